"""One training step, and the state that lasts from step to step.

Every random number of a step is drawn for the whole global batch from a generator seeded with (seed, step); each process
takes its share. So a step's randomness depends on neither the number of processes nor on how the run got there.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion import GaussianDiffusion
from models import DiT

MOST_COUNTED = 2**24  # steps, which AdamW counts in float32: it stays there
QUARTERS = 4  # of the steps t, for which the mean squared error is also told apart
# What a step reports, summed over samples and processes: requests and troubles, then what is averaged over a log window.
FLAGS = ("stop", "save", "bad")
SUMS = (
    "loss", "mse", "vb",
    *(f"mse_q{q + 1}" for q in range(QUARTERS)), *(f"samples_q{q + 1}" for q in range(QUARTERS)),
)  # fmt: skip


class Recipe(NamedTuple):
    """How a network learns: AdamW's arguments, the averages' decays (the first is the main one), limits and precision."""

    lr: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_decay: tuple[float, ...] = (0.9999,)
    grad_clip: float | None = None
    grad_accum: int = 1
    bf16: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: constant after a linear rise over warmup_steps."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


class Window:
    """Sums over the steps since the last log line, as Python floats; equal in every process."""

    def __init__(self, sums: Sequence[float] = (0.0,) * (len(SUMS) + 2)) -> None:
        self.sums = list(sums)  # SUMS, then gradient norms, then good steps

    def add(self, report: dict[str, float]) -> None:
        """Take in the report of a good step."""
        values = [*(report[name] for name in SUMS), report["gradient_norm"], 1.0]
        self.sums = [old + new for old, new in zip(self.sums, values, strict=True)]

    def means(self, batch_size: int) -> dict[str, float | None]:
        """Name → mean over samples (gradient_norm: over steps); None where there was no sample."""
        *sums, norms, steps = self.sums
        totals = dict(zip(SUMS, sums, strict=True)) | {"gradient_norm": norms}
        counts = {name: steps * batch_size for name in ("loss", "mse", "vb")} | {"gradient_norm": steps}
        counts |= {f"mse_q{q + 1}": totals[f"samples_q{q + 1}"] for q in range(QUARTERS)}
        return {name: totals[name] / count if count else None for name, count in counts.items()}


@dataclass
class TrainState:
    """What a step changes: the network, its moving averages, the optimizer, and the number of steps done.

    `model` is the network as it is called in training, wrapped for several processes. `emas` maps decays to averages.
    """

    network: DiT
    model: nn.Module
    emas: dict[float, DiT]
    opt: torch.optim.Optimizer
    recipe: Recipe
    step: int = 0
    bad_steps: int = 0  # skipped because loss or gradient was not finite: in all, and in a row up to now
    bad_in_a_row: int = 0
    window: Window = field(default_factory=Window)

    @property
    def ema(self) -> DiT:
        """The main moving average, of the first decay."""
        return self.emas[self.recipe.ema_decay[0]]

    def to_checkpoint(self, args: dict, classes: list[str] | None, processes: int, keep: bool = True) -> dict:
        """The dict that a checkpoint file holds (checkpoints.py says what is in it). Sharded tensors are put together:
        then every process must call it, and those that do not keep it get None for each.
        """
        log = {"window": self.window.sums, "bad_steps": self.bad_steps, "bad_in_a_row": self.bad_in_a_row}
        rng = {
            "seed": args["global_seed"],
            "processes": processes,
            "device": next(self.network.parameters()).device.type,
        }
        contents = {
            "model": self.network.state_dict(), "ema": self.ema.state_dict(), "opt": self.opt.state_dict(),
            "args": args, "step": self.step, "config": self.network.config, "classes": classes, "rng": rng, "log": log,
        }  # fmt: skip
        if len(self.emas) > 1:
            contents["emas"] = {decay: ema.state_dict() for decay, ema in list(self.emas.items())[1:]}
        return unsharded(contents, keep)

    def load_checkpoint(self, contents: dict) -> None:
        """Take up network, averages, optimizer, step and log window from such a dict, whose `emas` has every average.

        The recipe stays as it is. An average of a decay that the checkpoint lacks goes on from its `ema`. Raises ValueError
        if the optimizer's part is not of this network.
        """
        log = checked_log(contents)
        load_tensors(self.network, contents["model"])
        for decay, ema in self.emas.items():
            load_tensors(ema, contents["emas"].get(decay, contents["ema"]))
        self._load_optimizer(contents["opt"])
        self._check_moments(contents["step"], log)
        self.step = contents["step"]
        self.bad_steps, self.bad_in_a_row = log.get("bad_steps", 0), log.get("bad_in_a_row", 0)
        self.window = Window(log["window"]) if "window" in log else Window()

    def is_finite(self) -> bool:
        """Whether all weights and averages are finite, those that this process holds."""
        networks = (self.network, *self.emas.values())
        return bool(torch.stack([own_part(p).isfinite().all() for one in networks for p in one.parameters()]).all())

    def _load_optimizer(self, saved):
        """Load AdamW's moments, keeping the recipe's own settings. Raises ValueError if they are of other parameters."""
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.opt.param_groups]
        parameters = [p for group in self.opt.param_groups for p in group["params"]]
        try:
            state = {
                i: {k: sharded_like(parameters[i], v) for k, v in moments.items()}
                for i, moments in saved["state"].items()
            }
            self.opt.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the optimizer's state is not of this network ({error!r})") from None
        for group, own in zip(self.opt.param_groups, settings, strict=True):
            group.update(own)

    def _check_moments(self, step, log):
        """Raise ValueError unless AdamW has moments of every parameter, and has counted the good ones of so many steps."""
        parameters = [p for group in self.opt.param_groups for p in group["params"]]
        good = step - log.get("bad_steps", 0)
        for parameter in parameters if good else ():
            moments = self.opt.state.get(parameter, {})
            if any(getattr(moments.get(name), "shape", None) != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError(f"at step {step} its optimizer has no moments for some of the network's parameters")
            counted = _as_number(moments.get("step"))
            if counted != min(good, MOST_COUNTED) if "bad_steps" in log else not 1 <= counted <= good:
                raise ValueError(
                    f"its step is {step}, of which {step - good} were skipped, but its optimizer has counted {counted:.0f}; "
                    "these are parts of different checkpoints"
                )


def _as_number(value):
    """A number, or a tensor of one number, as a float; 0 for anything else."""
    one = isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1 and not value.is_complex())
    return float(value) if one else 0.0


def checked_log(contents: dict) -> dict:
    """The log window and the counts of bad steps in a checkpoint; {} for one without. Raises ValueError if damaged."""
    log, step = contents.get("log") or {}, contents["step"]
    if not isinstance(log, dict):
        raise ValueError("its log is no dict")
    skipped, in_a_row = (log.get(name, 0) for name in ("bad_steps", "bad_in_a_row"))
    window = log.get("window", Window().sums)
    if not (type(skipped) is int and 0 <= skipped <= step and type(in_a_row) is int and in_a_row >= 0):
        raise ValueError(f"its counts of skipped steps are {skipped} and {in_a_row} at step {step}")
    if not (isinstance(window, list) and len(window) == len(Window().sums) and all(type(x) is float for x in window)):
        raise ValueError("the window of its log is damaged")
    return log


def new_state(
    network: DiT,
    recipe: Recipe,
    wrap: Callable[[DiT], nn.Module] = lambda network: network,
    shard: Callable[[DiT], DiT] = lambda network: network,
) -> TrainState:
    """A TrainState at step 0, each average equal to the network.

    shard(network) splits a network's tensors over processes, in place; wrap(network) returns the model to call.
    """
    emas = {decay: shard(deepcopy(network).eval().requires_grad_(False)) for decay in recipe.ema_decay}
    network = shard(network.train())
    trained = [p for p in network.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return TrainState(network, wrap(network), emas, opt, recipe)


class Draws(NamedTuple):
    """The random numbers of one process's share of a step, n samples: t (n,), drop (n,), and two noises (n, C, h, w)."""

    t: Tensor
    drop: Tensor
    vae_noise: Tensor
    noise: Tensor


def draw(
    seed: int, step: int, global_batch_size: int, latent: tuple[int, ...], dropout_prob: float, num_timesteps: int,
    device: torch.device | str, rank: int = 0, world_size: int = 1,
) -> Draws:  # fmt: skip
    """The Draws of process `rank` at a step; latent is the shape (C, h, w) of one sample.

    Drawn from one generator for the global batch, in the order drop, t, vae_noise, noise. A device's generator is its
    own: CPU and GPU give different numbers.
    """
    word = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    generator = torch.Generator(device).manual_seed(word)
    on: dict[str, Any] = dict(generator=generator, device=device)
    drop = (torch.rand(global_batch_size, **on) < dropout_prob).long()
    t = torch.randint(num_timesteps, (global_batch_size,), **on)
    vae_noise = torch.randn(global_batch_size, *latent, **on)
    noise = torch.randn(global_batch_size, *latent, **on)
    share = global_batch_size // world_size
    return Draws(*(values[rank * share : (rank + 1) * share] for values in (t, drop, vae_noise, noise)))


def train_step(
    state: TrainState, diffusion: GaussianDiffusion, latents: Tensor, labels: Tensor, draws: Draws,
    reduce: Callable[[Tensor], Tensor] = lambda values: values, stop: bool = False, save: bool = False,
) -> dict[str, float]:  # fmt: skip
    """One step of AdamW on this process's latents (n, C, h, w) and labels (n,), and one of the moving averages.

    reduce(tensor) sums over the processes. Where the loss or gradient of any of them is not finite, every one leaves
    weights, averages and optimizer as they are. Returns the report, a dict of floats under FLAGS and SUMS, equal in every
    process, and "gradient_norm": "bad" is above 0 for such a step, "stop" and "save" where any process passed it.
    """
    share = len(latents)
    sums = torch.zeros(len(SUMS), device=latents.device)
    parts = list(
        zip(*(values.chunk(state.recipe.grad_accum) for values in (latents, labels, draws.t, draws.drop, draws.noise)))
    )
    for i, part in enumerate(parts):
        with nullcontext() if i == len(parts) - 1 else no_reduction(state.model):
            sums += backward(state, diffusion, share, *part)
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in state.network.parameters() if p.grad is not None]))
    flags = torch.zeros(len(FLAGS), device=latents.device)
    if stop:
        flags[0].fill_(1)
    if save:
        flags[1].fill_(1)
    flags[2] = ~(sums.isfinite().all() & norm.isfinite())
    values = torch.cat([reduce(torch.cat([flags, sums])), norm[None]]).tolist()  # the step's only read
    report = dict(zip((*FLAGS, *SUMS, "gradient_norm"), values, strict=True))
    if not report["bad"]:
        if state.recipe.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(state.network.parameters(), state.recipe.grad_clip, norm)
        for group in state.opt.param_groups:
            group["lr"] = state.recipe.rate(state.step)
        state.opt.step()
        for decay, ema in state.emas.items():
            update_ema(ema, state.network, decay)
        state.window.add(report)
    state.opt.zero_grad(set_to_none=True)
    state.bad_in_a_row = state.bad_in_a_row + 1 if report["bad"] else 0
    state.bad_steps += bool(report["bad"])
    state.step += 1
    return report


def backward(
    state: TrainState, diffusion: GaussianDiffusion, share: int, latents: Tensor, labels: Tensor, t: Tensor,
    drop: Tensor, noise: Tensor,
) -> Tensor:  # fmt: skip
    """Add the gradient of a part of a process's share to the network's; the part's SUMS (len(SUMS),) on the device."""
    condition = {}
    if state.network.num_classes:
        condition["y"] = labels
    if state.network.null_label is not None:
        condition["force_drop_ids"] = drop

    def predict(x, t, **condition):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=state.recipe.bf16):
            return state.model(x, t, **condition).float()

    losses = diffusion.training_losses(predict, latents, t, condition, noise=noise)
    (losses["loss"].sum() / share).backward()
    mse = losses["mse"].detach()
    quarter = torch.nn.functional.one_hot(t * QUARTERS // diffusion.num_timesteps, QUARTERS).to(mse.dtype)  # (n, 4)
    totals = torch.stack([losses[key].detach().sum() for key in ("loss", "mse", "vb")])
    return torch.cat([totals, mse @ quarter, quarter.sum(dim=0)])  # (len(SUMS),)


def warm_up(state: TrainState, diffusion: GaussianDiffusion, latents: Tensor) -> None:
    """Run the model forward and back once, on as many latents (n, C, h, w) as a process has, and leave nothing behind.

    DistributedDataParallel sums gradients in the order of its first backward pass, that pass itself in another. After this
    one all steps sum alike, also the first after a restart.
    """
    zeros = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    backward(state, diffusion, len(latents), latents, zeros, zeros, zeros, latents)
    state.opt.zero_grad(set_to_none=True)


def no_reduction(model: nn.Module) -> AbstractContextManager:
    """A context in which gradients are not yet shared between processes, where the model can do that."""
    return getattr(model, "no_sync", nullcontext)()


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """ema = decay·ema + (1 - decay)·model for every trained parameter, in bulk; buffers are copied, frozen tables left."""
    pairs = [(e, p) for e, p in zip(ema_model.parameters(), model.parameters(), strict=True) if p.requires_grad]
    averages, values = ([own_part(tensor) for tensor in column] for column in zip(*pairs))
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in zip(ema_model.buffers(), model.buffers(), strict=True):
        average.copy_(value)


def requires_grad(model: nn.Module, flag: bool = True) -> nn.Module:
    """The model, each of its parameters now taking gradients or not."""
    return model.requires_grad_(flag)


def training_flops(config: dict) -> int:
    """Floating-point operations (2 per multiply-add) that training on one latent takes: forward, and twice that backward.

    Counted on the network with this configuration; what gradient checkpointing computes again is not in it.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = DiT(**config)
        labels = torch.zeros(1, dtype=torch.long) if network.num_classes else None
        network(torch.zeros(1, network.in_channels, network.input_size, network.input_size), torch.zeros(1), labels)
    return 3 * counter.get_total_flops()


# ---- networks whose tensors are split over processes (FSDP2) ----


def shard_network(network: DiT, device_type: str, processes: int) -> DiT:
    """The network, its tensors now split over the processes; each block is put together when it is its turn."""
    mesh = init_device_mesh(device_type, (processes,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes, if it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, if it is split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor split as the parameter is, where it has its shape."""
    if isinstance(parameter, DTensor) and torch.is_tensor(tensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def unsharded(contents: Any, keep: bool = True) -> Any:
    """A tree of dicts and lists with every split tensor put together, on the CPU; None for it in a process that does not
    keep it.
    """
    if isinstance(contents, dict):
        return {key: unsharded(value, keep) for key, value in contents.items()}
    if isinstance(contents, list):
        return [unsharded(value, keep) for value in contents]
    if not isinstance(contents, DTensor):
        return contents
    full = contents.full_tensor()
    return full.cpu() if keep else None


def load_tensors(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a network that may be split."""
    own = network.state_dict()
    network.load_state_dict({name: sharded_like(own[name], tensor) for name, tensor in tensors.items()})
