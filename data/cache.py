"""A folder of cached latents, written once by extract_latents.py and read by every training."""

import argparse
from contextlib import closing
import errno
import hashlib
from io import BytesIO
import json
import math
import os
from pathlib import Path
import time
import zlib

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from data.images import ImageDataset, Item, unreadable
from data.listing import Listing
from data.loader import make_loader, read
from runtime.disk import write_whole
from runtime.json_files import read_json
from runtime.presence import Presence
from runtime.surroundings import Place
from vae import LatentSpace, from_uint8, vae_hashes

# What manifest.json of a cache says of the arrays, and of the autoencoder: name → (kind, least).
MANIFEST: dict[str, tuple[type | tuple[type, ...], float]] = {
    "images": (int, 1), "flip": (bool, 0), "shape": (list, 0), "image_size": (int, 1),
    "channels": (int, 1), "ratio": (int, 1), "scale": ((int, float), -math.inf),
    "shift": ((int, float), -math.inf), "vae": (str, 0), "vae_sha256": (dict, 0),
    "files_sha256": (str, 0),
}  # fmt: skip


class CachedLatents(Dataset):
    """A folder that extract_latents.py wrote, by (index, flip), as (moments (2, C, h, w): mean and
    std, label, []).

    `manifest` is what it says of itself, `hash` a hash of that, checksums included. Raises
    ValueError if the folder is incomplete, or its parts do not fit together.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        try:
            # (N, flips, 2, C, h, w) and (N,)
            self.manifest, self.moments, labels = open_cache(folder)
            check_labels(self.manifest, labels)
            self.hash = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            advice = "it is damaged: remove it and make it again with extract_latents.py"
            if not (folder / "manifest.json").exists():
                advice = f"run extract_latents.py --output {folder} with the same arguments until it ends"
            raise ValueError(
                f"--latents {folder} holds no complete latents ({error}); {advice}"
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

    def __getitem__(self, key: tuple[int, bool]) -> Item:
        index, flip = key
        return torch.from_numpy(np.array(self.moments[index, int(flip)])), self.labels[index], []


def open_cache(folder: Path) -> tuple[dict, np.memmap, np.ndarray]:
    """(manifest, moments (N, flips, 2, C, h, w), labels (N,)) of a finished cache, read when they
    are used.

    Raises ValueError if one is missing, or they do not fit together.
    """
    manifest = read_json(folder / "manifest.json")
    check_manifest(manifest)
    arrays = []
    for name in ("moments.npy", "labels.npy"):
        try:
            arrays.append(np.load(folder / name, mmap_mode="r"))
        except (OSError, ValueError, TypeError, OverflowError, EOFError, MemoryError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
            raise ValueError(f"{name} cannot be read: {reason}") from None
    moments, labels = arrays
    wanted = (manifest["images"], 1 + manifest["flip"], *manifest["shape"])
    if moments.shape != wanted or moments.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"moments.npy is {moments.dtype} {moments.shape}, its manifest says {wanted}"
        )
    if labels.shape != wanted[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"labels.npy is {labels.dtype} {labels.shape} for {wanted[0]:,} images")
    return manifest, moments, labels


def check_manifest(manifest: dict) -> None:
    """Raise ValueError, naming the entry, unless a cache's manifest has what training reads, of the
    right kinds.
    """
    for name, (kind, least) in MANIFEST.items():
        value = manifest.get(name)
        wrong_kind = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong_kind or (isinstance(value, (int, float)) and not least <= value < math.inf):
            raise ValueError(f"manifest.json has {str(value)[:60]!r} for {name}")
    classes, side = manifest.get("classes"), manifest["image_size"] // manifest["ratio"]
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise ValueError("manifest.json has classes that are no list of names")
    if not manifest["scale"] or manifest["shape"] != [2, manifest["channels"], side, side]:
        raise ValueError(
            "manifest.json has a shape, image_size, channels, ratio and scale that do not fit together"
        )


def check_labels(manifest: dict, labels: np.ndarray) -> None:
    """Raise ValueError unless the labels (N,) of a cache are of its classes."""
    least, most, classes = labels.min(), labels.max(), max(1, len(manifest["classes"] or ()))
    if least < 0 or most >= classes:
        raise ValueError(f"labels.npy has labels from {least} to {most} for {classes} classes")


CHUNK = 64  # images that are encoded, written and checksummed together
POLL_SECONDS = 1
TELL_SECONDS = 60  # between lines on what is waited for


def describe(args: argparse.Namespace, listing: Listing, space: LatentSpace) -> dict:
    """What decides the content of the cache, as manifest.json and, until it is there, plan.json
    have it.
    """
    return {
        "images": len(listing.paths), "flip": args.flip,
        "shape": [2, *space.shape.latent(args.image_size, args.image_size)],
        "dtype": args.latents_dtype,
        "image_size": args.image_size, "vae": args.vae, "vae_sha256": vae_hashes(args.vae),
        "channels": space.shape.channels, "ratio": space.shape.ratio, "scale": space.scale,
        "shift": space.shift, "classes": listing.classes, "skip_bad_images": args.skip_bad_images,
        "files_sha256": listing.hash(args.data_path), "chunk": CHUNK,
    }  # fmt: skip


def open_folder(folder: Path, plan: dict, place: Place) -> None:
    """Make the folder with its plan and an array to fill, in the first process while the others
    wait for it.

    Raises ValueError if it holds latents of another plan, or cannot be made.
    """
    wanted, told = json.loads(json.dumps(plan)), time.monotonic()
    while not (folder / "plan.json").exists():
        if place.rank:
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                print(
                    f"process {place.rank} is waiting for process 0 to make {folder}; start that one too",
                    flush=True,
                )
            time.sleep(POLL_SECONDS)
            continue
        if folder.exists() and any(folder.iterdir()) and not (folder / "chunks").exists():
            raise ValueError(f"--output {folder} holds something else; give a new folder")
        try:
            (folder / "chunks").mkdir(parents=True, exist_ok=True)
            make_array(folder / "moments.npy", plan)
            write_json(folder / "plan.json", plan)
        except OSError as error:
            raise ValueError(
                f"cannot write --output {folder} ({error.strerror}); choose another folder"
            ) from None
    found = read_json(folder / "plan.json")
    others = [
        name
        for name in wanted
        if found.get(name) != wanted[name] and not (name == "vae" and wanted["vae_sha256"])
    ]
    if others:
        raise ValueError(
            f"--output {folder} holds latents with other {', '.join(others)}; give a new folder"
        )
    if (
        not (folder / "moments.npy").exists()
        or (folder / "moments.npy").stat().st_size != array_layout(plan)[1]
    ):
        raise ValueError(
            f"{folder / 'moments.npy'} has lost its length; remove the folder and make it again"
        )


def write_json(path: Path, contents: dict, indent: int | None = 1) -> None:
    """Write a dict as JSON, whole or not at all. Raises OSError if the disk refuses."""
    text = json.dumps(contents, indent=indent)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def array_layout(plan: dict) -> tuple[bytes, int, int]:
    """(header, size of the file, bytes of an image) of moments.npy."""
    shape, dtype = (plan["images"], 1 + plan["flip"], *plan["shape"]), np.dtype(plan["dtype"])
    header = BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": shape}
    )
    row = int(np.prod(shape[1:])) * dtype.itemsize
    return header.getvalue(), len(header.getvalue()) + plan["images"] * row, row


def make_array(path: Path, plan: dict) -> None:
    """Write an .npy file of the right size, empty as yet; its disk space is taken at once where the
    system can do that.
    """
    header, size, _ = array_layout(plan)
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
        file.truncate(size)


def chunk_path(folder: Path, number: int) -> Path:
    return folder / "chunks" / f"{number:07d}.json"


def encode_share(
    args: argparse.Namespace, listing: Listing, space: LatentSpace, folder: Path, plan: dict,
    device: torch.device, place: Place,
) -> None:  # fmt: skip
    """Encode and write the chunks that this process is to do and that are not there yet.

    Raises ValueError, OSError.
    """
    count = plan["images"]
    starts = [
        s
        for s in range(0, count, CHUNK)[place.rank :: place.world_size]
        if not chunk_path(folder, s // CHUNK).exists()
    ]
    keys = [
        [(i, bool(f)) for i in range(s, min(s + CHUNK, count)) for f in range(1 + plan["flip"])]
        for s in starts
    ]
    dataset = ImageDataset(listing, args.image_size, args.skip_bad_images)
    loader = make_loader(dataset, keys, args.num_workers, pin_memory=device.type == "cuda")
    header, _, row = array_layout(plan)
    progress = tqdm(starts, unit="chunk", disable=None if place.rank == 0 else True)
    with open(folder / "moments.npy", "r+b") as file, closing(read(loader)) as loaded:
        for start, (images, labels, bad) in zip(progress, loaded):
            if images is None or (bad and not args.skip_bad_images):
                raise ValueError(unreadable(bad, args.skip_bad_images))
            # (n·flips, 2, C, h, w)
            moments = torch.stack(space.moments(from_uint8(images.to(device))), dim=1)
            stored = moments.cpu().numpy().astype(plan["dtype"])
            if not np.isfinite(stored).all():
                raise ValueError(
                    f"images {start} and following have latents beyond {plan['dtype']}; pass --latents-dtype float32"
                )
            content = stored.tobytes()
            file.seek(len(header) + start * row)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            done = {"crc32": zlib.crc32(content), "labels": labels[:: 1 + plan["flip"]].tolist()}
            done["bad_images"] = sorted({f"{path} ({reason})" for path, reason in bad})
            write_json(chunk_path(folder, start // CHUNK), done, indent=None)


def finish(folder: Path, plan: dict, presence: Presence) -> None:
    """Wait for every chunk, then write labels.npy and, last, manifest.json.

    Raises ValueError if a process has ended without its share, or a chunk's note is damaged.
    """
    wanted = [chunk_path(folder, number) for number in range(-(-plan["images"] // CHUNK))]
    told = time.monotonic()
    while missing := {path.name for path in wanted} - set(os.listdir(folder / "chunks")):
        ranks = {int(Path(name).stem) % presence.place.world_size for name in missing}
        absent = presence.missed(ranks)
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"waiting for {len(missing)} chunks of other processes{absent}", flush=True)
        time.sleep(POLL_SECONDS)
    if (folder / "manifest.json").exists():
        return
    chunks = [
        read_chunk(path, min(CHUNK, plan["images"] - number * CHUNK))
        for number, path in enumerate(wanted)
    ]
    bad = sorted({image for chunk in chunks for image in chunk["bad_images"]})
    for image in bad:
        print(f"skipped unreadable image {image}")
    labels = np.array([label for chunk in chunks for label in chunk["labels"]])

    def write_labels(temporary):
        with open(temporary, "wb") as file:
            np.save(file, labels)

    write_whole(folder / "labels.npy", write_labels)
    manifest = plan | {"bad_images": bad, "labels_crc32": zlib.crc32(labels.tobytes())}
    manifest["crc32"] = [chunk["crc32"] for chunk in chunks]
    write_json(folder / "manifest.json", manifest)


def read_chunk(path: Path, images: int) -> dict:
    """What the note of a chunk of so many images says: crc32, labels, bad_images.

    Raises ValueError if it is damaged.
    """
    chunk = read_json(path)
    labels, bad = chunk.get("labels"), chunk.get("bad_images")
    labels = labels if isinstance(labels, list) else []
    right = len(labels) == images and all(
        type(label) is int and 0 <= label < 2**31 for label in labels
    )
    if not (
        right
        and isinstance(bad, list)
        and all(isinstance(one, str) for one in bad)
        and type(chunk.get("crc32")) is int
    ):
        raise ValueError(f"{path} is damaged; remove it and give the same command again")
    return chunk


def verify(folder: Path) -> list[str]:
    """What is wrong with a finished folder, a list of sentences.

    Raises ValueError if it is not finished.
    """
    try:
        manifest, moments, labels = open_cache(folder)
    except ValueError as error:
        raise ValueError(
            f"--verify {folder} holds no finished latents ({error}); give a folder that --output made"
        ) from None
    sums, chunk = manifest.get("crc32"), manifest.get("chunk")
    if not (
        isinstance(sums, list)
        and type(chunk) is int
        and 0 < chunk
        and len(sums) == -(-len(moments) // chunk)
    ):
        raise ValueError(
            f"--verify {folder}: manifest.json has no checksums; give a folder that --output made"
        )
    wrong = []
    for number, crc32 in enumerate(tqdm(sums, unit="chunk", disable=None)):
        first = number * chunk
        if zlib.crc32(moments[first : first + chunk].tobytes()) != crc32:
            wrong.append(
                f"moments.npy is damaged in images {first} to {min(first + chunk, len(moments)) - 1}"
            )
    if zlib.crc32(labels.tobytes()) != manifest.get("labels_crc32"):
        wrong.append("labels.npy is damaged")
    return wrong
