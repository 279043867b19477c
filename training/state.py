"""What lasts from step to step: network, averages, optimizer and the unfinished log window."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from checkpoints.network_config import process_in, with_process
from checkpoints.networks import Network, said_of
from conditions.condition import Condition, condition_of
from processes.process import QUARTERS, Process
from processes.table import process_of
from training.dynamic import PARTS as OF_DYNAMIC, Target
from training.sharding import load_tensors, own_part, sharded_like, unsharded

MOST_COUNTED = 2**24  # steps, which AdamW counts in float32: it stays there
# What a step reports of requests and troubles, summed over the processes of the job.
FLAGS = ("stop", "save", "bad")


class Recipe(NamedTuple):
    """How a network learns: AdamW's arguments, the averages' decays, limits and precision.

    The first decay is the main one. `pack` is how many tokens a row of packed images has; None:
    they are not packed. `dynamic` is the share of operations that is aimed at; None: all are done.
    """

    lr: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_decay: tuple[float, ...] = (0.9999,)
    grad_clip: float | None = None
    grad_accum: int = 1
    bf16: bool = False
    pack: int | None = None
    dynamic: Target | None = None

    @property
    def more_parts(self) -> tuple[str, ...]:
        """What a step reports of each sample beside the parts of the process's loss."""
        return () if self.dynamic is None else OF_DYNAMIC

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        The rate is constant after a linear rise over warmup_steps.
        """
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


class Window:
    """Sums over the steps since the last log line, as Python floats; equal in every process.

    `summed` names what a step reports summed over its samples: the parts of the loss, and `more`,
    then one of the parts, and the number of samples, in each quarter of the noise levels. `shown`
    names what a log line shows of the means. `sums` are those of `summed`, then of gradient norms,
    then good steps.
    """

    def __init__(
        self, process: Process, sums: Sequence[float] | None = None, more: Sequence[str] = ()
    ) -> None:
        self.parts, numbers = (*process.parts, *more), range(1, QUARTERS + 1)
        # (name of a quarter's part, name of its number of samples)
        self.quarters = [(f"{process.told_apart}_q{q}", f"samples_q{q}") for q in numbers]
        by_quarter = [name for names in zip(*self.quarters) for name in names]
        self.summed = (*self.parts, *by_quarter)
        self.shown = (*self.parts, "gradient_norm")
        self.sums = [0.0] * (len(self.summed) + 2) if sums is None else list(sums)

    def add(self, report: dict[str, float]) -> None:
        """Take in the report of a good step."""
        values = [*(report[name] for name in self.summed), report["gradient_norm"], 1.0]
        self.sums = [old + new for old, new in zip(self.sums, values, strict=True)]

    def means(self, batch_size: int) -> dict[str, float | None]:
        """Name → mean over samples (gradient_norm: over steps); None where there was no sample."""
        *sums, norms, steps = self.sums
        totals = dict(zip(self.summed, sums, strict=True)) | {"gradient_norm": norms}
        counts = {name: steps * batch_size for name in self.parts} | {"gradient_norm": steps}
        counts |= {part: totals[samples] for part, samples in self.quarters}
        return {name: totals[name] / count if count else None for name, count in counts.items()}


@dataclass
class TrainState:
    """What a step changes: the network, its averages, the optimizer, and the number of steps done.

    `model` is the network as it is called in training, wrapped for several processes. `emas` maps
    decays to averages. `process` is what the network learns, `condition` on what.
    """

    network: Network
    model: nn.Module
    emas: dict[float, Network]
    opt: torch.optim.Optimizer
    recipe: Recipe
    process: Process
    window: Window
    condition: Condition
    step: int = 0
    note: str | None = None  # for the log, of the weights that it begins with
    # Skipped because loss or gradient was not finite: in all, and in a row up to now
    bad_steps: int = 0
    bad_in_a_row: int = 0

    @property
    def ema(self) -> Network:
        """The main moving average, of the first decay."""
        return self.emas[self.recipe.ema_decay[0]]

    def begin_window(self) -> None:
        """Forget what was summed since the last log line."""
        self.window = Window(self.process, more=self.recipe.more_parts)

    def to_checkpoint(
        self, args: dict, classes: list[str] | None, processes: int, keep: bool = True
    ) -> dict:
        """The dict that a checkpoint file holds (checkpoints.py says what is in it).

        Sharded tensors are put together: then every process must call it, and those that do not
        keep it get None for each.
        """
        log = {
            "window": self.window.sums, "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
        }  # fmt: skip
        rng = {
            "seed": args["global_seed"], "processes": processes,
            "device": next(self.network.parameters()).device.type,
        }  # fmt: skip
        contents = {
            "model": self.network.state_dict(), "ema": self.ema.state_dict(),
            "opt": self.opt.state_dict(), "args": args, "step": self.step,
            "config": with_process(self.network.config, self.process.config, said_of(self.network)),
            "classes": classes, "rng": rng, "log": log,
        }  # fmt: skip
        if len(self.emas) > 1:
            contents["emas"] = {
                decay: ema.state_dict() for decay, ema in list(self.emas.items())[1:]
            }
        return unsharded(contents, keep)

    def check_learned(self, config: object) -> None:
        """Raise ValueError if a checkpoint's `config` is of a network that has learned another
        process than this one, or the same with other settings.
        """
        theirs, ours = process_of(self.network, process_in(config)), self.process
        instead = "or start a new run from its weights with `init_from`"
        if theirs.name != ours.name:
            raise ValueError(
                f"its network has learned the process {theirs.word}, and `process` is {ours.word}; "
                f'pass `process="{theirs.word}"`, {instead}'
            )
        here = ours.config | {"learn_sigma": self.network.learn_sigma}
        there = here | theirs.config
        if isinstance(config, dict):
            there["learn_sigma"] = config.get("learn_sigma", here["learn_sigma"])
        if others := [name for name in here if there[name] != here[name]]:
            learned, wanted = (
                ", ".join(_told(name, config[name]) for name in others) for config in (there, here)
            )
            raise ValueError(
                f"its network has learned with {learned}, and here is {wanted}; "
                f"pass the same, {instead}"
            )

    def load_checkpoint(self, contents: dict) -> None:
        """Take up network, averages, optimizer, step and log window from a checkpoint's dict.

        The dict's `emas` has every average. The recipe stays as it is. An average of a decay that
        the checkpoint lacks goes on from its `ema`. Raises ValueError if the optimizer's part is
        not of this network.
        """
        log = checked_log(contents, Window(self.process, more=self.recipe.more_parts))
        load_tensors(self.network, contents["model"])
        for decay, ema in self.emas.items():
            load_tensors(ema, contents["emas"].get(decay, contents["ema"]))
        self._load_optimizer(contents["opt"])
        self._check_moments(contents["step"], log)
        self.step = contents["step"]
        self.bad_steps, self.bad_in_a_row = log.get("bad_steps", 0), log.get("bad_in_a_row", 0)
        self.window = Window(self.process, log.get("window"), self.recipe.more_parts)

    def is_finite(self) -> bool:
        """Whether all weights and averages are finite, those that this process holds."""
        networks = (self.network, *self.emas.values())
        return bool(
            torch.stack(
                [own_part(p).isfinite().all() for one in networks for p in one.parameters()]
            ).all()
        )

    def _load_optimizer(self, saved):
        """Load AdamW's moments, keeping the recipe's own settings.

        Raises ValueError if they are of other parameters.
        """
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.opt.param_groups
        ]
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
        """Raise ValueError unless AdamW has moments of every parameter.

        AdamW must have counted the good ones of so many steps.
        """
        parameters = [p for group in self.opt.param_groups for p in group["params"]]
        good = step - log.get("bad_steps", 0)
        for parameter in parameters if good else ():
            moments = self.opt.state.get(parameter, {})
            if any(
                getattr(moments.get(name), "shape", None) != parameter.shape
                for name in ("exp_avg", "exp_avg_sq")
            ):
                raise ValueError(
                    f"at step {step} its optimizer has no moments for some of the network's "
                    "parameters"
                )
            counted = _as_number(moments.get("step"))
            if (
                counted != min(good, MOST_COUNTED)
                if "bad_steps" in log
                else not 1 <= counted <= good
            ):
                raise ValueError(
                    f"its step is {step}, of which {step - good} were skipped, but its optimizer "
                    f"has counted {counted:.0f}; these are parts of different checkpoints"
                )


def _told(name, value):
    """A setting of a process for a message."""
    if isinstance(value, bool):
        return f"`{name}`" if value else f"no `{name}`"
    return f"`{name}` {value}"


def _as_number(value):
    """A number, or a tensor of one number, as a float; 0 for anything else."""
    one = isinstance(value, (int, float)) or (
        torch.is_tensor(value) and value.numel() == 1 and not value.is_complex()
    )
    return float(value) if one else 0.0


def checked_log(contents: dict, empty: Window) -> dict:
    """The log window and the counts of bad steps in a checkpoint; {} for one without. An empty
    window is one of the run's.

    Raises ValueError if damaged.
    """
    log, step = contents.get("log") or {}, contents["step"]
    if not isinstance(log, dict):
        raise ValueError("its log is no dict")
    skipped, in_a_row = (log.get(name, 0) for name in ("bad_steps", "bad_in_a_row"))
    expected = empty.sums
    window = log.get("window", expected)
    if not (
        type(skipped) is int and 0 <= skipped <= step and type(in_a_row) is int and in_a_row >= 0
    ):
        raise ValueError(f"its counts of skipped steps are {skipped} and {in_a_row} at step {step}")
    if not (
        isinstance(window, list)
        and len(window) == len(expected)
        and all(type(x) is float for x in window)
    ):
        raise ValueError("the window of its log is damaged")
    return log


def new_state(
    network: Network, recipe: Recipe,
    wrap: Callable[[Network], nn.Module] = lambda network: network,
    shard: Callable[[Network], Network] = lambda network: network,
    process: Process | None = None, condition: Condition | None = None,
) -> TrainState:  # fmt: skip
    """A TrainState at step 0, each average equal to the network.

    shard(network) splits a network's tensors over processes, in place; wrap(network) returns the
    model to call. `process` is what it is to learn, the Gaussian process unless told otherwise, and
    `condition` on what, unless the network tells it itself.
    """
    condition = condition or condition_of(network)
    process = process or process_of(network)
    emas = {
        decay: shard(deepcopy(network).eval().requires_grad_(False)) for decay in recipe.ema_decay
    }
    network = shard(network.train())
    trained = [p for p in network.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    window = Window(process, more=recipe.more_parts)
    return TrainState(network, wrap(network), emas, opt, recipe, process, window, condition)
