"""Images as people look at them: a labelled picture, or how it came about, with its settings; and
clips, as a labelled picture that plays, or as a strip.

An animation or a strip shows how it came about. Images are uint8 arrays (N, H, W, 3), clips
(N, F, H, W, 3).
"""

from collections.abc import Sequence
import io
import json
import os
from pathlib import Path
import stat
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from runtime.clip_files import (
    GIF_RATE, GIF_SIDE, MP4_SIDE, check_pyav, check_side, write_gif, write_mp4,
)  # fmt: skip
from runtime.disk import write_whole

PER_ROW = 4
# Smaller images are enlarged in the picture by a whole factor, so that their labels can be read
LEAST_TILE = 96
MARGIN, FONT_SIZE = 4, 12
# Of a trajectory: how many are shown in an animation, how many in a strip
GIF_MOMENTS, STRIP_MOMENTS = 30, 8
FRAME_MS, LAST_FRAME_MS = 120, 2000
ENDINGS = (".png", ".gif", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PLAYS = {".gif": write_gif, ".mp4": write_mp4}  # the endings of clips that play
CLIP_ENDINGS = (*ENDINGS, ".mp4")
# Pixels of a side, at most, of formats that have few
MOST_SIDE = {".gif": GIF_SIDE, ".mp4": MP4_SIDE, ".webp": 16383, ".jpg": 65500, ".jpeg": 65500}
FRAME_RATE = 8.0  # frames a second at which clips play, where nobody says it
LONGEST_TEXT = 200  # characters of a caption that are looked at
PROMPT_LINES = 3  # below an image, at most, of its prompt
SETTINGS = "settings"  # the text entry of a PNG file that has them, as JSON


class Prompt(str):
    """A text below an image that may take PROMPT_LINES lines; others take one."""


def captions(labels: Sequence[Any], num_classes: int, classes: list[str] | None) -> list[str]:
    """What to write under each image: its prompt, or the class name where it is known, else the
    class's number.

    Nothing is written without classes and prompts.
    """
    if num_classes == 0:
        return [Prompt(label) if isinstance(label, str) else "" for label in labels]
    return [classes[i] if classes and i < len(classes) else str(i) for i in labels]


def legible(text: str) -> str:
    """The text on one line, cut to LONGEST_TEXT characters, with ? for what UTF-8 cannot hold."""
    return " ".join(text[:LONGEST_TEXT].encode("utf-8", "replace").decode("utf-8").split())


def wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float
) -> list[str]:
    """The lines of a text, no wider than this, in pixels; what is left over is cut, and a word that
    is wider than a line.
    """
    most = PROMPT_LINES if isinstance(text, Prompt) else 1
    lines: list[str] = []
    for word in legible(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if not lines or len(lines) < most and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_cut(line, font, width) for line in lines]


def _cut(line, font, width):
    """A line that is no wider than this, its end replaced by … if it was."""
    while font.getlength(line) > width and len(line) > 1:
        line = line[:-2] + "…"
    return line


def picture(images: np.ndarray, texts: Sequence[str], per_row: int = PER_ROW) -> Image.Image:
    """A PIL image of images (N, H, W, 3), so many to a row, each with its text below."""
    height, width = images.shape[1:3]
    factor = -(-LEAST_TILE // width) if width < LEAST_TILE else 1
    height, width, font = height * factor, width * factor, ImageFont.load_default(FONT_SIZE)
    below = [wrapped(text, font, width) for text in texts]
    lines = max(map(len, below), default=0) if any(texts) else 0
    strip = lines * FONT_SIZE + MARGIN if lines else 0
    columns, rows = min(per_row, len(images)), -(-len(images) // per_row)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + strip + MARGIN) + MARGIN)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for i, (pixels, text) in enumerate(zip(np.asarray(images), below)):
        left = MARGIN + i % per_row * (width + MARGIN)
        top = MARGIN + i // per_row * (height + strip + MARGIN)
        canvas.paste(
            Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top)
        )
        for row, line in enumerate(text):
            place = (left + width / 2, top + height + 1 + row * FONT_SIZE)
            pen.text(place, line, fill="black", font=font, anchor="mt")
    return canvas


def ending(path: Path | str, known: Sequence[str] = ENDINGS) -> str:
    """The format that a file's name asks for: its ending, with the dot.

    Raises ValueError if it is none of those that are known.
    """
    found = Path(path).suffix.lower()
    if found not in known:
        raise ValueError(
            f"{path}: {found or 'no ending'} is not an image format here; use {known[0]}, or "
            f"{', '.join(known[1:])}"
        )
    return found


def check_clip_file(path: Path | str, frame_rate: float) -> None:
    """Raise ValueError unless clips can be written to path, in the format of its ending, to play at
    so many frames a second.
    """
    found = ending(path, CLIP_ENDINGS)
    if found == ".mp4":
        check_pyav(f"{path} is a video")
    if found == ".gif" and frame_rate > GIF_RATE:
        raise ValueError(
            f"`frame_rate` is {frame_rate:g}, and a GIF shows at most {GIF_RATE} frames a second; "
            "give a lower one, or write .mp4"
        )


def check_clip_size(path: Path | str, shape: Sequence[int], texts: Sequence[str]) -> None:
    """Raise ValueError if clips of a shape (N, F, H, W, 3), with these texts, are too large for a
    file.
    """
    black = np.broadcast_to(np.uint8(0), shape)  # without memory
    if (found := ending(path, CLIP_ENDINGS)) in MOST_SIDE:
        canvas = picture(black[:, 0], texts) if found in PLAYS else clip_strip(black, texts)
        check_side(path, canvas.size[::-1], MOST_SIDE[found])


def save(canvas: Image.Image, path: Path | str, settings: dict, **options: object) -> None:
    """Write a PIL image; a PNG file gets the settings, a dict, as JSON under SETTINGS. `options`
    are Pillow's for the format.

    Raises ValueError as write_file.
    """
    if ending(path) != ".png":
        write_file(path, encoded(canvas, path, **options))
        return
    entries = PngImagePlugin.PngInfo()
    entries.add_text(SETTINGS, json.dumps(settings, default=str))
    write_file(path, encoded(canvas, path, pnginfo=entries, **options))


def encoded(canvas: Image.Image, path: Path | str, **options: object) -> bytes:
    """A PIL image in the format that a file's name asks for.

    Raises ValueError if it is too large for that.
    """
    file = io.BytesIO()
    canvas.save(file, Image.registered_extensions()[ending(path)], **options)
    return file.getvalue()


def write_file(path: Path | str, content: bytes) -> None:
    """Make this the content of a file, whole or not at all.

    A write that fails leaves what was there. A link stays one, its target is written; a file that
    exists keeps its permissions; a pipe or a device is written to. Raises ValueError, naming the
    file, if it cannot be written.
    """
    try:
        old = _mode(path)
        if old is not None and not stat.S_ISREG(old):
            Path(path).write_bytes(content)
            return
        target = Path(os.path.realpath(path))
        if old is not None:
            target.open("r+b").close()  # a file that may not be changed is not replaced either
        write_whole(target, lambda temporary: _write_new(temporary, content, old))
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror or error}); what was there before is unchanged: "
            "make room, or choose another file, and try again"
        ) from None


def _mode(path):
    """The mode of the file that a path leads to, None if there is none."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _write_new(path, content, mode):
    """Write a file with the permissions of this mode, or with those of any new file if it is None.
    """
    path.write_bytes(content)
    if mode is not None:
        path.chmod(stat.S_IMODE(mode))


def evenly(steps: int, most: int) -> list[int]:
    """The indices of at most `most` of so many steps, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, steps - 1, min(steps, most)).round().astype(int).tolist()))


def moments(steps: int, path: Path | str) -> list[int]:
    """The indices of the steps shown in the file `path`, evenly spread from first to last."""
    return evenly(steps, GIF_MOMENTS if ending(path) == ".gif" else STRIP_MOMENTS)


def strip(frames: list[tuple[float | None, np.ndarray]], texts: Sequence[str]) -> Image.Image:
    """A PIL image of [(time t, images (N, H, W, 3))] with the images' texts.

    An image has a row, whose last frame is named.
    """
    times = [f"t = {t:.4g}" for t, _ in frames[:-1]]
    rows = np.stack([images for _, images in frames], axis=1)  # (N, moments, H, W, 3)
    below = [text for name in texts for text in [*times, name]]
    return picture(rows.reshape(-1, *rows.shape[2:]), below, per_row=len(frames))


def save_trajectory(
    frames: list[tuple[float | None, np.ndarray]], path: Path | str, texts: Sequence[str]
) -> None:
    """Write [(time t, images (N, H, W, 3))] with the images' texts.

    A .gif is an animation, another file a strip, an image per row. Raises ValueError as write_file.
    """
    if ending(path) == ".gif":
        pictures = [picture(images, texts) for _, images in frames]
        durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
        options = dict(save_all=True, append_images=pictures[1:], duration=durations, loop=0)
        write_file(path, encoded(pictures[0], path, **options))
        return
    write_file(path, encoded(strip(frames, texts), path))


def played(clips: np.ndarray, texts: Sequence[str]) -> list[Image.Image]:
    """The F frames, PIL images, of a picture that plays clips (N, F, H, W, 3), with their texts."""
    return [picture(images, texts) for images in np.swapaxes(clips, 0, 1)]  # (N, H, W, 3) each


def save_moving(
    frames: Sequence[Image.Image], path: Path | str, frame_rate: float, settings: dict
) -> None:
    """Write PIL images as a PNG file that plays so many of them a second, over and over, with the
    settings as `save` has them.

    Raises ValueError as write_file.
    """
    duration = 1000 / frame_rate  # in milliseconds
    moving = dict(save_all=True, append_images=frames[1:], duration=duration, loop=0)
    save(frames[0], path, settings, **moving)


def clip_strip(clips: np.ndarray, texts: Sequence[str]) -> Image.Image:
    """A PIL image of clips (N, F, H, W, 3): each a row, with its text below its first frame; clips
    of one frame as `picture` has images.
    """
    count = clips.shape[1]
    if count == 1:
        return picture(clips[:, 0], texts)
    below = [text for name in texts for text in [name, *[""] * (count - 1)]]
    return picture(clips.reshape(-1, *clips.shape[2:]), below, per_row=count)


def save_clips(
    clips: np.ndarray, path: Path | str, texts: Sequence[str], frame_rate: float, settings: dict
) -> None:
    """Write clips (N, F, H, W, 3) with their texts: .gif and .mp4 play so many frames a second,
    another file is a strip, and a PNG file gets the settings.

    Raises ValueError as check_clip_file and write_file.
    """
    check_clip_file(path, frame_rate)
    write = PLAYS.get(found := ending(path, CLIP_ENDINGS))
    if write is None:
        save(clip_strip(clips, texts), path, settings)
        return
    frames = np.stack([np.asarray(one) for one in played(clips, texts)])  # (F, height, width, 3)
    try:
        with TemporaryDirectory() as folder:  # of a video's file, parts are written anew
            file = Path(folder) / f"clips{found}"
            write(file, frames, frame_rate)
            content = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: its parts go to the system's folder for temporary files "
            f"({error.strerror or error}); make room there, or set TMPDIR, and try again"
        ) from None
    write_file(path, content)
