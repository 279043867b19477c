"""One training step, and the state that lasts from step to step.

Every random number of a step is drawn for the whole global batch from a generator seeded with
(seed, step); each process takes its share. So a step's randomness depends on neither the number of
processes nor on how the run got there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints.networks import routes
from conditions.condition import Values
from conditions.given import draw_masks
from processes.process import QUARTERS, Process
from training.dynamic import Aim, dynamic_losses, mean_of_all, shares_of
from training.given_frames import given_losses
from training.packed import first_numbers, packed_losses
from training.sharding import own_part, whole
from training.state import FLAGS, TrainState


class Draws(NamedTuple):
    """The random numbers of one process's share of a step, n samples.

    The numbers are t (n,), drop (n, *drops), two noises (n, C, *space), which frames of clips are
    given, bool (n, F), or (n, 0) where none ever is, and the noise of switches (n, *routes), or
    (n, 0).
    """

    t: Tensor
    drop: Tensor
    vae_noise: Tensor
    noise: Tensor
    given: Tensor
    routing: Tensor


def draw(
    seed: int, step: int, global_batch_size: int, latent: tuple[int, ...], dropout_prob: float,
    process: Process, device: torch.device | str, rank: int = 0, world_size: int = 1,
    drops: tuple[int, ...] = (), given_frames: float = 0.0, patch_frames: int = 1,
    routes: tuple[int, ...] = (),
) -> Draws:  # fmt: skip
    """The Draws of the `rank`-th of world_size processes at a step.

    `latent` is the shape (C, *space) of one sample, `drops` a Condition's: all parts of a value
    are dropped together with a probability of dropout_prob. A share of given_frames of clips have
    frames that are given, whole patches of patch_frames. `routes` is the shape of the switches of a
    network that leaves parts of itself out. Drawn from one generator for the global batch, in the
    order drop, t, vae_noise, noise, given, routing. A device's generator is its own: CPU and GPU
    give different numbers.
    """
    word = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    generator = torch.Generator(device).manual_seed(word)
    on: dict[str, Any] = dict(generator=generator, device=device)
    each = dropout_prob ** (1 / math.prod(drops))
    drop = (torch.rand(global_batch_size, *drops, **on) < each).long()
    t = process.draw_times(global_batch_size, generator)
    vae_noise = torch.randn(global_batch_size, *latent, **on)
    noise = torch.randn(global_batch_size, *latent, **on)
    given = torch.zeros(global_batch_size, 0, dtype=torch.bool, device=device)
    if given_frames:
        count = latent[1] // patch_frames
        mask = draw_masks(global_batch_size, count, given_frames, generator)  # (N, F / patch)
        given = mask.repeat_interleave(patch_frames, dim=1)  # (N, F)
    # The difference of two Gumbel draws is logistic
    numbers = torch.rand(global_batch_size, *routes, **on).logit() if routes else given[:, :0]
    share = global_batch_size // world_size
    drawn = t, drop, vae_noise, noise, given, numbers
    return Draws(*(values[rank * share : (rank + 1) * share] for values in drawn))


def train_step(
    state: TrainState, latents: Tensor | list[Tensor], labels: Values, draws: Draws,
    reduce: Callable[[Tensor], Tensor] = lambda values: values, stop: bool = False,
    save: bool = False,
) -> dict[str, float]:  # fmt: skip
    """One step of AdamW on this process's latents (n, C, *space), or a list of (C, h, w) to be
    packed, and their conditions, n labels or captions, and one of the moving averages. Latents
    smaller than the draws' noise take its first numbers.

    reduce(tensor) sums over the processes. Where the loss or gradient of any of them is not finite,
    every one leaves weights, averages and optimizer as they are. Returns the report, a dict of
    floats under FLAGS, the window's `summed` and "gradient_norm", equal in every process: "bad" is
    above 0 for such a step, "stop" and "save" where any process passed it.
    """
    share, device = len(latents), draws.t.device
    sums = torch.zeros(len(state.window.summed), device=device)
    per_part = -(-share // state.recipe.grad_accum)
    of_samples = latents, labels, draws.t, draws.drop, draws.noise, draws.given, draws.routing
    parts: list[Any] = [
        [values[start : start + per_part] for values in of_samples]
        for start in range(0, share, per_part)
    ]
    aim = aim_of(state, parts, reduce)
    for i, part in enumerate(parts):
        with nullcontext() if i == len(parts) - 1 else no_reduction(state.model):
            sums += backward(state, aim, share, *part)
    norm = whole(
        torch.nn.utils.get_total_norm(
            [p.grad for p in state.network.parameters() if p.grad is not None]
        )
    )
    flags = torch.zeros(len(FLAGS), device=device)
    if stop:
        flags[0].fill_(1)
    if save:
        flags[1].fill_(1)
    flags[2] = ~(sums.isfinite().all() & norm.isfinite())
    # The step's only read
    values = torch.cat([reduce(torch.cat([flags, sums])), norm[None]]).tolist()
    names = (*FLAGS, *state.window.summed, "gradient_norm")
    report = dict(zip(names, values, strict=True))
    if not report["bad"]:
        if state.recipe.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                state.network.parameters(), state.recipe.grad_clip, norm
            )
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
    state: TrainState, aim: Aim | None, share: int, latents: Tensor | list[Tensor], labels: Values,
    t: Tensor, drop: Tensor, noise: Tensor, given: Tensor, routing: Tensor,
) -> Tensor:  # fmt: skip
    """Add the gradient of a part of a process's share to the network's.

    Returns what the part adds to the window's `summed` (S,), on the device.
    """
    process, predict = state.process, predictor(state, labels, drop)
    if aim is None:
        losses = losses_of(state, predict, latents, t, noise, given)
    else:
        assert isinstance(latents, Tensor)
        noise = first_numbers(noise, latents.shape[1:])
        losses = dynamic_losses(process, predict, latents, t, noise, routing, aim)
    (losses["loss"].sum() / share).backward()
    told_apart = losses[process.told_apart].detach()  # (n,)
    quarter = torch.nn.functional.one_hot(process.quarter(t), QUARTERS)
    quarter = quarter.to(told_apart.dtype)  # (n, QUARTERS)
    totals = torch.stack([losses[name].detach().sum() for name in state.window.parts])
    return torch.cat([totals, told_apart @ quarter, quarter.sum(dim=0)])  # (S,)


def predictor(state: TrainState, labels: Values, drop: Tensor) -> Callable[..., Any]:
    """predict(x, t, **others) → what the model makes of latents, or Packed, x of these conditions
    at times t, in float32.
    """
    condition = state.condition.dropped(labels, drop)

    def predict(x, t, **others):
        with torch.autocast(t.device.type, torch.bfloat16, enabled=state.recipe.bf16):
            out = state.model(x, t, **condition, **others)
        return out.float() if isinstance(out, Tensor) else tuple(one.float() for one in out)

    return predict


def aim_of(
    state: TrainState, parts: list[Any], reduce: Callable[[Tensor], Tensor]
) -> Aim | None:
    """What the step aims at of a network's operations; None unless it learns to leave some out.

    It is about their mean over the global batch. Of several parts none is done before all are known
    to it, so that they are asked for their shares first, without gradients.
    """
    if state.recipe.dynamic is None:
        return None
    target = state.recipe.dynamic.at(state.step)
    if len(parts) == 1:
        return Aim(target, partial(mean_of_all, reduce))
    with torch.no_grad():
        shares = [
            shares_of(
                state.process, predictor(state, labels, drop), latents, t,
                first_numbers(noise, latents.shape[1:]), routing,
            )
            for latents, labels, t, drop, noise, _, routing in parts
        ]  # fmt: skip
    mean = mean_of_all(reduce, torch.cat(shares))
    return Aim(target, lambda shares: mean)


def losses_of(
    state: TrainState, network: Callable[..., Tensor], latents: Tensor | list[Tensor], t: Tensor,
    noise: Tensor, given: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """The parts of the loss, {name: (n,)}, of latents of one shape, or packed ones; of clips over
    the frames that are not given.
    """
    if state.recipe.pack is not None:
        return packed_losses(
            state.process, network, latents, t, noise, state.network.patch_size, state.recipe.pack
        )
    assert isinstance(latents, Tensor)
    noise = first_numbers(noise, latents.shape[1:])
    if given.shape[1] and latents.shape[2] > 1:  # of single images none can be given
        return given_losses(state.process, network, latents, t, noise, given)
    return state.process.losses(network, latents, t, noise)


def warm_up(state: TrainState, latents: Tensor) -> None:
    """Run the model forward and back once, and leave nothing behind.

    The model gets as many latents (n, C, *space) as a process has. DistributedDataParallel fixes
    its summing order during the first backward pass, which itself sums differently. After this one
    all steps sum alike, also the first after a restart.
    """
    count, device = len(latents), latents.device
    values = state.condition.blank(count, device)
    drop = torch.zeros(count, *state.condition.drops, dtype=torch.int64, device=device)
    t = state.process.draw_times(count, torch.Generator(device))
    given = torch.zeros(count, 0, dtype=torch.bool, device=device)
    routing = torch.zeros(count, *routes(state.network), device=device)
    aim = None if state.recipe.dynamic is None else Aim(1.0, lambda shares: shares.detach().mean())
    backward(state, aim, count, latents, values, t, drop, latents, given, routing)
    state.opt.zero_grad(set_to_none=True)


def no_reduction(model: nn.Module) -> AbstractContextManager:
    """A context in which processes do not share gradients yet, where the model can do that."""
    return getattr(model, "no_sync", nullcontext)()


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """ema = decay·ema + (1 - decay)·model for every trained parameter, in bulk.

    Buffers are copied, frozen tables left.
    """
    pairs = [
        (e, p)
        for e, p in zip(ema_model.parameters(), model.parameters(), strict=True)
        if p.requires_grad
    ]
    averages, values = ([own_part(tensor) for tensor in column] for column in zip(*pairs))
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in zip(ema_model.buffers(), model.buffers(), strict=True):
        average.copy_(value)


def requires_grad(model: nn.Module, flag: bool = True) -> nn.Module:
    """The model, each of its parameters now taking gradients or not."""
    return model.requires_grad_(flag)
