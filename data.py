"""A folder of images, or of cached latents → batches: listing, centre crop, flips, and what is seen at which step.

What a batch holds is a function of the seed and the step alone: neither the number of processes nor of workers matters.
Batches are uint8 (n, 3, S, S), or moments (n, 2, C, h, w) from a cache; n is one process's share of the global batch.
"""

import atexit
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
import ctypes
from functools import partial
import hashlib
import math
import multiprocessing
import os
from pathlib import Path
import signal
import sys
from threading import Thread
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, PngImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from checkpoints import read_json
from command_line import LOST_WORKER, why_lost

# Formats that people have images in and that are not read here; files of them are counted.
OTHER_FORMATS = (
    ".apng", ".avif", ".dds", ".dng", ".exr", ".gif", ".hdr", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".psd",
    ".raw", ".svg", ".tga",
)  # fmt: skip
BACKGROUND = "white"  # behind what is transparent
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # of a resized image; a strip that would have more is cropped first
MOST_TEXT = 2**26  # bytes of text in a PNG file that are passed over; Pillow refuses one of 1 MB
MOST_UNREADABLE = 1000  # images in a row; with more, the disk is gone rather than an image broken
TELL_SECONDS = 60  # between lines about a batch that does not come
SAMPLED_FILES = 64  # of a data set, whose contents tell it from another with the same names
WAIT = 5.0  # seconds for a batch, after which somebody looks whether to wait on
GRACE = 3.0  # seconds that a loader's worker has to end by itself
NO_SHARED_MEMORY = (
    "/dev/shm is too small for their batches; pass --num-workers 0 or fewer, or enlarge it (docker run --shm-size=8g, or "
    "--ipc=host)"
)
PR_SET_PDEATHSIG = 1  # of prctl(2)
END_WORKER = getattr(signal, "SIGUSR2", None)


class Listing(NamedTuple):
    """Image files with their class indices; `classes` are the names in index order, None without classes.

    `notes` say, in sentences, what below the folder was left out.
    """

    paths: list[str]
    labels: list[int]
    classes: list[str] | None
    notes: tuple[str, ...] = ()

    def hash(self, root: Path | str) -> str:
        """SHA-256, in hexadecimal, of the files' names below root and their labels."""
        lines = (f"{label} {str(path).removeprefix(str(Path(root)))}\n" for path, label in zip(self.paths, self.labels))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def sample_hash(paths: list[str]) -> str:
    """SHA-256, in hexadecimal, of the bytes of up to SAMPLED_FILES of these files, evenly spread.

    "" if one cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    count = min(SAMPLED_FILES, len(paths))
    for path in (Path(paths[i * len(paths) // count]) for i in range(count)):
        try:
            if not path.is_file():  # a pipe, say, which might not end
                return ""
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError:
            return ""
    return digest.hexdigest()


def list_images(root: Path | str, num_classes: int) -> Listing:
    """The Listing of a folder with one folder per class; with num_classes 0, of all images below it, whatever the folder.

    The order is that of torchvision's ImageFolder. Hidden files and folders are left out, and links back to a folder
    above. Raises ValueError if the folder is missing, cannot be read, holds no images or an empty
    class, or has more classes than num_classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data-path {root} is not a folder; give one that holds one folder of images per class")
    left_out: Counter[str] = Counter()
    folders = _walk(str(root), left_out)
    if num_classes == 0:
        paths = sorted(path for images in folders.values() for path in images)
        if not paths:
            raise ValueError(f"--data-path {root} holds no images ({', '.join(IMG_EXTENSIONS)}){_told(left_out)}")
        return Listing(paths, [0] * len(paths), None, _notes(root, left_out))
    loose = folders.pop(str(root))
    if loose:
        left_out["loose images beside the class folders"] = len(loose)
    by_class: dict[str, list[str]] = {}
    for folder in sorted(folders):
        by_class.setdefault(os.path.relpath(folder, root).split(os.sep)[0], []).extend(folders[folder])
    classes = sorted(by_class)
    _check_classes(root, num_classes, by_class, left_out)
    paths = [path for name in classes for path in by_class[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return Listing(paths, labels, classes, _notes(root, left_out))


def _walk(root, left_out):
    """{folder: its images in order} for a folder and all below it; counts in `left_out` what is not looked at."""
    found: dict[str, list[str]] = {}
    folders, links, seen = [root], list[str](), set()
    while folders or links:
        folder = folders.pop() if folders else links.pop()  # links last: what they lead to may be listed by itself
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                left_out["links to a folder that is listed by itself"] += 1
                continue
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"--data-path: {folder} cannot be read ({error.strerror}); mend that, or take it away") from None
        seen.add((status.st_dev, status.st_ino))
        below, linked, found[folder] = _sorted_out(inside, left_out)
        folders += below
        links = linked[::-1] + links
    return found


def _sorted_out(entries, left_out):
    """(folders, links to folders, images) among a folder's entries, as paths in order; the rest is counted in `left_out`."""
    folders, links, images = list[str](), list[str](), list[str]()
    for entry in entries:
        ending = os.path.splitext(entry.name)[1].lower()
        kind = _kind(entry)
        if entry.name.startswith("."):
            if kind == "folder" or ending in IMG_EXTENSIONS:
                left_out[f"hidden {kind}s (names that begin with a dot)"] += 1
        elif kind == "folder":
            (links if entry.is_symlink() else folders).append(entry.path)
        elif kind != "file":
            left_out["pipes, sockets and devices"] += 1
        elif ending in IMG_EXTENSIONS:
            images.append(entry.path)
        elif ending in OTHER_FORMATS:
            left_out[f"{ending} files, a format that is not read"] += 1
    return folders, links, images


def _kind(entry):
    """What an entry of a folder is, or leads to: "folder", "file" or "other"; a link to nothing is a file, for its reader."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() or not os.path.exists(entry.path) else "other"
    except OSError:  # a link to itself, say
        return "file"


def _told(left_out):
    """What was left out, to end a message with."""
    return "".join(f"; left out: {count:,} {what}" for what, count in sorted(left_out.items()))


def _notes(root, left_out):
    """What was left out, as the notes of a Listing."""
    return tuple(f"{root}: left out {count:,} {what}" for what, count in sorted(left_out.items()))


def _check_classes(root, num_classes, by_class, left_out):
    """Raise ValueError unless there are class folders, each with images, and no more than num_classes."""
    classes = sorted(by_class)
    empty = [name for name in classes if not by_class[name]]
    if not classes or empty:
        lacking = f"no images in {', '.join(empty[:5])}{' …' if len(empty) > 5 else ''}" if empty else "no class folders"
        raise ValueError(
            f"--data-path {root}: {lacking}{_told(left_out)}. One folder of images per class is wanted, or --num-classes 0"
        )
    if len(classes) > num_classes:
        raise ValueError(
            f"--data-path {root} has {len(classes)} class folders, --num-classes is {num_classes}: there is no room "
            f"for {', '.join(classes[num_classes:][:5])}; pass --num-classes {len(classes)}"
        )


def check_outside(root: Path | str, flag: str, folder: Path | str) -> None:
    """Raise ValueError if a folder to be written lies at or below that of the images, where it would be taken for more."""
    if Path(root).resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
        raise ValueError(f"{flag} {folder} lies inside --data-path {root} and would be taken for images; choose another")


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """The central square of a PIL image as a PIL image of image_size × image_size, resized as ADM does it.

    The image is halved with a box filter while its short side is at least twice the target, then scaled bicubically.
    A strip so long that it would have more than MOST_PIXELS then is cropped before it is scaled.
    """
    while min(pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize([side // 2 for side in pil_image.size], Image.Resampling.BOX)
    short = min(pil_image.size)
    scale = image_size / short
    if scale**2 * math.prod(pil_image.size) > MOST_PIXELS:
        left, top = ((side - short) // 2 for side in pil_image.size)
        pil_image = pil_image.crop((left, top, left + short, top + short))
    pil_image = pil_image.resize([round(side * scale) for side in pil_image.size], Image.Resampling.BICUBIC)
    left, top = ((side - image_size) // 2 for side in pil_image.size)
    return pil_image.crop((left, top, left + image_size, top + image_size))


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """The image in a file, not decoded yet, whatever text is stored with it. Raises what Pillow raises, of many kinds."""
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT
    try:
        with Image.open(path) as image:
            yield image
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any kind as RGB with 8 bits a channel, on BACKGROUND where it is transparent.

    Raises ValueError for kinds without a known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # which convert would clip at 255
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no range that is known; save it with 8 or 16 bits")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # of a PNG with 16 bits, which Pillow halves
        image.info["transparency"] = tuple(level >> 8 for level in key)
    if image.has_transparency_data:  # what lies under it is often what an editor left there
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def _eight_bits(image):
    """A grey image with 16 bits as one with 8, BACKGROUND where it has the colour that is transparent."""
    levels, key = np.asarray(image), image.info.get("transparency")
    grey = (levels >> 8).astype(np.uint8)
    if isinstance(key, int):
        grey[levels == key] = ImageColor.getcolor(BACKGROUND, "L")
    return Image.fromarray(grey)


class BadImage(NamedTuple):
    """A file that could not be read, and why."""

    path: str
    reason: str


# What a data set gives for an (index, flip): pixels or moments, None if unreadable; label; bad images met.
Item = tuple[Tensor | None, int, list[BadImage]]


class ImageDataset(Dataset):
    """Images of a Listing by (index, flip), as (uint8 (3, S, S), label, bad images met).

    An unreadable file is reported rather than raised: with skip_bad the next readable image stands in for it, else the
    image is None.
    """

    def __init__(self, listing: Listing, image_size: int, skip_bad: bool = False) -> None:
        self.listing, self.image_size, self.skip_bad = listing, image_size, skip_bad
        self.classes, self.notes = listing.classes, listing.notes

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, key: tuple[int, bool]) -> Item:
        index, flip = key
        bad: list[BadImage] = []
        for i in range(min(len(self), MOST_UNREADABLE)):
            at = (index + i) % len(self)
            try:
                return self._read(self.listing.paths[at], flip), self.listing.labels[at], bad
            except Exception as error:  # Pillow's decoders raise many kinds for broken files
                bad.append(BadImage(self.listing.paths[at], str(error) or type(error).__name__))
            if not self.skip_bad:
                break
        return None, 0, bad

    def _read(self, path, flip):
        with open_image(path) as image:
            pixels = np.array(center_crop_arr(to_rgb(image), self.image_size))  # (S, S, 3)
        pixels = pixels[:, ::-1] if flip else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (3, S, S)


def unreadable(bad: list[BadImage], skip_bad: bool) -> str:
    """The sentence for images of which none can be taken, whose bad ones these are."""
    first = f"cannot read {bad[0].path} ({bad[0].reason})"
    if not skip_bad:
        return f"{first}; mend it, or pass --skip-bad-images"
    return f"{first}, and none of the {len(bad):,} images after it; look whether their disk is still there"


# What manifest.json of a cache says of the arrays, and of the autoencoder: name → (kind, least).
MANIFEST: dict[str, tuple[type | tuple[type, ...], float]] = {
    "images": (int, 1), "flip": (bool, 0), "shape": (list, 0), "image_size": (int, 1), "channels": (int, 1),
    "ratio": (int, 1), "scale": ((int, float), -math.inf), "shift": ((int, float), -math.inf), "vae": (str, 0),
    "vae_sha256": (dict, 0), "files_sha256": (str, 0),
}  # fmt: skip


class CachedLatents(Dataset):
    """A folder that extract_latents.py wrote, by (index, flip), as (moments (2, C, h, w): mean and std, label, []).

    `manifest` is what it says of itself, `hash` a hash of that, checksums included. Raises ValueError if the folder is
    incomplete, or its parts do not fit together.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        try:
            self.manifest, self.moments, labels = open_cache(folder)  # (N, flips, 2, C, h, w) and (N,)
            check_labels(self.manifest, labels)
            self.hash = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            advice = "it is damaged: remove it and make it again with extract_latents.py"
            if not (folder / "manifest.json").exists():
                advice = f"run extract_latents.py --output {folder} with the same arguments until it ends"
            raise ValueError(f"--latents {folder} holds no complete latents ({error}); {advice}") from None
        self.path = self.moments.filename
        self.labels, self.classes = labels.tolist(), self.manifest["classes"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:  # a worker process maps the file itself rather than being sent what is in it
        return vars(self) | {"moments": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, moments=np.load(state["path"], mmap_mode="r"))

    def __getitem__(self, key: tuple[int, bool]) -> Item:
        index, flip = key
        return torch.from_numpy(np.array(self.moments[index, int(flip)])), self.labels[index], []


def open_cache(folder: Path) -> tuple[dict, np.memmap, np.ndarray]:
    """(manifest, moments (N, flips, 2, C, h, w), labels (N,)) of a finished cache, read when they are used.

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
        raise ValueError(f"moments.npy is {moments.dtype} {moments.shape}, its manifest says {wanted}")
    if labels.shape != wanted[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"labels.npy is {labels.dtype} {labels.shape} for {wanted[0]:,} images")
    return manifest, moments, labels


def check_manifest(manifest: dict) -> None:
    """Raise ValueError, naming the entry, unless a cache's manifest has what training reads, of the right kinds."""
    for name, (kind, least) in MANIFEST.items():
        value = manifest.get(name)
        wrong_kind = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong_kind or (isinstance(value, (int, float)) and not least <= value < math.inf):
            raise ValueError(f"manifest.json has {str(value)[:60]!r} for {name}")
    classes, side = manifest.get("classes"), manifest["image_size"] // manifest["ratio"]
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("manifest.json has classes that are no list of names")
    if not manifest["scale"] or manifest["shape"] != [2, manifest["channels"], side, side]:
        raise ValueError("manifest.json has a shape, image_size, channels, ratio and scale that do not fit together")


def check_labels(manifest: dict, labels: np.ndarray) -> None:
    """Raise ValueError unless the labels (N,) of a cache are of its classes."""
    least, most, classes = labels.min(), labels.max(), max(1, len(manifest["classes"] or ()))
    if least < 0 or most >= classes:
        raise ValueError(f"labels.npy has labels from {least} to {most} for {classes} classes")


def collate(items: list[Item]) -> tuple[Tensor | None, Tensor, list[BadImage]]:
    """(images or moments (n, ...), labels (n,), bad images met); images is None where one had no readable stand-in."""
    images, labels, bad = zip(*items)
    batch = None if any(image is None for image in images) else stack(images)
    return batch, stack([torch.tensor(label) for label in labels]), [one for several in bad for one in several]


def stack(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of one shape as one (n, ...), in a loader's worker in memory that it shares with the training process.

    The queue would move them there later, in a thread whose errors nobody hears of.
    """
    tensors = list(tensors)
    if get_worker_info() is None:
        return torch.stack(tensors)
    shared = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype).share_memory_()
    return torch.stack(tensors, out=shared)


class StepBatches(Sampler):
    """For each step from `start` to `stop` - 1, the (index, flip) pairs of one process's share of the global batch.

    Each epoch is a permutation drawn from (seed, epoch), cut into whole batches; flips are drawn from (seed, step).
    Raises ValueError if there are fewer images than one batch takes.
    """

    def __init__(
        self, num_images: int, global_batch_size: int, seed: int, start: int, stop: int, rank: int = 0,
        world_size: int = 1, flip: bool = True,
    ) -> None:  # fmt: skip
        self.num_images, self.batch, self.seed = num_images, global_batch_size, seed
        self.steps_per_epoch = steps_per_epoch(num_images, global_batch_size)
        self.start, self.stop, self.flip = start, stop, flip
        self.ordered_epoch: int | None = None  # the epoch that was asked for last
        self.order = np.empty(0, np.int64)  # its permutation
        share = global_batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for step in range(self.start, self.stop):
            flips = self.flip & (np.random.default_rng([self.seed, 1, step]).random(self.batch) < 0.5)
            yield list(zip(self.indices(step)[self.share].tolist(), flips[self.share].tolist()))

    def indices(self, step: int) -> np.ndarray:
        """Which images the global batch of a step holds, an int64 array (global_batch_size,)."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.ordered_epoch:
            self.order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_images)
            self.ordered_epoch = epoch
        return self.order[i * self.batch : (i + 1) * self.batch]


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Whole batches in one pass over the images. Raises ValueError if there is none."""
    if num_images < global_batch_size:
        raise ValueError(f"{num_images} images do not fill one batch of {global_batch_size}; lower --global-batch-size")
    return num_images // global_batch_size


def heed_the_trainer(_: int) -> None:
    """Make a loader's worker leave to the training process what a scheduler sends to all processes of a job.

    END_WORKER ends it, whatever it waits for.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if END_WORKER is not None:
        signal.signal(END_WORKER, lambda *_: os._exit(0))
    with suppress(OSError, AttributeError):  # Linux can end it with its trainer, though it be blocked
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def make_loader(
    dataset: Dataset, batches: Iterable[list[Any]], num_workers: int, pin_memory: bool = False, collate_fn: Callable = collate
) -> DataLoader:
    """A DataLoader over batches of keys, such as StepBatches; yields what collate_fn returns. To be walked by `read`."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate_fn, pin_memory=pin_memory,
        worker_init_fn=heed_the_trainer, timeout=WAIT if num_workers else 0,
        generator=torch.Generator(),  # which it draws its workers' seeds from: not torch's own, and nothing uses them
    )  # fmt: skip


class LoaderFailed(ValueError):
    """A loader's worker was ended by the system, or had no memory; says what happened and what to do."""


def say_waiting(seconds: float, say: Callable[[str], None] | None = None) -> None:
    """Say every TELL_SECONDS for how long a batch has not come; on the error output, unless told otherwise.

    To be called every WAIT seconds.
    """
    if int(seconds / TELL_SECONDS) > int((seconds - WAIT) / TELL_SECONDS):
        line = f"no batch for {seconds:.0f} s: is the disk with the images there? waiting on"
        say(line) if say else print(line, file=sys.stderr, flush=True)


def read(loader: DataLoader, waiting: Callable[[float], None] = say_waiting) -> Generator[Any]:
    """The loader's batches; to be closed, which ends the loader's workers, whatever blocks them.

    waiting(seconds) is called every WAIT seconds for which no batch has come; what it raises ends the
    wait. Raises LoaderFailed.
    """
    before = set(multiprocessing.active_children())
    refused = None
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # what torch has half built complains when it goes
    try:
        batches = iter(loader)
    except OSError as error:  # no room for the workers' queues
        refused = error.strerror or str(error)
    finally:
        sys.unraisablehook = hook
    workers = [child for child in multiprocessing.active_children() if child not in before]
    if refused:
        _end(workers, 0.0)
        raise LoaderFailed(f"the loader's workers cannot start ({refused}): {NO_SHARED_MEMORY}")
    end_at_exit = partial(_end, workers, 0.0)
    atexit.register(end_at_exit)  # for whoever does not come to close this: Python itself would wait for ever
    began = time.monotonic()
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                waiting(time.monotonic() - began)
                continue
            except (OSError, EOFError) as error:  # it was just sending a batch
                if not workers:
                    raise
                raise LoaderFailed(f"DataLoader worker was lost ({error}): {LOST_WORKER}") from None
            yield batch
            began = time.monotonic()
    except RuntimeError as error:  # torch tells of a lost worker wherever the program is
        raise explained(error) from None
    finally:
        if workers:
            with suppress(RuntimeError):  # by which torch tells that a worker was killed
                Thread(target=_end, args=(workers, GRACE), daemon=True).start()
            with suppress(RuntimeError):
                batches.__del__()  # type: ignore[attr-defined]  # waits for the workers
        atexit.unregister(end_at_exit)


def _end(workers, patience):
    """End those of a loader's workers that are still there after so many seconds."""
    for number, seconds in ((END_WORKER, patience), (getattr(signal, "SIGKILL", signal.SIGTERM), GRACE)):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(worker.exitcode is None for worker in workers):
            time.sleep(0.05)
        for worker in workers:
            if worker.exitcode is None and number is not None:
                with suppress(ProcessLookupError, RuntimeError):
                    os.kill(worker.pid, number)


def explained(error: RuntimeError) -> Exception:
    """LoaderFailed for what torch raises when something happens to a loader's worker, or the error itself."""
    text = str(error)
    if "shared memory" in text:
        return LoaderFailed(f"the loader's workers have too little shared memory: {NO_SHARED_MEMORY}")
    if "open files" in text or "ancdata" in text:
        return LoaderFailed(
            "the loader's workers need more open files than allowed; pass fewer --num-workers, or ulimit -n 65536"
        )
    if "DataLoader worker (pid" in text:
        return LoaderFailed(why_lost(error))
    return error
