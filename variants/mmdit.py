"""MM-DiT, the network of Stable Diffusion 3 (Esser et al. 2024): image and text in two streams.

Each stream has weights of its own; in every block their tokens attend to each other in one
attention. The vector of t and of the whole text modulates both (adaLN-Zero). With streams=1 both
kinds of token go through the same weights, as in that paper's comparison.

Shapes: N batch, T tokens of the image, L of the text, D width, V width of the text's vector.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from layers.modulation import Modulation, modulated
from layers.positions import of_middle
from layers.text import Text
from variants.initial import set_to_zero
from variants.text_network import TextNetwork

EPS = 1e-6  # in the norms


class Stream(nn.Module):
    """What one kind of token has in a block: norms, attention's Linears, MLP, and modulation.

    Without `ends` its tokens are seen by others and then left: it has no output, and no MLP.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, ends: bool = True
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, width, elementwise_affine=False, eps=EPS)
        head_norm = partial(nn.RMSNorm, width // heads, eps=EPS) if qk_norm else nn.Identity
        self.heads = heads
        self.adaLN_modulation = Modulation(width, 6 if ends else 2)
        self.norm1 = norm()
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = head_norm(), head_norm()
        if ends:
            gelu = partial(nn.GELU, approximate="tanh")
            self.proj = nn.Linear(width, width)
            self.norm2 = norm()
            self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=gelu)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Of c (N, D): shift and scale before attention, its gate, the same of the MLP; (N, 1, D)
        each, the first two alone without `ends`.
        """
        vectors = self.adaLN_modulation(c).unsqueeze(1)  # (N, 1, 6·D)
        return vectors.chunk(vectors.shape[-1] // c.shape[-1], dim=-1)

    def asks(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (N, heads, T, D / heads) each, of tokens x (N, T, D)."""
        qkv = self.qkv(modulated(self.norm1(x), shift, scale))  # (N, T, 3·D)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def answers(self, x: Tensor, attended: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """Tokens x (N, T, D) past what they attended to (N, T, D) and the MLP; `rest` is the
        modulation from the first gate on.
        """
        gate, mlp_shift, mlp_scale, mlp_gate = rest
        x = x + gate * self.proj(attended)
        return x + mlp_gate * self.mlp(modulated(self.norm2(x), mlp_shift, mlp_scale))


class JointBlock(nn.Module):
    """Tokens of image and text → the same, after one attention over both (section 4, figure 2).

    The last block (`last`) leaves the text behind: nothing comes after that would see it.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, streams: int, last: bool
    ) -> None:
        super().__init__()
        self.last = last
        self.image = Stream(width, heads, mlp_ratio, qk_norm)
        if streams == 2:
            self.text = Stream(width, heads, mlp_ratio, qk_norm, ends=not last)

    def forward(
        self, x: Tensor, words: Tensor, c: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (N, T, D), words (N, L, D), c (N, D), mask (N, 1, 1, T + L) or None → x and words."""
        image, text, tokens = self.image, getattr(self, "text", self.image), x.shape[1]
        of_image, of_text = image.modulation(c), text.modulation(c)
        pairs = zip(image.asks(x, *of_image[:2]), text.asks(words, *of_text[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)  # (N, heads, T + L, D / heads)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.transpose(1, 2).flatten(2)  # (N, T + L, D)
        x = image.answers(x, out[:, :tokens], of_image[2:])
        if not self.last:
            words = text.answers(words, out[:, tokens:], of_text[2:])
        return x, words


class MMDiTFinal(nn.Module):
    """The last adaLN and the linear map from a token to its patch."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (N, T, D) and c (N, D) → patches (N, T, outputs)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)  # (N, 1, D) each
        return self.linear(modulated(self.norm_final(x), shift, scale))


class MMDiT(TextNetwork):
    """Predicts what a process asks for from latents x, times t and captions y, a Text.

    `input_size` is the latents' side, or (height, width), that it is trained on. Its positions are
    those of the middle of a table of table_side × table_side tokens, whose coordinates run over
    those of the trained grid; None: of the trained grid itself. It takes any grid. qk_norm: RMSNorm
    of queries and keys in each head. text_width, pooled_width: widths of what outside encoders
    give; None for both: captions come as pieces, at most text_length of them, for an encoder of the
    network's own. noise_steps: for a flow, whose t is 0 at noise and 1 at data; the network is told
    the noise level 1 - t, so many times, as Stable Diffusion 3's is with 1000; None: t as it is.
    class_dropout_prob: how often training drops a caption. Raises ValueError for sizes that do not
    fit.
    """

    def __init__(
        self, input_size: int | Sequence[int] = 64, patch_size: int = 2, in_channels: int = 16,
        hidden_size: int = 1536, depth: int = 24, num_heads: int = 24, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, learn_sigma: bool = False, qk_norm: bool = False,
        streams: int = 2, table_side: int | None = None, text_width: int | None = None,
        pooled_width: int | None = None, text_length: int = 32, process: dict | None = None,
        text: list | None = None, noise_steps: int | None = None,
    ) -> None:  # fmt: skip
        config: dict[str, Any] = dict(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels,
            hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob, learn_sigma=learn_sigma, qk_norm=qk_norm,
            streams=streams, table_side=table_side, text_width=text_width,
            pooled_width=pooled_width, text_length=text_length, noise_steps=noise_steps,
        )  # fmt: skip
        super().__init__(config, process, text)
        if self.pooled_width is None:
            raise ValueError(
                f"text_width is {text_width} and pooled_width None, but MMDiT takes a vector of "
                "each caption, which CLIP gives and T5 alone does not; add a CLIP to the encoders"
            )
        self.noise_steps = noise_steps
        width = hidden_size
        table = torch.zeros(1, math.prod(self.grid), width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.words_embedder = nn.Linear(self.text_width, width)
        self.pooled_embedder = nn.Sequential(
            nn.Linear(self.pooled_width, width), nn.SiLU(), nn.Linear(width, width)
        )
        block = partial(JointBlock, width, num_heads, mlp_ratio, qk_norm, streams)
        self.blocks.extend(block(last=i == depth - 1) for i in range(depth))
        self.final_layer = MMDiTFinal(width, patch_size**2 * self.out_channels)
        self.initialize_common()
        # Every block begins as the identity, and the output as 0
        set_to_zero(self, ("_modulation.", "final_layer.linear."))
        if not self.pos_embed.is_meta:
            self.pos_embed.data.copy_(self.position_table(self.grid, self.pos_embed.double()))

    def position_table(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """What is added to the tokens of a grid, (1, T, D), of a tensor's dtype and device."""
        side = self.config["table_side"]
        most = self.grid if side is None else (side, side)
        found = of_middle(grid, most, self.grid, self.config["hidden_size"], like.device)
        return found.to(like.dtype).unsqueeze(0)  # (1, T, D)

    def placed(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) of latents x (N, C, H, W) with their positions added."""
        grid, kept = self.grid_seen(x), self.pos_embed
        table = kept if grid == self.grid else self.position_table(grid, kept)
        return self.x_embedder(x).to(kept.dtype) + table  # (N, T, D)

    def told(self, t: Tensor) -> Tensor:
        """Times (N,) as they are embedded."""
        return t if self.noise_steps is None else self.noise_steps * (1 - t)

    def forward(self, x: Tensor, t: Tensor, y: Text | None = None) -> Tensor:
        """Noisy latents x (N, C, H, W), times t (N,), captions y (N) → (N, C_out, H, W).

        Raises ValueError for an x or y of another shape.
        """
        text, tokens = self.read(y), self.placed(x)  # (N, T, D)
        if text.pooled is None:
            raise ValueError("the network takes a vector of each caption; y.pooled is missing")
        c = self.t_embedder(self.told(t)) + self.pooled_embedder(text.pooled)  # (N, D)
        words, mask = self.words_embedder(text.tokens), None  # (N, L, D)
        if text.mask is not None:
            seen = text.mask.new_ones(len(x), tokens.shape[1])
            mask = torch.cat([seen, text.mask], dim=1)[:, None, None]  # (N, 1, 1, T + L)
        for block in self.blocks:
            tokens, words = self.through(block, tokens, words, c, mask)
        return self.latents(self.final_layer(tokens, c), x)  # (N, C_out, H, W)


# Ti and XS are ours; the numbers are the paper's depths, of 64 times as wide networks (section 4),
# 24 that of the released medium one.
SIZES: dict[str, dict[str, Any]] = {
    "Ti": dict(depth=4, hidden_size=96, num_heads=3),
    "XS": dict(depth=5, hidden_size=160, num_heads=5),
} | {
    str(depth): dict(depth=depth, hidden_size=64 * depth, num_heads=depth)
    for depth in (15, 18, 21, 24, 30, 38)
}
MMDiT_models = {
    f"MMDiT-{size}/{patch}": partial(MMDiT, patch_size=patch, **sizes)
    for size, sizes in SIZES.items()
    for patch in ((1, 2, 4) if size == "Ti" else (2, 4))
}
