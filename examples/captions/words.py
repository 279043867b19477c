"""Words for what measure.py measures of a digit, and which digits they hold for.

A word is one of three levels of a measure: the lowest quarter of the training digits of the same
class, the middle half and the highest quarter. So sevens are measured against sevens, for the shape
of a seven leans by itself. Near the border of two levels a word says little, and captions leave it
out.
"""

from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from make_dataset import enlarge, load_split
from measure import slant, thickness, width

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANY = "digit"  # in the place of its word where a caption does not say which
MEASURES = {"thickness": thickness, "width": width, "slant": slant}
# The words of each level; a measure's words stand in a caption in this order, ANY among them
WORDS = {
    "thickness": ("thin", "medium", "thick"),
    "width": ("narrow", "regular", "wide"),
    ANY: DIGITS,
    "slant": ("leaning left", "upright", "leaning right"),
}
LEVELS = 3
ENDS = (0.25, 0.75)  # the shares of digits below the end of the first and of the second level
GAP = 0.14  # the share of digits, around each end, whose captions leave the word out
# Left out of training are 12 of the 90 combinations of digit, thickness and slant: every seventh
# in order, of those that enough digits have
COMBINED = ("thickness", "slant")
EVERY, FIRST, LEFT_OUT, ENOUGH = 7, 5, 12, 6


class Said(NamedTuple):
    """What is asked for: a digit, None for any, and a level of some measures."""

    digit: int | None
    levels: dict[str, int]

    @property
    def caption(self):
        """In words, such as "a thin seven leaning left"."""
        said = {name: WORDS[name][level] for name, level in self.levels.items()}
        said[ANY] = ANY if self.digit is None else DIGITS[self.digit]
        return " ".join(["a", *(said[name] for name in WORDS if name in said)])


class Scale(NamedTuple):
    """Where the levels of each measure end: {measure: (digits, 2)}, and where captions begin and
    end to leave a measure out: {measure: (digits, 4)}.
    """

    ends: dict
    gaps: dict

    def levels(self, images, digits):
        """{measure: levels (N,), 0 to 2} of pictures (N, 32, 32) of these digits (N,)."""
        found = measured(images)
        return {name: _above(found[name], self.ends[name][digits]) for name in found}

    def clear(self, images, digits):
        """{measure: bool (N,)}: whether captions say it, being far enough from the next level."""
        found = measured(images)
        return {name: _above(found[name], self.gaps[name][digits]) % 2 == 0 for name in found}


class Digits(NamedTuple):
    """N real digits: pictures uint8 (N, 32, 32), which digit (N,), and {measure: (N,)}: their
    levels, and whether captions say them.
    """

    images: np.ndarray
    digits: np.ndarray
    levels: dict
    clear: dict

    def chosen(self, which):
        """Those that a mask (N,) or numbers say."""
        parts = [{name: values[which] for name, values in part.items()} for part in self[2:]]
        return Digits(self.images[which], self.digits[which], *parts)

    def combinations(self):
        """The numbers (N,), from 0 to 89, of their digit, thickness and slant."""
        parts = [self.digits, *(self.levels[name] for name in COMBINED)]
        return np.ravel_multi_index(parts, (len(DIGITS), LEVELS, LEVELS))

    def captions(self):
        """Of each digit a list: what is clear of it, all of it, and then each part of that; last
        all of it without the digit's name.
        """
        for i, digit in enumerate(self.digits):
            levels = {name: int(self.levels[name][i]) for name in MEASURES if self.clear[name][i]}
            parts = [
                part for count in range(len(levels), -1, -1)
                for part in combinations(levels, count)
            ]  # fmt: skip
            said = [Said(int(digit), {name: levels[name] for name in part}) for part in parts]
            yield [one.caption for one in (*said, Said(None, levels))]


def measured(images):
    """{measure: (N,)} of pictures (N, H, W)."""
    return {name: measure(images) for name, measure in MEASURES.items()}


def _above(values, borders):
    """How many of the borders (N, B) each value (N,) is above: (N,)."""
    return (values[:, None] > borders).sum(axis=1)


def combination(number):
    """The Said with a number from 0 to 89."""
    digit, *levels = np.unravel_index(number, (len(DIGITS), LEVELS, LEVELS))
    return Said(int(digit), dict(zip(COMBINED, map(int, levels))))


def every_prompt():
    """Every Said with a digit and a level of each measure, or of none: 640 in all."""
    for digit, *levels in product(range(len(DIGITS)), *[(None, *range(LEVELS))] * len(MEASURES)):
        told = {name: level for name, level in zip(MEASURES, levels) if level is not None}
        yield Said(digit, told)


def scale_of(images, digits):
    """The Scale of training digits."""
    edges = [end + side * GAP / 2 for end in ENDS for side in (-1, 1)]
    found = measured(images)

    def quantiles(shares):
        return {
            name: np.stack([np.quantile(v[digits == d], shares) for d in range(len(DIGITS))])
            for name, v in found.items()
        }

    return Scale(quantiles(ENDS), quantiles(edges))


def load_captioned():
    """{"train", "left-out", "heldout": Digits}, the Scale, and the numbers of the combinations that
    are left out of training. Each digit of these is in "left-out", if it is not held out.
    """
    pixels, digits, heldout_pixels, heldout_digits = load_split()
    images = enlarge(pixels)
    scale = scale_of(images, digits)
    every = described(images, digits, scale)
    numbers = every.combinations()
    enough = np.bincount(numbers, minlength=len(DIGITS) * LEVELS**2) >= ENOUGH
    left = [n for n in range(FIRST, len(enough), EVERY) if enough[n]][:LEFT_OUT]
    out = np.isin(numbers, left)
    parts = {
        "train": every.chosen(~out), "left-out": every.chosen(out),
        "heldout": described(enlarge(heldout_pixels), heldout_digits, scale),
    }  # fmt: skip
    return parts, scale, left


def described(images, digits, scale):
    """The Digits of pictures and which digit each is."""
    return Digits(images, digits, scale.levels(images, digits), scale.clear(images, digits))
