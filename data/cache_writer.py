"""Writing a folder of cached latents, on one process or several, as cache_format.py lays it out.

The same options go on where the work stopped. The result is the same on any number of processes.
"""

from contextlib import closing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import json
import os
from pathlib import Path
import time
from typing import NoReturn
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from conditions.labels import CLASSES
from data.array_files import make_array, npy_layout, write_durably
from data.batches import Ragged, alike, collate_ragged
from data.cache import read_shapes
from data.cache_format import (
    CAPTIONS_HASH, CHUNKS, CLIPS, DTYPES, LABELS, MANIFEST, MOMENTS, PLAN, SHAPES, Extents,
    chunk_note, keeps_shapes, latent_moments_shape, moments_shape,
)  # fmt: skip
from data.captions import STORED, Captions, find_captions, left, stand_ins, write_captions
from data.clip_frames import ClipFrames, ClipPlan, clip_entries, plan_clips
from data.images import ImageDataset, unreadable
from data.listing import Listing, check_outside, list_images
from data.loader import make_loader, read
from data.opening import pixels_of_token, planned_sizes
from data.options import CacheOptions
from data.shapes import SQUARE, size_for
from data.source import BadImage
from runtime.devices import process_device, tf32
from runtime.disk import write_whole
from runtime.image_size import sides
from runtime.json_files import read_json
from runtime.limits import check_memory, check_numbers
from runtime.presence import Presence
from runtime.surroundings import Place, check_accelerate, own_place
from vae import LatentSpace, from_uint8, latent_shape, load_vae, vae_hashes

CHUNK = 64  # images that are encoded, written and checksummed together
POLL_SECONDS = 1
TELL_SECONDS = 60  # between lines on what is waited for


@dataclass(frozen=True)
class PlannedCache:
    """A cache whose folder is there and is to be filled: its plan, and all that the work needs."""

    options: CacheOptions
    folder: Path
    plan: dict  # what decides the content, as plan.json and the manifest have it
    shapes: np.ndarray | None  # heights and widths (N, 2) of latents of images that keep theirs
    listing: Listing
    space: LatentSpace
    device: torch.device
    place: Place
    captions: Captions | None  # of the images, in the first process, if they have any
    notes: tuple[str, ...]  # what a user should know, in sentences
    clips: ClipPlan | None = None  # whose frames the images of the plan and the listing are

    @property
    def items(self) -> Listing:
        """What captions are of, images or clips."""
        return self.listing if self.clips is None else self.clips.found


def cache_latents(options: CacheOptions) -> Path:
    """Cache the latents of a folder of images; the cache's folder.

    Under torchrun each process does its share, and the first one ends the work. Raises ValueError
    for what cannot be done, and OSError where the disk refuses.
    """
    planned = plan_cache(options)
    fill_cache(planned)
    return planned.folder


def plan_cache(options: CacheOptions) -> PlannedCache:
    """The cache that the options ask for, its folder made or found.

    Raises ValueError, and OSError, for whatever is wrong with the options; then nothing was
    written.
    """
    check_accelerate()
    place = own_place()
    check_options(options)
    device = process_device(options.device)
    clips = plan_clips(options) if options.clips else None
    listing = clips.frames() if clips else list_images(options.data_path, options.num_classes)
    space = load_vae(options.vae, device)
    assert isinstance(space, LatentSpace)  # check_options refuses pixels
    folder = Path(options.output)
    # The folder of images itself is refused by begin_folder, as one that holds something else
    if os.path.realpath(folder) != os.path.realpath(options.data_path):
        check_outside(options.data_path, "output", folder)
    plan = make_plan(options, listing, space) | (clips.entries(options) if clips else {})
    plan, shapes = begin_folder(folder, plan, place, partial(plan_shapes, options, listing))
    items = clips.found if clips else listing
    captions, notes = captions_in(options, items) if place.rank == 0 else (None, ())
    return PlannedCache(
        options, folder, plan, shapes, listing, space, device, place, captions,
        (*listing.notes, *notes), clips,
    )  # fmt: skip


def captions_in(
    options: CacheOptions, listing: Listing
) -> tuple[Captions | None, tuple[str, ...]]:
    """The captions of the images, if they have any, and notes on them: those that cannot be read
    are not cached, for whoever trains with labels needs none.
    """
    try:
        captions = find_captions(listing, options.data_path)
    except ValueError as error:
        return None, (f"no captions are cached: {str(error).replace('`', '')}",)
    return (captions, captions.notes) if captions.count else (None, ())


def check_options(options: CacheOptions) -> None:
    """Raise ValueError for numbers out of range and sizes that do not fit."""
    check_numbers(options, num_classes=CLASSES)
    check_memory(CHUNK * (1 + options.flip), options.image_size, "`image_size`")
    if options.latents_dtype not in DTYPES:
        raise ValueError(
            f"`latents_dtype` is {options.latents_dtype!r}; it must be {' or '.join(DTYPES)}"
        )
    if options.vae == "none":
        raise ValueError(
            "`vae=none`: pixels have no latents to cache; train on the images themselves"
        )
    latent_shape(options.vae).size(options.image_size)
    if options.frame_rate is not None and not options.clips:
        raise ValueError("`frame_rate` is for clips; pass `clips=True` too, or leave it out")
    if options.sizes != SQUARE:
        if options.clips:
            raise ValueError(f"`sizes` is {options.sizes}; `clips` are squares: leave one out")
        size_for(options.sizes, options.image_size, pixels_of_token(options))


def make_plan(options: CacheOptions, listing: Listing, space: LatentSpace) -> dict:
    """What decides the content of the cache, as manifest.json has it.

    plan.json has it until that is there.
    """
    latent = space.shape.latent(*sides(options.image_size))
    return {
        "images": len(listing.paths), "flip": options.flip,
        "shape": latent_moments_shape(latent),
        "dtype": options.latents_dtype, "image_size": options.image_size, "vae": options.vae,
        "vae_sha256": vae_hashes(options.vae), "channels": space.shape.channels,
        "ratio": space.shape.ratio, "scale": space.scale, "shift": space.shift,
        "classes": listing.classes, "skip_bad_images": options.skip_bad_images,
        "files_sha256": listing.hash(options.data_path), "chunk": CHUNK,
    } | own_entries(options, latent)  # fmt: skip


def own_entries(options: CacheOptions, latent: tuple[int, ...]) -> dict:
    """What a plan says otherwise, or more, of images that keep their shape."""
    if options.sizes == SQUARE:
        return {}
    return {
        "shape": latent_moments_shape(latent[:1]), "sizes": options.sizes,
        "unit": pixels_of_token(options),
    }  # fmt: skip


def plan_shapes(options: CacheOptions, listing: Listing) -> np.ndarray | None:
    """Heights and widths (N, 2) of latents by the images' headers; None for squares.

    Raises ValueError if a header cannot be read.
    """
    if options.sizes == SQUARE:
        return None
    sizes = planned_sizes(options, listing.paths)
    return np.array(sizes, np.int32) // latent_shape(options.vae).ratio  # (N, 2)


# ---- the folder ----

# What gives the shapes of latents of a cache to be made, which takes a while
Shapes = Callable[[], np.ndarray | None]


def begin_folder(
    folder: Path, plan: dict, place: Place, shapes_of: Shapes
) -> tuple[dict, np.ndarray | None]:
    """Make the folder with its plan and an array to fill, in the first process; the others wait.

    Returns the plan, and the shapes of latents if images keep theirs. Raises ValueError if the
    folder holds latents of another plan, or cannot be made.
    """
    if place.rank:
        wait_for_plan(folder, place)
    elif not (folder / PLAN).exists():
        make_folder(folder, plan, shapes_of)
    check_same_plan(folder, plan)
    plan, shapes = with_shapes(folder, plan)
    path = folder / MOMENTS
    if not path.exists() or path.stat().st_size != array_layout(plan, shapes)[1]:
        raise ValueError(f"{path} has lost its length; remove the folder and make it again")
    return plan, shapes


def with_shapes(folder: Path, plan: dict) -> tuple[dict, np.ndarray | None]:
    """A plan with what a folder's says of its shapes.npy, and these shapes (N, 2).

    Squares have none: (the plan, None). Raises ValueError if shapes.npy is damaged.
    """
    if not keeps_shapes(plan):
        return plan, None
    plan = plan | {"shapes_crc32": read_json(folder / PLAN).get("shapes_crc32")}
    try:
        return plan, read_shapes(folder, plan)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; remove the folder and make it again") from None


def wait_for_plan(folder: Path, place: Place) -> None:
    """Wait until the first process has made the folder."""
    told = time.monotonic()
    while not (folder / PLAN).exists():
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(
                f"process {place.rank} is waiting for process 0 to make {folder}; start that one "
                "too",
                flush=True,
            )
        time.sleep(POLL_SECONDS)


def make_folder(folder: Path, plan: dict, shapes_of: Shapes) -> None:
    """Make the folder, shapes.npy if there are any, an array to fill and, last, its plan.

    Raises ValueError if something else is there, a header cannot be read, or the disk refuses.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / CHUNKS).exists():
        raise ValueError(f"`output` {folder} holds something else; give a new folder")
    shapes = shapes_of()
    try:
        (folder / CHUNKS).mkdir(parents=True, exist_ok=True)
        if shapes is not None:
            write_array(folder / SHAPES, shapes)
            plan = plan | {"shapes_crc32": zlib.crc32(shapes.tobytes())}
        make_array(folder / MOMENTS, *array_layout(plan, shapes))
        write_json(folder / PLAN, plan)
    except OSError as error:
        raise ValueError(
            f"cannot write `output` {folder} ({error.strerror}); choose another folder"
        ) from None


def check_same_plan(folder: Path, plan: dict) -> None:
    """Raise ValueError if a folder's plan is another one.

    An autoencoder with equal files may have another name.
    """
    wanted, found = json.loads(json.dumps(plan)), read_json(folder / PLAN)
    # `sizes` stands in no plan of squares, `clips` in none of images
    names = dict.fromkeys([*wanted, "sizes", "clips"])
    others = [name for name in names if found.get(name) != wanted.get(name)]
    if wanted["vae_sha256"] and "vae" in others:
        others.remove("vae")
    if others:
        raise ValueError(
            f"`output` {folder} holds latents with other {', '.join(others)}; give a new folder"
        )


def write_json(path: Path, contents: dict, indent: int | None = 1) -> None:
    """Write a dict as JSON, whole or not at all. Raises OSError if the disk refuses."""
    text = json.dumps(contents, indent=indent)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file, whole or not at all. Raises OSError if the disk refuses."""

    def write(temporary):
        with open(temporary, "wb") as file:
            np.save(file, array)

    write_whole(path, write)


def array_layout(plan: dict, shapes: np.ndarray | None) -> tuple[bytes, int]:
    """(header, size of the file) of moments.npy."""
    return npy_layout(moments_shape(plan, shapes), plan["dtype"])


# ---- the work ----


def fill_cache(planned: PlannedCache) -> None:
    """Encode this process's share; in the first process, also wait for the others and finish.

    Raises ValueError, and OSError where the disk refuses; the same plan then goes on.
    """
    with Presence(planned.folder, planned.place, only=True) as presence:
        with tf32(planned.options.tf32):
            encode_share(planned)
        if planned.place.rank == 0:
            finish(planned, presence)


def encode_share(planned: PlannedCache) -> None:
    """Encode and write the chunks that this process is to do and that are not there yet.

    Raises ValueError, OSError.
    """
    plan, options, folder = planned.plan, planned.options, planned.folder
    starts = missing_chunks(planned)
    header, _ = array_layout(plan, planned.shapes)
    starts_in_file = Extents(plan, planned.shapes).starts * np.dtype(plan["dtype"]).itemsize
    progress = tqdm(starts, unit="chunk", disable=None if planned.place.rank == 0 else True)
    with (
        open(folder / MOMENTS, "r+b") as file,
        closing(read(chunk_loader(planned, starts))) as loaded,
    ):
        for start, (images, labels, bad) in zip(progress, loaded):
            if images is None or (bad and not options.skip_bad_images):
                refuse(planned, bad)
            content = encode(planned, images, start).tobytes()
            write_durably(file, len(header) + int(starts_in_file[start]), content)
            # Only now, when the data are safely there
            note = {
                "crc32": zlib.crc32(content), "labels": labels[:: 1 + plan["flip"]].tolist(),
                "bad_images": sorted(f"{path} ({why})" for path, why in dict(bad[::-1]).items()),
            }  # fmt: skip
            write_json(chunk_note(folder, start // CHUNK), note, indent=None)


def refuse(planned: PlannedCache, bad: list[BadImage]) -> NoReturn:
    """Raise ValueError for images, or a clip, that cannot be read."""
    told = unreadable(bad, planned.options.skip_bad_images)
    raise ValueError(told if planned.clips is None else f"{told} with a new `output`")


def missing_chunks(planned: PlannedCache) -> list[int]:
    """The first image of each chunk that this process is to do and that is not there yet."""
    dealt = range(0, planned.plan["images"], CHUNK)[planned.place.rank :: planned.place.world_size]
    return [start for start in dealt if not chunk_note(planned.folder, start // CHUNK).exists()]


def chunk_loader(planned: PlannedCache, starts: list[int]) -> DataLoader:
    """A loader of the images of chunks: each image and then, with `flip`, its mirror image."""
    count, flips = planned.plan["images"], range(1 + planned.plan["flip"])
    keys = [
        [(i, bool(flip)) for i in range(start, min(start + CHUNK, count)) for flip in flips]
        for start in starts
    ]
    options, sizes = planned.options, None
    if planned.shapes is not None:
        sizes = [(h, w) for h, w in (planned.shapes * planned.plan["ratio"]).tolist()]
    dataset: ImageDataset | ClipFrames = ImageDataset(
        planned.listing, options.image_size, options.skip_bad_images, sizes=sizes
    )
    if planned.clips is not None:
        dataset = ClipFrames(planned.clips, options.image_size, options.skip_bad_images)
    pin_memory = planned.device.type == "cuda"
    return make_loader(dataset, keys, options.num_workers, pin_memory, collate_ragged)


def encode(planned: PlannedCache, images: Ragged, start: int) -> np.ndarray:
    """The moments of images uint8 (3, H, W) as they are stored, in one row of numbers.

    Images of one size are encoded together. Raises ValueError, naming the first image, `start`, if
    the cache's kind of number is too small.
    """
    dtype, parts = planned.plan["dtype"], images.to(planned.device).parts()
    rows: dict[int, Tensor] = {}
    for numbers in alike(parts):
        batch = torch.stack([parts[number] for number in numbers])  # (n, 3, H, W)
        mean_and_std = planned.space.moments(from_uint8(batch))
        moments = torch.stack(mean_and_std, dim=1)  # (n, 2, C, h, w)
        rows |= zip(numbers, moments.flatten(1))
    stored = torch.cat([rows[number] for number in range(len(parts))]).cpu().numpy().astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"images {start} and following have latents beyond {dtype}; pass "
            "`latents_dtype=float32`"
        )
    return stored


# ---- the end ----


def finish(planned: PlannedCache, presence: Presence) -> None:
    """Wait for every chunk, then write labels.npy, captions.jsonl where there are captions and,
    last, manifest.json.

    Raises ValueError if a process has ended without its share, or a chunk's note is damaged.
    """
    folder, plan = planned.folder, planned.plan
    notes = [chunk_note(folder, number) for number in range(-(-plan["images"] // CHUNK))]
    wait_for_chunks(folder, {path.name for path in notes}, presence)
    if (folder / MANIFEST).exists():
        return
    chunks = [
        read_note(path, min(CHUNK, plan["images"] - number * CHUNK))
        for number, path in enumerate(notes)
    ]
    bad = list(dict.fromkeys(image for chunk in chunks for image in chunk["bad_images"]))
    rows, bad = (None, sorted(bad)) if planned.clips is None else planned.clips.read(bad)
    for image in bad:
        print(f"skipped unreadable {'image' if rows is None else 'clip'} {image}")
    labels = np.array([label for chunk in chunks for label in chunk["labels"]])  # (images,)
    write_array(folder / LABELS, labels)
    sums = {
        "bad_images": bad, "labels_crc32": zlib.crc32(labels.tobytes()),
        "crc32": [chunk["crc32"] for chunk in chunks],
    }  # fmt: skip
    if rows is not None:
        write_array(folder / CLIPS, rows)
        sums |= clip_entries(rows)
    write_json(folder / MANIFEST, plan | sums | store_captions(planned, bad))


def store_captions(planned: PlannedCache, bad: list[str]) -> dict:
    """Write the captions of the images whose latents are cached; what the manifest says of them."""
    if planned.captions is None:
        return {}
    chosen = stand_ins if planned.clips is None else left
    captions = planned.captions.chosen(chosen(planned.items.paths, bad))
    write_captions(planned.folder / STORED, captions)
    return {CAPTIONS_HASH: captions.hash, "captions_missing": captions.missing}


def wait_for_chunks(folder: Path, wanted: set[str], presence: Presence) -> None:
    """Wait until the notes of all chunks are there.

    Raises ValueError if a process has ended without its share.
    """
    told = time.monotonic()
    while missing := wanted - set(os.listdir(folder / CHUNKS)):
        ranks = {int(Path(name).stem) % presence.place.world_size for name in missing}
        absent = presence.missed(ranks)
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"waiting for {len(missing)} chunks of other processes{absent}", flush=True)
        time.sleep(POLL_SECONDS)


def read_note(path: Path, images: int) -> dict:
    """What the note of a chunk of so many images says: crc32, labels, bad_images.

    Raises ValueError if it is damaged.
    """
    note = read_json(path)
    labels, bad = note.get("labels"), note.get("bad_images")
    labels_right = (
        isinstance(labels, list)
        and len(labels) == images
        and all(type(label) is int and 0 <= label < 2**31 for label in labels)
    )
    bad_right = isinstance(bad, list) and all(isinstance(image, str) for image in bad)
    if not (labels_right and bad_right and type(note.get("crc32")) is int):
        raise ValueError(f"{path} is damaged; remove it and give the same command again")
    return note
