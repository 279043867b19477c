"""Labels → images: the loaded network and VAE, guidance, the choice of sampler, and each image's
own randomness.

Shapes: labels (N,), noise and latents (N, C, h, w), images uint8 (N, H, W, 3).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
import math
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusion import create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion, TensorMap, as_taken
from models import DiT
from sampling.speed import PRECISIONS
from vae import Space, to_uint8

TRAINED_STEPS = 1000
LOOPS = {
    "ddpm": GaussianDiffusion.p_sample_loop_progressive,
    "ddim": GaussianDiffusion.ddim_sample_loop_progressive,
}
# Multistep solvers of second order (Lu et al. 2022; Zhao et al. 2023), their steps of equal length
# in the log of sigma: of diffusers' spacings the one that comes nearest to the exact solution with
# 20 steps (docs/sampling.md).
SCHEDULERS = {
    "dpm++": partial(DPMSolverMultistepScheduler, use_lu_lambdas=True),
    "unipc": partial(UniPCMultistepScheduler, use_exponential_sigmas=True),
}


class Solver(NamedTuple):
    """How many steps a way from noise to data takes unless told otherwise, and how many it can take
    at most.
    """

    steps: int
    most: int


SOLVERS = {
    "ddpm": Solver(250, TRAINED_STEPS),
    "ddim": Solver(250, TRAINED_STEPS),
    "dpm++": Solver(20, TRAINED_STEPS - 1),  # one step number is left for the end of the last step
    "unipc": Solver(20, TRAINED_STEPS - 1),
}


@dataclass
class Sampler:
    """A network and a VAE on one device, and how to sample from them.

    `classes` are the class names, None if unknown; `checkpoint` is the file that the network came
    from, if any. Guidance is applied at the steps t from cfg_interval[0] to cfg_interval[1] times
    TRAINED_STEPS (Kynkäänniemi et al. 2024).
    """

    network: DiT
    space: Space
    classes: list[str] | None
    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | str = 3
    mixed_precision: str = "no"
    checkpoint: Path | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_steps(self.sampler, self.num_sampling_steps)
        respacing = str(self.num_sampling_steps) if self.sampler in LOOPS else ""
        self.diffusion = create_diffusion(respacing, learn_sigma=self.network.learn_sigma)
        side = self.network.input_size
        self.latent = (self.network.in_channels, side, side)
        if self.cfg_scale != 1 and self.network.null_label is None:
            raise ValueError(
                f"--cfg-scale {self.cfg_scale}: the network has no null class to guide against; pass --cfg-scale 1"
            )
        if isinstance(self.cfg_channels, int) and self.cfg_channels > max(
            3, self.network.in_channels
        ):
            raise ValueError(
                f"--cfg-channels {self.cfg_channels}: the latents have {self.network.in_channels}; pass that, fewer, or all"
            )
        if self.cfg_scale != 1 and not any(self.guided()):
            low, high = self.cfg_interval
            raise ValueError(
                f"--cfg-interval {low} {high} holds none of the {self.num_sampling_steps} steps of {self.sampler}, so "
                "nothing would be guided; widen it, or pass --cfg-scale 1"
            )

    def steps(self) -> list[int]:
        """The step numbers at which the network is asked, in order."""
        if self.sampler in LOOPS:
            return self.diffusion.timestep_map[::-1]
        # The nearest to each sigma; diffusers' own are rounded down where its steps are of equal
        # length.
        sigmas, known = (
            self.scheduler().sigmas[:-1].numpy(),
            self.diffusion.sqrt_recipm1_alphas_cumprod,
        )
        return (
            np.interp(np.log(sigmas), np.log(known), np.arange(TRAINED_STEPS))
            .round()
            .astype(int)
            .tolist()
        )

    def guided(self) -> list[bool]:
        """For each of the steps, whether it is guided."""
        low, high = self.cfg_interval
        return [
            self.cfg_scale != 1 and low <= step / TRAINED_STEPS <= high for step in self.steps()
        ]

    def scheduler(self) -> DPMSolverMultistepScheduler | UniPCMultistepScheduler:
        """A new scheduler of diffusers for a trajectory, which is to be given predictions of x_0.
        """
        scheduler = SCHEDULERS[self.sampler](
            trained_betas=self.diffusion.betas, num_train_timesteps=TRAINED_STEPS,
            prediction_type="sample",
        )  # fmt: skip
        scheduler.set_timesteps(self.num_sampling_steps)
        scheduler.set_begin_index(0)  # or it looks for its place on the device
        return scheduler

    def predictor(self, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """predict(x, t) → what the network makes of x (N, C, h, w), guided inside the interval.

        To be called once for each of `steps`, in their order: to look at t would make the CPU wait
        for a GPU.
        """
        guided = iter(self.guided())
        conditions = {"y": labels} if self.network.num_classes else {}
        if self.cfg_scale != 1:
            assert self.network.null_label is not None  # __post_init__ looks at that
            both = torch.cat([labels, torch.full_like(labels, self.network.null_label)])  # (2N,)
        dtype = PRECISIONS[self.mixed_precision]

        def predict(x, t):
            with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
                given, x = x, as_taken(self.network, x)
                if next(guided):
                    x2, t2 = torch.cat([x, x]), torch.cat([t, t])  # (2N, ...)
                    out = self.network.forward_with_cfg(
                        x2, t2, both, self.cfg_scale, self.cfg_channels
                    )[: len(x)]
                else:
                    out = self.network(x, t, **conditions)
            return out.to(given.dtype)

        return predict

    def trajectory(
        self, labels: Tensor, noise: Tensor, noise_fn: TensorMap = torch.randn_like,
        progress: bool = False,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Yields for each of `steps` a dict: `t`, the step; `sample`, the latents (N, C, h, w)
        after it; `pred_xstart`, the clean ones that it predicted.

        Arguments as for `latents`.
        """
        if self.sampler in SCHEDULERS:
            yield from self._multistep(labels, noise, progress)
            return

        # Which other implementations sample, and of which only the first half counts
        def doubled(x):
            return noise_fn(torch.cat([x, x]))[: len(x)]

        extra: dict[str, Any] = {"eta": self.eta} if self.sampler == "ddim" else {}
        loop = LOOPS[self.sampler](
            self.diffusion, self.predictor(labels), noise.shape, noise,
            clip_denoised=self.space.clip_denoised, progress=progress,
            noise_fn=noise_fn if self.cfg_scale == 1 else doubled, **extra,
        )  # fmt: skip
        for t, out in zip(self.steps(), loop, strict=True):
            yield {"t": t, "sample": out["sample"], "pred_xstart": out["pred_xstart"]}

    def _multistep(self, labels, noise, progress):
        """The trajectory by one of SCHEDULERS, from predictions of x_0 that are clipped where the
        space has bounds.
        """
        scheduler, predict, x = self.scheduler(), self.predictor(labels), noise
        # sqrt(1/alpha_bar - 1), from the host: a step reads nothing back
        sigmas = scheduler.sigmas.tolist()
        for t, sigma in zip(tqdm(self.steps(), disable=not progress), sigmas):
            with torch.no_grad():
                # Without the variance
                eps = predict(x, torch.full((len(x),), t, device=x.device))[:, : x.shape[1]]
                x_start = math.sqrt(1 + sigma**2) * x - sigma * eps
                if self.space.clip_denoised:
                    x_start = x_start.clamp(-1, 1)
                x = scheduler.step(x_start, t, x).prev_sample
            yield {"t": t, "sample": x, "pred_xstart": x_start}

    def latents(
        self, labels: Tensor, noise: Tensor, noise_fn: TensorMap = torch.randn_like,
        progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Latents (N, C, h, w) for labels (N,) from noise x_T; with guidance, noise_fn draws for a
        doubled batch.

        dpm++ and unipc draw nothing.
        """
        for out in self.trajectory(labels, noise, noise_fn, progress):
            last = out["sample"]
        return last

    def numbered_latents(self, seed: int, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Latents (N, C, h, w) of the images with these indices, each of which depends on (seed,
        index) and its label alone.
        """
        noise_fn = ImageNoise(seed, indices, labels.device)
        noise = noise_fn(torch.empty(len(indices), *self.latent, device=labels.device))
        return self.latents(labels, noise, noise_fn)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 (N, H, W, 3) of latents (N, C, h, w), on their device.

        Raises ValueError if they are not finite.
        """
        images = self.space.decode(latents)
        if not images.isfinite().all():
            raise ValueError(
                f"some images have values that are not finite, with --mixed-precision {self.mixed_precision} and --cfg-scale "
                f"{self.cfg_scale}: try no or bf16, less guidance, or look for NaN in the checkpoint"
            )
        return to_uint8(images)


def check_steps(sampler: str, steps: int) -> None:
    """Raise ValueError unless a sampler can take so many steps."""
    most = SOLVERS[sampler].most
    if not 1 <= steps <= most:
        reason = (
            f"; --sampler {sampler} takes at most {most}" if 1 <= steps <= TRAINED_STEPS else ""
        )
        raise ValueError(f"--num-sampling-steps is {steps}; it must be from 1 to {most}{reason}")


class ImageNoise:
    """Normal noise in which image i of the run depends on (seed, i) alone: a noise_fn for the steps
    and loops.

    Called with x (N, ...), or with a doubled batch (2N, ...), it returns the N images' next draws,
    twice if doubled.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str) -> None:
        # Neighbouring words, not hashes: two images of a run cannot share one, and CPU generators
        # use 32 bits of it.
        base = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        self.generators = [torch.Generator(device).manual_seed((base + i) % 2**64) for i in indices]

    def __call__(self, x: Tensor) -> Tensor:
        n = len(self.generators)
        if len(x) not in (n, 2 * n):
            raise ValueError(
                f"noise for {n} images was asked for a batch of {len(x)}; it must be as many, or twice"
            )
        drawn = torch.stack(
            [
                torch.randn(x.shape[1:], generator=g, device=x.device, dtype=x.dtype)
                for g in self.generators
            ]
        )
        return drawn if len(x) == n else torch.cat([drawn, drawn])
