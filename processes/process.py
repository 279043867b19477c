"""What a training step and a sampler need of a process between data and noise.

A process is one file beside this one and one row in processes/table.py. Shapes: a sample is (C,
*space) with any number of axes after the channels, N samples are x (N, C, *space), and times t are
(N,), in the unit that the network takes: all methods here speak of that t, but for `levels`, which
are 0 to 1. A network may have more channels than a sample, as one has that also predicts a
variance: a process without use for them takes the first C alone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

QUARTERS = 4  # of the noise levels, for which one part of the loss is also told apart

Network = Callable[[Tensor, Tensor], Tensor]  # called as network(x_t, t)
NoiseFunction = Callable[[Tensor], Tensor]  # x → standard normal noise in x's shape


class StepNetwork(Protocol):
    """A network as a trajectory asks it, once or several times for each of its steps."""

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        """What the network makes of x (N, C, *space) at times t (N,); `step` is the index among the
        trajectory's steps, a Python number, so that nobody has to read t back from a GPU.
        """


class Learner(Protocol):
    """What a process looks at in the network that learns it."""

    in_channels: int
    learn_sigma: bool


class Solver(NamedTuple):
    """A way from noise to data: how many steps it takes unless told otherwise, at most and at
    least, and its options with their defaults.

    at_beginnings: whether it asks the network once in a step, at the time at which the step begins.
    """

    steps: int
    most: int
    options: Mapping[str, Any] = MappingProxyType({})
    least: int = 1
    at_beginnings: bool = True


class Process(Protocol):
    """A process between data and noise that a network learns to go back.

    `name` is its name in PROCESSES, `word` the one that command lines have. `settings` are the
    options of training that are its own, with their defaults: the other entries of `config`.
    `learns_sigma`: networks have channels for a variance unless told otherwise. `solvers` maps the
    names of its ways from noise to data to their Solver, `usual` being the one that is taken unless
    told otherwise. `parts` are the names of the parts of its loss, "loss", which is minimised,
    first; `told_apart` is the one of them that is also told apart by quarters of the noise levels.
    `clean` is the time t of data without noise, `noisy` that of noise alone; a noise level lies as
    far between 0 and 1 as its time between these. `quick` is the solver and number of steps for
    images to look at, or to score, while training.
    """

    name: ClassVar[str]
    word: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]]
    learns_sigma: ClassVar[bool]
    solvers: ClassVar[Mapping[str, Solver]]
    usual: ClassVar[str]
    clean: ClassVar[float]
    noisy: ClassVar[float]
    quick: ClassVar[tuple[str, int]]
    parts: tuple[str, ...]
    told_apart: str

    @classmethod
    def settled(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """All of `settings` as files have them, from some of them.

        Raises ValueError for values that they cannot have.
        """

    @classmethod
    def of(cls, network: Learner, said: Mapping[str, Any]) -> "Process":
        """The process of a network, with the settings that `said`, a `config` in a file, has.

        Raises ValueError for settings that the process cannot have.
        """

    @property
    def config(self) -> dict[str, Any]:
        """What files say of the process: `name`, and the plain values that decide it."""

    # ---- training ----

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times t (count,) to train at, drawn from a generator, on its device."""

    def losses(
        self, network: Network, x_start: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """{name: (N,)} for each of `parts`, of data x_start (N, C, *space) at times t (N,).

        The data are mixed with noise of the same shape.
        """

    def quarter(self, t: Tensor) -> Tensor:
        """The quarter of the noise levels, 0 (nearly clean) to QUARTERS - 1, of t (N,): int64 (N,).
        """

    # ---- sampling ----

    def times(self, solver: str, steps: int, **options: Any) -> list[int] | list[float]:
        """The times t, as the network sees them, at which so many steps of a solver begin.

        `options` are some of the Solver's. Raises ValueError for values that they cannot have.
        """

    def levels(self, solver: str, steps: int, **options: Any) -> list[float]:
        """The noise level of each of these times, from 0, clean, to 1, noise."""

    def trajectory(
        self, network: StepNetwork, noise: Tensor, solver: str, steps: int, *,
        noise_fn: NoiseFunction, clip: bool, progress: bool, breaks: Collection[int] = (),
        **options: Any,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Yields for each of `times` a dict: `t`, the time; `sample`, x (N, C, *space) after the
        step; `pred_xstart`, the clean x that was predicted at its beginning.

        `noise` (N, C, *space) is where it begins; `noise_fn` draws what a solver adds. clip: the
        clean x is known to lie in [-1, 1]: predictions are clipped to that, and a process may go on
        from the clipped ones. progress: show a bar. breaks: the indices of steps from which on the
        network is another, its guidance beginning or ending, say: a solver that chooses its own
        steps takes none across their beginnings. `options` are some of the Solver's.
        """
