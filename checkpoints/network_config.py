"""DiT's arguments as files have them: their kinds, and whether a state dict has such sizes.

Both are looked at before a network is built, so that nonsense in a file costs neither memory nor
time.
"""

import math

import torch

from checkpoints.networks import CLASS, NOT_ARGUMENTS, OURS, arguments_of, class_in
from layers.parts import DEFAULTS
from layers.sizes import sides

Tensors = dict[str, torch.Tensor]  # a state dict
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# Numbers that a network may always have, whatever its file holds; the position table is not in
# every file
ROOM = 1 << 26
MOST = 1 << 53  # of a whole number beside the weights: floats have all of them up to here
ARGUMENTS = arguments_of(OURS)
# Arguments that are None unless they are given, and are not texts
SELF_CHECKED = ("exits",)  # of which the network says itself what they may be
NONE_OR = {"text_width": int, "pooled_width": int, "table_side": int, "noise_steps": int}
# Each so many rows, or columns, of hidden_size numbers
TIMES_WIDTH = (
    "text_width", "pooled_width", "table_side", "text_length", "frames", "patch_frames",
)  # fmt: skip
MOST_ENCODERS = 16  # of a text, that a file says something of
# Arguments that files of earlier versions lack, at what they meant there
LATER = {"block": "adaln_zero", **DEFAULTS}


def arguments_in(config: dict) -> dict:
    """The network's arguments in a configuration that calls itself ours, and its class unless that
    is DiT.

    Raises ValueError, naming the key, for values of other kinds than the network's. Which sizes
    there can be is the network's to say.
    """
    name = class_in(config)
    known = arguments_of(name)
    arguments = {key: value for key, value in config.items() if key not in NOT_ARGUMENTS}
    for key, value in arguments.items():
        sizes = value if key == "input_size" and isinstance(value, list) else [value]
        checked = key in known and key not in SELF_CHECKED
        for one in sizes if checked else ():  # how many, the network says
            if one is not None or key not in NONE_OR:
                check_kind(key, one, NONE_OR.get(key) or kind_of(known[key]))
    return arguments if name == OURS else {CLASS: name, **arguments}


def kind_of(default: object) -> type:
    """The kind of values of an argument that has this default."""
    return str if default is None else type(default)


def process_in(config: object) -> dict | None:
    """What a configuration says of the process that its network has learned; None where it says
    nothing, as those of earlier versions.
    """
    said = config.get("process") if isinstance(config, dict) else None
    return said if isinstance(said, dict) else None


def text_in(config: dict, key: str = "text") -> list[dict] | None:
    """What a configuration says under a key of each encoder of its network's text; None where it
    says nothing.

    Raises ValueError for anything but a few dicts of plain values.
    """
    said = config.get(key)
    fits = isinstance(said, list) and all(isinstance(one, dict) for one in said)
    if said is not None and (not fits or len(said) > MOST_ENCODERS):
        raise ValueError(f"{key} is {shown(said)}; wanted is a list of a dict for each encoder")
    for one in said or []:
        check_plain(one)
    return said or None


def with_process(arguments: dict, process: dict | None, text: list[dict] | None = None) -> dict:
    """A configuration: a network's arguments and what is said of the process, and of the encoders
    of its text, if anything is.
    """
    said = {"process": process, "text": text}
    return arguments | {key: value for key, value in said.items() if value is not None}


def check_plain(said: dict) -> None:
    """Raise ValueError, naming the key, unless a dict has texts as keys, and as values texts,
    numbers, true, false or nothing.
    """
    for key, value in said.items():
        if not isinstance(key, str):
            raise ValueError(f"{shown(key)} is no name; take it out")
        if value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"{key[:60]} is {shown(value)}; wanted is a number or a text")
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"{key[:60]} is {shown(value)}; wanted is one up to {MOST:,}")


def check_kind(key: str, value: object, kind: type) -> None:
    """Raise ValueError, naming the key, unless a value is of a kind of KINDS.

    true is no number, and 28.0 no whole one.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = type(value) is kind
    if kind is float:
        fits = number and math.isfinite(value)  # type: ignore[arg-type]
    if not fits:
        raise ValueError(f"{key} is {shown(value)}; wanted is {KINDS[kind]}")


def shown(value: object) -> str:
    """A value from a file for a message: in short, and containers by their kind."""
    if not (isinstance(value, (str, int, float)) or value is None):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # of a number with thousands of digits
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_outline(config: dict, tensors: Tensors) -> None:
    """Raise ValueError, naming the key, if arguments ask for far more than a state dict holds.

    The arguments are DiT's. What is left to say about sizes is said by DiT, and once it is built,
    by checkpoints.check_fits.
    """
    full, blocks = arguments_of(class_in(config)) | config, len(tensors)
    room = max(ROOM, sum(tensor.numel() for tensor in tensors.values()))
    rows, columns = (side // max(1, full["patch_size"]) for side in sides(full["input_size"]))
    hidden, tokens = full["hidden_size"], rows * columns
    asked = {
        "hidden_size": hidden, "input_size": tokens * hidden, "patch_size": full["patch_size"] ** 2,
        "in_channels": full["in_channels"], "num_classes": full.get("num_classes", 0) * hidden,
        "num_heads": full["num_heads"], "mlp_ratio": full["mlp_ratio"] * hidden,
        "depth": room + 1 if full["depth"] > blocks else 0,
    }  # fmt: skip
    asked |= {name: (full.get(name) or 0) * hidden for name in TIMES_WIDTH}
    for key, numbers in asked.items():
        if numbers > room:
            raise ValueError(
                f"{key} is {full[key]!s:.60}, far beyond the {len(tensors):,} tensors that are "
                "there; mend the configuration"
            )
