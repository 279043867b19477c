"""A file to an image: opening, whatever text is stored with it, and its colours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageColor, PngImagePlugin
import numpy as np

BACKGROUND = "white"  # behind what is transparent
MOST_TEXT = 2**26  # bytes of text in a PNG file that are passed over; Pillow refuses one of 1 MB


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """The image in a file, not decoded yet, whatever text is stored with it.

    Raises what Pillow raises, of many kinds.
    """
    with long_texts(), Image.open(path) as image:
        yield image


@contextmanager
def long_texts() -> Iterator[None]:
    """Have Pillow pass over MOST_TEXT of text in a PNG file."""
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT
    try:
        yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any kind as RGB with 8 bits a channel, on BACKGROUND where it is transparent.

    Raises ValueError for kinds without a known range.
    """
    # Image.convert would clip the levels at 255
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode} have no range that is known; save it with 8 or 16 bits"
        )
    key = image.info.get("transparency")
    # Of a PNG with 16 bits, which Pillow halves
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(level >> 8 for level in key)
    if image.has_transparency_data:  # what lies under it is often what an editor left there
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def _eight_bits(image):
    """A grey image with 16 bits as one with 8. Pixels of the transparent colour become BACKGROUND.
    """
    levels, key = np.asarray(image), image.info.get("transparency")
    grey = (levels >> 8).astype(np.uint8)
    if isinstance(key, int):
        grey[levels == key] = ImageColor.getcolor(BACKGROUND, "L")
    return Image.fromarray(grey)
