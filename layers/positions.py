"""Where a token is in its image: sines and cosines that are added to it, or rotate it.

Both are made for the grid of tokens that the network sees. Where that is not the grid that it was
trained on, an Extrapolation says which coordinates its tokens have. Shapes: `index` and `grid` are
(..., 2), a token's row and column, and how many rows and columns its image has; `trained` is the
trained grid, a tuple (rows, columns).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers.attention import Attention, AttentionRope
from torch import Tensor, nn

BASE = 10000.0  # of all wavelengths: the longest is 2π times this (Vaswani et al. 2017, 3.5)


class Positions(NamedTuple):
    """How a network knows where tokens are: by a table that is added, by rotating queries and keys
    in each attention, or by both.
    """

    has_table: bool
    rotates: bool
    extrapolation: str  # unless told otherwise: a table does not go on beyond its end

    @property
    def attention(self) -> Callable[..., nn.Module]:
        """The class of attention that this takes; both kinds name their parameters alike."""
        return _rotating_attention if self.rotates else Attention


def _rotating_attention(*sizes, **options):
    return AttentionRope(*sizes, num_prefix_tokens=0, **options)


POSITIONS = {
    "table": Positions(True, False, "interpolate"), "rope": Positions(False, True, "extend"),
    "table+rope": Positions(True, True, "interpolate"),
}  # fmt: skip


class Extrapolation(NamedTuple):
    """Which coordinates the tokens of a grid have that is not the trained one, on each axis apart.

    coordinate(i, n, trained) is that of the tokens i (...) of n (...) in a row or column, where the
    network was trained with `trained`; stretch(n, trained) (...) is how much longer the longest
    wavelength of a rotation is to be.
    """

    coordinate: Callable[[Tensor, Tensor, float], Tensor]
    stretch: Callable[[Tensor, float], Tensor]


def _counted(i, n, trained):
    return i


def _spread(i, n, trained):
    return i * trained / n


def _central(i, n, trained):
    return i + (trained - n) / 2


def _unstretched(n, trained):
    return torch.ones_like(n)


def _stretched(n, trained):
    return (n / trained).clamp(min=1)


# interpolate: tokens lie closer, or further apart, and span what the trained grid spans.
# extend: they are counted from 0, on beyond the trained grid. crop: they are the middle of the
# trained grid. ntk: counted from 0, rotations being slowed so that the slowest turns as far over
# the grid as over the trained one (NTK-aware scaling, bloc97 2023); a table is interpolated.
EXTRAPOLATIONS = {
    "interpolate": Extrapolation(_spread, _unstretched),
    "extend": Extrapolation(_counted, _unstretched),
    "crop": Extrapolation(_central, _unstretched),
    "ntk": Extrapolation(_counted, _stretched),
}
OF_A_TABLE = EXTRAPOLATIONS | {"ntk": EXTRAPOLATIONS["interpolate"]}


def grid_index(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Row and column of each token of a grid, (T, 2), tokens row by row."""
    axes = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return torch.cartesian_prod(*axes).reshape(-1, 2)  # (T, 2), also of a single token


def check_grid(extrapolation: str, grid: tuple[int, int], trained: tuple[int, int]) -> None:
    """Raise ValueError for a grid that the extrapolation has no coordinates for."""
    if extrapolation == "crop" and any(side > most for side, most in zip(grid, trained)):
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} tokens is beyond the trained grid of "
            f'{trained[0]} x {trained[1]}, of which `extrapolation="crop"` takes the middle; pass '
            '`extrapolation="interpolate"` or `extrapolation="extend"`'
        )


def table(
    index: Tensor, grid: Tensor, trained: tuple[float, float], width: int, extrapolation: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """What is added to tokens with this index in images of this grid, (..., width).

    Of the trained grid itself it is models.get_2d_sincos_pos_embed, up to rounding.
    """
    angles = _angles(index, grid, trained, width // 4, OF_A_TABLE[extrapolation], dtype)
    halves = [torch.cat([of.sin(), of.cos()], dim=-1) for of in reversed(angles)]  # columns first
    return torch.cat(halves, dim=-1)  # (..., D)


def of_middle(
    grid: tuple[int, int], most: tuple[int, int], trained: tuple[int, int], width: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """What is added to the tokens of a grid, (T, width) in float64: the middle part of a table of
    `most` rows and columns, whose coordinates run over those of the trained grid (Esser et al.
    2024, section 5.3.2). A grid beyond it goes on to both sides.
    """
    index = grid_index(*grid, device=device).double()  # (T, 2)
    axes, quarter = [], torch.arange(width // 4, dtype=torch.float64, device=device)
    for i, n, side, base in zip(index.unbind(-1), grid, most, trained):
        where = (i + (side - n) // 2) * base / side
        angles = torch.outer(where, BASE ** (-quarter / (width // 4)))  # (T, width / 4)
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=-1))  # (T, width / 2)
    return torch.cat(axes[::-1], dim=-1)  # (T, width), columns first


def rotation(
    index: Tensor, grid: Tensor, trained: tuple[int, int], width: int, extrapolation: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Sines and then cosines (..., 2·width) by which timm's attention rotates the queries and keys,
    of `width` numbers each, of tokens with this index in images of this grid.

    A rotation turns pairs of neighbouring numbers, the first half of them by the token's row, the
    second by its column (Su et al. 2021, once per axis).
    """
    angles = _angles(index, grid, trained, width // 4, EXTRAPOLATIONS[extrapolation], dtype)
    return turned(torch.cat(angles, dim=-1))  # (..., 2·width)


def turned(angles: Tensor) -> Tensor:
    """Sines and then cosines (..., 2·width) of the angles (..., width / 2) of pairs of neighbouring
    numbers, as timm's attention takes them.
    """
    of_pairs = angles.repeat_interleave(2, dim=-1)  # (..., width)
    return torch.cat([of_pairs.sin(), of_pairs.cos()], dim=-1)  # (..., 2·width)


def of_line(count: int, waves: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The places 0, 1, ... of `count` tokens in a line, such as frames, times so many frequencies
    BASE^(-k/waves): angles (count, waves).
    """
    k = torch.arange(waves, dtype=dtype, device=device)
    return torch.outer(torch.arange(count, dtype=dtype, device=device), BASE ** (-k / waves))


def line_table(count: int, width: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """What is added to `count` tokens in a line, (count, width): sines, then cosines."""
    angles = of_line(count, width // 2, dtype, device)  # (count, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (count, width)


def of_box(
    box: tuple[int, int, int], width: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """How the tokens of a box of (frames, rows, columns) are rotated, (F·T, 2·width), frame by
    frame and row by row: about a quarter of the numbers by the frame, the others by row and column.
    """
    in_plane = 3 * width // 16  # pairs that each of the two turns: 3/8 of the numbers
    waves = width // 2 - 2 * in_plane, in_plane, in_plane
    axes = [of_line(count, pairs, dtype, device) for count, pairs in zip(box, waves)]
    shapes = (-1, 1, 1), (1, -1, 1), (1, 1, -1)
    spread = [
        angles.view(*shape, angles.shape[-1]).expand(*box, -1)  # (F, rows, columns, pairs)
        for angles, shape in zip(axes, shapes)
    ]
    return turned(torch.cat(spread, dim=-1).flatten(0, 2))  # (F·T, 2·width)


def _angles(index, grid, trained, count, extrapolation, dtype):
    """[of rows, of columns]: coordinates times `count` frequencies, (..., count) each.

    Frequencies are BASE^(-k/count), and where the extrapolation stretches by s, smaller by a factor
    s^(k/(count - 1)): the last one by s.
    """
    k = torch.arange(count, dtype=dtype, device=index.device)
    frequencies, angles = BASE ** (-k / count), []
    for i, n, side in zip(index.to(dtype).unbind(-1), grid.to(dtype).unbind(-1), trained):
        stretch = extrapolation.stretch(n, side).unsqueeze(-1) ** (-k / max(1, count - 1))
        where = extrapolation.coordinate(i, n, side).unsqueeze(-1)  # (..., 1)
        angles.append(where * frequencies * stretch)  # (..., count)
    return angles


def unturned(rope: Tensor, more: int) -> Tensor:
    """A rotation (T, 2·width), and after it so many tokens that are not turned."""
    still = torch.zeros(more, rope.shape[-1], dtype=rope.dtype, device=rope.device)
    still[:, rope.shape[-1] // 2 :] = 1  # cosines
    return torch.cat([rope, still])  # (T + more, 2·width)
