"""A folder of images, or of cached latents → batches: listing, centre crop, flips, and what is seen at which step.

What a batch holds is a function of the seed and the step alone: neither the number of processes nor of workers matters.
Batches are uint8 (n, 3, S, S), or moments (n, 2, C, h, w) from a cache; n is one process's share of the global batch.
"""

from collections.abc import Iterable, Iterator
import hashlib
import json
import os
from pathlib import Path
import signal
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS


class Listing(NamedTuple):
    """Image files with their class indices; `classes` are the names in index order, None without classes."""

    paths: list[str]
    labels: list[int]
    classes: list[str] | None

    def hash(self, root: Path | str) -> str:
        """SHA-256, in hexadecimal, of the files' names below root and their labels."""
        lines = (f"{label} {str(path).removeprefix(str(Path(root)))}\n" for path, label in zip(self.paths, self.labels))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def list_images(root: Path | str, num_classes: int) -> Listing:
    """The Listing of a folder with one folder per class; with num_classes 0, of all images below it, whatever the folder.

    Raises ValueError if the folder is missing, holds no images or an empty class, or has more classes than num_classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data-path {root} is not a folder; give one that holds one folder of images per class")
    if num_classes == 0:
        walked = (os.path.join(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
        paths = sorted(path for path in walked if path.lower().endswith(IMG_EXTENSIONS))
        if not paths:
            raise ValueError(f"--data-path {root} holds no images ({', '.join(IMG_EXTENSIONS)})")
        return Listing(paths, [0] * len(paths), None)
    try:
        folder = ImageFolder(root)
    except FileNotFoundError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"--data-path {root}: {reason} One folder of images per class is wanted, or --num-classes 0"
        ) from error
    if len(folder.classes) > num_classes:
        raise ValueError(
            f"--data-path {root} has {len(folder.classes)} class folders, --num-classes is {num_classes}: there is no room "
            f"for {', '.join(folder.classes[num_classes:][:5])}; pass --num-classes {len(folder.classes)}"
        )
    return Listing([path for path, _ in folder.samples], [label for _, label in folder.samples], folder.classes)


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """The central square of a PIL image as a PIL image of image_size × image_size, resized as ADM does it.

    The image is halved with a box filter while its short side is at least twice the target, then scaled bicubically.
    """
    while min(pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize([side // 2 for side in pil_image.size], Image.Resampling.BOX)
    scale = image_size / min(pil_image.size)
    pil_image = pil_image.resize([round(side * scale) for side in pil_image.size], Image.Resampling.BICUBIC)
    left, top = ((side - image_size) // 2 for side in pil_image.size)
    return pil_image.crop((left, top, left + image_size, top + image_size))


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any kind as RGB with 8 bits a channel. Raises ValueError for kinds without a known range."""
    if image.mode.startswith("I;16"):  # which convert would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no range that is known; save it with 8 or 16 bits")
    return image.convert("RGB")


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
        self.classes = listing.classes

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, key: tuple[int, bool]) -> Item:
        index, flip = key
        bad: list[BadImage] = []
        for i in range(len(self)):
            at = (index + i) % len(self)
            try:
                return self._read(self.listing.paths[at], flip), self.listing.labels[at], bad
            except Exception as error:  # Pillow's decoders raise many kinds for broken files
                bad.append(BadImage(self.listing.paths[at], str(error) or type(error).__name__))
            if not self.skip_bad:
                break
        return None, 0, bad

    def _read(self, path, flip):
        with Image.open(path) as image:
            pixels = np.array(center_crop_arr(to_rgb(image), self.image_size))  # (S, S, 3)
        pixels = pixels[:, ::-1] if flip else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (3, S, S)


class CachedLatents(Dataset):
    """A folder that extract_latents.py wrote, by (index, flip), as (moments (2, C, h, w): mean and std, label, []).

    `manifest` is what it says of itself, `hash` a hash of that, checksums included. Raises ValueError if the folder is
    incomplete.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        try:
            text = (folder / "manifest.json").read_bytes()
            self.manifest, self.hash = json.loads(text), hashlib.sha256(text).hexdigest()
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")  # (N, flips, 2, C, h, w)
            self.path = self.moments.filename
            self.labels, self.classes = np.load(folder / "labels.npy").tolist(), self.manifest["classes"]
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or error
            advice = "it is damaged: remove it and make it again with extract_latents.py"
            if not (folder / "manifest.json").exists():
                advice = f"run extract_latents.py --output {folder} with the same arguments until it ends"
            raise ValueError(f"--latents {folder} holds no complete latents ({reason}); {advice}") from None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:  # a worker process maps the file itself rather than being sent what is in it
        return vars(self) | {"moments": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, moments=np.load(state["path"], mmap_mode="r"))

    def __getitem__(self, key: tuple[int, bool]) -> Item:
        index, flip = key
        return torch.from_numpy(np.array(self.moments[index, int(flip)])), self.labels[index], []


def collate(items: list[Item]) -> tuple[Tensor | None, Tensor, list[BadImage]]:
    """(images or moments (n, ...), labels (n,), bad images met); images is None where one had no readable stand-in."""
    images, labels, bad = zip(*items)
    batch = None if any(image is None for image in images) else torch.stack(images)
    return batch, torch.tensor(labels), [one for several in bad for one in several]


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


def ignore_signals(_: int) -> None:
    """Make a loader's worker leave to the training process what a scheduler sends to all processes of a job."""
    for number in {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), signal.SIGINT}:  # Windows lacks one
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    dataset: Dataset, batches: Iterable[list[tuple[int, bool]]], num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """A DataLoader over batches of keys, such as StepBatches; yields what `collate` returns."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # which it draws its workers' seeds from: not torch's own, and nothing uses them
    )  # fmt: skip
