"""Captions as a network takes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """N captions. `tokens` are an encoder's output (N, L, E), or pieces (N, L, B), int64, for a
    network that has an encoder of its own. `mask` (N, L), bool, says which tokens are there; None:
    all. `pooled` (N, P) is a vector for each whole caption; None: none.

    It has a length, and slices and moves to a device as a tensor (N, ...) does.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.tokens.device

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice | Tensor) -> "Text":
        """The captions of a slice, or with the numbers in an int64 tensor (M,)."""
        return self.each(lambda tensor: tensor[which])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Text":
        """The same on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Text":
        """The same in memory that a GPU reads directly, as a torch DataLoader asks for it."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Text":
        """With each tensor changed."""
        mask, pooled = (None if one is None else change(one) for one in (self.mask, self.pooled))
        return Text(change(self.tokens), mask, pooled)

    @staticmethod
    def join(texts: Sequence["Text"], how: Callable[[list[Tensor]], Tensor] = torch.cat) -> "Text":
        """Captions one after another, from texts whose tokens have the same shape but for N."""
        masks = [text.mask for text in texts if text.mask is not None]
        vectors = [text.pooled for text in texts if text.pooled is not None]
        tokens = how([text.tokens for text in texts])
        return Text(tokens, how(masks) if masks else None, how(vectors) if vectors else None)
