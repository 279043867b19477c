"""Tokens back to an image."""

from torch import Tensor


def unpatchify(x: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Patches (N, T, P·P·C) → (N, C, H, W): tokens row by row in a grid of (rows, columns),
    channels innermost.
    """
    n, p, (rows, columns) = len(x), patch_size, grid
    channels = x.shape[-1] // p**2
    x = x.reshape(n, rows, columns, p, p, channels)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, rows, P, columns, P)
    return x.reshape(n, channels, rows * p, columns * p)  # (N, C, H, W)
