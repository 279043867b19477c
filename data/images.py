"""A file to an image as training sees it: the central crop, and the data set of a Listing."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import math
from pathlib import Path

from PIL import Image
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.listing import Listing
from data.shapes import Size
from data.source import BadImage, TrainingItem
from runtime.image_files import long_texts, open_image, to_rgb
from runtime.image_size import ImageSize, sides

# Of a resized image; a strip that would have more is cropped first
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26
HEADERS_AT_ONCE = 16  # a disk on a network answers after a while
MOST_UNREADABLE = 1000  # images in a row; with more, the disk is gone rather than an image broken


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """The central square of a PIL image, as a PIL image of image_size × image_size."""
    return cover(pil_image, (image_size, image_size))


def cover(pil_image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A PIL image scaled until it covers a size, (height, width) in pixels, and cropped centrally.

    As in ADM, the image is halved with a box filter while it then still covers the size, and
    scaled bicubically after that. A strip so long that it would have more than MOST_PIXELS then
    is cropped before it is scaled.
    """
    target = size[1], size[0]  # as PIL has them: width first
    while all(side >= 2 * wanted for side, wanted in zip(pil_image.size, target)):
        pil_image = pil_image.resize([side // 2 for side in pil_image.size], Image.Resampling.BOX)
    scale = max(wanted / side for side, wanted in zip(pil_image.size, target))
    if scale**2 * math.prod(pil_image.size) > MOST_PIXELS:
        pil_image = _central(pil_image, _smallest_cover(pil_image.size, target))
    scaled = [round(side * scale) for side in pil_image.size]
    return _central(pil_image.resize(scaled, Image.Resampling.BICUBIC), target)


def _smallest_cover(sides, target):
    """(width, height) of the smallest box in an image that covers a target when it is scaled."""
    (width, height), (wide, high) = sides, target
    if width * high <= height * wide:  # the width decides how far the image is scaled
        return width, -(-width * high // wide)
    return -(-height * wide // high), height


def _central(image, sides):
    """The central box of an image, (width, height)."""
    left, top = ((side - wanted) // 2 for side, wanted in zip(image.size, sides))
    return image.crop((left, top, left + sides[0], top + sides[1]))


def sizes_in_headers(paths: Sequence[Path | str]) -> list[tuple[Size | None, str]]:
    """(height and width, "") of each of these images as its header has them, or (None, why it
    cannot be read). Several are read at a time.
    """
    with long_texts(), ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        return list(pool.map(_size_in_header, paths))


def _size_in_header(path):
    try:
        with Image.open(path) as image:
            return image.size[::-1], ""
    except Exception as error:  # of as many kinds as Pillow's decoders raise
        return None, str(error) or type(error).__name__


def read_pixels(path: Path | str, image_size: ImageSize | None = None) -> np.ndarray:
    """The pixels of an image file, uint8 (H, W, 3), cropped to image_size in RGB as training sees
    them. With None the image is read as it is: (H, W, 3) if it is RGB.

    Raises what Pillow raises, of many kinds.
    """
    with open_image(path) as image:
        cropped = cover(to_rgb(image), sides(image_size)) if image_size else image
        return np.array(cropped)  # (H, W, 3)


def channels_first(pixels: np.ndarray) -> Tensor:
    """Pixels uint8 (H, W, 3) as a tensor uint8 (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (3, H, W)


class ImageDataset(Dataset):
    """Images of a Listing by (index, flip), as (uint8 (3, H, W), label, bad images met).

    With `sizes`, (height, width) of each, the images are brought to these: (3, height, width). An
    unreadable file is reported rather than raised: with skip_bad the next readable image stands in
    for it, in its size, else the image is None.
    """

    lengths: Sequence[int] | None = None

    def __init__(
        self, listing: Listing, image_size: ImageSize, skip_bad: bool = False,
        hashes: tuple[str, str] = ("", ""), sizes: Sequence[Size] | None = None,
    ) -> None:  # fmt: skip
        self.listing, self.image_size, self.skip_bad = listing, image_size, skip_bad
        self.sizes = sizes
        self.classes, self.notes = listing.classes, listing.notes
        self.hash, self.sample_hash = hashes  # of names and labels, and of some files

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, key: tuple[int, bool]) -> TrainingItem:
        index, flip = key
        size = self.image_size if self.sizes is None else self.sizes[index]
        bad: list[BadImage] = []
        for i in range(min(len(self), MOST_UNREADABLE)):
            at = (index + i) % len(self)
            try:
                return _read(self.listing.paths[at], size, flip), self.listing.labels[at], bad
            except Exception as error:  # Pillow's decoders raise many kinds for broken files
                bad.append(BadImage(self.listing.paths[at], str(error) or type(error).__name__))
            if not self.skip_bad:
                break
        return None, 0, bad


def _read(path, size, flip):
    pixels = read_pixels(path, size)  # (H, W, 3)
    return channels_first(pixels[:, ::-1] if flip else pixels)  # (3, H, W)


def unreadable(bad: list[BadImage], skip_bad: bool) -> str:
    """The sentence for images that cannot be read, with no other to stand in for them."""
    first = f"cannot read {bad[0].path} ({bad[0].reason})"
    if not skip_bad:
        return f"{first}; mend it, or pass `skip_bad_images=True`"
    others = f"none of the {len(bad):,} images after it"
    return f"{first}, and {others}; look whether their disk is still there"


def read_all(listing: Listing, image_size: ImageSize) -> Tensor:
    """All images of a Listing at a size, uint8 (N, 3, H, W).

    Raises ValueError, naming the file, if one cannot be read.
    """
    dataset = ImageDataset(listing, image_size)
    images, _, bad = zip(*(dataset[i, False] for i in range(len(dataset))))
    if found := next(filter(None, bad), None):
        raise ValueError(f"cannot read {found[0].path} ({found[0].reason}); mend or remove it")
    return torch.stack(images)
