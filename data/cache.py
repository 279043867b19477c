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

from data.cache_format import (
    CAPTIONS_HASH, CLIPS, LABELS, MANIFEST, MOMENTS, SHAPES, Extents, check_clips, check_manifest,
    check_shapes, keeps_shapes, moments_shape, sizes_of,
)  # fmt: skip
from data.captions import STORED, stored_captions
from data.source import TrainingItem
from runtime.command_line import reason
from runtime.json_files import read_json


class CachedLatents(Dataset):
    """A folder of cached latents, by (index, flip).

    An item is (moments (2, C, h, w): mean and std, label, []). `manifest` is what it says of
    itself, `hash` a hash of that, checksums included. `kind` is how images were brought to their
    `sizes`, (height, width) in pixels, by a name of SIZES; both are of images that keep their
    shape, and otherwise "square" and None. `clips` are the rows of clips.npy, of which the images
    are frames; None for images by themselves. Errors call the folder by the name of the `argument`
    that gave it. Raises ValueError if the folder is incomplete, or its parts do not fit together.
    """

    notes: tuple[str, ...] = ()
    sample_hash = ""  # `hash` says it all
    lengths: Sequence[int] | None = None

    def __init__(self, folder: Path | str, argument: str = "latents") -> None:
        folder = Path(folder)
        try:
            # (N, flips, 2, C, h, w), or all their numbers, and (N,)
            self.manifest, self.moments, labels = open_cache(folder)
            self._find_images(folder)
            check_labels(self.manifest, labels)
            self.clips = read_clips(folder, self.manifest)
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
        self.labels: Sequence[int] = labels.tolist()
        self.classes = self.manifest["classes"]
        self.kind, self.sizes = sizes_of(self.manifest), self._sizes()

    def _sizes(self):
        """Height and width of each image in pixels; None for squares."""
        if not keeps_shapes(self.manifest):
            return None
        pixels = self.extents.shapes * self.manifest["ratio"]  # (N, 2)
        return [(height, width) for height, width in pixels.tolist()]

    def __len__(self) -> int:
        return len(self.labels)

    # A worker process maps the file itself rather than being sent what is in it
    def __getstate__(self) -> dict:
        return vars(self) | dict.fromkeys(("moments", "extents", "numbers"))

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, moments=np.load(state["path"], mmap_mode="r"))
        self._find_images(Path(state["path"]).parent)

    def _find_images(self, folder):
        self.extents = extents_of(folder, self.manifest)
        self.numbers = np.asarray(self.moments).reshape(-1)  # a view of what is mapped

    def __getitem__(self, key: tuple[int, bool]) -> TrainingItem:
        index, flip = key
        index += len(self) if index < 0 else 0
        stored = self.numbers[self.extents.of(index, index + 1)]
        moments = stored.reshape(self.extents.shape(index))[int(flip)]  # (2, C, h, w)
        return torch.from_numpy(np.array(moments)), self.labels[index], []


def open_cache(folder: Path) -> tuple[dict, np.memmap, np.ndarray]:
    """(manifest, moments (N, flips, 2, C, h, w), labels (N,)) of a finished cache.

    Where images keep their shape the moments are one row, in which `extents_of` finds those of an
    image. The arrays are read when they are used. Raises ValueError if one is missing, or they do
    not fit together.
    """
    manifest = read_json(folder / MANIFEST)
    check_manifest(manifest)
    moments, labels = (map_array(folder, name) for name in (MOMENTS, LABELS))
    wanted = moments_shape(manifest, read_shapes(folder, manifest))
    if moments.shape != wanted or moments.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"{MOMENTS} is {moments.dtype} {moments.shape}, its manifest says {wanted}"
        )
    images = manifest["images"]
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{LABELS} is {labels.dtype} {labels.shape} for {images:,} images")
    return manifest, moments, labels


def extents_of(folder: Path, manifest: dict) -> Extents:
    """Where the moments of each image of a finished cache lie.

    Raises ValueError if shapes.npy is damaged.
    """
    return Extents(manifest, read_shapes(folder, manifest))


def read_shapes(folder: Path, manifest: dict) -> np.ndarray | None:
    """Heights and widths (N, 2) of a cache's latents, by its manifest or plan; None for squares.

    Raises ValueError if shapes.npy is damaged.
    """
    if not keeps_shapes(manifest):
        return None
    shapes = map_array(folder, SHAPES)
    check_shapes(manifest, shapes)
    return np.array(shapes)


def read_clips(folder: Path, manifest: dict) -> np.ndarray | None:
    """The rows (clips,) of CLIP_ROW by which a cache's images are frames; None without clips.

    Raises ValueError if clips.npy is damaged.
    """
    if "clips" not in manifest:
        return None
    rows = map_array(folder, CLIPS)
    check_clips(manifest, rows)
    return np.array(rows)


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
    (sums, chunk), images = checksums(manifest), len(labels)
    if chunk < 1 or len(sums) != -(-images // chunk):
        raise ValueError(
            f"`{argument}` {folder}: {MANIFEST} has no checksums; give a folder that `output` made"
        )
    wrong, extents, numbers = [], extents_of(folder, manifest), moments.reshape(-1)
    for number, crc32 in enumerate(tqdm(sums, unit="chunk", disable=None)):
        first = number * chunk
        if zlib.crc32(numbers[extents.of(first, first + chunk)].tobytes()) != crc32:
            last = min(first + chunk, images) - 1
            wrong.append(f"{MOMENTS} is damaged in images {first} to {last}")
    if zlib.crc32(labels.tobytes()) != manifest.get("labels_crc32"):
        wrong.append(f"{LABELS} is damaged")
    try:
        read_clips(folder, manifest)
    except ValueError as error:
        wrong.append(str(error))
    if CAPTIONS_HASH in manifest:
        try:
            stored_captions(folder / STORED, manifest.get("clips", images), manifest[CAPTIONS_HASH])
        except (OSError, ValueError) as error:
            wrong.append(reason(error))
    return wrong


def checksums(manifest: dict) -> tuple[list, int]:
    """(CRC32 of each chunk of moments.npy, images of a chunk) by a manifest.

    Without checksums in the manifest: ([], 0).
    """
    sums, chunk = manifest.get("crc32"), manifest.get("chunk")
    return (sums, chunk) if isinstance(sums, list) and type(chunk) is int else ([], 0)
