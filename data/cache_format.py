"""How a folder of cached latents is laid out: what its writer and its readers agree on.

moments.npy is one array (images, flips, 2, C, h, w): mean and standard deviation of the latents of
each image and, with `flip`, of its mirror image. Where images keep their shape (`sizes` is not
"square"), it is one row of numbers: an image's (flips, 2, C, h, w) follow those of the image before
it, and shapes.npy (images, 2) has h and w of each. labels.npy is (images,). captions.jsonl, where
the images had captions, has a line for each image, a list of its own. Where the images
are frames of clips, clips.npy has a row for each clip, and captions.jsonl a line. manifest.json
says what they are, and appears when all is done. Until then plan.json says what they will be, and
chunks/NNNNNNN.json is the note of a chunk of images that is written.
"""

import math
from pathlib import Path
from typing import Any
import zlib

import numpy as np

from data.shapes import SIZES, SQUARE
from runtime.image_size import settled, sides

MANIFEST, PLAN, MOMENTS, LABELS = "manifest.json", "plan.json", "moments.npy", "labels.npy"
SHAPES = "shapes.npy"  # where images keep their shape
CLIPS = "clips.npy"  # where images are frames of clips, which lie end to end
# A row of it: which frame is the clip's first and how many it has, its label and its frames per
# second, 0 where that is unknown
CLIP_ROW = np.dtype([("first", "<i8"), ("frames", "<i8"), ("label", "<i8"), ("rate", "<f8")])
CHUNKS = "chunks"  # the folder of notes
CAPTIONS_HASH = "captions_sha256"  # a manifest's entry, of the captions that are stored
DTYPES = ("float16", "float32")  # of moments.npy
# What a manifest must say of the arrays, and of the autoencoder: name → (kind, least).
ENTRIES: dict[str, tuple[type | tuple[type, ...], float]] = {
    "images": (int, 1), "flip": (bool, 0), "shape": (list, 0), "image_size": ((int, list), 1),
    "channels": (int, 1), "ratio": (int, 1), "vae": (str, 0), "vae_sha256": (dict, 0),
    "files_sha256": (str, 0),
}  # fmt: skip
NORMALISATION = ("scale", "shift")  # a number each, or a list with one for each channel
# The same, where images keep their shape
OWN_ENTRIES: dict[str, tuple[type, float]] = {
    "image_size": (int, 1), "unit": (int, 1), "shapes_crc32": (int, 0),
}  # fmt: skip


class Extents:
    """Where the moments of each image lie in moments.npy, whose numbers count as one row.

    `shapes` (N, 2) are heights and widths of latents; None for squares, all of which are as the
    manifest says. `starts` (N + 1,) is where each image's begin, and where the last one's end.
    """

    def __init__(self, manifest: dict[str, Any], shapes: np.ndarray | None = None) -> None:
        self.flips, self.channels = 1 + manifest["flip"], manifest["channels"]
        if shapes is None:
            shapes = np.broadcast_to(manifest["shape"][2:], (manifest["images"], 2))
        self.shapes = shapes
        numbers = shapes.prod(axis=1, dtype=np.int64) * (self.flips * 2 * self.channels)
        self.starts = np.concatenate([[0], numbers.cumsum()])  # (N + 1,)

    def of(self, first: int, stop: int) -> slice:
        """The numbers of images first to stop - 1, or to the last one there is."""
        return slice(self.starts[first], self.starts[min(stop, len(self.shapes))])

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape (flips, 2, C, h, w) of an image's moments."""
        return (self.flips, 2, self.channels, *self.shapes[index].tolist())


def keeps_shapes(manifest: dict[str, Any]) -> bool:
    """Whether a manifest or plan is of images that keep their shape. Older ones do not say."""
    return sizes_of(manifest) != SQUARE


def sizes_of(manifest: dict[str, Any]) -> str:
    """The entry `sizes` of a manifest or plan, which squares do not have."""
    return manifest.get("sizes", SQUARE)


def moments_shape(manifest: dict[str, Any], shapes: np.ndarray | None = None) -> tuple[int, ...]:
    """The shape of moments.npy that a manifest or plan describes: (images, flips, 2, C, h, w), or
    (numbers,) where images keep their `shapes`.
    """
    if shapes is None:
        return (manifest["images"], 1 + manifest["flip"], *manifest["shape"])
    latents = int(shapes.prod(axis=1, dtype=np.int64).sum())
    return (latents * (1 + manifest["flip"]) * 2 * manifest["channels"],)


def check_shapes(manifest: dict[str, Any], shapes: np.ndarray) -> None:
    """Raise ValueError unless shapes.npy, heights and widths of latents, is what a manifest or plan
    tells of.
    """
    if shapes.shape != (manifest["images"], 2) or shapes.dtype.kind not in "iu":
        raise ValueError(
            f"{SHAPES} is {shapes.dtype} {shapes.shape} for {manifest['images']:,} images"
        )
    if zlib.crc32(shapes.tobytes()) != manifest["shapes_crc32"] or (shapes < 1).any():
        raise ValueError(f"{SHAPES} is damaged")


def check_clips(manifest: dict[str, Any], rows: np.ndarray) -> None:
    """Raise ValueError unless clips.npy, rows of CLIP_ROW, is what a manifest tells of."""
    if rows.shape != (manifest["clips"],) or rows.dtype != CLIP_ROW:
        raise ValueError(f"{CLIPS} is {rows.dtype} {rows.shape} for {manifest['clips']} clips")
    # Frames of a clip that was skipped, as it could not be read to its end, are no row's
    firsts, ends = rows["first"], rows["first"] + rows["frames"]
    begun = np.append(firsts, manifest["images"])  # by what the frames end that lie before it
    fits = len(rows) and firsts[0] >= 0 and (rows["frames"] > 0).all()
    if (
        zlib.crc32(rows.tobytes()) != manifest.get("clips_crc32")
        or not fits
        or (ends > begun[1:]).any()
    ):
        raise ValueError(f"{CLIPS} is damaged")


def latent_moments_shape(latent: tuple[int, ...]) -> list[int]:
    """The entry `shape` of a manifest: [2, C, *space] for the moments of one image. Images that
    keep their shape have [2, C] in common.
    """
    return [2, *latent]


def chunk_note(folder: Path, number: int) -> Path:
    """The path of the note that says that a chunk is written."""
    return folder / CHUNKS / f"{number:07d}.json"


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, naming the entry, unless a cache's manifest has what training reads.

    Every entry must be of the right kind.
    """
    sizes = sizes_of(manifest)
    if sizes not in (SQUARE, *SIZES):
        raise ValueError(f"{MANIFEST} has {str(sizes)[:60]!r} for sizes")
    own = keeps_shapes(manifest)
    for name, (kind, least) in (ENTRIES | OWN_ENTRIES if own else ENTRIES).items():
        value = manifest.get(name)
        wrong_kind = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong_kind or (isinstance(value, (int, float)) and not least <= value < math.inf):
            raise ValueError(f"{MANIFEST} has {str(value)[:60]!r} for {name}")
    for name in NORMALISATION:
        _check_normalisation(name, manifest.get(name), manifest["channels"])
    if not isinstance(manifest.get(CAPTIONS_HASH, ""), str):
        raise ValueError(f"{MANIFEST} has {str(manifest[CAPTIONS_HASH])[:60]!r} for its captions")
    classes = manifest.get("classes")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise ValueError(f"{MANIFEST} has classes that are no list of names")
    try:
        image_size = settled(manifest["image_size"])
    except ValueError:
        raise ValueError(
            f"{MANIFEST} has {str(manifest['image_size'])[:60]!r} for image_size"
        ) from None
    latent = [side // manifest["ratio"] for side in sides(image_size)]
    if manifest["shape"] != latent_moments_shape((manifest["channels"], *([] if own else latent))):
        raise ValueError(
            f"{MANIFEST} has a shape, image_size, channels and ratio that do not fit together"
        )


def _check_normalisation(name, value, channels):
    """Raise ValueError, naming the entry, unless it is a number, or a list of one per channel."""
    numbers = value if isinstance(value, list) and len(value) == channels else [value]
    kinds = [isinstance(number, (int, float)) and type(number) is not bool for number in numbers]
    if not all(kinds) or not all(-math.inf < number < math.inf for number in numbers):
        raise ValueError(f"{MANIFEST} has {str(value)[:60]!r} for {name}")
    if name == "scale" and not all(numbers):
        raise ValueError(f"{MANIFEST} has {str(value)[:60]!r} for scale; no scale is 0")
