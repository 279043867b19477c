"""Captions as conditions of a network: pieces for its own encoder, what "no text" is, dropping."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from layers.text import Text
from layers.text_encoder import PIECE

Keywords = dict[str, Text]  # of the network's forward pass


def cut(caption: str) -> list[bytes]:
    """A caption's pieces: its words, as UTF-8, each in parts of up to PIECE bytes."""
    words = [word.encode() for word in caption.split()]
    return [word[at : at + PIECE] for word in words for at in range(0, len(word), PIECE)]


def pieces(captions: Sequence[str], length: int) -> Text:
    """Captions for a network with an encoder of its own: Text with tokens (N, length, PIECE), bytes
    counted from 1, 0 for none, and their mask. The first piece is empty; what is too long is cut.
    """
    tokens = torch.zeros(len(captions), length, PIECE, dtype=torch.int64)
    mask = torch.zeros(len(captions), length, dtype=torch.bool)
    for n, caption in enumerate(captions):
        found = cut(caption)[: length - 1]
        mask[n, : len(found) + 1] = True
        for place, piece in enumerate(found, start=1):
            tokens[n, place, : len(piece)] = torch.tensor(list(piece)) + 1
    return Text(tokens, mask)


class Reader(Protocol):
    """What turns captions into what a network takes.

    `null`, of one caption, is what stands for "no text": what it makes of the empty caption.
    `shares` say what each of several joined encoders contributes. `says` is what a checkpoint keeps
    of it, plain values; None for the encoder that is a part of the network.
    """

    @property
    def null(self) -> Text: ...

    @property
    def shares(self) -> tuple["Share", ...]: ...

    @property
    def says(self) -> list[dict[str, Any]] | None: ...

    def encode(self, captions: Sequence[str]) -> Text:
        """The Text of N captions, on the CPU; what is too long is cut."""

    def cut_at(self, caption: str) -> str | None:
        """The part of a caption that is read, if that is not all of it; else None."""


class PieceReader(NamedTuple):
    """The Reader for networks that have an encoder of their own; `length` is their text_length."""

    length: int
    says: None = None

    @property
    def null(self) -> Text:
        """The empty caption."""
        return self.encode([""])

    @property
    def shares(self) -> tuple["Share", ...]:
        """There is one encoder."""
        return (Share(),)

    def encode(self, captions: Sequence[str]) -> Text:
        """As `pieces`."""
        return pieces(captions, self.length)

    def cut_at(self, caption: str) -> str | None:
        """The words, or parts of them, that are read, if that is not all of them."""
        left, read = self.length - 1, []
        for word in caption.split():
            parts = cut(word)
            read.append(b"".join(parts[: max(0, left)]).decode(errors="ignore"))
            left -= len(parts)
        return " ".join(filter(None, read)) if left < 0 else None


class Share(NamedTuple):
    """What one of several joined encoders contributes: which tokens, which of their numbers, and
    which of the pooled vector's.
    """

    tokens: slice = slice(None)
    numbers: slice = slice(None)
    pooled: slice = slice(None)


class TextCondition(NamedTuple):
    """Captions, as Text, as a Condition. `null`, of one caption, is what stands for "no text".

    `shares` are those of the encoders; each is dropped by itself, as in Stable Diffusion 3 (Esser
    et al. 2024, appendix B.3).
    """

    null: Text
    shares: tuple[Share, ...] = (Share(),)

    @property
    def has_null(self) -> bool:
        """Whether samples can be guided: always."""
        return True

    @property
    def drops(self) -> tuple[int, ...]:
        """Each encoder of a caption is dropped by itself."""
        return (len(self.shares),)

    def blank(self, count: int, device: torch.device | str) -> Text:
        """The null text, count times."""
        return self._nulls(count).to(device)

    def keywords(self, values: Text) -> Keywords:
        """{"y": Text (N)}."""
        return {"y": values}

    def dropped(self, values: Text, drop: Tensor) -> Keywords:
        """As `keywords`, null where drop (N, encoders) is 1."""
        null = self._nulls(len(values)).to(values.device)
        gone = drop.bool()  # (N, encoders)
        for share, lost in zip(self.shares, gone.unbind(dim=1), strict=True):
            # Encoders that share tokens share their mask
            beside = [other.tokens == share.tokens for other in self.shares]
            values = replaced(values, null, share, lost, gone[:, beside].all(dim=1))
        return {"y": values}

    def doubled(self, values: Text) -> Keywords:
        """{"y": Text (2N)}, the captions and then N times the null text."""
        return {"y": Text.join([values, self._nulls(len(values)).to(values.device)])}

    def _nulls(self, count):
        return self.null.each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))


def replaced(values: Text, others: Text, share: Share, which: Tensor, masked: Tensor) -> Text:
    """Captions (N) of which those that `which` (N,), bool, names have a share of the others', and
    those that `masked` (N,) names also the mask of its tokens.
    """

    def mixed(tensor, other, which, *place):
        if tensor is None or other is None:
            return tensor
        chosen = torch.zeros_like(tensor, dtype=torch.bool)
        chosen[(slice(None), *place)] = True
        return torch.where(chosen & which.view(-1, *[1] * (tensor.dim() - 1)), other, tensor)

    return Text(
        mixed(values.tokens, others.tokens, which, share.tokens, share.numbers),
        mixed(values.mask, others.mask, masked, share.tokens),
        mixed(values.pooled, others.pooled, which, share.pooled),
    )  # fmt: skip

