"""Clips as tokens of space and time, and DiT's blocks over them: attention in the frames, along
them, or over all.

Shapes: N clips, C latent channels, F frames, (H, W) latent height and width, P patch size, D width;
S tokens along the frames, F divided by the patch's frames, and T = (H/P)·(W/P) in each.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.attention import CrossAttention
from layers.clips import clips_of
from layers.layout import ALONE
from layers.modulation import Modulation, modulated
from layers.parts import Parts
from layers.patches import unpatchify
from layers.placement import Placement
from layers.positions import POSITIONS, line_table, of_box, of_line, turned
from layers.sizes import box_of, sides


class Axis(NamedTuple):
    """Which tokens attend to each other: `rows` makes of tokens (N, S, T, D) rows (R, L, D) that
    attend to each other, `back` of rows and the shape (N, S, T, D) tokens again.
    """

    rows: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, torch.Size], Tensor]


AXES = {
    "space": Axis(
        lambda x: x.flatten(0, 1),  # (N·S, T, D)
        lambda x, shape: x.unflatten(0, shape[:2]),  # (N, S, T, D)
    ),
    "time": Axis(
        lambda x: x.transpose(1, 2).flatten(0, 1),  # (N·T, S, D)
        lambda x, shape: x.unflatten(0, (shape[0], shape[2])).transpose(1, 2),  # (N, S, T, D)
    ),
    "both": Axis(
        lambda x: x.flatten(1, 2),  # (N, S·T, D)
        lambda x, shape: x.unflatten(1, shape[1:3]),  # (N, S, T, D)
    ),
}


class Kind(NamedTuple):
    """How a network sees space and time: the axes of its blocks, in turn; those of them whose
    queries and keys are rotated; whether tables of places in the frame, and of frames, are added.
    """

    axes: tuple[str, ...]
    rotated: tuple[str, ...]
    table: bool
    table_of_frames: bool


# latte: Ma et al. 2024, variant 1, with a table of frames. alternate: the same, but attention
# along the frames rotates, so that without its blocks every frame is what DiT makes of it.
# full: all tokens attend to all, rotated by frame, row and column, as in CogVideoX (2024).
KINDS = {
    "latte": Kind(("space", "time"), (), True, True),
    "alternate": Kind(("space", "time"), ("time",), True, False),
    "full": Kind(("both",), ("both",), False, False),
}


class SpaceTimeBlock(nn.Module):
    """DiT's adaLN-Zero block, whose attention goes along an axis of AXES. With `reads_text` tokens
    then attend to those of a caption.
    """

    def __init__(
        self, axis: str, parts: Parts, width: int, heads: int, mlp_ratio: float, reads_text: bool
    ) -> None:
        super().__init__()
        self.axis = axis
        self.norm1 = parts.make_norm(width, own_weights=False)
        self.attn = parts.make_attention(width, heads)
        self.cross_attn = CrossAttention(width, heads) if reads_text else None
        self.norm2 = parts.make_norm(width, own_weights=False)
        self.mlp = parts.make_mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = Modulation(width, 6)

    def forward(
        self, x: Tensor, c: Tensor, rope: Tensor | None, words: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Tokens x (N, S, T, D), c (N, S, D), or (N, 1, D) where all frames have one; rope
        (L, 2·head) for rows of L tokens, words (N, L, D) and their mask (N, 1, 1, L) or None →
        (N, S, T, D).
        """
        axis = AXES[self.axis]
        vectors = self.adaLN_modulation(c).unsqueeze(2)  # (N, S or 1, 1, 6·D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors.chunk(6, dim=-1)
        rows = axis.rows(modulated(self.norm1(x), shift, scale))
        seen = self.attn(rows, **ALONE.rotated(rope).attention)
        x = x + gate * axis.back(seen, x.shape)  # (N, S, T, D)
        if self.cross_attn is not None:
            x = x + self.cross_attn(x.flatten(1, 2), words, mask).view_as(x)
        return x + mlp_gate * self.mlp(modulated(self.norm2(x), mlp_shift, mlp_scale))


class SpaceTimeFinal(nn.Module):
    """The last adaLN, and the linear map from a token to its patch."""

    def __init__(self, parts: Parts, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = parts.make_norm(width, own_weights=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (N, S, T, D) and c (N, S or 1, D) → patches (N, S, T, outputs)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(2).chunk(2, dim=-1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


def frozen(count: int, width: int) -> nn.Parameter:
    """A table (1, count, width) of zeros that is not trained."""
    return nn.Parameter(torch.zeros(1, count, width), requires_grad=False)


class SpaceTime:
    """What networks of clips share: tokens, blocks and the way back. A mixin of nn.Modules that
    have `config`, a `t_embedder`, and the attributes below.
    """

    config: dict[str, Any]
    input_size: Any
    in_channels: int
    out_channels: int
    patch_size: int
    grad_checkpointing: bool
    training: bool
    extrapolation: str | None
    t_embedder: Any

    def build(self, reads_text: bool) -> None:
        """Make all parts that see clips."""
        config = self.config
        width, heads = config["hidden_size"], config["num_heads"]
        self.frames, self.patch_frames = config["frames"], config["patch_frames"]
        self.kind = KINDS[config["attention"]]
        # Where tokens of another grid are: a table is spread over it; rotations go on, by a rule of
        # their own
        self.extrapolation = "interpolate" if self.kind.table else None
        self.positions = POSITIONS["table" if self.kind.table else "rope"]
        channels = self.in_channels * self.patch_frames
        self.x_embedder = PatchEmbed(None, self.patch_size, channels, width)  # of any grid
        count = self.frames // self.patch_frames
        self.pos_embed = frozen(math.prod(self.grid), width) if self.kind.table else None
        self.temp_embed = frozen(count, width) if self.kind.table_of_frames else None
        blocks = (
            self._block(self.kind.axes[i % len(self.kind.axes)], reads_text)
            for i in range(config["depth"])
        )
        self.blocks = nn.ModuleList(blocks)
        outputs = self.patch_size**2 * self.patch_frames * self.out_channels
        self.final_layer = SpaceTimeFinal(self._parts(False), width, outputs)
        self.head = width // heads
        self.fill_tables()

    def fill_tables(self) -> None:
        """Fill the frozen tables, which on "meta" have no memory."""
        if self.pos_embed is not None and not self.pos_embed.is_meta:
            exact = self.placement(torch.float64)
            table = exact.of_grid(self.grid, self.pos_embed.shape[-1], self.pos_embed.device)
            self.pos_embed.data.copy_(table)
        if self.temp_embed is not None and not self.temp_embed.is_meta:
            count, width = self.temp_embed.shape[1:]
            table = line_table(count, width, torch.float64, self.temp_embed.device)
            self.temp_embed.data.copy_(table)

    def placement(self, kind: torch.dtype) -> Placement:
        """How tokens are told where they are in their frame, in numbers of this kind."""
        assert self.extrapolation is not None  # `build` has set it
        return Placement(POSITIONS["table"], self.grid, self.head, self.extrapolation, kind)

    def _parts(self, rotates: bool) -> Parts:
        return Parts(positions="rope" if rotates else "table", qk_norm=self.config["qk_norm"])

    def _block(self, axis: str, reads_text: bool) -> SpaceTimeBlock:
        width, heads, ratio = (
            self.config[name] for name in ("hidden_size", "num_heads", "mlp_ratio")
        )
        words, parts = reads_text and axis != "time", self._parts(axis in self.kind.rotated)
        return SpaceTimeBlock(axis, parts, width, heads, ratio, words)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one clip that the network was trained on, (C, F, H, W)."""
        return self.in_channels, self.frames, *sides(self.input_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of a frame of such a clip."""
        height, width = sides(self.input_size)
        return height // self.patch_size, width // self.patch_size

    def box_seen(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of x. Raises ValueError for an x that does not fit."""
        return box_of(x.shape, self.in_channels, self.patch_size, self.patch_frames)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (N, S, T, D) of clips x (N, C, F, H, W), with their places in the frame added.

        Raises ValueError for an x that does not fit.
        """
        count, rows, columns = self.box_seen(x)
        tubes = x.transpose(1, 2).unflatten(1, (count, self.patch_frames))  # (N, S, P_F, C, H, W)
        images = tubes.flatten(2, 3).flatten(0, 1)  # (N·S, P_F·C, H, W)
        embedded, kind = self.x_embedder(images), self.x_embedder.proj.weight.dtype
        if self.kind.table:
            place = self.placement(kind)
            embedded, _ = place.in_images(embedded, (rows, columns), self.pos_embed)
        return embedded.to(kind).unflatten(0, (len(x), count))  # (N, S, T, D)

    def embedded_times(self, t: Tensor, frames: int) -> Tensor:
        """Times (N,), or (N, F) of each of so many frames, as vectors (N, 1, D) or (N, S, D). A
        patch of several frames has the mean of their times. Raises ValueError for other shapes.
        """
        if t.dim() == 1:
            return self.t_embedder(t).unsqueeze(1)  # (N, 1, D)
        if t.dim() != 2 or t.shape[1] != frames:
            raise ValueError(
                f"t has shape {tuple(t.shape)}, the network takes (N,), or (N, {frames}): a time "
                "of each frame"
            )
        if self.patch_frames > 1:
            t = t.unflatten(1, (-1, self.patch_frames)).float().mean(dim=2)  # (N, S)
        return self.t_embedder(t.flatten()).unflatten(0, t.shape)  # (N, S, D)

    def ropes(self, box: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        """{axis: how its rows are rotated, (L, 2·head)} of clips with so many tokens."""
        exact = torch.promote_types(self.x_embedder.proj.weight.dtype, torch.float32)
        make = {
            "time": lambda: turned(of_line(box[0], self.head // 2, exact, device)),
            "both": lambda: of_box(box, self.head, exact, device),
        }
        return {axis: make[axis]() for axis in self.kind.rotated}

    def predicted(
        self, x: Tensor, t: Tensor, of_y: Tensor | None, words: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The output (N, C_out, F, H, W) for clips x (N, C, F, H, W), times t (N,) or (N, F), and
        what is said of them: vectors of_y (N, D), and words (N, L, D) with their mask
        (N, 1, 1, L), or None.
        """
        tokens, box = self.tokens(x), self.box_seen(x)  # (N, S, T, D)
        c = self.embedded_times(t, x.shape[2])  # (N, S or 1, D)
        if of_y is not None:
            c = c + of_y.unsqueeze(1)  # (N, S or 1, D)
        ropes = self.ropes(box, x.device)
        for i, block in enumerate(self.blocks):
            axis = self.kind.axes[i % len(self.kind.axes)]
            if i == 1 and self.temp_embed is not None and box[0] > 1:  # an image has no frames
                tokens = tokens + self.placed_frames(box[0])
            tokens = self.run(block, tokens, c, ropes.get(axis), words, mask)
        return self.clips(self.final_layer(tokens, c), box)  # (N, C_out, F, H, W)

    def placed_frames(self, count: int) -> Tensor:
        """What is added to the tokens of so many frames, (S, 1, D)."""
        assert self.temp_embed is not None
        kept = self.temp_embed[0]
        if count > len(kept):
            exact = torch.promote_types(kept.dtype, torch.float32)
            kept = line_table(count, kept.shape[1], exact, kept.device).to(kept.dtype)  # (S, D)
        return kept[:count].unsqueeze(1)  # (S, 1, D)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """What a block returns, computed again in the backward pass if grad_checkpointing says so.
        """
        if self.grad_checkpointing and self.training:  # a block draws nothing: no random state
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def clips(self, patches: Tensor, box: tuple[int, int, int]) -> Tensor:
        """Patches (N, S, T, P·P·P_F·C_out) as clips (N, C_out, F, H, W)."""
        images = unpatchify(patches.flatten(0, 1), self.patch_size, box[1:])  # (N·S, P_F·C, H, W)
        frames = images.unflatten(1, (self.patch_frames, -1)).flatten(0, 1)  # (N·F, C_out, H, W)
        return clips_of(frames, box[0] * self.patch_frames)  # (N, C_out, F, H, W)
