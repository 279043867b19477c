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
    other grids, a name of EXTRAPOLATIONS; `kind` is that of the weights' numbers, in which tokens
    are added up, also under autocast; a table's coordinates are divided by `scale`.
    """

    positions: Positions
    trained: tuple[int, int]
    head: int
    extrapolation: str
    kind: torch.dtype
    scale: float = 1.0

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
            return self._sum(tokens, trained_table), ALONE
        check_grid(self.extrapolation, grid, self.trained)
        index = grid_index(*grid, device=tokens.device)  # (T, 2)
        of = (index[-1] + 1).expand(index.shape)  # (T, 2)
        added = trained_table if known else self.added(index, of, tokens.shape[-1])
        return self._sum(tokens, added), ALONE.rotated(self.rope(index, of))

    def in_rows(
        self, tokens: Tensor, packed: Packed, trained_table: Tensor | None
    ) -> tuple[Tensor, Layout]:
        """Tokens (R, L, D) of packed images with their positions added, and their Layout."""
        of = packed.place, packed.grid
        layout = Layout({"attn_mask": packed.attn_mask}, packed.image)
        added = self.added(*of, tokens.shape[-1])
        if added is not None and trained_table is not None:
            # On the trained grid these very numbers, which are rounded otherwise
            rows, columns = self.trained
            known = (packed.grid[..., 0] == rows) & (packed.grid[..., 1] == columns)  # (R, L)
            number = packed.place[..., 0] * columns + packed.place[..., 1]  # (R, L)
            entries = trained_table[0][torch.where(known, number, 0)]  # (R, L, D)
            added = torch.where(known.unsqueeze(-1), entries, added)
        return self._sum(tokens, added), layout.rotated(self.rope(*of))

    def added(self, index: Tensor, grid: Tensor, width: int) -> Tensor | None:
        """What is added to tokens with this index in this grid, (..., width); None for nothing."""
        if not self.positions.has_table:
            return None
        trained: tuple[float, float] = self.trained
        if self.scale != 1:  # whatever the extrapolation, coordinates go with all three
            index, grid = (of.to(self._exact) / self.scale for of in (index, grid))
            trained = trained[0] / self.scale, trained[1] / self.scale
        found = table(index, grid, trained, width, self.extrapolation, self._exact)
        return found.to(self.kind)  # (..., width)

    def of_grid(
        self, grid: tuple[int, int], width: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """What a table adds to the tokens of a grid, (T, width)."""
        index = grid_index(*grid, device=device)  # (T, 2)
        found = self.added(index, (index[-1] + 1).expand(index.shape), width)
        assert found is not None  # positions without a table are not asked
        return found

    def rope(self, index: Tensor, grid: Tensor) -> Tensor | None:
        """How they are rotated, (..., 2·head); None for not at all."""
        if not self.positions.rotates:
            return None
        return rotation(index, grid, self.trained, self.head, self.extrapolation, self._exact)

    @property
    def _exact(self):
        """The kind of number in which positions are computed: at least float32."""
        return torch.promote_types(self.kind, torch.float32)

    def _sum(self, tokens, added):
        return tokens.to(self.kind) if added is None else tokens + added
