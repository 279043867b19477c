"""Clips on disk: videos, GIFs and folders of frames, read; GIFs and MP4 files, written.

PyAV, the extra `clips`, reads and writes videos. All else needs Pillow alone.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
import re
import struct
from typing import NamedTuple

from PIL import GifImagePlugin, Image
import numpy as np

from runtime.disk import readable_name, write_whole
from runtime.image_files import long_texts, open_image, to_rgb
from runtime.limits import check_memory
from runtime.surroundings import is_installed

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg")
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".gif")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
GIF_RATE = 50  # frames per second at most: browsers show what is meant to be faster slowly
GIF_COLOURS = 256
GIF_SIDE, MP4_SIDE = 2**16 - 1, 2**14  # pixels: more, the format or H.264 do not take
GIF_ROUNDING = 5.001  # milliseconds
AT_ONCE = 16  # clips that are looked at: a disk on a network answers after a while
UNTIMED = 100  # milliseconds of a GIF's frame that says none, as browsers have it
# How good an H.264 and an MPEG-4 file is: 0 is without loss, and 2 the best there is
H264_QUALITY, MPEG4_QUALITY = "14", 2


class Clip(NamedTuple):
    """Frames uint8 (F, H, W, 3) and how many of them a second has; None where that is unknown."""

    frames: np.ndarray
    rate: float | None


class ClipInfo(NamedTuple):
    """How many frames a clip has, how many of them a second, and their (height, width)."""

    frames: int
    rate: float | None
    size: tuple[int, int]


# What gives the pixels (H, W, 3) of the frame that a walk has reached; before its next step
Pixels = Callable[[], np.ndarray]


def read_clip(path: Path | str, argument: str = "clip") -> Clip:
    """The Clip in a video, a GIF, a folder of frames (images in natural order) or a picture, which
    is a clip of one frame.

    A video's frames are turned as it says, and what is transparent lies on white. Errors call the
    file by the name of the `argument` that gave it. Raises ValueError, naming the file, if it
    cannot be read, holds no frames or frames of several sizes, or is too large.
    """
    info = probe_clip(path, argument)
    check_memory(info.frames, info.size, f"the number of frames of `{argument}`")
    return Clip(read_frames(path, range(info.frames), argument), info.rate)


def read_frames(
    path: Path | str, numbers: Collection[int], argument: str = "clip",
    crop: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> np.ndarray:  # fmt: skip
    """The frames of a clip that have these numbers, from 0, each once and in order: uint8
    (F, H, W, 3). A video is decoded from its beginning to the last of them. Only what `crop` makes
    of each frame (H, W, 3) is kept.

    Raises ValueError as read_clip, and where there is no such frame.
    """
    wanted, last, found = set(numbers), max(numbers), []
    for number, pixels in enumerate(walk_clip(path, argument)):
        if number in wanted:
            found.append(crop(pixels()))
        if number == last:
            break
    if len(found) < len(wanted):
        raise UnreadableClip(path, argument, f"it has no frame {last}: it ends too early")
    if len({frame.shape for frame in found}) > 1:
        raise UnreadableClip(path, argument, "its frames have several sizes")
    return np.stack(found)  # (F, H, W, 3)


def walk_clip(path: Path | str, argument: str = "clip") -> Iterator[Pixels]:
    """For each frame in order what gives its pixels uint8 (H, W, 3), until the next one is asked
    for. Frames whose pixels are not asked for cost little.

    Raises ValueError as read_clip.
    """
    with _told(path, argument):
        for pixels in _kind(path, argument).walk(Path(path)):
            yield partial(_told_pixels, pixels, path, argument)


def probe_clip(path: Path | str, argument: str = "clip") -> ClipInfo:
    """The ClipInfo of a file or folder, of a video without decoding it. Raises ValueError as
    read_clip, and where a video lacks its end.
    """
    with _told(path, argument):
        info = _kind(path, argument).probe(Path(path))
        if info.frames < 1:
            raise ValueError("it holds no frames")
        return info


def probe_clips(
    paths: Sequence[Path | str], argument: str = "clip"
) -> list[tuple[ClipInfo | None, str]]:
    """(its ClipInfo, "") of each of these clips, or (None, why it cannot be read). Several are
    looked at at a time. Raises ValueError where PyAV is lacking for one.
    """
    with long_texts(), ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(partial(_probed, argument=argument), paths))


def _probed(path, argument):
    try:
        return probe_clip(path, argument), ""
    except UnreadableClip as error:
        return None, error.reason


def natural(name: str) -> tuple:
    """By what to sort names so that frame 10 comes after frame 9."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts), name


def frame_paths(folder: Path | str) -> list[Path]:
    """The images right in a folder of frames, in natural order, but for hidden ones."""
    return sorted(
        (
            path
            for path in Path(folder).iterdir()
            if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")
        ),
        key=lambda path: natural(path.name),
    )


class _Kind(NamedTuple):
    """How clips of a kind are looked at, and how they are walked through."""

    probe: Callable[[Path], ClipInfo]
    walk: Callable[[Path], Iterator[Pixels]]


def _kind(path, argument):
    """The _Kind of what is there. Raises ValueError for a video where PyAV is lacking, and for what
    is neither a file nor a folder, such as a pipe, which might not end.
    """
    if Path(path).is_dir():
        return _Kind(_probe_folder, _walk_folder)
    if Path(path).exists() and not Path(path).is_file():
        raise UnreadableClip(path, argument, "it is neither a file nor a folder")
    suffix = Path(path).suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        return _Kind(_probe_images, _walk_images)
    check_pyav(f"`{argument}` {path} is a video")
    return _Kind(_probe_video, _walk_video)


def check_pyav(what: str) -> None:
    """Raise ValueError if PyAV is not there for `what`, which begins the sentence."""
    if not is_installed("av"):
        raise MissingPyAV(
            f"{what}, which needs PyAV, and that is not installed; pip install .[clips], or use a "
            "GIF or a folder of frames"
        )


class MissingPyAV(ValueError):
    """PyAV is wanted and not installed; the text says what to do."""


@contextmanager
def _told(path, argument):
    """Have whatever goes wrong told by one ValueError that names the file."""
    try:
        yield
    except (MissingPyAV, UnreadableClip):
        raise
    except Exception as error:  # of as many kinds as decoders raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableClip(path, argument, reason) from None


def _told_pixels(pixels, path, argument):
    with _told(path, argument):
        return pixels()


class UnreadableClip(ValueError):
    """A clip cannot be read; `reason` says why, and the text what to do."""

    def __init__(self, path: Path | str, argument: str, reason: str) -> None:
        super().__init__(
            f"`{argument}` {path} cannot be read as a clip ({reason}); mend it, or give another "
            "video, GIF, folder of frames or picture"
        )
        self.reason = reason


# ---- folders of frames, GIFs and pictures ----


def _probe_folder(folder):
    paths = frame_paths(folder)
    if not paths:
        return ClipInfo(0, None, (0, 0))
    with open_image(paths[0]) as image:
        return ClipInfo(len(paths), None, image.size[::-1])


def _walk_folder(folder):
    for path in frame_paths(folder):
        yield partial(_picture, path)


def _picture(path):
    with open_image(path) as image:
        return np.array(to_rgb(image))  # (H, W, 3)


def _probe_images(path):
    """Of a GIF, or of another picture, which has one frame here."""
    with open_image(path) as image:
        count = _count(image)
        rate = _gif_rate(image, count) if count > 1 else None
        return ClipInfo(count, rate, image.size[::-1])


def _count(image):
    """How many frames of an open image count."""
    return getattr(image, "n_frames", 1) if image.format == "GIF" else 1


def _gif_rate(image, count):
    """Frames per second of a GIF, on the average: the whole number that fits its times, which are
    rounded to hundredths of a second, if one does.
    """
    milliseconds = 0.0
    for number in range(count):
        image.seek(number)
        milliseconds += image.info.get("duration") or UNTIMED
    rate = count * 1000 / milliseconds
    whole = max(1, round(rate))
    return float(whole) if abs(count * 1000 / whole - milliseconds) <= GIF_ROUNDING else rate


def _walk_images(path):
    with open_image(path) as image:
        for number in range(_count(image)):
            image.seek(number)
            yield lambda: np.array(to_rgb(image))  # (H, W, 3)


# ---- videos ----


@contextmanager
def _opened(path):
    """A video's container, open. PyAV gets an absolute name: in others it takes what lies before a
    colon for a protocol, such as http.
    """
    import av

    with readable_name(path) as name, av.open(str(name.absolute())) as container:
        yield container


def _probe_video(path):
    """By the file's index, or else by its packets: nothing is decoded but the first frame."""
    with _opened(path) as container:
        stream = _stream(container)
        count = stream.frames
        ends = [entry.pos + entry.size for entry in stream.index_entries] if count else []
        if ends and max(ends) > path.stat().st_size:
            raise ValueError("its end is missing")
        first = next(container.decode(stream), None)
        if first is None:
            return ClipInfo(0, None, (0, 0))
        rate = stream.average_rate or stream.guessed_rate
        size = _turned(np.empty((first.height, first.width)), first).shape
        if not count:
            container.seek(0)
            count = sum(packet.size > 0 for packet in container.demux(stream))
    return ClipInfo(count, float(rate) if rate else None, size)


def _walk_video(path):
    with _opened(path) as container:
        for frame in container.decode(_stream(container)):
            yield lambda: np.ascontiguousarray(_turned(frame.to_ndarray(format="rgb24"), frame))


def _stream(container):
    if not container.streams.video:
        raise ValueError("it holds no pictures")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # those who read many clips have processes for that
    return stream


def _turned(pixels, frame):
    """Pixels (H, W, ...) as the file says that they are to be shown: turned by quarters."""
    return np.rot90(pixels, round(frame.rotation / 90))  # (H, W, ...) or (W, H, ...)


# ---- writing ----


def write_gif(path: Path | str, frames: np.ndarray, rate: float) -> None:
    """Write frames uint8 (F, H, W, 3) as a GIF that is repeated for ever, whole or not at all.

    It is exact where the clip has 256 colours or fewer. Frames end where a rate that does not go
    into hundredths of a second says, within such a hundredth. Raises ValueError for a rate beyond
    GIF_RATE and sides beyond GIF_SIDE, OSError if the disk refuses.
    """
    if not 0 < rate <= GIF_RATE:
        raise ValueError(
            f"`frame_rate` is {rate:g}; a GIF shows at most {GIF_RATE} frames per second: give a "
            "lower one, or write .mp4"
        )
    ends = [round(100 * (number + 1) / rate) for number in range(len(frames))]
    height, width = frames.shape[1:3]
    check_side(path, (height, width), GIF_SIDE)
    repeated = b"\x21\xff\x0bNETSCAPE2.0" + struct.pack("<BBHB", 3, 1, 0, 0)
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0, 0, 0), repeated]
    # Not by Image.save, which leaves out a frame that is as the one before
    for image, end, begin in zip(_few_colours(frames), ends, [0, *ends]):
        timed = {"duration": 10 * (end - begin), "include_color_table": True}
        parts += GifImagePlugin.getdata(image, (0, 0), **timed)
    write_whole(Path(path), lambda temporary: temporary.write_bytes(b"".join([*parts, b";"])))


def check_side(path: Path | str, size: tuple[int, int], most: int) -> None:
    """Raise ValueError for frames of a size, (height, width), with a side beyond the most that
    their file takes.
    """
    if max(size) > most:
        height, width = size
        raise ValueError(
            f"the frames of {path} would be {height}x{width} pixels, and {Path(path).suffix} takes "
            f"at most {most:,} a side; ask for fewer clips or smaller ones, or write .png"
        )


def _few_colours(frames):
    """Frames as PIL images that share one palette."""
    red, green, blue = np.moveaxis(frames.astype(np.int32), -1, 0)  # (F, H, W) each
    colours, indices = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
    if len(colours) > GIF_COLOURS:
        joined = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))  # (F·H, W, 3)
        palette = joined.quantize(GIF_COLOURS, dither=Image.Dither.NONE)
        return [
            Image.fromarray(one).quantize(palette=palette, dither=Image.Dither.NONE)
            for one in frames
        ]
    table = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).ravel().tolist()
    images = []
    for one in indices.reshape(frames.shape[:3]).astype(np.uint8):
        image = Image.fromarray(one)
        image.putpalette(table)
        images.append(image)
    return images


def write_mp4(path: Path | str, frames: np.ndarray, rate: float) -> None:
    """Write frames uint8 (F, H, W, 3) as an MP4 file, whole or not at all: H.264 where PyAV has it,
    else MPEG-4.

    Colours are halved in resolution, as players want it, unless a side is odd. Raises ValueError if
    PyAV is lacking and for sides beyond MP4_SIDE, OSError if the disk refuses.
    """
    check_pyav(f"{path} is a video")
    check_side(path, frames.shape[1:3], MP4_SIDE)
    write_whole(Path(path), lambda temporary: _encode(temporary, frames, rate))


def _encode(path, frames, rate):
    import av

    height, width = frames.shape[1:3]
    with av.open(str(path), "w", format="mp4") as container:
        exact = Fraction(rate).limit_denominator(1001)
        stream = container.add_stream("libx264" if _has_h264() else "mpeg4", rate=exact)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # H.264's bytes depend on it
        if stream.codec_context.name == "libx264":
            stream.options = {"crf": H264_QUALITY}
            if height % 2 or width % 2:
                stream.pix_fmt = "yuv444p"
        else:
            stream.codec_context.qmin = stream.codec_context.qmax = MPEG4_QUALITY
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _has_h264():
    import av

    try:
        return bool(av.Codec("libx264", "w"))
    except av.codec.codec.UnknownCodecError:
        return False
