"""How a folder of cached latents is laid out: what its writer and its readers agree on.

moments.npy is one array (images, flips, 2, C, h, w): mean and standard deviation of the latents of
each image and, with `flip`, of its mirror image. labels.npy is (images,). manifest.json says what
they are, and appears when all is done. Until then plan.json says what they will be, and
chunks/NNNNNNN.json is the note of a chunk of images that is written.
"""

import math
from pathlib import Path
from typing import Any

from runtime.image_size import settled, sides

MANIFEST, PLAN, MOMENTS, LABELS = "manifest.json", "plan.json", "moments.npy", "labels.npy"
CHUNKS = "chunks"  # the folder of notes
DTYPES = ("float16", "float32")  # of moments.npy
# What a manifest must say of the arrays, and of the autoencoder: name → (kind, least).
ENTRIES: dict[str, tuple[type | tuple[type, ...], float]] = {
    "images": (int, 1), "flip": (bool, 0), "shape": (list, 0), "image_size": ((int, list), 1),
    "channels": (int, 1), "ratio": (int, 1), "scale": ((int, float), -math.inf),
    "shift": ((int, float), -math.inf), "vae": (str, 0), "vae_sha256": (dict, 0),
    "files_sha256": (str, 0),
}  # fmt: skip


def moments_shape(manifest: dict[str, Any]) -> tuple[int, ...]:
    """The shape (images, flips, 2, C, h, w) of moments.npy that a manifest or plan describes."""
    return (manifest["images"], 1 + manifest["flip"], *manifest["shape"])


def latent_moments_shape(latent: tuple[int, ...]) -> list[int]:
    """The entry `shape` of a manifest: [2, C, *space] for the moments of one image."""
    return [2, *latent]


def chunk_note(folder: Path, number: int) -> Path:
    """The path of the note that says that a chunk is written."""
    return folder / CHUNKS / f"{number:07d}.json"


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, naming the entry, unless a cache's manifest has what training reads.

    Every entry must be of the right kind.
    """
    for name, (kind, least) in ENTRIES.items():
        value = manifest.get(name)
        wrong_kind = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong_kind or (isinstance(value, (int, float)) and not least <= value < math.inf):
            raise ValueError(f"{MANIFEST} has {str(value)[:60]!r} for {name}")
    classes = manifest.get("classes")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise ValueError(f"{MANIFEST} has classes that are no list of names")
    latent = [side // manifest["ratio"] for side in sides(settled(manifest["image_size"]))]
    fits = manifest["shape"] == latent_moments_shape((manifest["channels"], *latent))
    if not manifest["scale"] or not fits:
        raise ValueError(
            f"{MANIFEST} has a shape, image_size, channels, ratio and scale that do not fit "
            "together"
        )
