"""The source that training's options name.

Another kind of source is a file of its own with a Source in it, a field of DataOptions that names
it, and a row of SOURCES. For train.py it is also a field of TrainOptions in training/options.py,
there in DECIDING, PATHS and UNRECORDED, and a flag in training/flags.py.
"""

from collections.abc import Callable
import hashlib
from pathlib import Path
from typing import Any

from data.cache import CachedLatents
from data.images import ImageDataset, sizes_in_headers, unreadable
from data.listing import Listing, list_images, sample_hash
from data.options import CacheOptions, DataOptions
from data.shapes import SQUARE, Size, size_for
from data.source import BadImage, Source
from runtime.image_size import settled, sides, written
from vae import latent_shape, vae_hashes

# call(function, *args) returns function(*args); among several processes the first one may do it
# for all.
Call = Callable[..., Any]


def call_here(function: Callable, *args: Any) -> Any:
    """What the function returns for these arguments."""
    return function(*args)


def open_source(options: DataOptions, call: Call = call_here) -> Source:
    """The source that the options name, in every process.

    call(function, *args) is used for what is slow and what all processes must agree on: it returns
    the same in each of them. Raises ValueError if no source is named, or one does not fit the
    options.
    """
    for name, open_one in SOURCES.items():
        if getattr(options, name) is not None:
            return open_one(options, call)
    raise ValueError("`data_path` is missing; give a folder of images, or `latents`")


def open_images(options: DataOptions, call: Call) -> ImageDataset:
    """The images below `data_path`, cropped to `image_size`, or to what is nearest to their aspect.
    """
    listing = listed(options, call)
    assert listing is not None  # for this source is chosen by its data_path
    sizes = call(planned_sizes, options, listing.paths) if options.sizes != SQUARE else None
    names = listing.hash(options.data_path or "")
    if sizes:  # they decide which images share a batch
        names = hashlib.sha256(f"{names} {sizes}".encode()).hexdigest()
    hashes = names, call(sample_hash, listing.paths)
    return ImageDataset(listing, options.image_size, options.skip_bad_images, hashes, sizes)


def planned_sizes(options: DataOptions | CacheOptions, paths: list[str]) -> list[Size]:
    """The size that each image is brought to, by what its header says.

    That of an unreadable one, which another stands in for, is a square. Raises ValueError where
    none may.
    """
    fitted = size_for(options.sizes, options.image_size, pixels_of_token(options))
    square, sizes = sides(options.image_size), []
    for path, (size, why) in zip(paths, sizes_in_headers(paths), strict=True):
        if size is None and not options.skip_bad_images:
            raise ValueError(unreadable([BadImage(path, why)], skip_bad=False))
        sizes.append(fitted(size) if size else square)
    return sizes


def pixels_of_token(options: DataOptions | CacheOptions) -> int:
    """How many pixels a token has along each side."""
    return latent_shape(options.vae).ratio * options.patch_size


def open_latents(options: DataOptions, call: Call) -> CachedLatents:
    """The cached latents in `latents`; if `data_path` is given, they must be of its images."""
    listing = listed(options, call)
    cached = CachedLatents(options.latents or "")
    if wrong := misfits(cached, options, listing):
        raise ValueError(f"`latents` {options.latents} do not fit: {'; '.join(wrong)}")
    return cached


def listed(options: DataOptions, call: Call) -> Listing | None:
    """The Listing of the images below `data_path`; None without it."""
    if options.data_path is None:
        return None
    return call(list_images, options.data_path, options.num_classes)


def misfits(cached: CachedLatents, options: DataOptions, listing: Listing | None) -> list[str]:
    """What of cached latents does not fit the options, or the images of a listing, in words."""
    manifest, classes, wrong = cached.manifest, cached.classes, []
    theirs = settled(manifest["image_size"])
    if options.image_size != theirs:
        ours = written(options.image_size)
        wrong.append(f"`image_size` is {ours}, the latents' {written(theirs)}")
    if options.sizes != cached.kind:
        wrong.append(FOR_TRAINING[cached.kind])
    if not is_same_autoencoder(options.vae, manifest):
        wrong.append(f"`vae` is {options.vae}, the latents' {manifest['vae']}")
    if options.num_classes and classes is None:
        wrong.append(
            f"`num_classes` is {options.num_classes}, the latents were made without classes "
            "(`num_classes=0`)"
        )
    if options.flip and not manifest["flip"]:
        wrong.append("`flip` is on, the latents have no mirrored images (`flip=False`)")
    if len(classes or ()) > options.num_classes > 0:
        wrong.append(
            f"`num_classes` is {options.num_classes}, the latents have {len(classes)} classes"
        )
    if listing and listing.hash(options.data_path or "") != manifest["files_sha256"]:
        wrong.append(
            f"`data_path` {options.data_path} holds other files than the latents were made from"
        )
    return wrong


def is_same_autoencoder(name: str, manifest: dict) -> bool:
    """Whether a VAE is the one of a manifest, by its place or by the bytes of its files."""
    if absolute_if_there(name) == absolute_if_there(manifest["vae"]):
        return True
    return bool(manifest["vae_sha256"]) and vae_hashes(name) == manifest["vae_sha256"]


def absolute_if_there(name: str) -> str:
    """A name as it is, or, if it is a path that exists, as an absolute path without links."""
    try:
        return str(Path(name).resolve()) if Path(name).exists() else name
    except (OSError, ValueError):  # no path that this file system can have
        return name


# What `sizes` of cached latents may be → what they are for, in words
FOR_TRAINING = {
    SQUARE: "the latents are squares, for training with neither `aspect_buckets` nor `pack`",
    "buckets": "the latents are in buckets, for training with `aspect_buckets=True`",
    "own": "the latents have sizes of their own, for training with `pack`",
}

# Field of DataOptions → what opens the source that it names. The first one that is given counts.
SOURCES: dict[str, Callable[[DataOptions, Call], Source]] = {
    "latents": open_latents,
    "data_path": open_images,
}
