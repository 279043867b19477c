"""Tokens back to an image."""

from torch import Tensor


def unpatchify(x: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Patches (N, T, P·P·C) → (N, C, H, W): tokens row by row in a grid of (rows, columns),
    channels innermost.
    """
    p, (rows, columns) = patch_size, grid
    x = x.reshape(len(x), rows, columns, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, rows, P, columns, P)
    return x.reshape(len(x), -1, rows * p, columns * p)  # (N, C, H, W)
