"""The sizes that images of any shape are brought to: buckets of about equal area, or each its own.

A size is (height, width) in pixels. Sides are multiples of a unit, the pixels of a token.
"""

from collections.abc import Sequence
import math

Size = tuple[int, int]

MOST_ASPECT = 2.0  # of buckets: from twice as high as wide to twice as wide as high


def bucket_sizes(image_size: int, unit: int) -> list[Size]:
    """The buckets for images of at most image_size² pixels: for each height from 1/√MOST_ASPECT to
    √MOST_ASPECT times image_size the greatest width that fits, from high to wide.

    Raises ValueError if the unit does not go into image_size.
    """
    check_unit(image_size, unit)
    side, limit = image_size // unit, math.sqrt(MOST_ASPECT)
    heights = range(math.floor(side * limit), math.ceil(side / limit) - 1, -1)
    sizes = [(height, side**2 // height) for height in heights if height]
    inside = [
        (height, width)
        for height, width in sizes
        if 1 / MOST_ASPECT <= height / width <= MOST_ASPECT
    ]
    return [(height * unit, width * unit) for height, width in inside]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """The number of the bucket whose aspect is nearest to that of a size, by their ratio."""
    aspect = math.log(size[0] / size[1])
    return min(
        range(len(buckets)),
        key=lambda number: abs(math.log(buckets[number][0] / buckets[number][1]) - aspect),
    )


def own_size(size: Size, image_size: int, unit: int) -> Size:
    """The size that an image is brought to which keeps its aspect: at most image_size² pixels, no
    larger than it is where that is possible, sides being multiples of the unit.

    Raises ValueError if the unit does not go into image_size.
    """
    check_unit(image_size, unit)
    scale = min(1.0, image_size / math.sqrt(size[0] * size[1]))
    most = (image_size // unit) ** 2
    height, width = (max(1, round(side * scale / unit)) for side in size)
    while height * width > most:  # rounded up: the longer side gives way
        if height >= width:
            height -= 1
        else:
            width -= 1
    return height * unit, width * unit


def check_unit(image_size: int, unit: int) -> None:
    """Raise ValueError unless a unit goes into image_size."""
    if image_size < unit or image_size % unit:
        raise ValueError(
            f"`image_size` {image_size} is not a multiple of {unit}, the pixels of a token along a "
            "side; choose one that is"
        )
