"""Frames of a clip that a network is given rather than asked for: to animate a picture, to go on
with a clip, or to fill in between.

They are clean, and have the time of clean data, while the others have the process's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Given(NamedTuple):
    """Clips (N, C, F, H, W) of latents, of which the frames in mask (N, F), bool, are given; and
    the time t of clean data in the process (processes.process.Process.clean).
    """

    clips: Tensor
    mask: Tensor
    clean: float

    def held(self, x: Tensor) -> Tensor:
        """x (N, C, F, H, W) with the given frames in their places."""
        return torch.where(self.mask[:, None, :, None, None], self.clips.to(x.dtype), x)

    def times(self, t: Tensor) -> Tensor:
        """Times (N, F) of the frames, where the others have t (N,), or (N, F)."""
        t = t.unsqueeze(1) if t.dim() == 1 else t  # (N, 1 or F)
        return torch.where(self.mask, torch.full_like(t, self.clean), t)  # (N, F)

    def asked(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The network (x (N, C, F, H, W), t, ...), asked with the given frames held. What it says
        of these is 0.
        """

        def ask(x: Tensor, t: Tensor, *others: Any) -> Tensor:
            out = network(self.held(x), self.times(t), *others)
            return out.masked_fill(self.mask[:, None, :, None, None], 0)  # (N, C_out, F, H, W)

        return ask


def draw_masks(count: int, frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Which frames of `count` clips are given in training, bool (N, F), on the generator's device.

    A clip has given frames with a probability of `share`. Then they are, each as often: the first
    ones, 1 to F - 1 of them; the first and the last one; or any, each by a chance of a half. At
    least one is left.
    """
    device = generator.device
    chance = torch.rand(count, 3 + frames, generator=generator, device=device)
    chosen, kind, length, each = chance.split((1, 1, 1, frames), dim=1)  # (N, 1), ..., (N, F)
    place = torch.arange(frames, device=device)
    first = place < 1 + (length * (frames - 1)).floor()  # (N, F)
    ends = (place == 0) | (place == frames - 1)
    some = each < 0.5
    mask = torch.where(kind < 1 / 3, first, torch.where(kind < 2 / 3, ends, some))
    left = place == each.argmax(dim=1, keepdim=True)  # (N, F)
    # Of one or two frames these would be all
    full = mask.all(dim=1, keepdim=True)
    return mask & ~(full & left) & (chosen < share)
