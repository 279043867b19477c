"""The losses of a network that learns to leave parts of itself out (Zhao et al. 2024, section 3.3).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from processes.process import Process

PARTS = ("operations",)  # what a step reports beside the parts of the process's loss
PASSES = 2  # through the network in a step: with parts left out, and complete
WEIGHT = 2.0  # of the operations in the loss
# The step from which on the target is the ratio, and in short runs the share of their steps; in the
# first of these steps, a tenth, nothing is to be left out
ANNEALED, OF_SHORT_RUNS, HELD = 1000, 0.25, 0.1


class Target(NamedTuple):
    """The share of the blocks' operations that is to be left, `ratio`, in a run of max_steps."""

    ratio: float
    max_steps: int | None = None

    def at(self, step: int) -> float:
        """The share that is wanted at a step: 1 at first, then falling linearly to the ratio."""
        short = ANNEALED if self.max_steps is None else OF_SHORT_RUNS * self.max_steps
        annealed = min(ANNEALED, short)
        done = (step / annealed - HELD) / (1 - HELD)
        return 1 + (self.ratio - 1) * min(1.0, max(0.0, done))


class Aim(NamedTuple):
    """The share that a step wants, and what makes of the shares (n,) of some of its samples their
    mean over all of them, without a gradient.
    """

    target: float
    mean: Callable[[Tensor], Tensor]


def dynamic_losses(
    process: Process, network: Callable[..., tuple[Tensor, Tensor, Tensor]], x_start: Tensor,
    t: Tensor, noise: Tensor, routing: Tensor, aim: Aim,
) -> dict[str, Tensor]:  # fmt: skip
    """{name: (n,)} for each part of a process's loss, of the network with parts left out, and for
    "operations", the share of them that it takes. "loss" is also that of the complete network, and
    WEIGHT·(mean share - target)², of which each sample has its part of the gradient.

    x_start and noise are (n, C, *space), times t (n,), routing (n, *routes) the switches' noise;
    network(x, t, noise=routing) returns what a DynamicDiT does.
    """
    kept: list[Tensor] = []

    def asked(x, t):
        """What the network makes of x with parts left out; the rest is kept."""
        out, *others = network(x, t, noise=routing)
        kept.extend(others)
        return out

    losses = process.losses(asked, x_start, t, noise)
    complete, shares = kept
    whole = process.losses(lambda *_: complete, x_start, t, noise)
    missed = aim.mean(shares) - aim.target
    # The gradient of the square of a mean over samples that are not all here
    operations = missed**2 + 2 * missed * (shares - shares.detach())  # (n,)
    loss = losses["loss"] + whole["loss"] + WEIGHT * operations
    return losses | {"loss": loss, "operations": shares}


def shares_of(
    process: Process, network: Callable[..., tuple[Tensor, Tensor, Tensor]], x_start: Tensor,
    t: Tensor, noise: Tensor, routing: Tensor,
) -> Tensor:  # fmt: skip
    """The shares (n,) of operations alone; arguments as for dynamic_losses."""
    found: list[Tensor] = []

    def asked(x, t):
        out, _, shares = network(x, t, noise=routing)
        found.append(shares)
        return out

    process.losses(asked, x_start, t, noise)
    return found[0]


def mean_of_all(reduce: Callable[[Tensor], Tensor], shares: Tensor) -> Tensor:
    """The mean over the samples of all processes, without a gradient; reduce sums over these."""
    total = reduce(torch.stack([shares.detach().sum(), shares.new_full((), len(shares))]))
    return total[0] / total[1]
