"""Tokens that know where they are in their image, whatever its grid, alone in a row or packed."""

from typing import NamedTuple

import torch
from torch import Tensor

from layers.layout import ALONE, Layout
from layers.packing import Packed
from layers.positions import Positions, check_grid, grid_index, rotation, table


class Placement(NamedTuple):
    """How a network tells its tokens where they are. `trained` is the grid that it was trained on,
    rows and columns; `head`, how many numbers a head of its attention has; `extrapolation`, for
    other grids, a name of EXTRAPOLATIONS.
    """

    positions: Positions
    trained: tuple[int, int]
    head: int
    extrapolation: str

    def in_images(
        self, tokens: Tensor, grid: tuple[int, int], trained_table: Tensor | None
    ) -> tuple[Tensor, Layout]:
        """Tokens (N, T, D) of images of this grid with their positions added, and their Layout.

        trained_table (1, T, D) is what is added on the trained grid, None for nothing. Raises
        ValueError for a grid without positions.
        """
        # Without a table no grid is another: a compiled rope network has one graph for all
        known = trained_table is not None and grid == self.trained
        if known and not self.positions.rotates:
            return _with(tokens, trained_table), ALONE
        check_grid(self.extrapolation, grid, self.trained)
        index = grid_index(*grid, device=tokens.device)  # (T, 2)
        of = (index[-1] + 1).expand(index.shape)  # (T, 2)
        added = trained_table if known else self.added(index, of, tokens, trained_table)
        return _with(tokens, added), ALONE.rotated(self.rope(index, of, tokens))

    def in_rows(
        self, tokens: Tensor, packed: Packed, trained_table: Tensor | None
    ) -> tuple[Tensor, Layout]:
        """Tokens (R, L, D) of packed images with their positions added, and their Layout."""
        of = packed.place, packed.grid, tokens
        layout = Layout({"attn_mask": packed.attn_mask}, packed.image)
        added = self.added(*of, trained_table)
        if added is not None and trained_table is not None:
            # On the trained grid these very numbers, which are rounded otherwise
            rows, columns = self.trained
            known = (packed.grid[..., 0] == rows) & (packed.grid[..., 1] == columns)  # (R, L)
            number = packed.place[..., 0] * columns + packed.place[..., 1]  # (R, L)
            entries = trained_table[0][torch.where(known, number, 0)]  # (R, L, D)
            added = torch.where(known.unsqueeze(-1), entries, added)
        return _with(tokens, added), layout.rotated(self.rope(*of))

    def added(
        self, index: Tensor, grid: Tensor, tokens: Tensor, trained_table: Tensor | None
    ) -> Tensor | None:
        """What is added to tokens (..., D) with this index in this grid, of the trained table's
        kind of number; None for nothing.
        """
        if trained_table is None:
            return None
        where = index, grid, self.trained
        found = table(*where, tokens.shape[-1], self.extrapolation, _exact(tokens))  # (..., D)
        return found.to(trained_table.dtype)

    def rope(self, index: Tensor, grid: Tensor, tokens: Tensor) -> Tensor | None:
        """How they are rotated, (..., 2·head); None for not at all."""
        if not self.positions.rotates:
            return None
        return rotation(index, grid, self.trained, self.head, self.extrapolation, _exact(tokens))


def _with(tokens, added):
    return tokens if added is None else tokens + added  # under autocast, float32


def _exact(tokens):
    """The kind of number in which positions are computed: at least float32."""
    return torch.promote_types(tokens.dtype, torch.float32)
