"""The sizes that images of any shape are brought to: buckets of about equal area, or each its own.

A size is (height, width) in pixels. Sides are multiples of a unit, the pixels of a token.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
import math

Size = tuple[int, int]

SQUARE = "square"  # all images have one size, which nobody has to ask for
MOST_ASPECT = 2.0  # of buckets: from twice as high as wide to twice as wide as high


def bucket_sizes(image_size: int, unit: int) -> list[Size]:
    """The buckets for images of at most image_size² pixels, from high to wide: for each short side
    from about image_size/√MOST_ASPECT on the longest side that fits, lying and standing.

    Raises ValueError if the unit does not go into image_size.
    """
    check_unit(image_size, unit)
    side = image_size // unit
    shorts = range(max(1, round(side / math.sqrt(MOST_ASPECT))), side)
    longs = [min(side**2 // short, math.floor(MOST_ASPECT * short)) for short in shorts]
    wide = [(short * unit, long * unit) for short, long in zip(shorts, longs)]  # widest first
    return [size[::-1] for size in wide] + [(image_size, image_size)] + wide[::-1]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """The number of the bucket whose aspect is nearest to that of a size, by their ratio."""
    aspect = math.log(size[0] / size[1])
    return min(
        range(len(buckets)),
        key=lambda number: abs(math.log(buckets[number][0] / buckets[number][1]) - aspect),
    )


def own_size(size: Size, image_size: int, unit: int) -> Size:
    """The size that an image is brought to which keeps its aspect: at most image_size² pixels, not
    enlarged beyond the rounding of its sides to multiples of the unit, of which each has one.

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


def size_for(kind: str, image_size: int | Size, unit: int) -> Callable[[Size], Size]:
    """A function from an image's size to the one that it is brought to, by a name of SIZES.

    Raises ValueError for another name, a height and width for image_size, or if the unit does not
    go into it.
    """
    if kind not in SIZES:
        raise ValueError(f"`sizes` is {kind}; choose from {', '.join([SQUARE, *SIZES])}")
    if not isinstance(image_size, int):
        height, width = image_size
        raise ValueError(
            f"`image_size` is {height}x{width}, and images that keep their shape are given an "
            "area: the side of a square of as many pixels; give one number"
        )
    check_unit(image_size, unit)
    return cache(SIZES[kind](image_size, unit))


def _bucketed(image_size, unit):
    buckets = bucket_sizes(image_size, unit)
    return lambda size: buckets[nearest_bucket(size, buckets)]


SIZES: dict[str, Callable[[int, int], Callable[[Size], Size]]] = {
    "buckets": _bucketed,
    "own": lambda image_size, unit: partial(own_size, image_size=image_size, unit=unit),
}


def check_unit(image_size: int, unit: int) -> None:
    """Raise ValueError unless a unit goes into image_size."""
    if image_size < unit or image_size % unit:
        raise ValueError(
            f"`image_size` {image_size} is not a multiple of {unit}, the pixels of a token along a "
            "side; choose one that is"
        )
