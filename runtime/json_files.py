"""JSON and text that others wrote: read within bounds, and refused by one clear message."""

import json
import math
from pathlib import Path
from typing import Any

# Bytes of a file of text that is read; a list of a million files is far below
MOST_TEXT = 256 << 20
MOST_DIGITS, MOST_DEPTH = 100, 100  # of a whole number, and of brackets, in JSON


def read_json(file: Path, infinite: bool = False) -> dict:
    """The dict in a JSON file in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32. With
    `infinite`, numbers may be so: diffusers writes Infinity, which JSON does not know.

    Raises ValueError, naming the file, if it cannot be read or holds something else.
    """
    try:
        contents = parse_json(read_bounded(file), infinite)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read {file} ({getattr(error, 'strerror', None) or error})"
        ) from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} is no configuration: it holds a {type(contents).__name__}")
    return contents


def read_bounded(path: Path | str, most: int = MOST_TEXT) -> bytes:
    """What is in a file, or comes out of a pipe.

    Raises ValueError for more than `most` bytes, as devices without end have.
    """
    with open(path, "rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return contents


def parse_json(text: str | bytes, infinite: bool = False) -> Any:
    """What a JSON text says; `infinite` is as in read_json.

    Raises ValueError if it is none, or has numbers or a depth that no sensible one has.
    """

    def refuse(name):
        raise ValueError(f"it has the number {name}, which JSON does not know")

    def whole(digits):
        return int(digits) if len(digits) <= MOST_DIGITS else refuse(f"of {len(digits):,} digits")

    def real(digits):
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits[:20])

    def constant(name):
        return float(name) if infinite and name != "NaN" else refuse(name)

    too_deep = "it is nested too deeply"
    try:
        contents = json.loads(text, parse_constant=constant, parse_int=whole, parse_float=real)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [[contents]]
    for _ in range(MOST_DEPTH):
        level = [part for container in level for part in _parts(container)]
    if level:
        raise ValueError(too_deep)
    return contents


def _parts(container):
    """The containers right inside one."""
    inside = container.values() if isinstance(container, dict) else container
    return [part for part in inside if isinstance(part, (dict, list))]
