"""Steps of even or given length from noise to data: the ODE's by Euler and Heun, the SDE's, too.

The network is asked once for each evaluation of the drift. Times are numbers of the host: a step
copies nothing between devices, and reads nothing back.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .checks import check_number
from .forms import FORMS
from .paths import Coefficients
from .prediction import Prediction

LAST_STEP_SIZE = 0.04  # of an SDE (SiT, table 10)


class Network(Protocol):
    """A network as steps ask it."""

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        """The output (N, C, *space) for x (N, C, *space) at times t (N,) in the step numbered so.
        """


class Moment(NamedTuple):
    """A step: the time at which it began, x after it, and the data predicted at its beginning."""

    t: float
    sample: Tensor
    pred_xstart: Tensor


class Evaluation(NamedTuple):
    """One output of the network at x, and the coefficients of the path there."""

    said: Prediction
    out: Tensor
    x: Tensor
    at: Coefficients
    t: Tensor  # 0-d float64 on the host, as the coefficients

    @property
    def velocity(self) -> Tensor:
        return self.said.velocity(self.out, self.x, self.at)

    @property
    def data(self) -> Tensor:
        return self.said.data(self.out, self.x, self.at)

    def drift(self, form: str, norm: float) -> Tensor:
        """velocity + D·score."""
        d = FORMS[form](self.t, self.at, norm)
        return self.velocity + d * self.said.score(self.out, self.x, self.at)


def evaluate(said: Prediction, network: Network, x: Tensor, t: float, step: int) -> Evaluation:
    """Ask the network for x at one time."""
    out = network(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), step)
    time = torch.tensor(t, dtype=torch.float64)  # 0-d tensors of the CPU mix with any device
    return Evaluation(said, out[:, : x.shape[1]], x, said.coefficients(time), time)


# ---- the ODE ----


def _euler(said, network, now, t, t_next, step):
    return now.x + (t_next - t) * now.velocity


def _heun(said, network, now, t, t_next, step):
    slope = now.velocity
    there = evaluate(said, network, now.x + (t_next - t) * slope, t_next, step)
    return now.x + (t_next - t) / 2 * (slope + there.velocity)


ODE_STEPS = {"euler": _euler, "heun": _heun}


def ode(
    said: Prediction, network: Network, x: Tensor, times: Sequence[float], method: str
) -> Iterator[Moment]:
    """The steps between neighbouring times, from x (N, C, *space) at the first of them."""
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        with torch.no_grad():
            now = evaluate(said, network, x, t, i)
            x = ODE_STEPS[method](said, network, now, t, t_next, i)
            predicted = now.data
        yield Moment(t, x, predicted)


# ---- the SDE ----


def _maruyama(said, network, x, noise, times, step, form, norm):
    (t, t_next), spread = times, _spread(said, form, norm, *times)
    now = evaluate(said, network, x, t, step)
    return x + (t_next - t) * now.drift(form, norm) + spread * noise, now.data


def _stochastic_heun(said, network, x, noise, times, step, form, norm):
    t, t_next = times
    x = x + _spread(said, form, norm, t, t_next) * noise
    now = evaluate(said, network, x, t, step)
    slope = now.drift(form, norm)
    there = evaluate(said, network, x + (t_next - t) * slope, t_next, step)
    return x + (t_next - t) / 2 * (slope + there.drift(form, norm)), now.data


def _spread(said, form, norm, t, t_next):
    """The standard deviation √(2 D dt) of the noise of a step, a number."""
    time = torch.tensor(t, dtype=torch.float64)
    return math.sqrt(2 * float(FORMS[form](time, said.coefficients(time), norm)) * (t_next - t))


SDE_STEPS = {"euler": _maruyama, "heun": _stochastic_heun}

# How the last step goes from t by h: (evaluation at t, h, form, norm) → x
LAST_STEPS: dict[str | None, Callable[[Evaluation, float, str, float], Tensor] | None] = {
    "mean": lambda now, h, form, norm: now.x + h * now.drift(form, norm),
    "euler": lambda now, h, form, norm: now.x + h * now.velocity,
    "tweedie": lambda now, h, form, norm: now.data,
    None: None,
}


def sde(
    said: Prediction, network: Network, x: Tensor, times: Sequence[float], method: str, form: str,
    norm: float, last_step: str | None, noise_fn: Callable[[Tensor], Tensor],
) -> Iterator[Moment]:  # fmt: skip
    """The steps between neighbouring times, the last of them without noise if there is a last_step.

    Raises ValueError, before the network is asked, where a term would be infinite.
    """
    finish = LAST_STEPS[last_step]
    equal = times if finish is None else times[:-1]
    check_finite(said, equal, method, form, norm)
    for i, pair in enumerate(zip(equal, equal[1:])):
        noise = noise_fn(x)
        with torch.no_grad():
            x, predicted = SDE_STEPS[method](said, network, x, noise, pair, i, form, norm)
        yield Moment(pair[0], x, predicted)
    if finish is not None:
        t, end = times[-2:]
        if t == end and last_step != "tweedie":  # nothing is left to do
            yield Moment(t, x, x)
            return
        with torch.no_grad():
            now = evaluate(said, network, x, t, len(times) - 2)
            x = finish(now, end - t, form, norm)
            predicted = now.data
        yield Moment(t, x, predicted)


def check_finite(
    said: Prediction, times: Sequence[float], method: str, form: str, norm: float
) -> None:
    """Raise ValueError if an SDE's steps would meet an infinite term at their first or last time,
    or if there is no such norm.
    """
    check_number(
        "diffusion_norm", norm, "at least 0, and finite", lambda norm: 0 <= norm < math.inf
    )
    start = torch.tensor(times[0], dtype=torch.float64)
    first = said.coefficients(start)
    if not FORMS[form](start, first, norm).isfinite():
        raise ValueError(
            f"the diffusion form {form} is infinite at t = {times[0]:g}; give another form, or "
            "`sample_eps=0.001` to begin there"
        )
    end = torch.tensor(times[-1], dtype=torch.float64)
    if method == "heun" and said.coefficients(end).sigma == 0:
        raise ValueError(
            "the score is infinite at t = 1, where the last of these steps of Heun asks for it; "
            "give `last_step_size` above 0 and a `last_step`"
        )
