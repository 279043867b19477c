"""Reading a folder of cached latents, which cache_writer.py wrote: as a source, and to find damage.
"""

from collections.abc import Sequence
import hashlib
from pathlib import Path
import zlib

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from data.cache_format import LABELS, MANIFEST, MOMENTS, check_manifest, moments_shape
from data.shapes import Size
from data.source import TrainingItem
from runtime.json_files import read_json


class CachedLatents(Dataset):
    """A folder of cached latents, by (index, flip).

    An item is (moments (2, C, h, w): mean and std, label, []). `manifest` is what it says of
    itself, `hash` a hash of that, checksums included. Errors call the folder by the name of the
    `argument` that gave it. Raises ValueError if the folder is incomplete, or its parts do not fit
    together.
    """

    notes: tuple[str, ...] = ()
    sample_hash = ""  # `hash` says it all
    sizes: Sequence[Size] | None = None

    def __init__(self, folder: Path | str, argument: str = "latents") -> None:
        folder = Path(folder)
        try:
            # (N, flips, 2, C, h, w) and (N,)
            self.manifest, self.moments, labels = open_cache(folder)
            check_labels(self.manifest, labels)
            self.hash = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            advice = "it is damaged: remove it and make it again with extract_latents.py"
            if not (folder / MANIFEST).exists():
                again = "with the same arguments until it ends"
                advice = f"run extract_latents.py --output {folder} {again}"
            raise ValueError(
                f"`{argument}` {folder} holds no complete latents ({error}); {advice}"
            ) from None
        self.path = self.moments.filename
        self.labels, self.classes = labels.tolist(), self.manifest["classes"]

    def __len__(self) -> int:
        return len(self.labels)

    # A worker process maps the file itself rather than being sent what is in it
    def __getstate__(self) -> dict:
        return vars(self) | {"moments": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, moments=np.load(state["path"], mmap_mode="r"))

    def __getitem__(self, key: tuple[int, bool]) -> TrainingItem:
        index, flip = key
        moments = torch.from_numpy(np.array(self.moments[index, int(flip)]))  # (2, C, h, w)
        return moments, self.labels[index], []


def open_cache(folder: Path) -> tuple[dict, np.memmap, np.ndarray]:
    """(manifest, moments (N, flips, 2, C, h, w), labels (N,)) of a finished cache.

    The arrays are read when they are used. Raises ValueError if one is missing, or they do not fit
    together.
    """
    manifest = read_json(folder / MANIFEST)
    check_manifest(manifest)
    moments, labels = (map_array(folder, name) for name in (MOMENTS, LABELS))
    wanted = moments_shape(manifest)
    if moments.shape != wanted or moments.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"{MOMENTS} is {moments.dtype} {moments.shape}, its manifest says {wanted}"
        )
    if labels.shape != wanted[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{LABELS} is {labels.dtype} {labels.shape} for {wanted[0]:,} images")
    return manifest, moments, labels


def map_array(folder: Path, name: str) -> np.memmap:
    """An array file of a cache, mapped. Raises ValueError, naming it, if it cannot be read."""
    try:
        return np.load(folder / name, mmap_mode="r")
    except (
        OSError, ValueError, TypeError, OverflowError, EOFError, MemoryError, RecursionError,
    ) as error:  # fmt: skip  # NumPy's, for a header that is nonsense
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
        raise ValueError(f"{name} cannot be read: {reason}") from None


def check_labels(manifest: dict, labels: np.ndarray) -> None:
    """Raise ValueError unless the labels (N,) of a cache are of its classes."""
    least, most, classes = labels.min(), labels.max(), max(1, len(manifest["classes"] or ()))
    if least < 0 or most >= classes:
        raise ValueError(f"{LABELS} has labels from {least} to {most} for {classes} classes")


def find_damage(folder: Path | str, argument: str = "folder") -> list[str]:
    """What is wrong with a finished cache by its checksums, a list of sentences.

    Errors call the folder by the name of the `argument` that gave it. Raises ValueError if the
    cache is not finished.
    """
    folder = Path(folder)
    try:
        manifest, moments, labels = open_cache(folder)
    except ValueError as error:
        raise ValueError(
            f"`{argument}` {folder} holds no finished latents ({error}); give a folder that "
            "`output` made"
        ) from None
    sums, chunk = checksums(manifest)
    if chunk < 1 or len(sums) != -(-len(moments) // chunk):
        raise ValueError(
            f"`{argument}` {folder}: {MANIFEST} has no checksums; give a folder that `output` made"
        )
    wrong = []
    for number, crc32 in enumerate(tqdm(sums, unit="chunk", disable=None)):
        first = number * chunk
        if zlib.crc32(moments[first : first + chunk].tobytes()) != crc32:
            last = min(first + chunk, len(moments)) - 1
            wrong.append(f"{MOMENTS} is damaged in images {first} to {last}")
    if zlib.crc32(labels.tobytes()) != manifest.get("labels_crc32"):
        wrong.append(f"{LABELS} is damaged")
    return wrong


def checksums(manifest: dict) -> tuple[list, int]:
    """(CRC32 of each chunk of moments.npy, images of a chunk) by a manifest.

    Without checksums in the manifest: ([], 0).
    """
    sums, chunk = manifest.get("crc32"), manifest.get("chunk")
    return (sums, chunk) if isinstance(sums, list) and type(chunk) is int else ([], 0)
