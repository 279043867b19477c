"""Steps at which a network's blocks are not asked: what they would have added to the tokens is
extrapolated from steps at which they were.

Extrapolating instead of reusing is TaylorSeer's (Liu et al. 2025, arXiv 2503.06923); order 0 reuses
as FORA does (Selvaraju et al. 2024, arXiv 2407.01425). Both keep the outputs of attention and MLP
in every block. Here one tensor is kept for all blocks, the tokens after the last of them minus
those before the first: it comes about as near to the full path in less time (docs/sampling.md).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from checkpoints.networks import Network
from layers.schedule import Scheduled
from processes.process import Solver
from runtime.limits import RANGES, bound


class Taylor(NamedTuple):
    """The blocks are asked at one step of `interval`, and in between what they add is a polynomial
    of degree `order` in the time t, through the last order + 1 of these steps.

    That many tensors are kept of a batch of N, each as large as its tokens, (N, T, D), of a guided
    one (2N, T, D).
    """

    interval: int
    order: int

    def computed(self, guided: Sequence[bool]) -> list[bool]:
        """For each step whether the blocks are asked, of steps that are guided or not.

        They are at the last step, and at the first order + 1; so, too, after guidance begins or
        ends, which makes the batch another. The images of the batch do not matter.
        """
        found: list[bool] = []
        for _, same in groupby(guided):
            since = range(len([*same]))
            found += [i <= self.order or (i - self.order) % self.interval == 0 for i in since]
        return [*found[:-1], True]


# What `cache` may name before its numbers, which are the fields of the row
KINDS = {"taylor": Taylor}


def parse_cache(text: str) -> Taylor:
    """What a text such as "taylor:3,1" asks for: a name of KINDS, and its numbers.

    Raises ValueError for any other text, and for what is none.
    """
    if not isinstance(text, str):
        raise ValueError(f"`cache` is {text!r:.60}; give a text such as taylor:3,1")
    name, _, numbers = text.partition(":")
    kind, parts = KINDS.get(name), numbers.split(",")
    fields = () if kind is None else kind._fields
    plain = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
    if kind is None or len(parts) != len(fields) or not plain:
        forms = " or ".join(f"{key}:{','.join(row._fields).upper()}" for key, row in KINDS.items())
        raise ValueError(f"`cache` is {text[:60]!r}; give {forms}, such as taylor:3,1")
    values = dict(zip(fields, map(int, parts)))
    for field, value in values.items():
        least, most = RANGES[f"cache_{field}"]
        if not least <= value <= most:
            raise ValueError(
                f"`cache` {text[:60]} has the {field} {value}; it must be from {bound(least)} to "
                f"{bound(most)}"
            )
    return kind(**values)


def written(cache: Taylor) -> str:
    """The one text that asks for it."""
    (name,) = (name for name, kind in KINDS.items() if isinstance(cache, kind))
    return f"{name}:{','.join(map(str, cache))}"


class History:
    """Tensors at the last few times, and the polynomial in the time through all of them."""

    def __init__(self, length: int) -> None:
        self.kept: deque[tuple[float, Tensor]] = deque(maxlen=length)

    def keep(self, time: float, value: Tensor) -> None:
        """Keep a tensor at a time, instead of the last one if that has the same time; drop the
        oldest one if there are too many.
        """
        if self.kept and self.kept[-1][0] == time:  # dpm++ has such steps where they are many
            self.kept.pop()
        self.kept.append((time, value))

    def weighted(self, time: float) -> Iterator[tuple[float, Tensor]]:
        """The tensors, each with its weight, a Python number: their sum is the polynomial at a
        time (Lagrange's form).
        """
        for here, value in self.kept:
            weight = 1.0
            for other, _ in self.kept:
                if other != here:
                    weight *= (time - other) / (here - other)
            yield weight, value


class Memory:
    """What the blocks of one trajectory leave behind: what they added to the tokens at some times,
    and whether they hand on words, as MMDiT's do.
    """

    def __init__(self, length: int) -> None:
        self.added, self.time, self.pairs = History(length), 0.0, False
        self.entered: Tensor | None = None

    def leave(self, out: Any) -> None:
        """Keep what was added, now that the last block has returned `out`."""
        self.pairs = isinstance(out, tuple)
        x = out[0] if self.pairs else out
        self.added.keep(self.time, x - self.entered)
        self.entered = None


class First(nn.Module):
    """The first block, which leaves in a Memory the tokens that it was given."""

    def __init__(self, block: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.block, self.memory = block, memory

    def forward(self, x: Tensor, *others: Any) -> Any:
        self.memory.entered = x
        return self.block(x, *others)


class Last(nn.Module):
    """The last block, after which a Memory keeps what all blocks have added."""

    def __init__(self, block: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.block, self.memory = block, memory

    def forward(self, *inputs: Any) -> Any:
        out = self.block(*inputs)
        self.memory.leave(out)
        return out


class Between(nn.Module):
    """What stands for all blocks where they are not asked: tokens x (N, ..., D) → the same and what
    the blocks are expected to add; words as they are, since nobody looks at them any more.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor, *others: Any) -> Any:
        for weight, value in self.memory.added.weighted(self.memory.time):
            x = x.add(value, alpha=weight)
        return (x, others[0]) if self.memory.pairs else x


class CachedRun:
    """A network along one trajectory, whose blocks are asked at some of its steps.

    times: those at which steps begin; guided: whether each is. The network itself is left as it is,
    so that nothing remains of one trajectory in the next, whatever became of it.
    """

    def __init__(
        self, network: Network, cache: Taylor, times: Sequence[float], guided: Sequence[bool]
    ) -> None:
        self.times, self.guided, self.computed = times, guided, cache.computed(guided)
        self.memory = Memory(cache.order + 1)
        blocks = [*network.blocks]
        blocks[0] = First(blocks[0], self.memory)
        blocks[-1] = Last(blocks[-1], self.memory)
        self.asked = with_blocks(network, blocks)
        self.spared = with_blocks(network, [Between(self.memory)])

    def at(self, step: int) -> Network:
        """The network to be asked at a step of the trajectory, whose steps come in order."""
        if step and self.guided[step] != self.guided[step - 1]:
            self.memory.added.kept.clear()
        self.memory.time = self.times[step]
        return self.asked if self.computed[step] else self.spared


def with_blocks(network: Network, blocks: Sequence[nn.Module]) -> Network:
    """Another network that shares all of a network's modules, but has these blocks."""
    twin = copy(network)
    # The copy has the same dict of modules, which is to stay as it is
    vars(twin)["_modules"] = vars(network)["_modules"] | {"blocks": nn.ModuleList(blocks)}
    return twin


def check_cache(network: object, cache: Taylor, guided: Sequence[bool]) -> None:
    """Raise ValueError for a network that cannot be asked without its blocks, and where the blocks
    would be asked at every step although that is not wanted.
    """
    if isinstance(network, Scheduled):
        raise ValueError(
            "`cache` wants one network that does as much at all times; one with exits, a dynamic "
            "one and two by turns (`ckpt_high`) do not: leave the argument out"
        )
    if "forward" in vars(network):
        raise ValueError(
            "`cache` leaves out blocks, and the network is compiled as a whole; prepare it with "
            "`by_blocks=True`"
        )
    if cache.interval > 1 and all(cache.computed(guided)):
        raise ValueError(
            f"`cache` {written(cache)} leaves nothing out in {len(guided)} steps, of which the "
            f"first {cache.order + 1}, also after a change of guidance, and the last are whole; "
            "take more steps, or leave the argument out"
        )


def check_once_a_step(sampler: str, solvers: Mapping[str, Solver]) -> None:
    """Raise ValueError for a solver that asks the network at more times than its steps begin."""
    if not solvers[sampler].at_beginnings:
        once = ", ".join(name for name, solver in solvers.items() if solver.at_beginnings)
        raise ValueError(
            f"`cache` is for samplers that ask the network once a step, {once}; `sampler` is "
            f"{sampler}"
        )
