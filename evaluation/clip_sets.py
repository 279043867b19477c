"""Sets of clips that are scored, in a folder or in an .npz, whole or frame by frame.

An .npz has its clips as uint8 `arr_0` (N, F, H, W, 3). Of a longer clip the first frames count.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.listing import list_clips
from evaluation.image_sets import (
    MOST_SIDE, HashedImage, Scored, digest_of, hashed, in_pixels, npz_errors,
)  # fmt: skip
from runtime.clip_files import probe_clip, read_frames
from runtime.limits import Range, check_numbers
from runtime.npz import IMAGES, array_names, open_array

MOST_FRAMES = 4096  # of a clip that is scored


@dataclass(frozen=True)
class ClipOptions:
    """Which frames of a clip are scored: the first `frames` of every `frame_stride`-th, together,
    or each by itself.
    """

    frames: int
    frame_stride: int = 1
    per_frame: bool = False

    @property
    def numbers(self) -> range:
        """The numbers of the frames that are scored."""
        return range(0, (self.frames - 1) * self.frame_stride + 1, self.frame_stride)


def check_clip_numbers(clips: ClipOptions) -> None:
    """Raise ValueError for numbers out of range."""
    counts = Range(1, MOST_FRAMES)
    check_numbers(clips, frames=counts, frame_stride=counts)


class ClipSet(Scored):
    """Clips of one size and so many frames, in the order of their paths or of their array.

    Items are (uint8 (3, F, H, W), digest) or (None, what is wrong). `size` is (W, H). Errors call
    the set by the name of the `argument` that gave it.
    """

    notes: tuple[str, ...] = ()
    rate: float | None = None  # frames a second, where it is known
    size: tuple[int, int]

    def __init__(self, path: Path | str, argument: str, clips: ClipOptions) -> None:
        self.named, self.argument, self.clips = f"`{argument}` {path}", argument, clips

    def check_length(self, frames: int, what: str) -> None:
        """Raise ValueError unless a clip, or clips, called `what` have frames enough."""
        last, stride = self.clips.numbers[-1], self.clips.frame_stride
        if frames <= last:
            apart = f", {stride} apart, which is {last + 1} in all" if stride > 1 else ""
            raise ValueError(
                f"{what} has {frames} frames; `frames` asks for {self.clips.frames}{apart}: leave "
                "short clips out, or ask for fewer"
            )

    def frames_of_clip(self, i: int) -> np.ndarray:
        """The frames uint8 (F, H, W, 3) of a clip that are scored. Raises ValueError."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> HashedImage:
        try:
            frames = self.frames_of_clip(i)
        except ValueError as error:
            return None, str(error)
        clip = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))  # (3, F, H, W)
        return clip, digest_of(frames)


class FolderClips(ClipSet):
    """All clips below a folder, in the order of their paths."""

    def __init__(self, folder: Path | str, argument: str, clips: ClipOptions) -> None:
        super().__init__(folder, argument, clips)
        listing = list_clips(folder, num_classes=0, argument=argument)
        self.paths, self.notes = listing.paths, tuple(listing.notes)
        height, width = self.read(0).shape[1:3]
        self.rate = probe_clip(self.paths[0], argument).rate
        self.size = width, height

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> np.ndarray:
        """The frames uint8 (F, H, W, 3) of a clip of any size. Raises ValueError if it cannot be
        read or is too short.
        """
        path = self.paths[i]
        self.check_length(probe_clip(path, self.argument).frames, path)
        return read_frames(path, self.clips.numbers, self.argument)

    def frames_of_clip(self, i: int) -> np.ndarray:
        frames = self.read(i)
        size = frames.shape[2], frames.shape[1]
        if size != self.size:
            raise ValueError(
                f"{self.paths[i]} is {in_pixels(size)}, {self.paths[0]} is {in_pixels(self.size)}; "
                f"clips of {self.named} are wanted in one size"
            )
        return frames


class ArrayClips(ClipSet):
    """The clips `arr_0` of an .npz, which are not held in memory unless they are compressed.

    Raises ValueError if they are no uint8 clips (N, F, H, W, 3), or too short.
    """

    def __init__(self, path: Path | str, argument: str, clips: ClipOptions) -> None:
        super().__init__(path, argument, clips)
        self.path, self.array = path, open_array(path, IMAGES)
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or len(shape) != 5 or shape[-1] != 3 or 0 in shape:
            raise ValueError(
                f"{IMAGES} is {dtype} {shape}; wanted are clips, uint8 (N, F, H, W, 3)"
            )
        self.size = shape[3], shape[2]
        if max(self.size) > MOST_SIDE:
            raise ValueError(
                f"{IMAGES} has clips of {in_pixels(self.size)}; at most {MOST_SIDE} pixels a side "
                "are scored"
            )
        self.check_length(shape[1], f"each clip of {IMAGES}")

    def __len__(self) -> int:
        return len(self.array)

    def frames_of_clip(self, i: int) -> np.ndarray:
        return np.array(self.array[i][self.clips.numbers])  # (F, H, W, 3)

    # A worker process maps the file itself rather than being sent what is in it
    def __getstate__(self) -> dict:
        return vars(self) | {"array": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, array=open_array(state["path"], IMAGES))


class Frames(Scored):
    """The frames of all clips of a ClipSet, one after another, as images.

    Items are (uint8 (3, H, W), digest) or (None, what is wrong).
    """

    def __init__(self, clips: ClipSet) -> None:
        self.clips, self.size, self.each = clips, clips.size, clips.clips.frames
        # The clip read last: its frames are asked for one after another
        self.last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.clips) * self.each

    def __getitem__(self, i: int) -> HashedImage:
        number, frame = divmod(i, self.each)
        try:
            if self.last is None or self.last[0] != number:
                self.last = number, self.clips.frames_of_clip(number)
        except ValueError as error:
            return None, str(error)
        return hashed(self.last[1][frame])


def open_clips(
    path: Path | str, argument: str, clips: ClipOptions, whole: bool = True
) -> FolderClips | ArrayClips:
    """The clips at a path, a folder or an .npz; errors call it by the name of the `argument`.

    With `whole`, every byte of an .npz is looked at. Raises ValueError for what holds no clips, or
    too short ones.
    """
    path = Path(path)
    if path.is_dir():
        return FolderClips(path, argument, clips)
    if not path.is_file():
        raise ValueError(
            f"`{argument}` {path}: there is no such file or folder; give a folder of clips or an "
            ".npz of them"
        )
    with npz_errors(path, argument, "a folder of clips or an .npz of them"):
        names = array_names(path, whole)
        if IMAGES in names:
            return ArrayClips(path, argument, clips)
    inside = ", ".join(sorted(names)) or "nothing"
    raise ValueError(
        f"`{argument}` {path} has {inside}; wanted is {IMAGES}, uint8 clips (N, F, H, W, 3)"
    )
