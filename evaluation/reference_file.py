"""ADM's reference files, an .npz with statistics in it: written, and read with care.

mu and sigma are the mean and covariance of Inception's features, mu_s and sigma_s those of the
spatial ones; `arr_0` has some images for precision and recall. A file that was made here also says
in `made_from` of what.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics import Statistics, Summary
from runtime.disk import write_whole
from runtime.json_files import parse_json
from runtime.npz import IMAGES, Streamed, array_names, open_array, write_npz

# What a Summary calls them → ADM's names
STATISTICS = {"statistics": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MADE_FROM = "made_from"


def read_statistics(path: Path | str, keys: tuple[str, str]) -> Statistics:
    """Statistics from an .npz under these keys.

    Raises ValueError if they are damaged or do not fit together.
    """
    if not set(keys) <= array_names(path):
        raise ValueError(f"it has {' or '.join(keys)} alone; wanted are both of them, or neither")
    mean, covariance = (open_array(path, key) for key in keys)
    check_kinds(keys, mean, covariance)
    mean, covariance = np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(
            f"{keys[0]} or {keys[1]} has values that are not finite; the file is damaged, fetch or "
            "make it again"
        )
    if covariance.diagonal().min() < 0:
        raise ValueError(
            f"{keys[1]} has variances below 0, so it is no covariance; fetch or make it again"
        )
    return Statistics(mean, covariance)


def check_kinds(keys: tuple[str, str], mean: np.ndarray, covariance: np.ndarray) -> None:
    """Raise ValueError unless two arrays, which a file has under these keys, have the shapes and
    kinds of numbers of Statistics.
    """
    size = mean.size
    if mean.shape != (size,) or covariance.shape != (size, size) or not size:
        raise ValueError(
            f"{keys[0]} has the shape {mean.shape}, {keys[1]} {covariance.shape}; wanted are (D,) "
            "and (D, D)"
        )
    if not all(np.issubdtype(array.dtype, np.floating) for array in (mean, covariance)):
        raise ValueError(
            f"{keys[0]} is {mean.dtype}, {keys[1]} {covariance.dtype}; wanted are floating-point "
            "numbers"
        )


def read_made_from(path: Path | str) -> dict | None:
    """What a reference file that was made here says of itself, a dict.

    The answer is None if the file's `made_from` is somebody else's.
    """
    with suppress(ValueError):
        made = parse_json(str(open_array(path, MADE_FROM)))
        known = isinstance(made, dict) and {"features", "features_sha256"} <= made.keys()
        if known and isinstance(made["features"], str):
            return made
    return None


def write_reference(
    path: Path, summary: Summary, shape: tuple[int, int, int, int], images: Iterable[np.ndarray],
    made_from: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Write a reference file with the statistics of a Summary, and images uint8 (H, W, 3) that have
    the `shape` (n, H, W, 3) together; the names of its arrays.

    Raises OSError if the disk refuses.
    """
    arrays: dict[str, np.ndarray | Streamed] = {}
    for name, keys in STATISTICS.items():
        if getattr(summary, name) is not None:
            arrays |= dict(zip(keys, getattr(summary, name)))
    arrays[IMAGES] = (shape, np.uint8, images)
    arrays[MADE_FROM] = np.array(json.dumps(made_from))

    def write(temporary):
        with open(temporary, "wb") as file:
            write_npz(file, arrays)

    write_whole(path, write)
    return list(arrays)
