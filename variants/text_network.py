"""What networks that read captions share: sizes, embedders, and the way back to latents.

Shapes: N batch, C latent channels, (H, W) latent height and width, P patch size, D width, T tokens
of the image, L tokens of the text, E their width, V the width of a vector for the whole text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.guidance import guided
from layers.patches import unpatchify
from layers.positions import POSITIONS
from layers.sizes import check_text_sizes, grid_of, plain_size, sides
from layers.text import Text
from layers.text_encoder import PIECE, TextEncoder
from layers.time import TimestepEmbedder
from variants.initial import fill_as_vit


class TextNetwork(nn.Module):
    """A network of (x, t, y) with y a Text. A variant adds its blocks and its forward.

    text_width None: captions come as pieces, and a TextEncoder of the network's own reads them;
    else it is the width E of the tokens that come. pooled_width is that of their vectors.
    `config` holds the arguments that a variant was built with; `process` is what a checkpoint says
    that it learned, `text` what it says of the encoders: kept, both change nothing.
    """

    num_classes, null_label = 0, None  # it takes no labels
    positions = POSITIONS["table"]
    extrapolation: str | None = None  # None: a rule of its own places the tokens of other grids

    def __init__(self, config: dict[str, Any], process: dict | None, text: list | None) -> None:
        super().__init__()
        check_text_sizes(**config)
        size = plain_size(config["input_size"])
        self.config = {"_class_name": type(self).__name__} | config | {"input_size": size}
        self.input_size: int | Sequence[int] = self.config["input_size"]
        self.patch_size, self.in_channels = config["patch_size"], config["in_channels"]
        self.learn_sigma, self.process, self.text = config["learn_sigma"], process, text
        self.out_channels = self.in_channels * (2 if self.learn_sigma else 1)
        self.text_length = config["text_length"]
        self.grad_checkpointing = False  # True saves memory: the backward pass runs blocks again
        width, own = config["hidden_size"], config["text_width"] is None
        self.text_width = width if own else config["text_width"]
        self.pooled_width: int | None = width if own else config.get("pooled_width")
        self.x_embedder = PatchEmbed(None, self.patch_size, self.in_channels, width)  # of any grid
        self.t_embedder = TimestepEmbedder(width)
        self.text_encoder = TextEncoder(width, self.text_length) if own else None
        self.blocks = nn.ModuleList()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample that the network was trained on, (C, H, W)."""
        return self.in_channels, *sides(self.input_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of such a sample."""
        height, width = sides(self.input_size)
        return height // self.patch_size, width // self.patch_size

    def read(self, y: Text | None) -> Text:
        """The text as an encoder gives it. Raises ValueError for none, or one of another kind."""
        if not isinstance(y, Text):
            raise ValueError("the network reads captions but y is no Text; pass y=Text(...)")
        if self.text_encoder is not None:
            self._check_pieces(y)
            return self.text_encoder(y)
        if y.tokens.dim() != 3 or y.tokens.shape[-1] != self.text_width:
            raise ValueError(
                f"y.tokens has shape {tuple(y.tokens.shape)}, the network takes (N, L, "
                f"{self.text_width})"
            )
        return y

    def _check_pieces(self, y):
        length, shape = self.text_length, tuple(y.tokens.shape)
        right = len(shape) == 3 and 1 <= shape[1] <= length and shape[2] == PIECE
        if not right or y.tokens.dtype != torch.int64 or y.mask is None:
            raise ValueError(
                f"y.tokens has shape {shape} and {y.tokens.dtype}, and the network's own encoder "
                f"takes pieces (N, {length}, {PIECE}), torch.int64, with a mask; make them by "
                f"conditions.text.pieces(captions, {length})"
            )

    def grid_seen(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of x. Raises ValueError for an x that does not fit."""
        return grid_of(x.shape, self.in_channels, self.patch_size)

    def latents(self, patches: Tensor, like: Tensor) -> Tensor:
        """Patches (N, T, P·P·C_out) as latents (N, C_out, H, W)."""
        return unpatchify(patches, self.patch_size, self.grid_seen(like))

    def through(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """What a block returns, computed again in the backward pass if grad_checkpointing says so.
        """
        if self.grad_checkpointing and self.training:  # a block draws nothing: no random state
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Text, cfg_scale: float, cfg_channels: int | str = "all"
    ) -> Tensor:
        """The output (2N, C_out, H, W), guided as layers.guidance.guided says. y (2N) holds N
        captions and then the N to be guided against.
        """
        return guided(self, x, t, y, cfg_scale, cfg_channels)

    def initialize_common(self) -> None:
        """Fill every parameter as in a ViT; a variant sets to zero what begins at zero."""
        fill_as_vit(self)
        if self.text_encoder is not None:
            nn.init.normal_(self.text_encoder.bytes, std=0.02)
            nn.init.normal_(self.text_encoder.places, std=0.02)
