"""Coloured shapes drawn by code: which there are, what they are called, and how they look."""

import math
from typing import NamedTuple

from PIL import Image, ImageDraw

SIDE = 64  # pixels of an image
FINER = 4  # drawn so many times larger and reduced, for smooth edges
# Emoji's nine colours, as hearts, circles and squares have them, in RGB of 255.
COLOURS = {
    "red": (221, 46, 68), "orange": (244, 144, 12), "yellow": (253, 203, 88),
    "green": (120, 177, 89), "blue": (85, 172, 238), "purple": (170, 142, 214),
    "brown": (130, 74, 50), "black": (49, 55, 61), "white": (226, 228, 230),
}  # fmt: skip
SHAPES = ("circle", "square", "heart", "triangle", "star", "diamond")
# Size → its half, as a share of the image's side.
SIZES = {"small": 0.13, "medium": 0.21, "big": 0.30}
# Place → its middle, as shares of the image's width and height.
PLACES = {
    "at the top left": (0.31, 0.31), "at the top": (0.5, 0.31), "at the top right": (0.69, 0.31),
    "on the left": (0.31, 0.5), "in the middle": (0.5, 0.5), "on the right": (0.69, 0.5),
    "at the bottom left": (0.31, 0.69), "at the bottom": (0.5, 0.69),
    "at the bottom right": (0.69, 0.69),
}  # fmt: skip
# (shape, colour) that nothing is trained on: what was never seen together.
UNSEEN = frozenset({
    ("heart", "orange"), ("heart", "purple"), ("circle", "green"), ("circle", "brown"),
    ("square", "yellow"), ("square", "blue"),
})  # fmt: skip
A, AN = ("uni", "eu", "one", "uku"), ("hour",)  # beginnings that sound otherwise than they look
POINTS_OF_STAR, INNER = 5, 0.45  # how many, and the radius between them over that at them
HEART_STEPS = 100


class Shape(NamedTuple):
    """What an image shows, in words: keys of COLOURS, SIZES and PLACES, and one of SHAPES."""

    shape: str
    colour: str
    size: str
    place: str

    def captions(self) -> list[str]:
        """What can be said of it, the fullest first."""
        colour, shape = self.colour, self.shape
        return [
            f"a {self.size} {colour} {shape} {self.place}", with_article(f"{colour} {shape}"),
            f"{colour} {shape} {self.place}", f"a {self.size} {colour} {shape}",
        ]  # fmt: skip


def with_article(words):
    """The words with "a" or "an" before them, as they sound."""
    vowel = words.startswith(AN) or words[0] in "aeiou" and not words.startswith(A)
    return f"{'an' if vowel else 'a'} {words}"


def all_shapes(unseen=False):
    """Every Shape that may be trained on, or every one that must not be, in a fixed order."""
    return [
        Shape(shape, colour, size, place)
        for shape in SHAPES for colour in COLOURS for size in SIZES for place in PLACES
        if ((shape, colour) in UNSEEN) == unseen
    ]  # fmt: skip


def outline(shape, x, y, half):
    """The corners of a shape's outline around (x, y), as [(x, y)]; y runs down."""
    if shape == "square":
        side = half * 0.88  # so that it looks as large as the others
        return [(x + i * side, y + j * side) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if shape == "diamond":
        return [(x, y - half), (x + half * 0.75, y), (x, y + half), (x - half * 0.75, y)]
    if shape == "triangle":
        return [(x, y - half), (x + half, y + half * 0.8), (x - half, y + half * 0.8)]
    if shape == "star":
        turns = [math.pi * i / POINTS_OF_STAR for i in range(2 * POINTS_OF_STAR)]
        radii = [half * (1, INNER)[i % 2] for i in range(2 * POINTS_OF_STAR)]
        return [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in zip(radii, turns)]
    angles = [2 * math.pi * i / HEART_STEPS for i in range(HEART_STEPS)]
    if shape == "circle":
        return [(x + half * math.sin(a), y - half * math.cos(a)) for a in angles]
    # The usual curve, 32 wide and from 12 above to 17 below
    rise = [
        13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        for a in angles
    ]
    return [
        (x + half * math.sin(a) ** 3, y - half * (r + 2.5) / 16) for a, r in zip(angles, rise)
    ]  # fmt: skip


def drawn(shape, shift=(0.0, 0.0), larger=1.0):
    """A Shape as an RGB image of SIDE × SIDE on white, moved by shares of the side and enlarged."""
    whole = SIDE * FINER
    image = Image.new("RGB", (whole, whole), "white")
    x, y = (whole * (middle + by) for middle, by in zip(PLACES[shape.place], shift))
    corners = outline(shape.shape, x, y, whole * SIZES[shape.size] * larger)
    ImageDraw.Draw(image).polygon(corners, fill=COLOURS[shape.colour])
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)
