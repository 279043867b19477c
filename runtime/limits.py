"""The range of each number that a user may give.

What is far beyond all that exists is refused before any work.
"""

from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
import os
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

from runtime.image_size import ImageSize, sides

COUNTS = 10**9  # of steps, epochs and the like: more than a century of work
IMAGE_SIZE = 2**14
LONGEST_NUMBER = 30  # characters of it that a message shows
CHANNELS = 3


class Range(NamedTuple):
    """The least and the most that an argument's number may be."""

    least: float
    most: float


# Argument → its range. Upper ends are generous: nobody's sensible use is refused, and nothing that
# passes overflows. The range of num_classes is conditions.labels.CLASSES.
RANGES = {
    "image_size": Range(1, IMAGE_SIZE),
    "patch_size": Range(1, 2**10),
    # clips
    "frames": Range(1, 2**12),
    "frame_stride": Range(1, 2**12),
    "frame_rate": Range(0.01, 1000.0),
    # training
    "epochs": Range(1, COUNTS),
    "max_steps": Range(1, COUNTS),
    "steps": Range(1, COUNTS),
    "warmup_steps": Range(0, COUNTS),
    "max_bad_steps": Range(1, COUNTS),
    "global_batch_size": Range(1, 2**20),
    "grad_accum": Range(1, 2**20),
    "pack": Range(1, 2**16),
    "text_length": Range(2, 2**12),
    "log_every": Range(1, COUNTS),
    "ckpt_every": Range(1, COUNTS),
    "sample_every": Range(1, COUNTS),
    "eval_every": Range(1, COUNTS),
    "keep_last": Range(1, COUNTS),
    "ckpt_minutes": Range(1e-12, 1e9),
    "lr": Range(1e-12, 100.0),
    "weight_decay": Range(0.0, 1000.0),
    "grad_clip": Range(1e-12, 1e12),
    "dynamic": Range(0.01, 1.0),
    # scores and samples
    "num_fid_samples": Range(1, 10**7),
    "per_proc_batch_size": Range(1, 2**16),
    "batch_size": Range(1, 2**14),
    "cfg_scale": Range(-1000.0, 1000.0),
    "high_from": Range(0.0, 1.0),  # noise levels: clean, noise
    "steps_between": Range(0, 1000),
    "sample_eps": Range(0.0, 0.5),
    "diffusion_norm": Range(0.0, 1e6),
    "last_step_size": Range(0.0, 1.0),
    "atol": Range(1e-15, 1000.0),
    "rtol": Range(1e-15, 1000.0),
    "cache_interval": Range(1, 1000),
    "cache_order": Range(0, 4),
    # both
    "num_workers": Range(0, 1024),
    "workers": Range(1, 1024),
    "global_seed": Range(0, 2**63 - 1),
    "seed": Range(0, 2**63 - 1),
}
# Argument → how many values it may have.
MOST_VALUES = {
    "ema_decay": 16, "text_encoder": 8, "class_labels": 4096, "prompt": 4096, "cfg_scale": 64,
}  # fmt: skip


def check_numbers(options: object, **others: Range) -> None:
    """Raise ValueError for a number out of its range, for something else where a number is wanted,
    or for an argument with too many values.

    `options` is a mapping from names to values, or an object with the names as attributes. `others`
    adds to RANGES.
    """
    found = options if isinstance(options, Mapping) else vars(options)
    ranges = RANGES | others
    for name in ranges | MOST_VALUES:
        given = found.get(name)
        values = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        if len(values) > MOST_VALUES.get(name, len(values)):
            raise ValueError(
                f"{argument(name)} has {len(values)} values; it takes {MOST_VALUES[name]} at most"
            )
        for value in values if name in ranges else ():
            check_range(name, value, ranges[name])


def check_kinds(options: Any) -> None:
    """Raise ValueError for a field of a dataclass that is not of its kind: None where that is none,
    no True or False, or no text where a text or a path is wanted. Numbers are check_numbers' task.
    """
    for field in fields(options):
        value, kinds = getattr(options, field.name), {*get_args(field.type)} or {field.type}
        if value is None and NoneType not in kinds:
            wanted = "number" if kinds <= {int, float} else "value"
            raise ValueError(f"{argument(field.name)} is None; give a {wanted}")
        if value is None:
            continue
        if kinds <= {bool, NoneType} and not isinstance(value, bool):
            raise ValueError(f"{argument(field.name)} is {value!r:.60}; it is true or false")
        if kinds <= {str, Path, NoneType} and not (isinstance(value, (str, Path)) and str(value)):
            raise ValueError(f"{argument(field.name)} is {value!r:.60}; give a text")


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Raise ValueError, naming the argument, for what is no number, or a number out of its range.
    Ends that are whole say that numbers between them are.
    """
    least, most = allowed
    whole = isinstance(least, int) and isinstance(most, int)
    if not is_number(value, Integral if whole else Real):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{argument(name)} is {value!r:.60}; give a {kind}")
    if not least <= value <= most:
        is_small = isinstance(value, int) and value < least
        wanted = f"at least {least}" if is_small else f"from {bound(least)} to {bound(most)}"
        raise ValueError(f"{argument(name)} is {short(value)}; it must be {wanted}")


def is_number(value: object, kind: type = Real) -> bool:
    """Whether a value is a number of a kind, True and False being none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def argument(name: str) -> str:
    """An argument's name as messages have it; a door turns it into its flag."""
    return f"`{name}`"


def short(number: float) -> str:
    """A number for a message, cut where it is long."""
    text = str(number)
    return text if len(text) <= LONGEST_NUMBER else f"{text[:10]}… ({len(text)} digits)"


def bound(number: float) -> str:
    """An end of a Range for a message."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def check_memory(images: int, size: ImageSize, lower: str) -> None:
    """Raise ValueError if so many images of a size are more than the machine's memory.

    `lower` names the arguments to lower, in backticks.
    """
    height, width = sides(size)
    wanted, there = images * height * width * CHANNELS, memory()
    if there is not None and wanted > there:
        raise ValueError(
            f"{images} images of {height}x{width} pixels, which are held at a time, take "
            f"{wanted / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f} GB of memory; "
            f"lower {lower}"
        )


def memory() -> int | None:
    """The bytes of memory that the machine has; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
