"""Where digits are in clips, how straight they move between the borders, and how well a clip goes
on.
"""

from functools import cache
from itertools import combinations
import math

import numpy as np

from moving import BOX, ROOM, fold

FAINT = 16  # of 255: what is darker is no ink, such as what an autoencoder leaves on black
WINDOW = 16  # frames that one way is fitted to, in which a digit turns at most twice on an axis
MOST_TURNS = 2
MIDDLE = (BOX - 1) / 2  # of a box, from its first pixel
SLACK = 0.5  # pixels by which a fitted way may miss the border at a turn
AT_ONCE = 256  # tracks that are fitted together


def grey(clips):
    """Clips uint8 (N, F, H, W, 3) → (N, F, H, W), float32."""
    return clips.mean(axis=-1, dtype=np.float32)  # (N, F, H, W)


def centres(clips):
    """The centres of mass (N, F, 2) of the ink in clips (N, F, H, W), y before x, in pixels.

    A frame without ink has its middle.
    """
    ink = np.maximum(clips.astype(np.float64) - FAINT, 0) + 1e-9
    rows, columns = (np.arange(side) for side in clips.shape[2:])
    y, x = ink.sum(axis=3) @ rows, ink.sum(axis=2) @ columns  # (N, F)
    return np.stack([y, x], axis=-1) / ink.sum(axis=(2, 3))[..., None]  # (N, F, 2)


@cache
def ways(frames):
    """Every order of crossings of a digit that turns at most twice in so many frames: the number of
    fields it has left behind by each frame, whole numbers (K, F).

    Unfolded, a digit goes straight through fields side by side: 0 is the one it starts in, and 1 or
    -1 the next.
    """
    found = [np.zeros(frames, int)]
    for turns in range(1, MOST_TURNS + 1):
        for places in combinations(range(1, frames), turns):
            crossed = sum(np.arange(frames) >= place for place in places)
            found += [crossed, -crossed]
    return np.stack(found)  # (K, F)


def fit_axis(track):
    """The way that comes nearest to places (N, F) on an axis: (what is off (N, F), speed (N,) in
    pixels a frame).

    A way is where in its box the ink's centre lies, where the digit starts, and how fast it goes;
    the digit turns where `fold` turns it.
    """
    fields = ways(track.shape[1])
    is_back = fields % 2 == 1
    sign = np.where(is_back, -1.0, 1.0)  # (K, F)
    unfolded = np.where(is_back, fields + 1, -fields) * ROOM
    times = np.arange(track.shape[1])
    terms = np.stack([np.ones_like(sign), sign, sign * times], axis=-1)  # (K, F, 3)
    wanted = track[:, None] - unfolded  # (N, K, F)
    found = np.einsum("kpf,nkf->nkp", np.linalg.pinv(terms), wanted)  # (N, K, 3)
    off = wanted - np.einsum("kfp,nkp->nkf", terms, found)  # (N, K, F)
    place = found[..., 1:2] + found[..., 2:] * times - fields * ROOM  # within its field
    misses = np.maximum(-place, place - ROOM).max(axis=-1) > SLACK  # (N, K)
    misses[:, 0] = False  # without a turn nothing says where the borders are
    squares = np.where(misses, np.inf, np.square(off).sum(axis=-1))  # (N, K)
    best = squares.argmin(axis=1)
    each = np.arange(len(track))
    return off[each, best], np.abs(found[each, best, 2])


def straightness(tracks):
    """(how far (N,) the places (N, F, 2) of each clip are off the nearest way, RMS in pixels; the
    speed (N,) of that way in pixels a frame).
    """
    squares, speeds = [], []
    for window in np.array_split(tracks, math.ceil(tracks.shape[1] / WINDOW), axis=1):
        parts = np.array_split(window, math.ceil(len(window) / AT_ONCE))
        (y_off, y_speed), (x_off, x_speed) = (
            map(np.concatenate, zip(*(fit_axis(part[..., axis]) for part in parts)))
            for axis in (0, 1)
        )
        squares.append(y_off**2 + x_off**2)  # (N, F)
        speeds.append(np.hypot(y_speed, x_speed))  # (N,)
    return np.sqrt(np.hstack(squares).mean(axis=1)), np.mean(speeds, axis=0)


def straight_on(tracks, given):
    """Places (N, F, 2) that go on, from the given first ones, along the straight line nearest to
    them, and turn where the middle of a digit's box does.
    """
    frames = tracks.shape[1]
    terms = np.stack([np.ones(frames), np.arange(frames)], axis=1)  # (F, 2)
    line = terms @ np.linalg.pinv(terms[:given]) @ tracks[:, :given]  # (N, F, 2)
    return fold(line - MIDDLE) + MIDDLE


def still(tracks, given):
    """Places (N, F, 2) that stay what the last given one is."""
    return np.broadcast_to(tracks[:, given - 1 : given], tracks.shape)


def place_error(tracks, truth, given):
    """The mean distance, in pixels, of places (N, F, 2) from the true ones after the given frames.
    """
    return float(np.linalg.norm(tracks - truth, axis=-1)[:, given:].mean())
