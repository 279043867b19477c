"""The source that training's options name.

Another kind of source is a file of its own with a Source in it, a field of DataOptions that names
it, and a row of SOURCES. For train.py it is also a field of TrainOptions in training/options.py,
there in DECIDING, PATHS and UNRECORDED, and a flag in training/flags.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
import hashlib
import os
from pathlib import Path
from typing import Any

from conditions.text import PieceReader
from data.cache import CachedLatents
from data.cache_format import CAPTIONS_HASH
from data.captioned import CachedTexts, Captioned, ReadTexts, notes_on_length
from data.captions import STORED, Captions, left, read_captions, stand_ins, stored_captions
from data.clip_cache import CachedClips
from data.clips import ClipDataset, probed
from data.images import ImageDataset, sizes_in_headers, unreadable
from data.listing import Listing, list_clips, list_images, sample_hash
from data.options import LABELS, TEXT, CacheOptions, DataOptions
from data.shapes import SQUARE, Size, size_for
from data.source import BadImage, Source
from data.text_cache import TEXT_MANIFEST, CachedText
from data.windows import Windows
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


def open_images(options: DataOptions, call: Call) -> Source:
    """The images below `data_path`, cropped to `image_size`, or to what is nearest to their aspect,
    with their labels or captions.
    """
    if options.frames is not None:
        return open_clips(options, call)
    listing = listed(options, call, options.num_classes)
    assert listing is not None  # for this source is chosen by its data_path
    sizes = call(planned_sizes, options, listing.paths) if options.sizes != SQUARE else None
    names = listing.hash(options.data_path or "")
    if sizes:  # they decide which images share a batch
        names = hashlib.sha256(f"{names} {sizes}".encode()).hexdigest()
    hashes = names, call(sample_hash, listing.paths)
    others = options.image_size, options.skip_bad_images, hashes, sizes
    if options.condition == LABELS:
        return ImageDataset(listing, *others)
    check_inside(options)
    texts = read_texts(options, call, partial(read_captions, listing, options.data_path or ""))
    numbers = list(range(len(listing.paths)))
    return Captioned(ImageDataset(listing._replace(labels=numbers), *others), texts)


def open_clips(options: DataOptions, call: Call) -> Source:
    """Windows of the clips below `data_path`, with their labels or captions."""
    check_one_size(options)
    found = listed(options, call, options.num_classes)
    assert found is not None and options.frames is not None
    listing, infos, _ = call(probed, found, options.skip_bad_images)
    counts, rates = [info.frames for info in infos], [info.rate for info in infos]
    window = options.frames, options.frame_stride, options.frame_rate
    windows = Windows(listing.paths, counts, rates, *window)
    told = f"{listing.hash(options.data_path or '')} {counts} {rates}"
    hashes = hashlib.sha256(told.encode()).hexdigest(), call(sample_hash, listing.paths)
    others = windows, options.image_size, options.skip_bad_images, hashes
    if options.condition == LABELS:
        return ClipDataset(listing, *others)
    check_inside(options)
    texts = read_texts(options, call, partial(read_captions, listing, options.data_path or ""))
    numbers = list(range(len(listing.paths)))
    return Captioned(ClipDataset(listing._replace(labels=numbers), *others), texts)


def check_one_size(options: DataOptions) -> None:
    """Raise ValueError if clips are to keep their aspect."""
    if options.sizes != SQUARE:
        raise ValueError(
            f"`frames` is {options.frames}, and clips are all brought to one size; leave out "
            f"`{'aspect_buckets' if options.sizes == 'buckets' else 'pack'}`"
        )


def check_inside(options: DataOptions) -> None:
    """Raise ValueError if encoders outside of the network are named and no latents."""
    if options.text_encoder is not None:
        raise ValueError(
            "`text_encoder` names encoders whose output lies beside cached latents; give `latents` "
            "that were made with the same `text_encoder`, or leave it out for the network's own"
        )


def read_texts(options: DataOptions, call: Call, captions: Callable[[], Captions]) -> ReadTexts:
    """Captions for a network with an encoder of its own."""
    assert options.text_length is not None  # such a network has one
    reader, length = PieceReader(options.text_length), options.text_length
    found = call(captions)
    return ReadTexts(found, reader, length, call(notes_on_length, found, reader, length))


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


def open_latents(options: DataOptions, call: Call) -> Source:
    """The cached latents in `latents`, with their labels or captions; if `data_path` is given, they
    must be of its images, whose captions are taken then.
    """
    if options.condition == TEXT:
        return open_captioned_latents(options, call)
    listing = listed(options, call, options.num_classes)
    cached = CachedLatents(options.latents or "")
    check_fitting(cached, options, listing)
    return cached if options.frames is None else windows_of(cached, options)


def windows_of(cached: CachedLatents, options: DataOptions) -> CachedClips:
    """Windows of cached clips. Raises ValueError, naming the cache, if there are none."""
    assert options.frames is not None
    try:
        return CachedClips(cached, options.frames, options.frame_stride, options.frame_rate)
    except ValueError as error:
        raise ValueError(f"`latents` {options.latents}: {error}") from None


def open_captioned_latents(options: DataOptions, call: Call) -> Captioned:
    """The same, with captions."""
    folder = Path(options.latents or "")
    latents = CachedLatents(folder)  # its classes, if any, decide the order of its images
    listing = listed(options, call, len(latents.classes or ()))
    check_fitting(latents, options, listing)
    cached = latents if options.frames is None else windows_of(latents, options)
    texts: CachedTexts | ReadTexts
    captions = partial(captions_of_latents, cached, options, listing)
    if options.text_encoder is not None:
        texts = cached_texts(folder, options.text_encoder)
        if listing is not None and call(captions).hash != texts.cached.manifest[CAPTIONS_HASH]:
            raise ValueError(
                f"`data_path` {options.data_path} holds other captions than `text_encoder` has read"
                f" for `latents` {folder}; encode them again"
            )
    else:
        texts = read_texts(options, call, captions)
        if (folder / TEXT_MANIFEST).exists():
            texts.notes = (*texts.notes, UNUSED)
    cached.labels, cached.classes = range(len(cached)), None
    return Captioned(cached, texts)


UNUSED = (
    "the latents have the output of text encoders beside them, which is not used: the network has "
    "an encoder of its own; name them by `text_encoder` to learn with them"
)


def cached_texts(folder: Path, encoders: Sequence[str]) -> CachedTexts:
    """What these encoders made of the captions. Raises ValueError if others did, or none."""
    named = ", ".join(encoders)
    try:
        cached = CachedText(folder)
    except ValueError as error:
        raise ValueError(f"`text_encoder` {named}: {error}") from None
    theirs = [str(one.get("name")) for one in cached.says or ()]
    if [absolute_if_there(name) for name in encoders] != [absolute_if_there(n) for n in theirs]:
        raise ValueError(
            f"`text_encoder` is {named}, and `latents` {folder} have the output of "
            f"{', '.join(theirs)}; name these, or encode the captions again"
        )
    return CachedTexts(cached)


def captions_of_latents(
    cached: CachedLatents | CachedClips, options: DataOptions, listing: Listing | None
) -> Captions:
    """The captions of images whose latents are cached: from `data_path` if it is given, else those
    that were cached with them. Raises ValueError if there are none.
    """
    if listing is not None:
        captions = read_captions(listing, options.data_path or "")
        bad = cached.manifest.get("bad_images") or []
        chosen = stand_ins if isinstance(cached, CachedLatents) else left
        return captions.chosen(chosen(listing.paths, bad)) if bad else captions
    wanted = cached.manifest.get(CAPTIONS_HASH)
    if wanted is None:
        raise ValueError(
            f"`latents` {options.latents} have no captions; give the folder of their images as "
            "`data_path` too, or make them again with extract_latents.py from images that have some"
        )
    try:
        return stored_captions(Path(options.latents or "") / STORED, len(cached), wanted)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`latents` {options.latents}: {error}; remove the folder and make it again"
        ) from None


def check_fitting(cached: CachedLatents, options: DataOptions, listing: Listing | None) -> None:
    """Raise ValueError if cached latents do not fit the options or the images of a listing."""
    if wrong := misfits(cached, options, listing):
        raise ValueError(f"`latents` {options.latents} do not fit: {'; '.join(wrong)}")


def listed(options: DataOptions, call: Call, num_classes: int) -> Listing | None:
    """The Listing of the images below `data_path`, or with `frames` of the clips, in so many
    classes; None without it.
    """
    if options.data_path is None:
        return None
    what = list_images if options.frames is None else list_clips
    return call(what, options.data_path, num_classes)


def misfits(cached: CachedLatents, options: DataOptions, listing: Listing | None) -> list[str]:
    """What of cached latents does not fit the options, or the images of a listing, in words."""
    manifest, classes, wrong = cached.manifest, cached.classes, []
    theirs = settled(manifest["image_size"])
    if options.image_size != theirs:
        ours = written(options.image_size)
        wrong.append(f"`image_size` is {ours}, the latents' {written(theirs)}")
    if options.sizes != cached.kind:
        wrong.append(FOR_TRAINING[cached.kind])
    if options.frames is None and cached.clips is not None:
        wrong.append("the latents are of clips, for training with `frames`")
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
        return os.path.realpath(name) if Path(name).exists() else name
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
