"""What moving digits are judged by: which digit each frame shows, how straight it moves, and where
it goes on.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from conditions.labels import random_labels
from data.listing import list_clips
from evaluation.summaries import spread
from moving import FIELD
from runtime.clip_files import read_clip
from runtime.json_files import read_json
from runtime.npz import IMAGES, open_array
from tracks import centres, grey, place_error, still, straight_on, straightness
from vae import from_uint8, to_uint8

DIGITS = 10
AT_ONCE = 512  # frames in a network
LEAST_FRAMES = 4  # of a clip whose way is fitted
LEAST_INK = 10 * 255  # sum of grey levels; a frame with less shows nothing


class Clips(NamedTuple):
    """Clips uint8 (N, F, 32, 32, 3), and the digit of each, int64 (N,), or None."""

    frames: np.ndarray
    digits: np.ndarray | None


def read_clips(path, argument):
    """The Clips in an .npz, with the digits that a folder of sample_ddp.py beside it names, or in a
    folder of clips, with the digits that its folders are called.

    Raises ValueError for what holds no clips of 32×32 pixels, all of as many frames.
    """
    path = Path(path)
    frames = _in_folder(path, argument) if path.is_dir() else _in_array(path, argument)
    if frames.shape[2:] != (FIELD, FIELD, 3) or frames.shape[1] < LEAST_FRAMES or not len(frames):
        raise ValueError(
            f"`{argument}` {path} has uint8 clips {frames.shape}; wanted are (N, F, {FIELD}, "
            f"{FIELD}, 3), with {LEAST_FRAMES} frames or more, such as the .npz of sample_ddp.py"
        )
    return Clips(frames, _named_digits(path) if path.is_dir() else _asked_digits(path, len(frames)))


def _in_folder(folder, argument):
    paths = list_clips(folder, num_classes=0, argument=argument).paths
    clips = [read_clip(path, argument).frames for path in paths]
    for path, clip in zip(paths, clips):
        if clip.shape != clips[0].shape:
            raise ValueError(
                f"`{argument}` {path} has frames of the shape {clip.shape}, {paths[0]} "
                f"{clips[0].shape}; give clips of one length and size"
            )
    return np.stack(clips)


def _in_array(path, argument):
    try:
        frames = open_array(path, IMAGES)
    except Exception as error:  # a broken file makes zipfile, zlib and NumPy raise many kinds
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"`{argument}` {path} cannot be read as an .npz ({reason[:300]}); give what "
            "sample_ddp.py wrote, or a folder of clips"
        ) from None
    if frames.dtype != np.uint8 or frames.ndim != 5:
        raise ValueError(
            f"`{argument}` {path} has {frames.dtype} {frames.shape}; wanted are clips, uint8 "
            f"(N, F, {FIELD}, {FIELD}, 3)"
        )
    return np.array(frames)


def _named_digits(folder):
    """The digits that the folders of clips are called; None if some are called otherwise."""
    names = [Path(path).parent.name for path in list_clips(folder, num_classes=0).paths]
    known = {str(digit) for digit in range(DIGITS)}
    return np.array([int(name) for name in names]) if known.issuperset(names) else None


def _asked_digits(path, count):
    """The digits that NAME/manifest.json says of NAME.npz; None if it does not say."""
    manifest = path.with_suffix("") / "manifest.json"
    decides = read_json(manifest).get("decides", {}) if manifest.is_file() else {}
    if decides.get("labels") == "balanced":
        return np.arange(count) % DIGITS
    if decides.get("labels") == "random":
        return random_labels(decides["global_seed"], range(count), DIGITS).numpy()
    return None


def digits_in(path, count):
    """The digits in a file with one a line, for so many clips, int64 (N,).

    Raises ValueError if there are not so many, or others.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`labels` {path} cannot be read ({error}); give a file of text") from None
    wrong = [line for line in lines if line not in map(str, range(DIGITS))]
    if wrong or len(lines) != count:
        told = f"the line {wrong[0][:30]!r}" if wrong else f"{len(lines)} lines"
        raise ValueError(
            f"`labels` {path} has {told}; wanted is a digit a line for each of {count} clips"
        )
    return np.array(lines).astype(np.int64)


def spread_out(clips, count):
    """So many of Clips, or all if there are no more, evenly spread."""
    chosen = spread(len(clips.frames), count)
    return Clips(clips.frames[chosen], None if clips.digits is None else clips.digits[chosen])


def read_digits(frames, features):
    """The digit (N, F) that a classifier reads in each frame of clips uint8 (N, F, H, W, 3)."""
    images = torch.from_numpy(frames).flatten(0, 1).movedim(-1, 1)  # (N·F, 3, H, W)
    found = [features(part.contiguous()).logits.argmax(dim=1) for part in images.split(AT_ONCE)]
    return torch.cat(found).reshape(frames.shape[:2]).numpy()  # (N, F)


def through_autoencoder(frames, space, seed):
    """Clips uint8 (N, F, H, W, 3), encoded and decoded again, a frame at a time."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(frames).flatten(0, 1).movedim(-1, 1)  # (N·F, 3, H, W)
    found = []
    for part in images.split(AT_ONCE):
        mean, std = space.moments(from_uint8(part.contiguous()))
        noise = torch.randn(mean.shape, generator=generator)
        found.append(to_uint8(space.decode(space.draw(mean, std, noise))))  # (n, H, W, 3)
    return torch.cat(found).reshape(frames.shape).numpy()


def judged(clips, features):
    """What is seen in Clips: a dict of figures. Shares are of 1, lengths in pixels."""
    read = read_digits(clips.frames, features)
    off, speed = straightness(centres(grey(clips.frames)))
    found = {"clips": len(read), "frames of each": read.shape[1]}
    if clips.digits is not None:
        right = read == clips.digits[:, None]
        found["frames read as the digit asked for"] = right.mean()
        found["clips read so throughout"] = right.all(axis=1).mean()
    return found | {
        "clips that keep one digit": (read == read[:, :1]).all(axis=1).mean(),
        "frames that show nothing": (grey(clips.frames).sum(axis=(2, 3)) < LEAST_INK).mean(),
        "off a straight way, median": np.median(off),
        "off a straight way, 90th percentile": np.percentile(off, 90),
        "speed, pixels a frame, median": np.median(speed),
    }


def judged_continuations(clips, truth, given):
    """How far places lie from the true ones after the given first frames, on the average: in Clips
    that go on as frames (N, F, 32, 32, 3) of the truth begin, and where digits would stand still or
    go straight on.
    """
    true, found = centres(grey(truth)), centres(grey(clips.frames))
    return {
        "off the true place": place_error(found, true, given),
        "off it in the last frame": place_error(found, true, true.shape[1] - 1),
        "standing still": place_error(still(true, given), true, given),
        "straight on, turning at the borders": place_error(straight_on(true, given), true, given),
    }
