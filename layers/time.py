"""The time t of a process as a vector."""

import math

import torch
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """A step number, whole or not, as a vector: sines and cosines (float32), then two Linears."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )  # fmt: skip

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
        """t (N,) → (N, dim) float32: cosines, then sines, of t·max_period^(-i/half), i < half."""
        half = dim // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = torch.outer(t.float(), torch.exp(i * -math.log(max_period) / half))  # (N, half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 2·half)
        return nn.functional.pad(waves, (0, dim % 2))  # (N, dim), an odd dim's last column 0

    def forward(self, t: Tensor) -> Tensor:
        """t (N,) → (N, D)."""
        waves = self.timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]  # a Linear
