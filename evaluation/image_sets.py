"""Sets of images that are scored, in a folder or in an .npz, and their batches.

An .npz has its images as uint8 `arr_0` (N, H, W, 3).
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from data.batches import stack
from data.images import channels_first, open_image, read_pixels
from data.listing import list_images
from data.loader import make_loader, read
from evaluation.features import Batch
from evaluation.summaries import deal
from runtime.image_size import ImageSize, sides
from runtime.npz import IMAGES, open_array
from runtime.team import Team

MOST_SIDE = 16_384  # pixels of images that are scored
# An image, or a batch, and digests; or None and what is wrong
HashedImage = tuple[Batch | None, Tensor | str]


@contextmanager
def npz_errors(path: Path | str, argument: str, wanted: str) -> Iterator[None]:
    """Have whatever goes wrong with an .npz told by one ValueError, which calls it by the name of
    the `argument` that gave it and says what is wanted.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`{argument}` {path}: {error}") from None
    except Exception as error:  # a broken file makes zipfile, zlib and NumPy raise many kinds
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"`{argument}` {path} cannot be read as an .npz ({reason[:300]}); give {wanted}"
        ) from None


class Scored(Dataset):
    """What is read for scores: items (uint8 (3, ...), digest), or (None, what is wrong).

    `mixed`: whether they have several sizes.
    """

    mixed = False

    def __len__(self) -> int:
        raise NotImplementedError


class FolderImages(Scored):
    """All images below a folder, in the order of their paths.

    Items are (uint8 (3, H, W), digest) or (None, what is wrong). Errors call the folder by the name
    of the `argument` that gave it. Without image_size the images must be RGB: ValueError. `size` is
    (W, H), of the first image where `strange` says that one in `share` has another; both are looked
    up in `share`. Whoever knows all shares sets `mixed`: whether images have several sizes.
    """

    def __init__(
        self, folder: Path | str, argument: str, image_size: ImageSize | None = None,
        share: slice = slice(None),
    ) -> None:  # fmt: skip
        listing = list_images(folder, num_classes=0, argument=argument)
        self.paths, self.notes = listing.paths, listing.notes
        self.folders = len({os.path.dirname(path) for path in self.paths})
        self.image_size, self.named, self.strange = image_size, f"`{argument}` {folder}", ""
        if image_size is not None:
            height, width = sides(image_size)
            self.size = width, height
            return
        first = self.paths[0]
        self.size = size_in_header(first)
        sizes = {path: size_in_header(path) for path in self.paths[share]}
        for path, size in sizes.items():
            if size != self.size and not self.strange:
                self.strange = (
                    f"{path} is {in_pixels(size)}, {first} is {in_pixels(self.size)}"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> HashedImage:
        try:
            pixels = read_pixels(self.paths[i], self.image_size)  # (H, W, 3)
        except Exception as error:  # Pillow's decoders raise many kinds for broken files
            return None, f"{self.paths[i]} cannot be read ({error}); remove it or make it again"
        return hashed(pixels)


def size_in_header(path: Path | str) -> tuple[int, int]:
    """(width, height) of an image, read from its header. Raises ValueError unless it is RGB."""
    try:
        with open_image(path) as image:
            mode, size = image.mode, image.size
            mode += " with transparency" if image.has_transparency_data else ""
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it or make it again") from None
    if mode != "RGB":
        raise ValueError(
            f"{path} is of mode {mode}; wanted is RGB. Convert it, or, for a reference, pass "
            "`make_reference` with `image_size`, which converts as training does"
        )
    return size


def in_pixels(size: tuple[int, int]) -> str:
    """A size (width, height) in words."""
    return f"{size[0]}x{size[1]}"


class ArrayImages(Scored):
    """The images `arr_0` of an .npz, which are not held in memory unless they are compressed.

    Items as in FolderImages.

    Raises ValueError if they are no uint8 images (N, H, W, 3).
    """

    folders = 1
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.array = open_array(path, IMAGES)
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            clips = ", or for clips `frames`" if len(shape) == 5 else ""
            raise ValueError(
                f"{IMAGES} is {dtype} {shape}; wanted are images, uint8 (N, H, W, 3){clips}"
            )
        self.size = (shape[2], shape[1])
        if max(self.size) > MOST_SIDE:
            raise ValueError(
                f"{IMAGES} has images of {in_pixels(self.size)}; at most {MOST_SIDE} pixels a side "
                "are scored"
            )

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> HashedImage:
        return hashed(np.array(self.array[i]))

    # A worker process maps the file itself rather than being sent what is in it
    def __getstate__(self) -> dict:
        return vars(self) | {"array": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, array=open_array(state["path"], IMAGES))


ImageSet = FolderImages | ArrayImages


def hashed(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """(uint8 (3, H, W), SHA-256 of the pixels, uint8 (32,)) of an image (H, W, 3)."""
    return channels_first(pixels), digest_of(pixels)


def digest_of(pixels: np.ndarray) -> Tensor:
    """The SHA-256 of pixels, uint8 (32,)."""
    digest = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest(), np.uint8).copy()
    return torch.from_numpy(digest)


def collate_hashed(items: list[HashedImage]) -> HashedImage:
    """(Batch, digests (n, 32)), or (None, what is wrong with the first bad one)."""
    for image, reason in items:
        if image is None:
            return None, reason
    images, digests = zip(*items)
    same = len({image.shape for image in images}) == 1
    batch = stack(images) if same else [stack([image])[0] for image in images]
    return batch, stack(digests)


def read_batches(
    images: Scored, batch_size: int, device: torch.device, team: Team = Team(),
    num_workers: int = 0,
) -> Iterator[tuple[Batch, Tensor]]:  # fmt: skip
    """This process's batches of a set of images, as `summaries.summarize` takes them.

    Raises ValueError for a damaged image.
    """
    batches = list(deal(len(images), batch_size, team))
    loader = make_loader(images, batches, num_workers, device.type == "cuda", collate_hashed)
    with closing(read(loader)) as found:
        for batch, digests in tqdm(
            found, total=len(batches), unit="batch", disable=True if team.rank else None
        ):
            if batch is None:
                raise ValueError(digests)
            there = [part.to(device, non_blocking=True) for part in batch] if images.mixed else (
                batch.to(device, non_blocking=True)
            )
            yield there, digests.to(device, non_blocking=True)


def hash_of(digests: Tensor) -> str:
    """One SHA-256, in hexadecimal, for images with these digests (N, 32), in their order.

    Equal pixels have an equal hash.
    """
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()
