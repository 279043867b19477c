"""The diffusion process: noising q, the learned way back p, losses, bits per dim, DDPM and DDIM.

Papers: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), IDDPM (Nichol & Dhariwal 2021), ADM
(Dhariwal & Nichol 2021).

Notation: t counts from 0 (hardly any noise) to T-1; alpha_bar_t = prod (1 - beta_s) over s ≤ t;
x_start is data, x_t is √alpha_bar_t·x_start + √(1 - alpha_bar_t)·eps. Shapes: x (N, C, ...) of any
number of axes, t (N,), int64. The network is called as model(x_t, steps, **model_kwargs). With a
learned variance it returns 2C channels, prediction and fraction.
"""

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
import enum
from functools import partial
import math

import numpy as np
import torch
from torch import Tensor

from .likelihood import discretized_gaussian_log_likelihood, normal_kl
from .network import as_taken, sampling_device
from .schedules import betas_for_alpha_bar, get_named_beta_schedule

__all__ = [
    "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "betas_for_alpha_bar",
    "get_named_beta_schedule",
]  # fmt: skip


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of a reverse step.

    FIXED_SMALL: the posterior variance. FIXED_LARGE: beta, or at t = 0 the posterior variance of
    t = 1. LEARNED_RANGE: the network's choice between the logs of posterior variance and beta.
    """

    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE: squared error, and the bound `vb` of a learned variance. KL: the variational bound.

    RESCALED_MSE multiplies `vb` by num_timesteps/1000, RESCALED_KL the bound by num_timesteps.
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()


SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
COLUMNS = (*SCHEDULE, "log_betas", "fixed_variance", "fixed_log_variance")
Coefficients = namedtuple("Coefficients", COLUMNS)  # type: ignore[misc]  # names not written out

WITHOUT_FLOAT64 = {"mps"}  # device types

Model = Callable[..., Tensor]  # called as model(x_t, steps, **model_kwargs), like a cond_fn
TensorMap = Callable[[Tensor], Tensor]
Device = torch.device | str | None
Answer = tuple[Tensor, Tensor | None]


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all axes but the first, (N,)."""
    return x.flatten(1).mean(dim=1)


class GaussianDiffusion:
    """The process over a sequence of betas. Its schedule arrays (T,) are float64 NumPy attributes.

    Raises ValueError for betas outside (0, 1) and for types that are not of the enumerations above.
    """

    def __init__(
        self, *, betas: Sequence[float] | np.ndarray, model_mean_type: ModelMeanType,
        model_var_type: ModelVarType, loss_type: LossType,
    ) -> None:  # fmt: skip
        types = model_mean_type, model_var_type, loss_type
        kinds: tuple[type[enum.Enum], ...] = (ModelMeanType, ModelVarType, LossType)
        for value, kind in zip(types, kinds):
            if not isinstance(value, kind):
                names = ", ".join(k.name for k in kind)
                raise ValueError(f"{value!r} is no {kind.__name__}; choose one of {names}")
        self.model_mean_type, self.model_var_type, self.loss_type = types
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            wanted = "a non-empty sequence of numbers above 0 and below 1"
            raise ValueError(f"betas must be {wanted}; got {betas}")
        self.num_timesteps = len(betas)
        self._set_schedule(betas)
        self._tables: dict[torch.device, Tensor] = {}  # device → coefficients of each step, (T, K)

    def _set_schedule(self, betas):
        """Set what depends on the betas alone, float64, as attributes named as in SCHEDULE."""
        self.betas = betas
        abar = self.alphas_cumprod = np.cumprod(1 - betas)
        before = self.alphas_cumprod_prev = np.concatenate([[1.0], abar[:-1]])
        self.alphas_cumprod_next = np.concatenate([abar[1:], [0.0]])

        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - abar)
        self.log_one_minus_alphas_cumprod = np.log(1 - abar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / abar - 1)

        # q(x_{t-1} | x_t, x_start), DDPM eq. 6 and 7. Its variance at t = 0 is 0: the log takes the
        # next one instead, or beta where there is no next.
        variance = self.posterior_variance = betas * (1 - before) / (1 - abar)
        at_one = variance[1:2] if len(betas) > 1 else betas
        log_variance = np.log(np.concatenate([at_one, variance[1:]]))
        self.posterior_log_variance_clipped = log_variance
        self.posterior_mean_coef1 = betas * np.sqrt(before) / (1 - abar)
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - betas) / (1 - abar)

        fixed = np.concatenate([at_one, betas[1:]])
        fixed_and_log = (fixed, np.log(fixed))
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            fixed_and_log = (variance, log_variance)
        columns = [*(getattr(self, name) for name in SCHEDULE), np.log(betas), *fixed_and_log]
        self._table = np.stack(columns, axis=1)  # (T, K)

    def _at(self, t, x):
        """The coefficients at steps t (N,), each (N, 1, ..., 1), in x's dtype, at least float32.

        The table goes to x's device once; a step then indexes it once.
        """
        if x.device not in self._tables:
            dtype = torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64
            self._tables[x.device] = torch.tensor(self._table, dtype=dtype, device=x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = self._tables[x.device].index_select(0, t).to(dtype)  # (N, K)
        return Coefficients(*rows.view(*rows.shape, *[1] * (x.dim() - 1)).unbind(1))

    def _model_steps(self, t):
        """The step numbers (N,) that the network and cond_fn see."""
        return t

    # ---- q: adding noise, and its posterior ----

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_start), in x_start's shape (DDPM eq. 4)."""
        c = self._at(t, x_start)
        variance = c.sqrt_one_minus_alphas_cumprod**2  # 1 - alpha_bar would lose digits at small t
        spread = variance.expand_as(x_start), c.log_one_minus_alphas_cumprod.expand_as(x_start)
        return c.sqrt_alphas_cumprod * x_start, *spread

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_start noised to step t (DDPM eq. 4). The noise, standard normal, is drawn if None."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return _noised(self._at(t, x_start), x_start, noise)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_start), in x_t's shape."""
        c = self._at(t, x_t)  # DDPM eq. 6 and 7
        spread = (c.posterior_variance, c.posterior_log_variance_clipped)
        return _posterior_mean(c, x_start, x_t), *(part.expand_as(x_t) for part in spread)

    # ---- p: the way back that the network defines ----

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True,
        denoised_fn: TensorMap | None = None, model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The network's p(x_{t-1} | x_t): mean, variance, log_variance, pred_xstart, in x's shape.

        denoised_fn, if given, acts on pred_xstart; clip_denoised then clamps it to [-1, 1].
        Raises ValueError unless the network returns x's channels, with a learned variance twice.
        """
        c = self._at(t, x)
        p = self._p(c, *self._call(model, x, t, model_kwargs), x, clip_denoised, denoised_fn)
        return {**p, "variance": self._variance(c, p["log_variance"])}

    def _call(self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict | None) -> Answer:
        """The network's prediction at steps t and its fraction v, or None, both like x."""
        output = model(as_taken(model, x), self._model_steps(t), **(model_kwargs or {}))
        learned = self.model_var_type is ModelVarType.LEARNED_RANGE
        want = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != want:
            raise ValueError(
                f"the network returned {tuple(output.shape)}, the process needs {want}: "
                "its learn_sigma must be the one given to create_diffusion"
            )
        output = output.to(x.dtype)
        if not learned:
            return output, None
        prediction, v = output.chunk(2, dim=1)
        return prediction, v

    def _p(self, c, prediction, v, x, clip_denoised, denoised_fn=None):
        """p_mean_variance without the variance, from coefficients c and what the network said."""
        if v is None:
            log_variance = c.fixed_log_variance.expand_as(x)
        else:
            low = c.posterior_log_variance_clipped
            log_variance = low + (v + 1) / 2 * (c.log_betas - low)  # IDDPM eq. 15
        x_start = prediction
        if self.model_mean_type is ModelMeanType.EPSILON:
            x_start = _x_start_from_eps(c, x, prediction)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = _posterior_mean(c, x_start, x)
        return {"mean": mean, "log_variance": log_variance, "pred_xstart": x_start}

    def _variance(self, c, log_variance):
        """The variance for a log variance."""
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            return log_variance.exp()
        return c.fixed_variance.expand_as(log_variance)  # at t = 0 it may be 0: _set_schedule

    def condition_mean(
        self, cond_fn: Model, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor,
        model_kwargs: dict | None = None,
    ) -> Tensor:  # fmt: skip
        """The mean moved by variance × gradient of log p(y | x_t), in x's shape (ADM algorithm 1).

        cond_fn(x, steps, **model_kwargs) returns that gradient, for the network's step numbers.
        """
        gradient = cond_fn(x, self._model_steps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(
        self, cond_fn: Model, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """p_mean_var, its mean and pred_xstart after the gradient moved the noise (ADM alg. 2)."""
        c = self._at(t, x)
        gradient = cond_fn(x, self._model_steps(t), **(model_kwargs or {}))
        eps = _eps_from_x_start(c, x, p_mean_var["pred_xstart"])
        x_start = _x_start_from_eps(c, x, eps - c.sqrt_one_minus_alphas_cumprod * gradient)
        return {**p_mean_var, "pred_xstart": x_start, "mean": _posterior_mean(c, x_start, x)}

    # ---- one step back, or forth ----

    def p_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True,
        denoised_fn: TensorMap | None = None, cond_fn: Model | None = None,
        model_kwargs: dict | None = None, *, noise_fn: TensorMap = torch.randn_like,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One ancestral step (DDPM alg. 2): a dict of sample and pred_xstart, in x's shape.

        sample is drawn from p(x_{t-1} | x_t). noise_fn(x) gives the noise; t = 0 calls it too.
        """
        c = self._at(t, x)
        out = self._p(c, *self._call(model, x, t, model_kwargs), x, clip_denoised, denoised_fn)
        noise, mean = noise_fn(x), out["mean"]
        if cond_fn is not None:
            out["variance"] = self._variance(c, out["log_variance"])
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        std = torch.exp(out["log_variance"] / 2) * _adds_noise(t, x)
        return {"sample": mean + std * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True,
        denoised_fn: TensorMap | None = None, cond_fn: Model | None = None,
        model_kwargs: dict | None = None, eta: float = 0.0, *,
        noise_fn: TensorMap = torch.randn_like,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One DDIM step: a dict of sample and pred_xstart, in x's shape (DDIM eq. 12 and 16).

        eta = 0 is deterministic, eta = 1 has DDPM's posterior variance. noise_fn as in p_sample.
        """
        c = self._at(t, x)
        out = self._p(c, *self._call(model, x, t, model_kwargs), x, clip_denoised, denoised_fn)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        before, x_start = c.alphas_cumprod_prev, out["pred_xstart"]
        eps = _eps_from_x_start(c, x, x_start)
        noise = noise_fn(x)
        sigma = eta * c.posterior_variance.sqrt()  # eq. 16, whose product is the posterior variance
        mean = before.sqrt() * x_start + torch.sqrt(1 - before - sigma**2) * eps
        return {"sample": mean + _adds_noise(t, x) * sigma * noise, "pred_xstart": x_start}

    def ddim_reverse_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True,
        denoised_fn: TensorMap | None = None, cond_fn: Model | None = None,
        model_kwargs: dict | None = None, eta: float = 0.0,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One DDIM step towards noise: a dict of sample (x_{t+1}) and pred_xstart, in x's shape.

        Raises ValueError unless eta is 0: only the deterministic path can be walked backwards.
        """
        if eta != 0:
            why = "the way back to noise exists for the deterministic path only, pass eta=0"
            raise ValueError(f"eta is {eta}; {why}")
        c = self._at(t, x)
        out = self._p(c, *self._call(model, x, t, model_kwargs), x, clip_denoised, denoised_fn)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps, after = _eps_from_x_start(c, x, out["pred_xstart"]), c.alphas_cumprod_next
        sample = after.sqrt() * out["pred_xstart"] + (1 - after).sqrt() * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # ---- whole trajectories ----

    def p_sample_loop(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None,
        clip_denoised: bool = True, denoised_fn: TensorMap | None = None,
        cond_fn: Model | None = None, model_kwargs: dict | None = None, device: Device = None,
        progress: bool = False, *, noise_fn: TensorMap = torch.randn_like,
    ) -> Tensor:  # fmt: skip
        """Samples of the shape by ancestral sampling; arguments of p_sample_loop_progressive."""
        return _last(self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device,
            progress, noise_fn=noise_fn,
        ))["sample"]  # fmt: skip

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None,
        clip_denoised: bool = True, denoised_fn: TensorMap | None = None,
        cond_fn: Model | None = None, model_kwargs: dict | None = None, device: Device = None,
        progress: bool = False, *, noise_fn: TensorMap = torch.randn_like,
    ) -> Iterator[dict[str, Tensor]]:  # fmt: skip
        """Yields p_sample's dict after each step, T-1 first.

        noise is x_T; if None, noise_fn makes it on `device`, by default that of the network's
        parameters. progress=True shows a bar.
        """
        step = partial(
            self.p_sample, model, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
            cond_fn=cond_fn, model_kwargs=model_kwargs, noise_fn=noise_fn,
        )  # fmt: skip
        device = sampling_device(device, noise, model)
        yield from self._loop(step, shape, noise, device, progress, noise_fn)

    def ddim_sample_loop(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None,
        clip_denoised: bool = True, denoised_fn: TensorMap | None = None,
        cond_fn: Model | None = None, model_kwargs: dict | None = None, device: Device = None,
        progress: bool = False, eta: float = 0.0, *, noise_fn: TensorMap = torch.randn_like,
    ) -> Tensor:  # fmt: skip
        """Samples of the shape by DDIM; arguments of ddim_sample_loop_progressive."""
        return _last(self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device,
            progress, eta, noise_fn=noise_fn,
        ))["sample"]  # fmt: skip

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None,
        clip_denoised: bool = True, denoised_fn: TensorMap | None = None,
        cond_fn: Model | None = None, model_kwargs: dict | None = None, device: Device = None,
        progress: bool = False, eta: float = 0.0, *, noise_fn: TensorMap = torch.randn_like,
    ) -> Iterator[dict[str, Tensor]]:  # fmt: skip
        """Yields ddim_sample's dict after each step, T-1 first.

        Arguments as for p_sample_loop_progressive; eta as in ddim_sample.
        """
        step = partial(
            self.ddim_sample, model, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
            cond_fn=cond_fn, model_kwargs=model_kwargs, eta=eta, noise_fn=noise_fn,
        )  # fmt: skip
        device = sampling_device(device, noise, model)
        yield from self._loop(step, shape, noise, device, progress, noise_fn)

    def _loop(self, step, shape, noise, device, progress, noise_fn):
        """The one sampling loop: step(x, t) from T-1 down to 0."""
        x = noise_fn(torch.empty(*shape, device=device)) if noise is None else noise.to(device)
        for i in self._steps_down(progress):
            with torch.no_grad():
                t = torch.full((shape[0],), i, device=device)
                out = step(x, t)
            yield out
            x = out["sample"]

    def _steps_down(self, progress=False):
        steps = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm
            steps = tqdm(steps)
        return steps

    # ---- losses and likelihood ----

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The losses of a batch at steps t, tensors (N,): loss, and for the MSE types mse.

        With a learned variance the MSE types add vb, the bound in bits per dim. Its gradient
        reaches the variance alone (IDDPM section 3.1). The KL types return loss only. noise, drawn
        if None, is the noise in x_t.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        c = self._at(t, x_start)
        x_t = _noised(c, x_start, noise)
        prediction, v = self._call(model, x_t, t, model_kwargs)

        if self.loss_type in (LossType.KL, LossType.RESCALED_KL):
            bound = self._bound(c, prediction, v, x_start, x_t, t, clip_denoised=False)["bits"]
            rescaled = self.loss_type is LossType.RESCALED_KL
            return {"loss": bound * self.num_timesteps if rescaled else bound}
        if self.loss_type not in (LossType.MSE, LossType.RESCALED_MSE):
            raise NotImplementedError(self.loss_type)

        losses = {}
        if v is not None:
            bound = self._bound(c, prediction.detach(), v, x_start, x_t, t, clip_denoised=False)
            losses["vb"] = bound["bits"]
            if self.loss_type is LossType.RESCALED_MSE:
                losses["vb"] = losses["vb"] * (self.num_timesteps / 1000)
        target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
        losses["mse"] = mean_flat((target - prediction) ** 2)
        losses["loss"] = losses["mse"] + losses["vb"] if "vb" in losses else losses["mse"]
        return losses

    def _bound(self, c, prediction, v, x_start, x_t, t, clip_denoised):
        """One term of the variational bound (DDPM eq. 5): bits (N,), per dim, and pred_xstart.

        KL between true posterior and p; at t = 0 negative log-likelihood of x_start's grey levels.
        """
        p = self._p(c, prediction, v, x_t, clip_denoised)
        true_mean = _posterior_mean(c, x_start, x_t)
        kl = normal_kl(true_mean, c.posterior_log_variance_clipped, p["mean"], p["log_variance"])
        log_likelihood = discretized_gaussian_log_likelihood(
            x_start, means=p["mean"], log_scales=p["log_variance"] / 2
        )
        nats = torch.where(t == 0, -mean_flat(log_likelihood), mean_flat(kl))
        return {"bits": nats / math.log(2), "pred_xstart": p["pred_xstart"]}

    @torch.no_grad()
    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True,
        model_kwargs: dict | None = None, *, noise_fn: TensorMap = torch.randn_like,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The variational bound on -log2 p(x_start) per dimension, term by term: a dict of tensors.

        total_bpd (N,); prior_bpd (N,), KL(q(x_T | x_start) ‖ N(0, 1)); and for each step, T-1 in
        column 0: vb (N, T), xstart_mse (N, T) of pred_xstart, mse (N, T) of the noise that
        pred_xstart implies.
        """
        series: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in self._steps_down():
            t = torch.full((len(x_start),), i, device=x_start.device)
            c, noise = self._at(t, x_start), noise_fn(x_start)
            x_t = _noised(c, x_start, noise)
            answer = self._call(model, x_t, t, model_kwargs)
            bound = self._bound(c, *answer, x_start, x_t, t, clip_denoised)
            eps = _eps_from_x_start(c, x_t, bound["pred_xstart"])
            series["vb"].append(bound["bits"])
            series["xstart_mse"].append(mean_flat((bound["pred_xstart"] - x_start) ** 2))
            series["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: torch.stack(values, dim=1) for name, values in series.items()}  # (N, T)

        last = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        prior = mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}


def _noised(c, x_start, noise):
    return c.sqrt_alphas_cumprod * x_start + c.sqrt_one_minus_alphas_cumprod * noise


def _posterior_mean(c, x_start, x_t):
    return c.posterior_mean_coef1 * x_start + c.posterior_mean_coef2 * x_t


def _x_start_from_eps(c, x_t, eps):
    return c.sqrt_recip_alphas_cumprod * x_t - c.sqrt_recipm1_alphas_cumprod * eps


def _eps_from_x_start(c, x_t, x_start):
    return (c.sqrt_recip_alphas_cumprod * x_t - x_start) / c.sqrt_recipm1_alphas_cumprod


def _adds_noise(t, x):
    """1 where a step adds noise, 0 at t = 0; (N, 1, ..., 1)."""
    return (t != 0).to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _last(dicts):
    for last in dicts:  # noqa: B007 (the loop is for what it leaves behind)
        pass
    return last
