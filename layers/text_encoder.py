"""A small text encoder that is a part of a network and is trained with it."""

import torch
from torch import Tensor, nn

from layers.parts import PAPERS
from layers.text import Text

BYTES = 256
PIECE = 8  # bytes in a piece of a caption, at most
DEPTH, HEAD = 2, 32  # layers, and how many numbers a head of their attention has


class TextLayer(nn.Module):
    """Tokens (N, L, E) → (N, L, E): attention to each other and an MLP, a norm before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = PAPERS.make_norm(width)
        self.attn = PAPERS.make_attention(width, heads)
        self.norm2 = PAPERS.make_norm(width)
        self.mlp = PAPERS.make_mlp(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask (N, 1, 1, L), bool: the tokens that are attended to."""
        x = x + self.attn(self.norm1(x), attn_mask=mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Captions as pieces → tokens and a vector of each caption, their mean.

    A piece is up to PIECE bytes of a word, so no vocabulary is kept, and no word is unknown: its
    embedding is the sum of one vector for each (place in the piece, byte). The first piece of every
    caption is an empty one, so that also "" has a token.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        # Bytes count from 1; 0 is "no byte", whose vectors stay zero
        self.bytes = nn.Parameter(torch.zeros(PIECE, BYTES, width))
        self.places = nn.Parameter(torch.zeros(length, width))
        heads = max(1, width // HEAD)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(DEPTH))
        self.norm = PAPERS.make_norm(width)

    def forward(self, text: Text) -> Text:
        """Text with tokens (N, L, PIECE) → Text with tokens (N, L, E) and pooled (N, E)."""
        pieces, mask = text.tokens, text.mask
        assert mask is not None
        table = nn.functional.pad(self.bytes, (0, 0, 1, 0))  # (PIECE, 1 + BYTES, E)
        place = torch.arange(PIECE, device=pieces.device)
        x = table[place, pieces].sum(dim=2)  # (N, L, E)
        x = x + self.places[: pieces.shape[1]]
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        x = self.norm(x)
        there = mask.unsqueeze(-1).to(x.dtype)  # (N, L, 1)
        pooled = (x * there).sum(dim=1) / there.sum(dim=1)  # (N, E)
        return Text(x, mask, pooled)
