"""Images of several sizes in the rows of one batch: as many tokens in each row, some of them empty.

Shapes: N images, R rows of L tokens, patches of side P, images (C, h, w) with their own h and w.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layers.positions import grid_index

EMPTY = -1  # in `image`: a token of no image


class Packed(NamedTuple):
    """Images in rows of tokens. `tokens` (R, L, C, P, P) are their patches, 0 where a row is empty;
    `image` (R, L) the number of each token's image, EMPTY without one; `place` and `grid`
    (R, L, 2) its row and column and its image's rows and columns. `full` (M,) are the places, of
    all R·L, that have a token, in order; `images` says how many images there are.
    """

    tokens: Tensor
    image: Tensor
    place: Tensor
    grid: Tensor
    full: Tensor
    images: int

    @property
    def attn_mask(self) -> Tensor:
        """Whether a token attends to another, (R, 1, L, L): one of the same image."""
        return (self.image[:, None, :, None] == self.image[:, None, None, :])  # (R, 1, L, L)

    def taken(self, values: Tensor) -> Tensor:
        """Of values (R, L, ...) those of places that have a token: (M, ...)."""
        return values.flatten(0, 1).index_select(0, self.full)  # (M, ...)

    def placed(self, values: Tensor) -> Tensor:
        """Values (M, ...) in their places (R, L, ...), with 0 elsewhere."""
        rows = values.new_zeros(self.image.numel(), *values.shape[1:])  # (R·L, ...)
        return rows.index_copy(0, self.full, values).unflatten(0, self.image.shape)  # (R, L, ...)

    def per_token(self, values: Tensor) -> Tensor:
        """What images have, (N, ...), for their tokens: (M, ...)."""
        return values[self.taken(self.image)]

    def mean(self, values: Tensor) -> Tensor:
        """The mean (N,) over each image's tokens of values (M,)."""
        of, none = self.taken(self.image), values.new_zeros(self.images)
        counts = none.index_add(0, of, torch.ones_like(values))
        return none.index_add(0, of, values) / counts

    def unpacked(self, patches: Tensor) -> list[Tensor]:
        """The images (C, h, w) that patches (R, L, C, P, P) are of."""
        found = []
        for number in range(self.images):
            here = self.image == number
            rows, columns = self.grid[here][0].tolist()
            image = patches[here].unflatten(0, (rows, columns))  # (rows, columns, C, P, P)
            image = image.permute(2, 0, 3, 1, 4)  # (C, rows, P, columns, P)
            found.append(image.flatten(3, 4).flatten(1, 2))  # (C, h, w)
        return found


def rows_for(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which of images of so many tokens go into which row of `length` tokens: lists of numbers.

    The largest come first, each goes into the first row that has room for it (first fit
    decreasing). Raises ValueError for an image that no row has room for.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        if size > length:
            raise ValueError(
                f"an image has {size} tokens, and a packed row `pack` {length}; give at least "
                f"{size}, or smaller images"
            )
        row = next((row for row, left in enumerate(room) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= size
    return rows


def patches_of(image: Tensor, side: int) -> Tensor:
    """An image (C, h, w) as patches (T, C, P, P), row by row."""
    patches = image.unfold(1, side, side).unfold(2, side, side)  # (C, rows, columns, P, P)
    return patches.flatten(1, 2).transpose(0, 1)  # (T, C, P, P)


def pack(images: Sequence[Tensor], side: int, length: int) -> Packed:
    """Images (C, h, w), cut into patches of `side`, in as few rows of `length` tokens as first fit
    decreasing needs. Raises ValueError for one that patches do not fill, or no row has room for.
    """
    device = images[0].device
    for image in images:
        if image.shape[1] % side or image.shape[2] % side:
            raise ValueError(
                f"an image of {image.shape[1]} x {image.shape[2]} is not filled by patches of "
                f"{side}; give multiples of {side}"
            )
    grids = [(image.shape[1] // side, image.shape[2] // side) for image in images]
    rows = rows_for([h * w for h, w in grids], length)
    image_of = torch.full((len(rows), length), EMPTY)
    place, grid = torch.ones(2, len(rows), length, 2, dtype=torch.int64)  # 1 where it is empty
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            here = row, slice(start, start := start + grids[number][0] * grids[number][1])
            image_of[here], place[here] = number, grid_index(*grids[number])
            grid[here] = torch.tensor(grids[number])
    ordered = [patches_of(images[number], side) for numbers in rows for number in numbers]
    full = (image_of.flatten() != EMPTY).nonzero().flatten()  # (M,)
    image_of, place, grid, full = (
        part.to(device, non_blocking=True) for part in (image_of, place, grid, full)
    )
    packed = Packed(images[0], image_of, place, grid, full, len(images))
    return packed._replace(tokens=packed.placed(torch.cat(ordered)))
