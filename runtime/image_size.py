"""The size of images in pixels: one number for squares, else a height and a width.

A command line has it as 256 or as 256x384, HEIGHTxWIDTH, and JSON as 256 or as [256, 384].
"""

ImageSize = int | tuple[int, int]
LONGEST_SIZE = 40  # characters of what is no size that a message shows


def size_in(text: str) -> ImageSize:
    """The size that a word of a command line is. Raises ValueError if it is none."""
    height, times, width = text.partition("x")
    try:
        return settled((int(height), int(width)) if times else int(text))
    except ValueError:
        raise ValueError(
            f"{text[:LONGEST_SIZE]!r} is no size; give pixels, such as 256, or HEIGHTxWIDTH, such "
            "as 256x384"
        ) from None


def settled(size: object, name: str = "image_size") -> ImageSize:
    """A size in its one form: a whole number, or (height, width) that differ.

    Raises ValueError, which calls it `name`, for anything else than whole numbers. Which there may
    be is runtime.limits' to say.
    """
    given = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(given) != 2 or not all(type(side) is int for side in given):
        raise ValueError(
            f"`{name}` is {size!r:.{LONGEST_SIZE}}; give a whole number of pixels, or a height and "
            "a width"
        )
    height, width = given
    return height if height == width else (height, width)


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return size if isinstance(size, tuple) else (size, size)


def written(size: ImageSize) -> str:
    """A size as a command line has it."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
