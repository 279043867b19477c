"""PixArt-α's network (Chen et al. 2023): a DiT whose tokens also attend to those of a caption.

Its blocks have adaLN-single (section 2.3): one regression for all of them, and in each a table that
is added to its vectors. The text comes in by cross-attention alone, without a norm and a gate.

Shapes: N batch, T tokens of the image, L of the text, D width.
"""

from collections.abc import Sequence
from functools import partial
import math
from typing import Any

import torch
from torch import Tensor, nn

from layers.attention import CrossAttention
from layers.modulation import Modulation, modulated
from layers.parts import PAPERS
from layers.placement import Placement
from layers.text import Text
from variants.initial import set_to_zero
from variants.text_network import TextNetwork


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the text, and MLP; the first and last are modulated."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.norm1 = PAPERS.make_norm(width, own_weights=False)
        self.attn = PAPERS.make_attention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = PAPERS.make_norm(width, own_weights=False)
        self.mlp = PAPERS.make_mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, words: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens x (N, T, D), words (N, L, D), vectors c (N, 6, D) that all blocks share, and mask
        (N, 1, 1, L) or None → (N, T, D).
        """
        vectors = (c + self.scale_shift_table).chunk(6, dim=1)  # (N, 1, D) each
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
        x = x + gate * self.attn(modulated(self.norm1(x), shift, scale))
        x = x + self.cross_attn(x, words, mask)
        return x + mlp_gate * self.mlp(modulated(self.norm2(x), mlp_shift, mlp_scale))


class PixArtFinal(nn.Module):
    """The last norm, modulated by a table that the embedding of t is added to, and the linear map
    from a token to its patch.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.norm_final = PAPERS.make_norm(width, own_weights=False)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor, of_t: Tensor) -> Tensor:
        """Tokens x (N, T, D) and the embedding of t (N, D) → patches (N, T, outputs)."""
        vectors = self.scale_shift_table + of_t.unsqueeze(1)  # (N, 2, D)
        shift, scale = vectors.chunk(2, dim=1)  # (N, 1, D) each
        return self.linear(modulated(self.norm_final(x), shift, scale))


class PixArt(TextNetwork):
    """Predicts what a process asks for from latents x, times t and captions y, a Text.

    `input_size` is the latents' side, or (height, width), that it is trained on; tokens of other
    grids are placed as `extrapolation` says, a name of EXTRAPOLATIONS (None: "interpolate"). All
    coordinates are divided by position_scale, as in PixArt-Σ. text_width is the width of what an
    outside encoder gives; None: captions come as pieces, at most text_length of them, for an
    encoder of the network's own. class_dropout_prob: how often training drops a caption. Raises
    ValueError for sizes that do not fit.
    """

    def __init__(
        self, input_size: int | Sequence[int] = 32, patch_size: int = 2, in_channels: int = 4,
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, learn_sigma: bool = True, position_scale: float = 1.0,
        text_width: int | None = None, text_length: int = 32, process: dict | None = None,
        text: list | None = None, extrapolation: str | None = None,
    ) -> None:  # fmt: skip
        config: dict[str, Any] = dict(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels,
            hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob, learn_sigma=learn_sigma,
            position_scale=position_scale, text_width=text_width, text_length=text_length,
        )  # fmt: skip
        if extrapolation is not None:
            config["extrapolation"] = extrapolation
        super().__init__(config, process, text)
        self.extrapolation: str = extrapolation or self.positions.extrapolation
        width = hidden_size
        table = torch.zeros(1, math.prod(self.grid), width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.words_embedder = nn.Sequential(
            nn.Linear(self.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.shared_modulation = Modulation(width, 6)
        self.blocks.extend(PixArtBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = PixArtFinal(width, patch_size**2 * self.out_channels)
        self.initialize_common()
        # Every block begins as the identity, and the output as 0
        parts = "_modulation.", "scale_shift_table", "cross_attn.proj.", "final_layer.linear."
        set_to_zero(self, parts)
        if not self.pos_embed.is_meta:
            exact = self.placement(torch.float64)
            self.pos_embed.data.copy_(exact.of_grid(self.grid, width, self.pos_embed.device))

    def placement(self, kind: torch.dtype) -> Placement:
        """How tokens are told where they are, in numbers of this kind."""
        head = self.config["hidden_size"] // self.config["num_heads"]
        scale = self.config["position_scale"]
        return Placement(self.positions, self.grid, head, self.extrapolation, kind, scale)

    def forward(self, x: Tensor, t: Tensor, y: Text | None = None) -> Tensor:
        """Noisy latents x (N, C, H, W), times t (N,), captions y (N) → (N, C_out, H, W).

        Raises ValueError for an x or y of another shape.
        """
        text, grid = self.read(y), self.grid_seen(x)
        placement = self.placement(self.x_embedder.proj.weight.dtype)
        tokens, _ = placement.in_images(self.x_embedder(x), grid, self.pos_embed)  # (N, T, D)
        words = self.words_embedder(text.tokens)  # (N, L, D)
        mask = None if text.mask is None else text.mask[:, None, None]  # (N, 1, 1, L)
        of_t = self.t_embedder(t)  # (N, D)
        c = self.shared_modulation(of_t).unflatten(-1, (6, -1))  # (N, 6, D)
        for block in self.blocks:
            tokens = self.through(block, tokens, words, c, mask)
        return self.latents(self.final_layer(tokens, of_t), x)  # (N, C_out, H, W)


# Ti is ours, XL the published one
SIZES: dict[str, dict[str, Any]] = {
    "Ti": dict(depth=4, hidden_size=128, num_heads=4),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
PixArt_models = {
    f"PixArt-{size}/{patch}": partial(PixArt, patch_size=patch, **sizes)
    for size, sizes in SIZES.items()
    for patch in ((1, 2) if size == "Ti" else (2,))
}
