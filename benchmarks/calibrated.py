"""Caching by a schedule that a few samples have decided, or that a batch decides, on digits.

    python -m benchmarks.calibrated ddim                # 50 guided steps; minutes on a CPU core
    python -m benchmarks.calibrated sde --interval 2    # of the digits' flow; more of the blocks

All is measured as in benchmarks.caching. CALIBRATION images of another seed are drawn by all steps
first. They say how far a tensor at a step is from what would stand for it, in relation to its size
when it was last asked for (means of absolute values, over layers of a kind). Where that is above a
threshold the step asks for it again. The threshold is the least that leaves no more of the blocks
than `taylor:INTERVAL,2`. The first steps, as many as are kept, and the last one ask for all.

- `smooth`: outputs of attention and MLP, used again, with one schedule for each of the two kinds
  and one threshold, as in SmoothCache (arXiv 2411.10510)
- `smooth of blocks`: likewise what all blocks add, which is one tensor
- `first block`: it is always asked, and what the others added is used again while what the first
  adds stays near; in `first block, each batch` a batch decides for itself, as in diffusers
- `uneven:ORDER`: what all blocks add, extrapolated as by `taylor:INTERVAL,ORDER`
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.caching import (
    STEPS, OfParts, Way, ground_of, latents, measured, options_of, parser_of, sampler_of,
)  # fmt: skip
from benchmarks.sides import write
from benchmarks.solvers import GUIDANCE
from sampling.caching import CachedRun, History, Taylor, with_blocks
from sampling.sampler import Sampler

CALIBRATION, SEED = 10, 1000  # images, as many as SmoothCache's; those of scores have other seeds
# Whole steps that take about as long as 50 with the same interval of `taylor`
FEWER = {2: 28, 3: 20, 5: 14}
LONGEST = 3  # steps that SmoothCache leaves out after one another
SCORED = ("smooth", "first block", "uneven:1", "uneven:2")  # beside plain steps and two of taylor


# ---- what is seen at all steps, and schedules of it ----


def seen(sampler):
    """{kind: values (steps, layers, all else)} of few images at all steps of a Sampler: what "attn"
    and "mlp" return in every block, what the "first" block adds and what all "blocks" do.
    """
    blocks, found, entered = sampler.network.blocks, {}, []

    def keep(kind, value):
        found.setdefault(kind, []).append(value.flatten())

    hooks = [blocks[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))]
    for block in blocks:
        hooks += [
            block.attn.register_forward_hook(lambda _, __, out: keep("attn", out)),
            block.mlp.register_forward_hook(lambda _, __, out: keep("mlp", out)),
        ]
    hooks += [
        blocks[0].register_forward_hook(lambda _, given, out: keep("first", out - given[0])),
        blocks[-1].register_forward_hook(lambda _, __, out: keep("blocks", out - entered.pop())),
    ]
    latents(sampler, CALIBRATION, SEED)
    for hook in hooks:
        hook.remove()
    steps = len(sampler.steps())
    return {kind: torch.stack(values).unflatten(0, (steps, -1)) for kind, values in found.items()}


def change(now, before, size):
    """How far tensors (layers, all else) are from others, a number: the mean of absolute
    differences over that of the absolute values of `size`, as a mean over layers.
    """
    return ((now - before).abs().mean(1) / size.abs().mean(1)).mean().item()


def schedule(values, times, threshold, order=0, longest=STEPS):
    """For each step whether it is asked, of the values (steps, layers, all else) at all of them;
    `longest` is how many it may be left out after one another.
    """
    history, plan = History(order + 1), []
    for step, (time, value) in enumerate(zip(times, values)):
        ask = step <= order or step == len(times) - 1 or not any(plan[-longest:])
        if not ask:
            expected = sum(weight * one for weight, one in history.weighted(time))
            ask = change(value, expected, history.kept[-1][1]) > threshold
        if ask:
            history.keep(time, value)
        plan.append(ask)
    return plan


def least_threshold(cost, left):
    """The least threshold (to 1 in 1,000) whose cost, a number, is no more than `left`."""
    low, high = math.log(1e-6), math.log(1e3)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(math.exp(middle)) <= left else (middle, high)
    return math.exp(high)


# ---- ways of sampling that follow them ----


class Plan(NamedTuple):
    """Steps at which blocks are asked, in place of those of a Taylor of that order."""

    asked: list
    order: int

    def computed(self, guided):
        return self.asked


@dataclass
class Planned(Sampler):
    """A Sampler whose blocks are asked as a Plan says, of guidance everywhere."""

    plan: Plan = None

    def cached_run(self):
        return CachedRun(self.network, self.plan, self.steps(), self.guided())


@dataclass
class OfKinds(OfParts):
    """It uses outputs of attention and MLP again; `kinds` is the schedule of each."""

    kinds: dict = None

    def plans(self):
        return self.kinds


class Rule:
    """Asks where the first block adds something else than when it was last asked; as diffusers'
    FirstBlockCache of this threshold does.
    """

    def __init__(self, threshold):
        self.threshold, self.before = threshold, None

    def __call__(self, step, added):
        now, before = added.flatten().unsqueeze(0), self.before
        ask = before is None or change(now, before, before) > self.threshold
        if ask:
            self.before = now
        return ask


def fixed(plan):
    """Asks where a plan does, whatever the first block adds."""
    return lambda step, added: plan[step]


class FirstBlockRun(nn.Module):
    """A network along one trajectory whose first block is asked at all steps, and the others where
    ask(step, what the first one adds) is true. It is itself the one block of the network asked.
    """

    def __init__(self, network, ask):
        super().__init__()
        self.first, *self.others = network.blocks
        self.ask, self.step, self.added = ask, 0, None
        self.network = [with_blocks(network, [self])]  # a list, since it is no part of this module

    def at(self, step):
        self.step = step
        return self.network[0]

    def forward(self, x, *conditions):
        first = out = self.first(x, *conditions)
        if not self.ask(self.step, first - x):
            return first + self.added
        for block in self.others:
            out = block(out, *conditions)
        self.added = out - first
        return out


@dataclass
class OfFirstBlock(Sampler):
    """A Sampler by FirstBlockRun; `asks` makes the `ask` of a trajectory."""

    asks: Callable = None

    def cached_run(self):
        return FirstBlockRun(self.network, self.asks())


# ---- the ways of a solver ----


def calibrated(ground, way, left):
    """({name: Sampler}, {name: what was settled for it}) for a way without cache; of the blocks no
    more than those of `left` of its steps are asked.
    """
    options, full = options_of(ground, way), sampler_of(ground, way)
    values, times, depth = seen(full), full.steps(), len(ground.network.blocks)

    def settled(kinds, left, *limits):
        def plans(threshold):
            return {kind: schedule(values[kind], times, threshold, *limits) for kind in kinds}

        def cost(threshold):
            return sum(map(sum, plans(threshold).values())) / len(kinds)

        threshold = least_threshold(cost, left)
        return threshold, plans(threshold)

    # Its first block is asked at all steps
    first = settled(["first"], (left * depth - len(times)) / (depth - 1))
    found = {
        "smooth": settled(["attn", "mlp"], left, 0, LONGEST),
        "smooth of blocks": settled(["blocks"], left, 0, LONGEST),
        "first block": first,
        "uneven:1": settled(["blocks"], left, 1),
        "uneven:2": settled(["blocks"], left, 2),
    }
    samplers = {
        "smooth": OfKinds(**options, elsewhere=Taylor(1, 0), kinds=found["smooth"][1]),
        "first block": OfFirstBlock(**options, asks=lambda: fixed(first[1]["first"])),
        "first block, each batch": OfFirstBlock(**options, asks=lambda: Rule(first[0])),
    } | {
        name: Planned(**options, plan=Plan(found[name][1]["blocks"], order))
        for name, order in (("smooth of blocks", 0), ("uneven:1", 1), ("uneven:2", 2))
    }  # fmt: skip
    return samplers, {name: told(*one) for name, one in found.items()}


def told(threshold, plans):
    """What was settled, for a result: x is a step that is asked."""
    marks = {kind: "".join(".x"[ask] for ask in plan) for kind, plan in plans.items()}
    return {"threshold": round(threshold, 4)} | marks


def build_parser():
    parser = parser_of(["ddim", "ddpm", "euler", "sde"], __doc__)
    parser.add_argument(
        "--interval", type=int, choices=FEWER, default=3, help="(default: %(default)s)"
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    interval, full = args.interval, Way(args.sampler, STEPS)
    ground = ground_of(args.sampler)
    plain = [full, Way(args.sampler, FEWER[interval])]
    taylors = [Way(args.sampler, STEPS, f"taylor:{interval},{order}") for order in range(3)]
    control = Way(args.sampler, STEPS, f"taylor:{interval},0", "parts")
    samplers = {str(way): sampler_of(ground, way) for way in [*plain, *taylors, control]}
    steps = len(samplers[str(full)].steps())
    new, schedules = calibrated(ground, full, sum(Taylor(interval, 2).computed([True] * steps)))
    samplers |= new
    scored = [*map(str, plain), *map(str, taylors[::2]), *SCORED]
    settings = {"settings": vars(args) | {"guidance": GUIDANCE}, "schedules": schedules}
    write(f"calibrated-{args.sampler}", settings | measured(samplers, scored, args))


if __name__ == "__main__":
    main()
