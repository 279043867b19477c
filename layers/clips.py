"""Clips as images, and back. Shapes: N clips of F frames; C, H and W are those of an image."""

from torch import Tensor


def frames_of(x: Tensor) -> Tensor:
    """Clips (N, C, F, H, W) as images (N·F, C, H, W): all frames of the first clip, then others."""
    return x.transpose(1, 2).flatten(0, 1)  # (N·F, C, H, W)


def clips_of(x: Tensor, frames: int) -> Tensor:
    """Images (N·F, C, H, W) as clips (N, C, F, H, W) of so many frames: frames_of backwards."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)  # (N, C, F, H, W)
