"""Which frames of clips are taken: brought to one rate, every so many, from where a chance says."""

from collections import Counter
from collections.abc import Sequence
import math

import numpy as np

SAME_RATE = 1.02  # rates that differ less are one: 23.976 and 24, and what a GIF can say of 24
ROUNDING = 1e-6  # of a frame
NAMED = 5  # clips that a message names


class Windows:
    """Windows of `frames` frames, every `stride`-th one, of clips brought to `frame_rate` frames
    per second.

    `counts` are how many frames the clips have, `rates` how many a second, None where that is
    unknown; such clips are taken as they are. A clip of one frame is an image, and its window is
    that frame. `lengths` are how many frames each clip's window has, `notes` what a user should
    know, in sentences. Raises ValueError, with `names` of clips, if some are too short, all are
    images, or they have several rates and no frame_rate is given.
    """

    def __init__(
        self, names: Sequence[str], counts: Sequence[int], rates: Sequence[float | None],
        frames: int, stride: int = 1, frame_rate: float | None = None,
    ) -> None:  # fmt: skip
        if frame_rate is None:
            check_rates(counts, rates)
        self.frames, self.stride, self.frame_rate = frames, stride, frame_rate
        self.steps = [step_of(rate, frame_rate) for rate in rates]
        self.counts = [resampled(count, step) for count, step in zip(counts, self.steps)]
        self.lengths = [1 if count == 1 else frames for count in counts]
        self.span = (frames - 1) * stride + 1
        self._check_lengths(names)
        self.notes = tuple(self._noted(rates))

    def of(self, index: int, chance: float) -> np.ndarray:
        """The numbers of a clip's frames in the window that a chance in [0, 1) chooses, int64
        (F,): each window by as many chances.
        """
        length = self.lengths[index]
        span = (length - 1) * self.stride + 1
        starts = self.counts[index] - span + 1
        first = min(starts - 1, int(chance * starts))
        numbers = first + self.stride * np.arange(length)  # (F,)
        return sources(numbers, self.steps[index])

    def _check_lengths(self, names):
        short = [
            f"{name} ({count})"
            for name, count, length in zip(names, self.counts, self.lengths)
            if length > 1 and count < self.span
        ]
        if short:
            some = f"{', '.join(short[:NAMED])}{', …' if len(short) > NAMED else ''}"
            rate = "" if self.frame_rate is None else f" at `frame_rate` {self.frame_rate:g}"
            raise ValueError(
                f"{len(short):,} of {len(self.lengths):,} clips have fewer than the {self.span} "
                f"frames that `frames` {self.frames} and `frame_stride` {self.stride} take{rate}: "
                f"{some}; take these away, or lower `frames` or `frame_stride`"
            )
        if self.frames > 1 and max(self.lengths) == 1:
            raise ValueError(
                f"`frames` is {self.frames}, and all {len(self.lengths):,} clips have one frame; "
                "leave `frames` out to learn from images"
            )

    def _noted(self, rates):
        """Sentences on clips whose rate is unknown, or lower than it is to be."""
        if self.frame_rate is None:
            return
        moving = [rate for rate, length in zip(rates, self.lengths) if length > 1]
        if unknown := sum(rate is None for rate in moving):
            yield f"{unknown:,} clips say no frames per second, and are taken as they are"
        slow = sum(rate is not None and rate * SAME_RATE < self.frame_rate for rate in moving)
        if slow:
            yield (
                f"{slow:,} clips have fewer than {self.frame_rate:g} frames per second: some of "
                "their frames are repeated"
            )


def check_rates(counts: Sequence[int], rates: Sequence[float | None]) -> None:
    """Raise ValueError if clips of several frames have several rates, as far as they are known."""
    known = Counter(
        rate for count, rate in zip(counts, rates) if count > 1 and rate is not None
    )
    if known and max(known) > SAME_RATE * min(known):
        some = [f"{rate:g} ({known[rate]:,} clips)" for rate in sorted(known)]
        shown = f"{', '.join(some[:NAMED])}{', …' if len(some) > NAMED else ''}"
        raise ValueError(
            f"the clips have several rates, in frames per second: {shown}; give `frame_rate`, the "
            "one that all are brought to"
        )


def step_of(rate: float | None, frame_rate: float | None) -> float:
    """How many of its frames a clip goes on while one is shown at frame_rate; 1 where a rate is
    unknown, or both are about the same.
    """
    if rate is None or frame_rate is None or max(rate, frame_rate) <= SAME_RATE * min(
        rate, frame_rate
    ):
        return 1.0
    return rate / frame_rate


def resampled(count: int, step: float) -> int:
    """How many frames a clip of so many has when it goes on by a step for each. An image has one.
    """
    return 1 if count == 1 else max(1, math.ceil((count - 2 * ROUNDING) / step))


def sources(numbers: np.ndarray, step: float) -> np.ndarray:
    """Which frame of a clip is shown at each of these numbers of a resampled one, int64 (F,)."""
    return np.floor(numbers * step + ROUNDING).astype(np.int64)
