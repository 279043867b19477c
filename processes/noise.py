"""The noise of numbered images, each its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ImageNoise:
    """Normal noise in which image i of the run depends on (seed, i) alone.

    The object is a noise_fn for the steps and loops. Called with x (N, ...), or with a doubled
    batch (2N, ...), it returns the N images' next draws, twice if doubled.
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
                f"noise for {n} images was asked for a batch of {len(x)}; "
                "it must be as many, or twice"
            )
        drawn = torch.stack(
            [
                torch.randn(x.shape[1:], generator=g, device=x.device, dtype=x.dtype)
                for g in self.generators
            ]
        )
        return drawn if len(x) == n else torch.cat([drawn, drawn])
