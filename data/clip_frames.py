"""All frames of clips, end to end, as they are cached: which there are, and their pixels."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple
import zlib

import numpy as np
import torch
from torch.utils.data import Dataset

from data.cache_format import CLIP_ROW
from data.captions import bad_numbers
from data.clips import fitted, probed
from data.images import channels_first
from data.listing import Listing, list_clips
from data.options import CacheOptions
from data.source import BadImage, TrainingItem
from data.windows import resampled, sources, step_of
from runtime.clip_files import Pixels, UnreadableClip, walk_clip
from runtime.image_size import ImageSize, sides


class ClipPlan(NamedTuple):
    """Clips whose frames are to be cached: their Listing, where the frames of each lie, as
    clips.npy has it, and how many frames of its file each goes on for one of them. `found` is the
    Listing with those that cannot be read, which `bad` names, "PATH (reason)".
    """

    listing: Listing
    rows: np.ndarray  # (clips,) of CLIP_ROW
    steps: list[float]
    found: Listing
    bad: list[str]

    def frames(self) -> Listing:
        """The Listing of all frames, each of which has the path and label of its clip."""
        counts = self.rows["frames"].tolist()
        paths = [path for path, count in zip(self.listing.paths, counts) for _ in range(count)]
        labels = np.repeat(self.rows["label"], self.rows["frames"]).tolist()
        return self.listing._replace(paths=paths, labels=labels)

    def entries(self, options: CacheOptions) -> dict:
        """What a plan says more, or otherwise, of clips."""
        rate = options.frame_rate
        return {
            **clip_entries(self.rows),
            "frame_rate": None if rate is None else float(rate),
            "files_sha256": self.found.hash(options.data_path),
        }  # fmt: skip

    def read(self, bad: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """(the rows of clips that were read to their end, all others) where `bad`, "PATH (reason)",
        were not, in the order of their frames: of a clip's several reasons the first counts.

        Raises ValueError if no clip is left.
        """
        numbers = bad_numbers(self.listing.paths, bad)
        broken = dict(zip(reversed(numbers), reversed(bad)))
        rows = np.delete(self.rows, list(broken))
        if not len(rows):
            raise ValueError(f"cannot read {bad[0]}, nor any other clip; mend one")
        return rows, sorted([*self.bad, *broken.values()])


def clip_entries(rows: np.ndarray) -> dict:
    """What a plan and a manifest say of clips.npy."""
    return {"clips": len(rows), "clips_crc32": zlib.crc32(rows.tobytes())}


def plan_clips(options: CacheOptions) -> ClipPlan:
    """The clips below `data_path`, brought to `frame_rate` if it is given.

    Raises ValueError as list_clips, and if one cannot be read.
    """
    found = list_clips(options.data_path, options.num_classes)
    listing, infos, bad = probed(found, options.skip_bad_images)
    steps = [step_of(info.rate, options.frame_rate) for info in infos]
    counts = np.array([resampled(info.frames, step) for info, step in zip(infos, steps)])
    rows = np.zeros(len(infos), CLIP_ROW)
    rows["first"] = np.cumsum(counts) - counts
    rows["frames"], rows["label"] = counts, listing.labels
    rows["rate"] = [(info.rate or 0) / step for info, step in zip(infos, steps)]
    if single := sum(info.frames > count for info, count in zip(infos, counts) if count == 1):
        note = f"{single:,} clips have one frame at this rate, and training takes them for images"
        listing = listing._replace(notes=(*listing.notes, note))
    return ClipPlan(listing, rows, steps, found, bad)


class ClipFrames(Dataset):
    """The frames of a ClipPlan by (number, flip), as (uint8 (3, H, W), label, bad clips met).

    It is meant for numbers that rise: the file that was read last stays open. A frame that cannot
    be read is None, or with skip_bad black, and its clip reported.
    """

    def __init__(self, plan: ClipPlan, image_size: ImageSize, skip_bad: bool = False) -> None:
        self.plan, self.image_size, self.skip_bad = plan, image_size, skip_bad
        self.reading: _Reading | None = None

    def __len__(self) -> int:
        return int(self.plan.rows["frames"].sum())

    def __getitem__(self, key: tuple[int, bool]) -> TrainingItem:
        number, flip = key
        clip = int(np.searchsorted(self.plan.rows["first"], number, side="right")) - 1
        row, path = self.plan.rows[clip], self.plan.listing.paths[clip]
        frame = int(sources(number - row["first"], self.plan.steps[clip]))
        label = int(row["label"])
        try:
            if self.reading is None or not self.reading.reaches(path, frame):
                self.reading = _Reading(path)
            pixels = self.reading.at(frame)  # (H, W, 3)
        except UnreadableClip as error:  # what was read so far stays: no later frame is read anew
            black = torch.zeros(3, *sides(self.image_size), dtype=torch.uint8)
            return black if self.skip_bad else None, label, [BadImage(path, error.reason)]
        return channels_first(fitted(pixels, self.image_size, flip)), label, []


class _Reading:
    """A clip's file, open, and the frame that was read last."""

    def __init__(self, path: str) -> None:
        self.path, self.number = path, -1
        self.pixels: np.ndarray | None = None  # where they cannot be read
        self.frames: Iterator[Pixels] = walk_clip(path)

    def reaches(self, path, frame):
        return path == self.path and frame >= self.number

    def at(self, frame):
        """The pixels of a frame, which is not before the one that was read last. Raises
        UnreadableClip.
        """
        while self.number < frame:
            pixels = next(self.frames, None)
            if pixels is None:
                raise UnreadableClip(self.path, "clip", f"it has no frame {frame}: it ends early")
            self.number, self.pixels = self.number + 1, None
            if self.number == frame:
                self.pixels = pixels()
        if self.pixels is None:
            raise UnreadableClip(self.path, "clip", f"frame {frame} cannot be read")
        return self.pixels
