"""Which image a token is of: one to a row, or several of different sizes in it."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from layers.positions import unturned


class Layout(NamedTuple):
    """How tokens lie in a batch's rows. `attention` are keywords of its attention: `rope`, how
    tokens are rotated; `attn_mask`, which tokens attend to which.

    `image` (R, L) is the number of each token's image; None: row n is image n.
    """

    attention: Mapping[str, Tensor] = {}
    image: Tensor | None = None

    def spread(self, vectors: Tensor) -> Tensor:
        """What images have, (N, V), for their tokens: (N, 1, V), the same for all of a row, or
        (R, L, V).
        """
        if self.image is None:
            return vectors.unsqueeze(1)  # (N, 1, V)
        return vectors[self.image]  # (R, L, V)

    def rotated(self, rope: Tensor | None) -> "Layout":
        """This layout with a rotation of tokens, (T, 2·width) or (R, L, 2·width); None for none."""
        if rope is None:
            return self
        rope = rope if rope.dim() == 2 else rope.unsqueeze(1)  # (R, 1, L, 2·width), for all heads
        return self._replace(attention={**self.attention, "rope": rope})

    def appended(self, more: int) -> "Layout":
        """This layout with so many more tokens at the end of each row, which are not rotated."""
        if not more or "rope" not in self.attention:
            return self
        return self.rotated(unturned(self.attention["rope"], more))


ALONE = Layout()  # an image to a row, without a rotation
