"""Networks of clips (SpaceTime) that take class labels, as Latte (Ma et al. 2024), or captions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from layers.guidance import guided
from layers.labels import LabelEmbedder
from layers.sizes import check_choice, check_clip_sizes, check_sizes, plain_size
from layers.text import Text
from layers.time import TimestepEmbedder
from variants.initial import fill_as_vit, set_to_zero
from variants.space_time import KINDS, SpaceTime
from variants.text_network import TextNetwork

# With these at zero every block begins as the identity, and the output as 0
AT_ZERO = ("_modulation.", "cross_attn.proj.", "final_layer.linear.")


def check_kind(config: dict[str, Any]) -> None:
    """Raise ValueError for arguments that networks of clips alone have and that do not fit."""
    check_choice("attention", config["attention"], KINDS)
    check_clip_sizes(**config, rotates=bool(KINDS[config["attention"]].rotated))


class VideoDiT(SpaceTime, nn.Module):
    """Predicts what a process asks for from clips x, times t and labels y.

    `input_size` is the latents' side, or (height, width), and `frames` their number, that it is
    trained on; it takes others. A patch has patch_frames frames. `attention` is a name of KINDS, of
    whose axes the `depth` blocks take turns. num_classes=0: no labels, y is None. `process` is what
    a checkpoint says that it learned: kept, it changes nothing. Raises ValueError for sizes that do
    not fit. Its names of weights are DiT's and, in "latte", temp_embed.
    """

    def __init__(
        self, input_size: int | Sequence[int] = 32, frames: int = 16, patch_size: int = 2,
        patch_frames: int = 1, in_channels: int = 4, hidden_size: int = 1152, depth: int = 28,
        num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1,
        num_classes: int = 1000, learn_sigma: bool = True, attention: str = "alternate",
        qk_norm: bool = False, process: dict | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config: dict[str, Any] = dict(
            input_size=input_size, frames=frames, patch_size=patch_size,
            patch_frames=patch_frames, in_channels=in_channels, hidden_size=hidden_size,
            depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob, num_classes=num_classes,
            learn_sigma=learn_sigma, attention=attention, qk_norm=qk_norm,
        )  # fmt: skip
        check_sizes(**config)
        check_kind(config)
        size = plain_size(input_size)
        self.config = {"_class_name": type(self).__name__} | config | {"input_size": size}
        self.input_size, self.patch_size, self.in_channels = size, patch_size, in_channels
        self.num_classes, self.learn_sigma, self.process = num_classes, learn_sigma, process
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grad_checkpointing = False  # True saves memory: the backward pass runs blocks again
        self.t_embedder = TimestepEmbedder(hidden_size)
        labels = partial(LabelEmbedder, num_classes, hidden_size, class_dropout_prob)
        self.y_embedder = labels() if num_classes else None
        self.build(reads_text=False)
        fill_as_vit(self)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        set_to_zero(self, AT_ZERO)

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None if the network has none."""
        return self.y_embedder.null_label if self.y_embedder else None

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, force_drop_ids: Tensor | None = None
    ) -> Tensor:
        """Noisy clips x (N, C, F, H, W), times t (N,), or (N, F) of each frame, labels y (N,) →
        (N, C_out, F, H, W).

        A label whose entry in force_drop_ids (N,) is 1 is dropped. Raises ValueError for an x of
        another shape, and a y that is missing or needless.
        """
        if (y is None) != (self.y_embedder is None):
            what = "missing; pass y=labels of shape (N,)" if y is None else "given; pass y=None"
            raise ValueError(f"the network has num_classes={self.num_classes} but y is {what}")
        of_y = self.y_embedder(y, self.training, force_drop_ids) if self.y_embedder else None
        return self.predicted(x, t, of_y)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | str = "all"
    ) -> Tensor:
        """The output (2N, C_out, F, H, W), guided as layers.guidance.guided says. y (2N,) holds N
        labels and then N null labels. Raises ValueError for a network without null label.
        """
        if self.null_label is None:
            raise ValueError(
                "guidance needs a null label, which a network with `class_dropout_prob=0` or "
                "`num_classes=0` lacks"
            )
        return guided(self, x, t, y, cfg_scale, cfg_channels)


class TextVideo(SpaceTime, TextNetwork):
    """Predicts what a process asks for from clips x, times t and captions y, a Text.

    Arguments as VideoDiT's; those of captions as MMDiT's: text_width and pooled_width None means an
    encoder of the network's own. Blocks over space, or over all, attend to the caption's tokens,
    and its vector, where it has one, is added to the embedding of t.
    """

    def __init__(
        self, input_size: int | Sequence[int] = 32, frames: int = 16, patch_size: int = 2,
        patch_frames: int = 1, in_channels: int = 4, hidden_size: int = 1152, depth: int = 28,
        num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1,
        learn_sigma: bool = True, attention: str = "alternate", qk_norm: bool = False,
        text_width: int | None = None, pooled_width: int | None = None, text_length: int = 32,
        process: dict | None = None, text: list | None = None,
    ) -> None:  # fmt: skip
        config: dict[str, Any] = dict(
            input_size=input_size, frames=frames, patch_size=patch_size,
            patch_frames=patch_frames, in_channels=in_channels, hidden_size=hidden_size,
            depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob, learn_sigma=learn_sigma, attention=attention,
            qk_norm=qk_norm, text_width=text_width, pooled_width=pooled_width,
            text_length=text_length,
        )  # fmt: skip
        super().__init__(config, process, text)
        check_kind(config)
        self.words_embedder = nn.Linear(self.text_width, hidden_size)
        pooled = nn.Linear(self.pooled_width, hidden_size) if self.pooled_width else None
        self.pooled_embedder = pooled
        self.build(reads_text=True)
        self.initialize_common()
        set_to_zero(self, AT_ZERO)

    def forward(self, x: Tensor, t: Tensor, y: Text | None = None) -> Tensor:
        """Noisy clips x (N, C, F, H, W), times t (N,), or (N, F) of each frame, captions y (N) →
        (N, C_out, F, H, W). Raises ValueError for an x or y of another shape.
        """
        text, of_y = self.read(y), None
        if self.pooled_embedder is not None:
            if text.pooled is None:
                raise ValueError("the network takes a vector of each caption; y.pooled is missing")
            of_y = self.pooled_embedder(text.pooled)  # (N, D)
        words = self.words_embedder(text.tokens)  # (N, L, D)
        mask = None if text.mask is None else text.mask[:, None, None]  # (N, 1, 1, L)
        return self.predicted(x, t, of_y, words, mask)


# DiT's sizes. Latte's and SpaceTime's have as many blocks, VideoDiT's twice as many: DiT's own and
# one along the frames after each.
SIZES: dict[str, dict[str, Any]] = {
    "Ti": dict(depth=6, hidden_size=128, num_heads=4),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
PATCHES = {"Ti": (1, 2, 4)} | dict.fromkeys(("S", "B", "L", "XL"), (2,))


def _models() -> dict[str, partial]:
    found: dict[str, partial] = {}
    for size, sizes in SIZES.items():
        twice = sizes | {"depth": 2 * sizes["depth"]}
        for patch in PATCHES[size]:
            label = f"{size}/{patch}"
            latte = partial(VideoDiT, patch_size=patch, attention="latte", **sizes)
            full = partial(VideoDiT, patch_size=patch, attention="full", **sizes)
            found |= {
                f"Latte-{label}": latte,
                f"VideoDiT-{label}": partial(VideoDiT, patch_size=patch, **twice),
                f"SpaceTime-{label}": full,
                f"SpaceTime-{label}x2": partial(full, patch_frames=2),
                f"TextVideo-{label}": partial(TextVideo, patch_size=patch, **sizes),
            }
    return found


# "Latte-XL/2" → a factory that takes the network's other arguments as keywords; "/2x2": patches of
# two frames
Video_models = _models()
