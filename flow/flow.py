"""A flow: what its network learns, and how one output of it becomes velocity, score or data.

Shapes: data, noise and x are (N, C, *space), times t are (N,), from 0, noise, to 1, data. Whatever
comes in as float64 stays in it. A network may have more channels than x, as one that also learned
a variance: the first C count.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from .adaptive import ATOL, RTOL, adaptive_ode
from .checks import check_names, check_number, check_steps
from .forms import FORMS, check_form
from .likelihood import log_likelihood
from .paths import PATHS, Coefficients
from .prediction import PREDICTIONS, Prediction
from .solvers import LAST_STEP_SIZE, LAST_STEPS, ODE_STEPS, SDE_STEPS, Moment, ode, sde
from .times import shifted

LOSS_WEIGHTS = (None, "velocity", "likelihood")
EPS = 1e-3  # from an end where a term is infinite
VP_TRAIN_EPS = 1e-5
LEAST_EPS = 1e-6  # but 0: float32's rounding near 1 is 6e-8
# Of a vector whose direction is learned. A fresh network returns 0, where the cosine's slope is one
# over this: with torch's 1e-8 Adam would remember the first step for ten thousands of steps.
LEAST_NORM = 1e-2

Network = Callable[..., Tensor]  # called as network(x, t, **model_kwargs)


class Interval(NamedTuple):
    """The times between which something happens, the noisier first."""

    start: float
    end: float


class Flow:
    """A path of PATHS and what a network predicts on it; arguments as for `create_flow`."""

    def __init__(
        self, path: str = "linear", prediction: str = "velocity", loss_weight: str | None = None,
        train_eps: float | None = None, sample_eps: float | None = None, cosine_loss: bool = False,
    ) -> None:  # fmt: skip
        check_names(path=(path, PATHS), prediction=(prediction, PREDICTIONS))
        check_names(loss_weight=(loss_weight, LOSS_WEIGHTS))
        for name, wanted in {"loss_weight": loss_weight, "cosine_loss": cosine_loss}.items():
            if wanted and (prediction == "velocity") != (name == "cosine_loss"):
                known = "a velocity" if name == "cosine_loss" else "a score or the noise"
                raise ValueError(
                    f"`{name}` is for {known} as the prediction, and `prediction` is {prediction}; "
                    f"leave `{name}` out"
                )
        self.path, self.prediction, self.loss_weight = path, prediction, loss_weight
        self.cosine_loss = bool(cosine_loss)
        self.said = Prediction(path, prediction)
        # Neither end has an infinite term: straight and circular paths of velocities
        self.is_open = path != "vp" and prediction == "velocity"
        self.train_eps = self._checked_eps(
            "train_eps", train_eps, VP_TRAIN_EPS if path == "vp" else EPS
        )
        self.sample_eps = self._checked_eps("sample_eps", sample_eps, EPS)

    def _checked_eps(self, name: str, eps: float | None, published: float) -> float:
        """A distance from the ends; None stands for the published one."""
        if eps is None:
            return 0.0 if self.is_open else published
        check_number(name, eps, "at least 0 and below 0.5", lambda eps: 0 <= eps < 0.5)
        if eps == 0 and not self.is_open:
            raise ValueError(
                f"`{name}` is 0, and with the path {self.path} and the prediction "
                f"{self.prediction} a term is infinite at an end; give one above 0, "
                f"such as {published:g}"
            )
        if 0 < eps < LEAST_EPS:
            raise ValueError(
                f"`{name}` is {eps:g}, too near to an end for float32; give at least {LEAST_EPS:g}"
            )
        return float(eps)

    # ---- the path ----

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their derivatives at t, of its shape."""
        return self.said.coefficients(t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t (N, C, *space) = alpha·x_start + sigma·noise; noise is drawn where none is given."""
        noise = torch.randn_like(x_start) if noise is None else noise
        at = self._spread(t, x_start)
        return at.alpha * x_start + at.sigma * noise

    def velocity_target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """dx_t/dt (N, C, *space) = alpha'·x_start + sigma'·noise (SiT, equation 5)."""
        at = self._spread(t, x_start)
        return at.d_alpha * x_start + at.d_sigma * noise

    def diffusion_coefficient(self, x: Tensor, t: Tensor, form: str, norm: float = 1.0) -> Tensor:
        """D (N, 1, ...) of dX = (velocity + D·score) dt + √(2 D) dW, half of the w in SiT's paper.

        form: one of FORMS. "sbdm" is infinite at t = 0 on the linear and gvp paths.
        """
        check_form(form)
        t = _column(t, x)  # (N, 1, ...)
        return FORMS[form](t, self.coefficients(t), norm)

    def interval(
        self, sde: bool = False, form: str = "sbdm", last_step_size: float = 0.0
    ) -> Interval:
        """(t0, t1) between which sampling steps; an SDE's last step goes on from t1.

        Raises ValueError for a form that does not exist, and for a last step that leaves no room.
        """
        eps = self.sample_eps
        if not sde:
            if self.is_open:
                return Interval(0.0, 1.0)
            return self._inside(eps)
        check_form(form)
        starts_late = self.path != "vp" and (form == "sbdm" or self.prediction != "velocity")
        start = eps if starts_late else 0.0
        check_number(
            "last_step_size", last_step_size,
            f"at least 0 and below {1 - start:g}, for the steps begin at t = {start:g}",
            lambda size: 0 <= size < 1 - start,
        )  # fmt: skip
        return Interval(start, 1 - (last_step_size or eps))

    @property
    def train_interval(self) -> Interval:
        """The times between which a network is trained."""
        return self._inside(self.train_eps)

    def _inside(self, eps: float) -> Interval:
        """All times but those nearer than eps to an end where a term is infinite."""
        return Interval(0.0 if self.path == "vp" else eps, 1 - eps)

    # ---- what the network says ----

    def training_losses(
        self, model: Network, x_start: Tensor, t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None, noise: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """{"loss", "mse"}, (N,) each, of data at times t; with cosine_loss "cosine", too.

        "mse" is the squared error before weights (SiT, equations 7 and 8). "cosine" is one less the
        cosine, over the channels, between a velocity and what it should be; a vector shorter than
        LEAST_NORM counts as that long.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t, at = self.q_sample(x_start, t, noise), self._spread(t, x_start)
        out = self._ask(model, x_t, t, model_kwargs)
        if self.prediction == "velocity":
            target = self.velocity_target(x_start, t, noise)
            error = out - target
        else:
            error = out - noise if self.prediction == "noise" else at.sigma * out + noise
        mse = _mean(error**2)  # (N,)
        if self.loss_weight is not None:
            return {"loss": _mean(self._weight(at) * error**2), "mse": mse}
        if not self.cosine_loss:
            return {"loss": mse, "mse": mse}
        cosine = _mean(1 - cosine_similarity(out, target, dim=1, eps=LEAST_NORM))  # (N,)
        return {"loss": mse + cosine, "mse": mse, "cosine": cosine}

    def velocity(
        self, model: Network, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The velocity dx/dt (N, C, *space), whatever the network predicts."""
        out = self._ask(model, x, t, model_kwargs)
        return self.said.velocity(out, x, self._spread(t, x))

    def score(
        self, model: Network, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The gradient of log p_t(x) by x (N, C, *space), whatever the network predicts."""
        out = self._ask(model, x, t, model_kwargs)
        return self.said.score(out, x, self._spread(t, x))

    # ---- sampling ----

    @torch.no_grad()
    def ode_sample_loop(
        self, model: Network, shape: tuple[int, ...], noise: Tensor | None = None, *,
        num_steps: int, method: str = "heun", atol: float = ATOL, rtol: float = RTOL,
        model_kwargs: Mapping[str, Any] | None = None, device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Samples (N, C, *space) by the probability flow ODE, dx = velocity dt.

        method: "euler", one call of the network a step; "heun", the explicit trapezoid, two; or
        "dopri5", which chooses the steps of each sample by atol and rtol, whatever num_steps is.
        Raises ValueError for what there is not.
        """
        check_names(method=(method, (*ODE_STEPS, "dopri5")))
        x = self._start(model, shape, noise, device)
        times = even_times(self.interval(), num_steps)
        if method == "dopri5":
            return adaptive_ode(
                self.said, self._at_steps(model, model_kwargs), x, [times[0], times[-1]], atol, rtol
            )[-1]  # fmt: skip
        steps = ode(self.said, self._at_steps(model, model_kwargs), x, times, method)
        return _last(steps, num_steps, progress)

    @torch.no_grad()
    def sde_sample_loop(
        self, model: Network, shape: tuple[int, ...], noise: Tensor | None = None, *,
        num_steps: int, method: str = "euler", diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0, last_step: str | None = "mean",
        last_step_size: float = LAST_STEP_SIZE, model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None, progress: bool = False,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:  # fmt: skip
        """Samples (N, C, *space) by the SDE with the diffusion coefficient of a form and norm.

        method: "euler" (Euler-Maruyama), one call of the network a step, or "heun", two.
        last_step: how the last of num_steps goes from t = 1 - last_step_size to data: "mean" (the
        drift without noise), "euler" (the ODE's), "tweedie" (the predicted data), or None for equal
        steps alone. noise_fn(x) is called once for each equal step, before the network. Raises
        ValueError for what there is not, and where a term would be infinite.
        """
        check_names(method=(method, SDE_STEPS))
        x = self._start(model, shape, noise, device)
        steps = sde(
            self.said, self._at_steps(model, model_kwargs), x,
            self.sde_times(num_steps, diffusion_form, last_step, last_step_size), method,
            diffusion_form, diffusion_norm, last_step, noise_fn,
        )  # fmt: skip
        return _last(steps, num_steps, progress)

    def sde_times(
        self, num_steps: int, form: str = "sigma", last_step: str | None = "mean",
        last_step_size: float = LAST_STEP_SIZE, shift: float = 1.0,
    ) -> list[float]:  # fmt: skip
        """The times at which the equal steps of an SDE begin, and the one at which they end; if
        there is a last step, its end after them.

        Raises ValueError if there are too few steps.
        """
        check_names(last_step=(last_step, LAST_STEPS))
        interval = self.interval(True, form, 0.0 if last_step is None else last_step_size)
        if last_step is None:
            return even_times(interval, num_steps, shift)
        check_steps(num_steps, 2, ", the last step being one of them")
        end = interval.end + last_step_size
        return [*even_times(interval, num_steps - 1, shift), end]

    log_likelihood = log_likelihood

    # ---- inside ----

    def _ask(self, model, x, t, model_kwargs):
        """What the network says of x at t, in x's precision: its first C channels.

        It is given x in the precision of its weights, and t in that of t.
        """
        weights = _weights(model)
        taken = x.dtype if weights is None or not weights.is_floating_point() else weights.dtype
        out = model(x.to(taken), t, **(model_kwargs or {}))
        return out[:, : x.shape[1]].to(x.dtype)

    def _at_steps(self, model, model_kwargs):
        return lambda x, t, step: self._ask(model, x, t, model_kwargs)

    def _spread(self, t, x):
        """The coefficients at t (N,), of shape (N, 1, ...) as x takes them."""
        return self.coefficients(_column(t, x))

    def _weight(self, at):
        """The weight of a score's or noise's squared error: (D/sigma)² or D/sigma²."""
        ratio = at.turn / at.alpha  # D / sigma, D being "sbdm"
        return ratio**2 if self.loss_weight == "velocity" else ratio / at.sigma

    def _start(self, model, shape, noise, device):
        """Where a trajectory begins: the noise that is given, or new noise of this shape."""
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise is {tuple(noise.shape)}, and shape {tuple(shape)}")
        if noise is not None:
            return noise if device is None else noise.to(device)
        weights = _weights(model)
        if device is None and weights is None:
            raise ValueError("pass device, or noise: the model has no parameters that say where")
        return torch.randn(shape, device=weights.device if device is None else device)


def even_times(interval: Interval, num_steps: int, shift: float = 1.0) -> list[float]:
    """The num_steps + 1 times at which steps begin and end, evenly spread but for the shift."""
    check_steps(num_steps, 1)
    start, end = interval
    # Both ends are met exactly
    inside = [shifted(i / num_steps, shift) for i in range(1, num_steps)]
    return [start, *(start + (end - start) * share for share in inside), end]


def _weights(model):
    """A parameter of a network, or of the network that a method is bound to; None without one."""
    network = getattr(model, "__self__", model)
    return next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None


def _column(t, x):
    """t (N,) as (N, 1, ...), with as many axes as x."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def _mean(values):
    """The mean of each sample: (N, ...) → (N,)."""
    return values.flatten(1).mean(dim=1)


def _last(steps: Iterator[Moment], count: int, progress: bool) -> Tensor:
    """The sample after the last step."""
    for moment in tqdm(steps, total=count, disable=not progress):
        x = moment.sample
    return x
