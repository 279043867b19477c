"""Digits that move: drawn at any place of a field, bouncing off its borders.

A digit fills a square of 14×14 pixels, whose upper left corner is at 0 to 18 on both axes of the
32×32 field. Between bounces the corner moves on a straight line at a steady speed.
"""

import numpy as np
from PIL import Image
import torch

from vae import from_uint8

FIELD, BOX = 32, 14
ROOM = FIELD - BOX  # how far the corner of a digit can move on an axis
SLOWEST, FASTEST = 0.8, 2.0  # pixels a frame
LEVELS = 16  # of the digits as they come, 0 to 16


def enlarge(digits):
    """Digits (N, 8, 8) in 0 to 16 → float (N, 14, 14) in 0 to 255."""
    pictures = (Image.fromarray(digit.astype(np.float32)) for digit in digits)
    large = [np.asarray(p.resize((BOX, BOX), Image.Resampling.BICUBIC)) for p in pictures]
    return np.clip(np.stack(large) * 255 / LEVELS, 0, 255)  # (N, 14, 14)


def fold(way):
    """The place on an axis, 0 to 18, of what has gone so far from 0 and turns at both ends.

    `way` is of any shape and sign; so is what comes back.
    """
    back_and_forth = np.mod(way, 2 * ROOM)
    return np.minimum(back_and_forth, 2 * ROOM - back_and_forth)


def draw_motion(count, generator):
    """(starts (N, 2), velocities (N, 2)): anywhere, in any direction, 0.8 to 2 pixels a frame;
    y before x.
    """
    starts = generator.uniform(0, ROOM, (count, 2))
    speed = generator.uniform(SLOWEST, FASTEST, count)
    angle = generator.uniform(0, 2 * np.pi, count)
    return starts, np.stack([speed * np.sin(angle), speed * np.cos(angle)], axis=1)  # (N, 2)


def places(starts, velocities, frames):
    """The corners (N, F, 2) in so many frames of digits with starts and velocities (N, 2)."""
    return fold(starts[:, None] + velocities[:, None] * np.arange(frames)[:, None])  # (N, F, 2)


def shifts(corners):
    """Corners on one axis (...) → weights (..., 32, 14): which share of a digit's rows each row of
    the field gets. Shares are linear in the corner, so that centres of mass move exactly with it.
    """
    off = np.arange(FIELD)[:, None] - np.arange(BOX) - corners[..., None, None]
    return np.maximum(0, 1 - np.abs(off))  # (..., 32, 14)


def render(digits, corners):
    """Digits (N, 14, 14) in 0 to 255 at corners (N, F, 2) → uint8 frames (N, F, 32, 32)."""
    rows, columns = shifts(corners[..., 0]), shifts(corners[..., 1])  # (N, F, 32, 14)
    frames = rows @ digits[:, None] @ columns.swapaxes(-1, -2)  # (N, F, 32, 32)
    return np.uint8(frames + 0.5)


def random_frames(digits, generator):
    """Digits (N, 14, 14) → uint8 frames (N, 32, 32), each somewhere in the field."""
    return render(digits, generator.uniform(0, ROOM, (len(digits), 1, 2)))[:, 0]  # (N, 32, 32)


def as_batch(frames):
    """Grey frames uint8 (N, 32, 32) → what networks take, float32 (N, 3, 32, 32) in [-1, 1]."""
    return from_uint8(torch.from_numpy(frames)[:, None].expand(-1, 3, -1, -1))  # (N, 3, 32, 32)
