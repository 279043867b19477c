"""What sizes a DiT may have, and the grids of tokens that they make."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from layers.parts import DEFAULTS, NAMES
from layers.positions import POSITIONS, Positions

# The least and the most that a DiT takes. The most is far beyond every network that exists: a
# damaged configuration, or a slip of the keyboard, ends in a message and does not fill the memory.
MOST_CLASSES, MOST_RATIO = 10**6, 1024
LEAST_HEAD = 8  # numbers of a head that a frame, a row and a column turn
MOST_IN_TABLE = 2**28  # numbers in the position table, which is made in float64: 2 GiB
WHOLE_NUMBERS = {
    "input_size": (1, 2**14), "patch_size": (1, 2**10), "in_channels": (1, 2**12),
    "hidden_size": (1, 2**16), "depth": (1, 2**10), "num_heads": (1, 2**12),
    "num_classes": (0, MOST_CLASSES),
}  # fmt: skip
# Of networks that read captions; the least and the most likewise
TEXT_NUMBERS = {
    "text_width": (1, 2**16), "pooled_width": (1, 2**16), "text_length": (1, 2**12),
    "streams": (1, 2), "table_side": (1, 2**12), "noise_steps": (1, 2**14),
}  # fmt: skip

# Of networks that make clips
CLIP_NUMBERS = {"frames": (1, 2**14), "patch_frames": (1, 2**8)}


def plain_size(input_size: int | Sequence[int]) -> int | list[int]:
    """The side of a square, or [height, width], as a configuration has it."""
    if isinstance(input_size, Sequence):
        height, width = map(int, input_size)
        return height if height == width else [height, width]
    return input_size


def sides(input_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width. Raises ValueError for a sequence of others than two."""
    if not isinstance(input_size, Sequence):
        return input_size, input_size
    if len(input_size) != 2:
        raise ValueError(
            f"input_size is {input_size!r:.60}; it must be a whole number, or a height and a width"
        )
    return input_size[0], input_size[1]


def grid_of(shape: Sequence[int], channels: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of tokens of latents of a shape (N, C, H, W).

    Raises ValueError for another number of channels, and for sides that patches do not fill.
    """
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"x has shape {tuple(shape)}, the network takes (N, {channels}, height, width)"
        )
    height, width = shape[2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"x has shape {tuple(shape)}, whose height and width patches of {patch_size} do not "
            f"fill; the network takes (N, {channels}, height, width), multiples of {patch_size}"
        )
    return height // patch_size, width // patch_size


def box_of(
    shape: Sequence[int], channels: int, patch_size: int, patch_frames: int
) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens of latents of a shape (N, C, F, H, W).

    Raises ValueError for another number of channels, and for sides and frames that patches do not
    fill.
    """
    if len(shape) != 5 or shape[1] != channels:
        raise ValueError(
            f"x has shape {tuple(shape)}, the network takes (N, {channels}, frames, height, width)"
        )
    frames, height, width = shape[2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"x has shape {tuple(shape)}, whose height and width patches of {patch_size} do not "
            f"fill; the network takes multiples of {patch_size}"
        )
    if not frames or frames % patch_frames:
        raise ValueError(
            f"x has shape {tuple(shape)}, of {frames} frames; the network takes a multiple of "
            f"{patch_frames}"
        )
    return frames // patch_frames, height // patch_size, width // patch_size


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r:.60}; choose one of {', '.join(choices)}")


def check_sizes(
    input_size: int | Sequence[int], class_dropout_prob: float, mlp_ratio: float,
    learn_sigma: bool, positions: str = "table", qk_norm: bool = False, **others: Any,
) -> None:  # fmt: skip
    """Raise ValueError for arguments of DiT of the wrong kind, out of bounds or that do not fit."""
    names = DEFAULTS | others | {"positions": positions}
    for name, rows in NAMES.items():
        if names[name] != DEFAULTS[name]:
            check_choice(name, names[name], rows)
    if names["extrapolation"] == "ntk" and not POSITIONS[positions].rotates:
        raise ValueError(
            f'extrapolation is "ntk", which slows rotations down, and positions {positions} have '
            "none; choose another, or positions that rotate"
        )
    height, width = sides(input_size)
    check_whole({"input_size": height, **others})
    check_whole({"input_size": width, **others})
    check_fit(height, width, POSITIONS[positions], **others)
    if not is_number(mlp_ratio) or not 0 < mlp_ratio <= MOST_RATIO:
        raise ValueError(f"mlp_ratio is {mlp_ratio!r}; it must be above 0 and at most {MOST_RATIO}")
    drop = class_dropout_prob
    if not is_number(drop) or not 0 <= drop <= 1:
        raise ValueError(f"class_dropout_prob is {drop!r}; it is a probability, 0 to 1")
    for name, value in {"learn_sigma": learn_sigma, "qk_norm": qk_norm}.items():
        if value not in (True, False):
            raise ValueError(f"{name} is {value!r:.60}; it is true or false")


def check_clip_sizes(
    frames: int, patch_frames: int, num_heads: int, hidden_size: int, rotates: bool, **_: Any
) -> None:
    """Raise ValueError for arguments of a network of clips that check_sizes does not look at.
    `rotates`: whether its attention over frames rotates queries and keys.
    """
    check_whole({"frames": frames, "patch_frames": patch_frames}, CLIP_NUMBERS)
    if frames % patch_frames:
        raise ValueError(
            f"frames {frames} is not a multiple of patch_frames {patch_frames}; choose one that is"
        )
    head = hidden_size // num_heads
    if rotates and (head % 4 or head < LEAST_HEAD):
        raise ValueError(
            f"hidden_size {hidden_size} gives each of num_heads {num_heads} {head} numbers; "
            f"rotations over frames need a multiple of 4, at least {LEAST_HEAD}"
        )


def check_text_sizes(
    class_dropout_prob: float, mlp_ratio: float, learn_sigma: bool, text_width: int | None,
    text_length: int, input_size: int | Sequence[int], pooled_width: int | None = None,
    position_scale: float = 1.0, **others: Any,
) -> None:  # fmt: skip
    """Raise ValueError for arguments of a network that reads captions that are of the wrong kind,
    out of bounds or that do not fit.
    """
    network = {name: others[name] for name in WHOLE_NUMBERS.keys() & others.keys()}
    check_sizes(
        input_size, class_dropout_prob, mlp_ratio, learn_sigma, num_classes=0,
        qk_norm=others.get("qk_norm", False), extrapolation=others.get("extrapolation"), **network,
    )  # fmt: skip
    if text_width is None and pooled_width is not None:
        raise ValueError(
            f"pooled_width is {pooled_width} and text_width None; give the widths of outside "
            "encoders, or neither for the network's own"
        )
    if not is_number(position_scale) or not 0 < position_scale <= MOST_RATIO:
        raise ValueError(
            f"position_scale is {position_scale!r}; it must be above 0 and at most {MOST_RATIO}"
        )
    whole = {"text_width": text_width, "pooled_width": pooled_width, "text_length": text_length}
    whole |= {name: others[name] for name in TEXT_NUMBERS.keys() & others.keys()}
    check_whole({name: value for name, value in whole.items() if value is not None}, TEXT_NUMBERS)


def check_whole(
    whole: Mapping[str, Any], bounds: Mapping[str, tuple[int, int]] = WHOLE_NUMBERS
) -> None:
    """Raise ValueError unless arguments are whole numbers in their bounds."""
    for name, (least, most) in bounds.items():
        if name not in whole:
            continue
        value = whole[name]
        if not hasattr(value, "__index__") or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.60}; it must be a whole number")
        if not least <= value <= most:
            bound = f"least {least}" if value < least else f"most {most}"
            advice = "" if least else "; give the number of classes, or 0 for none"
            raise ValueError(f"{name} is {value}; it must be at {bound}{advice}")


def check_fit(
    height: int, width: int, positions: Positions, patch_size: int, hidden_size: int,
    num_heads: int, **_: Any,
) -> None:  # fmt: skip
    """Raise ValueError for sizes of a DiT that do not fit together."""
    named = f"input_size {height if height == width else [height, width]}"
    if height % patch_size or width % patch_size:
        sizes = f"{named} is not a multiple of patch_size {patch_size}"
        raise ValueError(f"{sizes}; choose one that is")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of num_heads ({num_heads}) and of 4"
        )
    if positions.rotates and hidden_size // num_heads % 4:
        raise ValueError(
            f"hidden_size {hidden_size} gives each of num_heads {num_heads} "
            f"{hidden_size // num_heads} numbers; positions that rotate them need a multiple of 4"
        )
    in_table = (height // patch_size) * (width // patch_size) * hidden_size
    if in_table > MOST_IN_TABLE:
        sizes = f"{named} with patch_size {patch_size} and hidden_size {hidden_size}"
        wanted = f"it may have {MOST_IN_TABLE:,}: lower input_size, or take larger patches"
        raise ValueError(f"{sizes} makes a position table of {in_table:,} numbers; {wanted}")


def is_number(value: object) -> bool:
    """Whether an argument of DiT is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
