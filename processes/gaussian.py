"""The Gaussian process of diffusion/ as training and sampling see it.

1,000 steps with linear betas, a network that predicts the noise, and a learned variance where the
network has the channels for one. Its solvers are the loops of diffusion/, DDPM and DDIM, and two
multistep solvers of diffusers.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusion import SpacedDiffusion, create_diffusion
from processes.process import Learner, Network, NoiseFunction, QUARTERS, Solver, StepNetwork

TRAINED_STEPS = 1000
SCHEDULE = "linear"
LOOPS = {"ddpm": SpacedDiffusion.p_sample, "ddim": SpacedDiffusion.ddim_sample}


class Scheduler(NamedTuple):
    """A multistep solver of diffusers: the name of its class, and options of it."""

    kind: str
    options: dict[str, Any]


# Multistep solvers of second order (Lu et al. 2022; Zhao et al. 2023), their steps of equal length
# in the log of sigma: of diffusers' spacings the one that comes nearest to the exact solution with
# 20 steps (docs/sampling.md).
SCHEDULERS = {
    "dpm++": Scheduler("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "unipc": Scheduler("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
}

Step = Callable[[Tensor, int], dict[str, Tensor]]  # (x, index of the step) → sample, pred_xstart


class GaussianProcess:
    """Gaussian diffusion (Ho et al. 2020), as a processes.process.Process.

    learn_sigma: the network's output has the variance's channels beside the noise's.
    """

    name: ClassVar[str] = "gaussian"
    word: ClassVar[str] = "diffusion"
    settings: ClassVar[Mapping[str, Any]] = {}
    learns_sigma: ClassVar[bool] = True
    solvers: ClassVar[Mapping[str, Solver]] = {
        "ddpm": Solver(250, TRAINED_STEPS),
        # eta: how much of the noise of ddpm is added, from 0, none, to 1, all
        "ddim": Solver(250, TRAINED_STEPS, {"eta": 0.0}),
        # One step number is left for the end of the last step
        "dpm++": Solver(20, TRAINED_STEPS - 1),
        "unipc": Solver(20, TRAINED_STEPS - 1),
    }
    usual: ClassVar[str] = "ddpm"
    clean: ClassVar[float] = 0
    noisy: ClassVar[float] = TRAINED_STEPS
    quick: ClassVar[tuple[str, int]] = ("ddim", 50)  # scores near those of 250 DDPM steps

    def __init__(self, learn_sigma: bool = True) -> None:
        self.learn_sigma, self.told_apart = learn_sigma, "mse"
        self.diffusion = spaced(TRAINED_STEPS, learn_sigma)
        self.parts: tuple[str, ...] = ("loss", "mse", "vb") if learn_sigma else ("loss", "mse")

    @classmethod
    def settled(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """{}: it has no settings."""
        return {}

    @classmethod
    def of(cls, network: Learner, said: Mapping[str, Any]) -> "GaussianProcess":
        """The process of a network, whose learn_sigma is the process's.

        Raises ValueError for settings that are not of `config`, and for a network that is told a
        flow's noise level.
        """
        if (steps := getattr(network, "noise_steps", None)) is not None:
            raise ValueError(
                f"the network is told the noise level of a flow, 1 - t, {steps} times, and in the "
                f"process {cls.name} t counts steps; give a flow as its process, or a network "
                "whose noise_steps are None"
            )
        process = cls(network.learn_sigma)
        for key, value in said.items():
            if key not in process.config or process.config[key] != value:
                raise ValueError(
                    f"the process {cls.name} has {key} {value!r:.60}; "
                    f"it is known as {process.config} alone"
                )
        return process

    @property
    def config(self) -> dict[str, Any]:
        """What files say of it: its name, schedule and number of steps."""
        return {"name": self.name, "noise_schedule": SCHEDULE, "diffusion_steps": TRAINED_STEPS}

    # ---- training ----

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Step numbers t (count,), int64, all equally likely."""
        return torch.randint(
            TRAINED_STEPS, (count,), generator=generator, device=generator.device
        )

    def losses(
        self, network: Network, x_start: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The squared error of the noise and, with a learned variance, the bound `vb`: (N,) each.
        """
        return self.diffusion.training_losses(network, x_start, t, noise=noise)

    def quarter(self, t: Tensor) -> Tensor:
        """The quarter of the steps, 0 to QUARTERS - 1, in which t (N,) lies: int64 (N,)."""
        return t * QUARTERS // TRAINED_STEPS

    # ---- sampling ----

    def times(self, solver: str, steps: int, **options: Any) -> list[int]:
        """The step numbers at which the network is asked, in order."""
        if solver in LOOPS:
            return spaced(steps, self.learn_sigma).timestep_map[::-1]
        # The nearest to each sigma; diffusers' own are rounded down where its steps are of equal
        # length.
        sigmas = self.scheduler(solver, steps).sigmas[:-1].numpy()
        known = self.diffusion.sqrt_recipm1_alphas_cumprod
        numbers = np.interp(np.log(sigmas), np.log(known), np.arange(TRAINED_STEPS))
        return numbers.round().astype(int).tolist()

    def levels(self, solver: str, steps: int, **options: Any) -> list[float]:
        """The step numbers as shares of all steps."""
        return [t / TRAINED_STEPS for t in self.times(solver, steps)]

    def scheduler(self, solver: str, steps: int) -> Any:
        """A new scheduler of diffusers for a trajectory, which is to be given predictions of x_0.
        """
        import diffusers  # here, since it takes seconds

        kind, options = SCHEDULERS[solver]
        scheduler = getattr(diffusers, kind)(
            trained_betas=self.diffusion.betas, num_train_timesteps=TRAINED_STEPS,
            prediction_type="sample", **options,
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)  # or it looks for its place on the device
        return scheduler

    def trajectory(
        self, network: StepNetwork, noise: Tensor, solver: str, steps: int, *,
        noise_fn: NoiseFunction = torch.randn_like, clip: bool = False, progress: bool = False,
        breaks: Collection[int] = (), **options: Any,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Yields t, sample and pred_xstart for each step, as the interface says.

        ddim's option is eta. ddpm and ddim call noise_fn once a step, whatever eta; dpm++ and
        unipc draw nothing.
        """
        times, x = self.times(solver, steps), noise
        if solver in LOOPS:
            step = self._one_step(network, solver, steps, options, noise_fn, clip)
        else:
            step = self._multistep(network, times, solver, clip)
        for i, t in enumerate(tqdm(times, disable=not progress)):
            with torch.no_grad():
                out = step(x, i)
            yield {"t": t, "sample": out["sample"], "pred_xstart": out["pred_xstart"]}
            x = out["sample"]

    def _one_step(
        self, network: StepNetwork, solver: str, steps: int, options: Mapping[str, Any],
        noise_fn: NoiseFunction, clip: bool,
    ) -> Step:  # fmt: skip
        """The step of one of LOOPS, on so many steps kept of all."""
        diffusion = spaced(steps, self.learn_sigma)

        def step(x, i):
            t = torch.full((len(x),), steps - 1 - i, device=x.device)  # (N,)
            return LOOPS[solver](
                diffusion, lambda x, t: network(x, t, i), x, t, clip_denoised=clip,
                noise_fn=noise_fn, **options,
            )  # fmt: skip

        return step

    def _multistep(self, network: StepNetwork, times: list[int], solver: str, clip: bool) -> Step:
        """The step of one of SCHEDULERS, from predictions of x_0."""
        scheduler = self.scheduler(solver, len(times))
        # sqrt(1/alpha_bar - 1), from the host: a step reads nothing back
        sigmas = scheduler.sigmas.tolist()

        def step(x, i):
            t = torch.full((len(x),), times[i], device=x.device)  # (N,)
            eps = network(x, t, i)[:, : x.shape[1]]  # (N, C, *space), without the variance
            x_start = math.sqrt(1 + sigmas[i] ** 2) * x - sigmas[i] * eps
            if clip:
                x_start = x_start.clamp(-1, 1)
            x = scheduler.step(x_start, times[i], x).prev_sample
            return {"sample": x, "pred_xstart": x_start}

        return step


# A few are kept: making one takes milliseconds, and each has its coefficients on the device.
@lru_cache(maxsize=16)
def spaced(steps: int, learn_sigma: bool) -> SpacedDiffusion:
    """The process on so many of its steps, evenly spread."""
    return create_diffusion(str(steps), learn_sigma=learn_sigma)
