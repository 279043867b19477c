"""The flows of flow/ as training and sampling see them.

t runs from 0, noise, to 1, data, and the network is given it as it is. The released SiT are the
linear path with a velocity as the prediction.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flow import TimeSampling, create_flow, shifted
from flow.adaptive import ATOL, RTOL, adaptive_ode, check_tolerances
from flow.flow import Flow, even_times
from flow.prediction import Prediction
from flow.solvers import LAST_STEP_SIZE, Moment, check_finite, ode, sde
from processes.process import Learner, Network, NoiseFunction, QUARTERS, Solver, StepNetwork

MOST_STEPS = 10_000
# Between the three times from which the slope of dopri5's solution is taken, at most: what the
# formula of second order leaves out is then of the order of float32's rounding
SPAN = 1 / 100
SHIFTS = (1e-3, 1e3)  # the least and the most that a time shift may be

# Of every solver: where steps stay away from ends, and how they are spread. None: as the network
# was trained.
EVERY = {"sample_eps": None, "time_shift": None}
SDE = EVERY | {
    "diffusion_form": "sigma", "diffusion_norm": 1.0, "last_step": "mean",
    "last_step_size": LAST_STEP_SIZE,
}  # fmt: skip


class FlowProcess:
    """Flow matching (Lipman et al. 2023; SiT, Ma et al. 2024), as a processes.process.Process.

    time_sampling: a law of flow.times; time_shift: as flow.shifted has it, for training, and for
    sampling unless told otherwise. The other arguments are those of flow.create_flow.

    Raises ValueError for arguments that there are not.
    """

    name: ClassVar[str] = "flow"
    word: ClassVar[str] = "flow"
    settings: ClassVar[Mapping[str, Any]] = {
        "path": "linear", "prediction": "velocity", "loss_weight": None, "train_eps": None,
        "time_sampling": "uniform", "time_shift": 1.0, "cosine_loss": False,
    }  # fmt: skip
    learns_sigma: ClassVar[bool] = False
    solvers: ClassVar[Mapping[str, Solver]] = {
        "euler": Solver(250, MOST_STEPS, EVERY),
        "heun": Solver(125, MOST_STEPS, EVERY, at_beginnings=False),
        # The moments at which its solution is told; it chooses its own steps
        "dopri5": Solver(
            50, MOST_STEPS, EVERY | {"atol": ATOL, "rtol": RTOL}, at_beginnings=False
        ),
        # The last of the steps is one of its own kind
        "sde": Solver(250, MOST_STEPS, SDE, least=2),
        "sde-heun": Solver(125, MOST_STEPS, SDE, least=2, at_beginnings=False),
    }
    usual: ClassVar[str] = "heun"
    clean: ClassVar[float] = 1
    noisy: ClassVar[float] = 0
    quick: ClassVar[tuple[str, int]] = ("heun", 25)
    told_apart: str = "mse"

    def __init__(
        self, path: str = "linear", prediction: str = "velocity", loss_weight: str | None = None,
        train_eps: float | None = None, time_sampling: str = "uniform", time_shift: float = 1.0,
        cosine_loss: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(cosine_loss, bool):
            raise ValueError(f"`cosine_loss` is {cosine_loss!r:.60}; it is true or false")
        self.flow = create_flow(path, prediction, loss_weight, train_eps, None, cosine_loss)
        self.times_law, self.time_shift = TimeSampling.parse(time_sampling), checked(time_shift)
        self.parts: tuple[str, ...] = ("loss", "mse", *["cosine"] * cosine_loss)

    @classmethod
    def settled(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """All of `settings` as files have them, from some of them.

        Raises ValueError for values that they cannot have.
        """
        config = cls(**given).config
        return {name: config[name] for name in cls.settings}

    @classmethod
    def of(cls, network: Learner, said: Mapping[str, Any]) -> "FlowProcess":
        """The flow with these settings, the defaults in place of those that are not said.

        Raises ValueError for settings that it cannot have.
        """
        given = {key: value for key, value in said.items() if key != "name"}
        if unknown := given.keys() - cls.settings.keys():
            raise ValueError(
                f"the process {cls.name} has {', '.join(sorted(map(str, unknown)))[:60]}, which "
                f"is not known here; known are {', '.join(cls.settings)}"
            )
        return cls(**given)

    @property
    def config(self) -> dict[str, Any]:
        """What files say of it: its name and all of `settings`."""
        flow = self.flow
        return {
            "name": self.name, "path": flow.path, "prediction": flow.prediction,
            "loss_weight": flow.loss_weight, "train_eps": flow.train_eps,
            "time_sampling": str(self.times_law), "time_shift": self.time_shift,
            "cosine_loss": flow.cosine_loss,
        }  # fmt: skip

    # ---- training ----

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times t (count,), float32, by the law and the shift, inside the flow's interval."""
        start, end = self.flow.train_interval
        share = shifted(self.times_law.draw(count, generator), self.time_shift)
        return start + (end - start) * share

    def losses(
        self, network: Network, x_start: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The loss, the squared error before weights and, if it is learned, the cosine: (N,) each.
        """
        return self.flow.training_losses(network, x_start, t, noise=noise)

    def quarter(self, t: Tensor) -> Tensor:
        """The quarter of the noise levels 1 - t, 0 to QUARTERS - 1, of t (N,): int64 (N,)."""
        return ((1 - t) * QUARTERS).long().clamp(max=QUARTERS - 1)

    # ---- sampling ----

    def times(self, solver: str, steps: int, **options: Any) -> list[float]:
        """The times at which steps begin."""
        return self._grid(solver, steps, **options)[:-1]

    def levels(self, solver: str, steps: int, **options: Any) -> list[float]:
        """1 - t of each of these times."""
        return [1 - t for t in self.times(solver, steps, **options)]

    def trajectory(
        self, network: StepNetwork, noise: Tensor, solver: str, steps: int, *,
        noise_fn: NoiseFunction = torch.randn_like, clip: bool = False, progress: bool = False,
        breaks: Collection[int] = (), **options: Any,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Yields t, sample and pred_xstart for each step, as the interface says.

        The SDE's solvers call noise_fn once for each of their steps but the last. Clipping is for
        pred_xstart alone: the drift goes by what the network says.
        """
        said, grid = self.flow.said, self._grid(solver, steps, **options)
        chosen = {**self.solvers[solver].options, **options}
        if solver in ("euler", "heun"):
            moments = ode(said, network, noise, grid, solver)
        elif solver == "dopri5":
            tolerances = chosen["atol"], chosen["rtol"]
            moments = self._adaptive(network, noise, grid, breaks, *tolerances)
        else:
            moments = sde(
                said, network, noise, grid, "heun" if solver == "sde-heun" else "euler",
                chosen["diffusion_form"], chosen["diffusion_norm"], chosen["last_step"], noise_fn,
            )  # fmt: skip
        for t, x, predicted in tqdm(moments, total=steps, disable=not progress):
            predicted = predicted.clamp(-1, 1) if clip else predicted
            yield {"t": t, "sample": x, "pred_xstart": predicted}

    def _grid(self, solver: str, steps: int, **options: Any) -> list[float]:
        """The times between which steps lie, steps + 1 of them.

        Raises ValueError for options that a solver cannot have, and where a term is infinite.
        """
        chosen = {**self.solvers[solver].options, **options}
        flow, shift = self._sampled(chosen["sample_eps"]), chosen["time_shift"]
        shift = self.time_shift if shift is None else checked(shift)
        if "atol" in chosen:
            check_tolerances(chosen["atol"], chosen["rtol"])
        if "diffusion_form" not in chosen:
            if chosen["sample_eps"] is not None and flow.is_open:
                raise ValueError(
                    f"`sample_eps` {chosen['sample_eps']:g} changes nothing of {solver} for a "
                    f"velocity on the path {flow.path}, of which no term is infinite; leave it out"
                )
            return even_times(flow.interval(), steps, shift)
        form, last = chosen["diffusion_form"], chosen["last_step"]
        grid = flow.sde_times(steps, form, last, chosen["last_step_size"], shift)
        check_finite(
            flow.said, grid if last is None else grid[:-1],
            "heun" if solver == "sde-heun" else "euler", form, chosen["diffusion_norm"],
        )  # fmt: skip
        return grid

    def _sampled(self, sample_eps: float | None) -> Flow:
        """The flow as it is sampled: at so great a distance from the ends."""
        flow = self.flow
        return create_flow(flow.path, flow.prediction, sample_eps=sample_eps)

    def _adaptive(
        self, network: StepNetwork, x: Tensor, grid: list[float], breaks: Collection[int],
        atol: float, rtol: float,
    ) -> Iterator[Moment]:  # fmt: skip
        """dopri5 between neighbouring breaks, told at the times of the grid.

        The data that it predicts follow from the slope of the solution, which costs no call.
        """
        said, count = self.flow.said, len(grid) - 1
        for first, end in pairwise(sorted({0, count, *breaks})):
            told = grid[first : end + 1]
            # From the beginning of each step on: two more times at small and equal distances, which
            # are smaller beside a term that is infinite at t = 0
            near = [t / 4 if t and self.flow.sample_eps else SPAN for t in told]
            spans = [min(SPAN, one, (told[-1] - t) / 2) for t, one in zip(told[:-1], near)]
            threes = [(t, t + span, t + 2 * span) for t, span in zip(told, spans)]
            points = sorted({*told, *(t for three in threes for t in three if t < told[-1])})
            states = adaptive_ode(said, network, x, points, atol, rtol, first)
            known = dict(zip(points, states))
            for t, t_next, span, three in zip(told, told[1:], spans, threes):
                here, then, later = (known.get(time, states[-1]) for time in three)
                slope = (4 * (then - here) - (later - here)) / (2 * span)
                yield Moment(t, known[t_next], data_of_slope(self.flow.path, slope, here, t))
            x = states[-1]


def checked(shift: object) -> float:
    """A time shift. Raises ValueError unless it is a number in SHIFTS."""
    least, most = SHIFTS
    number = isinstance(shift, (int, float)) and not isinstance(shift, bool)
    if not number or not least <= shift <= most:  # type: ignore[operator]
        raise ValueError(
            f"`time_shift` is {shift!r:.60}; it must be from {least:g} to {most:g}, 1 for none"
        )
    return float(shift)  # type: ignore[arg-type]


def data_of_slope(path: str, slope: Tensor, x: Tensor, t: float) -> Tensor:
    """The data that x comes from, if this is its velocity."""
    velocity = Prediction(path, "velocity")
    return velocity.data(slope, x, velocity.coefficients(torch.tensor(t, dtype=torch.float64)))
