"""DiT, the network of Peebles & Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023).

All of it, in reading order: modulation, embedders, block designs, final layers, DiT, sizes. What a
DiT may have instead of the paper's parts is in layers/.

Shapes: N batch, C latent channels, (H, W) latent height and width, P patch size, D width,
T = (H/P)·(W/P) tokens. Two designs take the embeddings of t and y as two tokens. A network without
classes embeds t alone, so it has one such token instead of two.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.attention import CrossAttention
from layers.guidance import guided
from layers.labels import LabelEmbedder
from layers.layout import ALONE, Layout
from layers.modulation import Modulation, modulated
from layers.packing import Packed
from layers.parts import DEFAULTS, PAPERS, Parts
from layers.patches import unpatchify
from layers.placement import Placement
from layers.positions import POSITIONS
from layers.sizes import check_choice, check_sizes, grid_of, plain_size, sides
from layers.time import TimestepEmbedder


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) times 1 + scale, plus shift; both are (N, D), the same for every token."""
    return modulated(x, shift.unsqueeze(1), scale.unsqueeze(1))


class Block(nn.Module):
    """Tokens x (R, L, D) → (R, L, D) by attention and an MLP, with a norm before each.

    The designs share this; each adds its way for the condition c to reach the tokens. Rows hold an
    image each, (N, T, D), unless a Layout says otherwise.
    """
    own_norms = False  # whether LayerNorms have weights, as in any ViT; else adaLN supplies them
    vectors = 0  # how many vectors (N, D) a block's own regression makes of c

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, parts: Parts = PAPERS
    ) -> None:
        super().__init__()
        self.norm1 = parts.make_norm(hidden_size, self.own_norms)
        self.attn = parts.make_attention(hidden_size, num_heads)
        self.norm2 = parts.make_norm(hidden_size, self.own_norms)
        self.mlp = parts.make_mlp(hidden_size, int(hidden_size * mlp_ratio))
        if self.vectors:
            self.adaLN_modulation = Modulation(hidden_size, self.vectors)

    def gated(self, x: Tensor, vectors: Tensor, layout: Layout) -> Tensor:
        """x past attention and MLP, each with shift, scale and gate from the vectors (N, 6·D)."""
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = layout.spread(
            vectors).chunk(6, dim=-1)  # (N, 1, D) each
        seen = modulated(self.norm1(x), attn_shift, attn_scale)
        x = x + attn_gate * self.attn(seen, **layout.attention)
        return x + mlp_gate * self.mlp(modulated(self.norm2(x), mlp_shift, mlp_scale))


class DiTBlock(Block):
    """adaLN-Zero: c gives shift, scale and gate for the attention and for the MLP.

    The gates start at 0, so the block starts as the identity (section 3.2).
    """
    vectors = 6

    def forward(self, x: Tensor, c: Tensor, layout: Layout = ALONE) -> Tensor:
        return self.gated(x, self.adaLN_modulation(c), layout)  # c (N, D)


class AdaLNBlock(Block):
    """adaLN: c gives shift and scale, twice, but no gates. It starts as a ViT block does."""
    vectors = 4

    def forward(self, x: Tensor, c: Tensor, layout: Layout = ALONE) -> Tensor:
        vectors = layout.spread(self.adaLN_modulation(c))  # (N, D) → (N, 1, 4·D)
        attn_shift, attn_scale, mlp_shift, mlp_scale = vectors.chunk(4, dim=-1)
        seen = modulated(self.norm1(x), attn_shift, attn_scale)
        x = x + self.attn(seen, **layout.attention)
        return x + self.mlp(modulated(self.norm2(x), mlp_shift, mlp_scale))


class AdaLNSingleBlock(Block):
    """adaLN-single (PixArt-α, Chen et al. 2023, section 2.3): c is six vectors for all blocks.

    DiT regresses them. A block adds a table of its own, and starts as the identity.
    """

    def __init__(self, hidden_size: int, *others: Any) -> None:
        super().__init__(hidden_size, *others)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size))

    def forward(self, x: Tensor, c: Tensor, layout: Layout = ALONE) -> Tensor:
        return self.gated(x, c + self.scale_shift_table.flatten(), layout)  # c (N, 6·D)


class CrossAttentionBlock(Block):
    """Cross-attention: after self-attention the tokens attend to the embeddings of t and y."""
    own_norms = True

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, parts: Parts = PAPERS
    ) -> None:
        super().__init__(hidden_size, num_heads, mlp_ratio, parts)
        self.norm_cross = parts.make_norm(hidden_size)
        self.cross_attn = CrossAttention(hidden_size, num_heads)

    def forward(self, x: Tensor, c: Tensor, layout: Layout = ALONE) -> Tensor:
        x = x + self.attn(self.norm1(x), **layout.attention)
        x = x + self.cross_attn(self.norm_cross(x), c)  # c (N, 2, D)
        return x + self.mlp(self.norm2(x))


class InContextBlock(Block):
    """In-context conditioning: a plain ViT block. Embeddings of t and y are two of its tokens."""
    own_norms = True

    def forward(self, x: Tensor, c: Tensor | None, layout: Layout = ALONE) -> Tensor:
        x = x + self.attn(self.norm1(x), **layout.attention)  # x has what c would tell
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """The last adaLN (shift and scale, no gate) and the linear map from a token to its patch."""
    own_norms, vectors = False, 2  # as in Block

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, parts: Parts = PAPERS
    ) -> None:
        super().__init__()
        self.norm_final = parts.make_norm(hidden_size, self.own_norms)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        if self.vectors:
            self.adaLN_modulation = Modulation(hidden_size, self.vectors)

    def forward(self, x: Tensor, c: Tensor, layout: Layout = ALONE) -> Tensor:
        """Tokens x (N, T, D) and condition c (N, D) → patches (N, T, P·P·C_out)."""
        shift, scale = layout.spread(self.adaLN_modulation(c)).chunk(2, dim=-1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


class ViTFinalLayer(FinalLayer):
    """The last LayerNorm, with its own weights, and the linear map: for designs without adaLN."""
    own_norms, vectors = True, 0

    def forward(self, x: Tensor, c: Tensor | None, layout: Layout = ALONE) -> Tensor:
        """Tokens x (N, T, D) → patches (N, T, P·P·C_out); c is not looked at."""
        return self.linear(self.norm_final(x))


# From tokens x (N, T, D) and the embeddings of t and y, (N, D) each, to x and c for the blocks.
def summed(x: Tensor, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
    """x, and as c (N, D) the embeddings' sum."""
    return x, reduce(torch.add, embeddings)


def beside(x: Tensor, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
    """x, and as c (N, 2, D) the embeddings in a sequence."""
    return x, torch.stack(embeddings, dim=1)


def appended(x: Tensor, embeddings: list[Tensor]) -> tuple[Tensor, None]:
    """x with the embeddings as two more tokens (N, T + 2, D), and no c."""
    return torch.cat([x, torch.stack(embeddings, dim=1)], dim=1), None


class Design(NamedTuple):
    """How t and y reach the tokens: `condition` makes the blocks' x and c of their embeddings.

    With shared_vectors DiT regresses so many vectors from c, and the blocks take these for c.
    """
    block: type[Block]
    final_layer: type[FinalLayer]
    condition: Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor | None]]
    shared_vectors: int = 0


# The paper's designs (section 3.2, figure 5), and PixArt-α's; checkpoints.design_of knows them
BLOCKS = {
    "adaln_zero": Design(DiTBlock, FinalLayer, summed),
    "adaln": Design(AdaLNBlock, FinalLayer, summed),
    "cross_attention": Design(CrossAttentionBlock, ViTFinalLayer, beside),
    "in_context": Design(InContextBlock, ViTFinalLayer, appended),
    "adaln_single": Design(AdaLNSingleBlock, FinalLayer, summed, shared_vectors=6),
}


class DiT(nn.Module):
    """Predicts the noise in a latent and, with learn_sigma, the variance of p(x_{t-1} | x_t).

    `input_size` is the latents' side, or (height, width): the grid of tokens that it is trained on.
    It takes others too, tokens placed as `extrapolation` says, a name of EXTRAPOLATIONS (None:
    "extend" with positions="rope", else "interpolate"). `block` names a design of BLOCKS,
    `positions`, `norm` and `mlp` rows of POSITIONS, NORMS and MLPS; qk_norm normalises queries and
    keys. num_classes=0 makes an unconditional network, called with y=None. `process` is what a
    checkpoint's config says that it learned: kept, it changes nothing. `config` holds all other
    arguments, the last five where they are not the defaults: DiT(**model.config) builds the same
    network. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self, input_size: int | Sequence[int] = 32, patch_size: int = 2, in_channels: int = 4,
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, num_classes: int = 1000, learn_sigma: bool = True,
        block: str = "adaln_zero", process: dict | None = None, positions: str = "table",
        norm: str = "layer", mlp: str = "gelu", qk_norm: bool = False,
        extrapolation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = dict(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels,
            hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob, num_classes=num_classes,
            learn_sigma=learn_sigma, block=block,
        )  # fmt: skip
        parts = Parts(positions, norm, mlp, qk_norm)
        others = parts._asdict() | {"extrapolation": extrapolation}
        check_choice("block", block, BLOCKS)
        check_sizes(**self.config, **others)
        self.config["input_size"] = self.input_size = plain_size(input_size)
        self.config |= {name: value for name, value in others.items() if value != DEFAULTS[name]}
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.learn_sigma, self.process = learn_sigma, process
        self.positions, self.design = POSITIONS[positions], BLOCKS[block]
        self.extrapolation = extrapolation or self.positions.extrapolation
        self.grad_checkpointing = False  # True saves memory: the backward pass runs blocks again
        self.out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(None, patch_size, in_channels, hidden_size)  # of any grid
        self.t_embedder = TimestepEmbedder(hidden_size)
        label_table = partial(LabelEmbedder, num_classes, hidden_size, class_dropout_prob)
        self.y_embedder = label_table() if num_classes else None
        table = torch.zeros(1, math.prod(self.grid), hidden_size)
        has_table = self.positions.has_table
        self.pos_embed = nn.Parameter(table, requires_grad=False) if has_table else None
        shared = self.design.shared_vectors
        self.shared_modulation = Modulation(hidden_size, shared) if shared else nn.Identity()
        block_of_design = partial(self.design.block, hidden_size, num_heads, mlp_ratio, parts)
        self.blocks = nn.ModuleList(block_of_design() for _ in range(depth))
        last = hidden_size, patch_size, self.out_channels, parts
        self.final_layer = self.design.final_layer(*last)
        self.initialize_weights()

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None if the network has none."""
        return self.y_embedder.null_label if self.y_embedder else None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample that the network was trained on, (C, H, W)."""
        return self.in_channels, *sides(self.input_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of such a sample."""
        height, width = sides(self.input_size)
        return height // self.patch_size, width // self.patch_size

    def initialize_weights(self) -> None:
        """Fill every parameter; afterwards the output is 0.

        adaLN-Zero's regressions and the last Linear start at zero, the rest as in a ViT (sections
        3.2 and 4). The papers do not say how the regressions of adaLN and adaLN-single start; here
        they start at zero as well. So each block of adaln_zero and adaln_single is the identity,
        and in_context, cross_attention and adaln start as ViT blocks.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        patch_to_token = self.x_embedder.proj
        nn.init.xavier_uniform_(patch_to_token.weight.flatten(1))  # as a Linear (D, C·P·P)
        nn.init.zeros_(patch_to_token.bias)

        label_table = [self.y_embedder.embedding_table] if self.y_embedder else []
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], *label_table):
            nn.init.normal_(module.weight, std=0.02)  # type: ignore[arg-type]
        at_zero = ("final_layer.linear.", "_modulation.", ".scale_shift_table")
        for name, parameter in self.named_parameters():
            if any(part in name for part in at_zero):
                nn.init.zeros_(parameter)

        # On "meta" it has no memory to fill, and the table can take seconds
        if self.pos_embed is not None and not self.pos_embed.is_meta:
            table = get_2d_sincos_pos_embed(self.pos_embed.shape[-1], self.grid)
            self.pos_embed.data.copy_(torch.from_numpy(table))

    def embed_conditions(self, t: Tensor, y: Tensor | None, drop: Tensor | None) -> list[Tensor]:
        """Embeddings (N, D) of t and, with classes, y. ValueError for a y missing or needless."""
        if (y is None) != (self.y_embedder is None):
            what = "missing; pass y=labels of shape (N,)" if y is None else "given; pass y=None"
            raise ValueError(f"the network has num_classes={self.num_classes} but y is {what}")
        of_t = self.t_embedder(t)
        return [of_t, self.y_embedder(y, self.training, drop)] if self.y_embedder else [of_t]

    def tokens(self, x: Tensor | Packed) -> tuple[Tensor, Layout]:
        """Tokens (N, T, D) of latents, or (R, L, D) of packed ones, with their positions added; and
        their Layout. Raises ValueError for latents that do not fit.
        """
        head = self.config["hidden_size"] // self.config["num_heads"]
        kind = self.x_embedder.proj.weight.dtype
        placement = Placement(self.positions, self.grid, head, self.extrapolation, kind)
        if isinstance(x, Packed):
            if self.design.condition is not summed:  # one c for each image
                raise ValueError(f"blocks of {self.config['block']} do not take packed images")
            tokens = self.x_embedder(x.tokens.flatten(0, 1)).view(*x.image.shape, -1)  # (R, L, D)
            return placement.in_rows(tokens, x, self.pos_embed)
        grid = grid_of(x.shape, self.in_channels, self.patch_size)
        return placement.in_images(self.x_embedder(x), grid, self.pos_embed)

    def unpatchify(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Patches (N, T, P·P·C_out) → (N, C_out, H, W): tokens row by row, channels innermost; grid
        is their rows and columns, None for the trained ones.
        """
        return unpatchify(x, self.patch_size, grid or self.grid)

    def images(self, patches: Tensor, like: Tensor | Packed) -> Tensor:
        """Patches (N, T, P·P·C_out) as latents (N, C_out, H, W), or packed, (R, L, C_out, P, P)."""
        p = self.patch_size
        if isinstance(like, Packed):
            return patches.unflatten(-1, (p, p, -1)).permute(0, 1, 4, 2, 3)  # (R, L, C_out, P, P)
        return self.unpatchify(patches, (like.shape[2] // p, like.shape[3] // p))

    def forward(
        self, x: Tensor | Packed, t: Tensor, y: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Noisy latents x (N, C, H, W), steps t (N,), labels y (N,) → (N, C_out, H, W).

        The output is the predicted noise and, with learn_sigma, C more channels: the fraction v in
        [-1, 1] (not enforced) between the two bounds of the log variance. A label whose entry in
        force_drop_ids (N,) is 1 is dropped. H and W are any that patches fill; N packed latents
        come back as patches (R, L, C_out, P, P). Raises ValueError for an x of another shape.
        """
        embeddings = self.embed_conditions(t, y, force_drop_ids)
        tokens, layout = self.tokens(x)  # (N, T, D)
        count = tokens.shape[1]
        tokens, c = self.design.condition(tokens, embeddings)
        layout = layout.appended(tokens.shape[1] - count)
        given = self.shared_modulation(c)  # c itself, but (N, 6·D) in adaln_single
        for block in self.blocks:
            if self.grad_checkpointing and self.training:  # a block draws nothing: no random state
                tokens = checkpoint(
                    block, tokens, given, layout, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, given, layout)
        tokens = tokens[:, :count]  # (N, T, D), without what in_context appended
        return self.images(self.final_layer(tokens, c, layout), x)  # (N, C_out, H, W)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | str = 3
    ) -> Tensor:
        """The output (2N, C_out, H, W), its noise guided: null + cfg_scale·(cond - null).

        The formula is eq. 6 of Ho & Salimans 2022. The batch is doubled: y (2N,) holds N labels and
        then N null labels, t (2N,) the same N steps twice. Both halves are evaluated on the first
        half of x (2N, C, H, W). The first cfg_channels channels of the noise are guided, at most
        in_channels; "all" stands for in_channels. Guided channels come back equal in both halves;
        every other channel stays the half's own. The released samples were made with three.
        Raises ValueError for a network without null label, an odd batch and other cfg_channels.
        """
        if self.null_label is None:
            raise ValueError("guidance needs a null label, which a network with "
                             "class_dropout_prob=0 or num_classes=0 lacks")  # fmt: skip
        return guided(self, x, t, y, cfg_scale, cfg_channels)


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | Sequence[int]) -> np.ndarray:
    """The frozen position table, a float64 array (T, embed_dim), tokens row by row.

    grid_size is (rows, columns), or the side of a square.

    The first half of the columns encodes the token's column in the grid, the second half its row.
    Each half holds sines and then cosines at frequencies 10000^(-i/(embed_dim/4)) (Vaswani et al.
    2017, section 3.5, once per axis). Raises ValueError unless embed_dim is a multiple of 4.
    """
    if embed_dim % 4:
        why = "a sine and a cosine for each of two axes need a multiple of 4"
        raise ValueError(f"embed_dim is {embed_dim}; {why}")
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    angles = np.outer(np.arange(max(rows, columns)), frequencies)  # (longer side, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (longer side, D/2)
    by_column = np.tile(axis[:columns], (rows, 1))  # (T, D/2)
    by_row = np.repeat(axis[:rows], columns, axis=0)  # (T, D/2)
    return np.concatenate([by_column, by_row], axis=1)  # (T, D)


# Ti and XS are ours, for CPUs and lessons; the others are the paper's Table 1.
SIZES: dict[str, dict[str, Any]] = {
    "Ti": dict(depth=6, hidden_size=128, num_heads=4),
    "XS": dict(depth=6, hidden_size=160, num_heads=5),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
PATCH_SIZES = {"Ti": (1, 2, 4, 8), "XS": (2,)} | dict.fromkeys(("S", "B", "L", "XL"), (2, 4, 8))

# "DiT-XL/2" → a factory that takes DiT's other arguments as keywords.
DiT_models = {
    f"DiT-{size}/{patch}": partial(DiT, patch_size=patch, **SIZES[size])
    for size in SIZES for patch in PATCH_SIZES[size]  # fmt: skip
}
DiT_XL_2, DiT_XL_4, DiT_XL_8 = (DiT_models[f"DiT-XL/{patch}"] for patch in PATCH_SIZES["XL"])
DiT_L_2, DiT_L_4, DiT_L_8 = (DiT_models[f"DiT-L/{patch}"] for patch in PATCH_SIZES["L"])
DiT_B_2, DiT_B_4, DiT_B_8 = (DiT_models[f"DiT-B/{patch}"] for patch in PATCH_SIZES["B"])
DiT_S_2, DiT_S_4, DiT_S_8 = (DiT_models[f"DiT-S/{patch}"] for patch in PATCH_SIZES["S"])
DiT_XS_2 = DiT_models["DiT-XS/2"]
DiT_Ti_1, DiT_Ti_2, DiT_Ti_4, DiT_Ti_8 = (DiT_models[f"DiT-Ti/{p}"] for p in PATCH_SIZES["Ti"])
