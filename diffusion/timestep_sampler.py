"""Which steps to train on: drawn uniformly, or more often where the loss is large.

After Nichol & Dhariwal 2021, section 3.3. Steps are drawn from torch's generator (or the one passed
in), so torch.manual_seed decides them. This serves code written for the interface; train.py draws
its own in processes/gaussian.py.
"""

from collections.abc import Sequence
import math
from typing import Any

import torch
from torch import Tensor
import torch.distributed as dist

from .gaussian_diffusion import GaussianDiffusion


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> "UniformSampler":
    """The step sampler called `name`, "uniform" or "loss-second-moment", for a diffusion.

    Raises ValueError for another name.
    """
    if name not in SAMPLERS:
        known = ", ".join(map(repr, SAMPLERS))
        raise ValueError(f"unknown step sampler {name!r}; known are {known}")
    return SAMPLERS[name](diffusion)


class UniformSampler:
    """Every step is equally likely and weighs 1."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.num_timesteps = diffusion.num_timesteps

    def weights(self) -> Tensor:
        """The relative frequency of each step, float64 (num_timesteps,), not normalised."""
        return torch.ones(self.num_timesteps, dtype=torch.float64)

    def sample(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(steps, weights), both (batch_size,) on the device, int64 and float32.

        The weights keep a mean loss unbiased. A generator, if given, is one of the CPU.
        """
        p = self.weights()
        p = p / p.sum()
        steps = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        weights = 1 / (self.num_timesteps * p[steps])
        return steps.to(device), weights.float().to(device)


class LossSecondMomentResampler(UniformSampler):
    """Steps drawn in proportion to √E[loss²] over each step's last losses, with a share
    uniform_prob of uniform draws among them.

    Draws are uniform until every step has history_per_term losses. Training calls
    update_with_local_losses after each batch.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001
    ) -> None:
        super().__init__(diffusion)
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self.losses = torch.zeros(self.num_timesteps, history_per_term, dtype=torch.float64)
        self.counts = torch.zeros(self.num_timesteps, dtype=torch.int64)  # losses seen at each step

    def weights(self) -> Tensor:
        """The relative frequency of each step, float64 (num_timesteps,), not normalised."""
        if (self.counts < self.history_per_term).any():
            return super().weights()
        p = self.losses.square().mean(dim=1).sqrt()
        uniform = torch.full_like(p, 1 / self.num_timesteps)
        p = p / p.sum() if p.sum() > 0 else uniform
        return (1 - self.uniform_prob) * p + self.uniform_prob * uniform

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Record this process's losses (N,) at steps local_ts (N,), and every other process's.

        All processes end up with the same record. With torch.distributed running, every process
        must call this; their batches may differ in size.
        """
        ts, losses = local_ts.tolist(), local_losses.tolist()
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (ts, losses))
            ts, losses = (sum(part, []) for part in zip(*gathered))
        self.update_with_all_losses(ts, losses)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Record losses at steps ts, sequences of equal length; a step's oldest loss makes room.

        A loss that is not finite is left out: it would decide all draws until it is forgotten.
        """
        for t, loss in zip(ts, losses, strict=True):
            if math.isfinite(loss):
                self.losses[t, self.counts[t] % self.history_per_term] = float(loss)
                self.counts[t] += 1


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
