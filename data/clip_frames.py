"""All frames of clips, end to end, as they are cached: which there are, and their pixels."""

from collections.abc import Iterator
from typing import NamedTuple
import zlib

import numpy as np
from torch.utils.data import Dataset

from data.cache_format import CLIP_ROW
from data.clips import fitted, probed
from data.images import channels_first
from data.listing import Listing, list_clips
from data.options import CacheOptions
from data.source import BadImage, TrainingItem
from data.windows import resampled, sources, step_of
from runtime.clip_files import Pixels, UnreadableClip, walk_clip
from runtime.image_size import ImageSize


class ClipPlan(NamedTuple):
    """Clips whose frames are to be cached: their Listing, where the frames of each lie, as
    clips.npy has it, and how many frames of its file each goes on for one of them.
    """

    listing: Listing
    rows: np.ndarray  # (clips,) of CLIP_ROW
    steps: list[float]

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
            "clips": len(self.rows), "clips_crc32": zlib.crc32(self.rows.tobytes()),
            "frame_rate": None if rate is None else float(rate),
            "files_sha256": self.listing.hash(options.data_path),
        }  # fmt: skip


def plan_clips(options: CacheOptions) -> ClipPlan:
    """The clips below `data_path`, brought to `frame_rate` if it is given.

    Raises ValueError as list_clips, and if one cannot be read.
    """
    found = list_clips(options.data_path, options.num_classes)
    listing, infos = probed(found, options.skip_bad_images)
    steps = [step_of(info.rate, options.frame_rate) for info in infos]
    counts = np.array([resampled(info.frames, step) for info, step in zip(infos, steps)])
    rows = np.zeros(len(infos), CLIP_ROW)
    rows["first"] = np.cumsum(counts) - counts
    rows["frames"], rows["label"] = counts, listing.labels
    rows["rate"] = [(info.rate or 0) / step for info, step in zip(infos, steps)]
    return ClipPlan(listing, rows, steps)


class ClipFrames(Dataset):
    """The frames of a ClipPlan by (number, flip), as (uint8 (3, H, W), label, bad clips met).

    It is meant for numbers that rise: the file that was read last stays open. A frame that cannot
    be read is None, and its clip reported.
    """

    def __init__(self, plan: ClipPlan, image_size: ImageSize) -> None:
        self.plan, self.image_size = plan, image_size
        self.reading: _Reading | None = None

    def __len__(self) -> int:
        return int(self.plan.rows["frames"].sum())

    def __getitem__(self, key: tuple[int, bool]) -> TrainingItem:
        number, flip = key
        clip = int(np.searchsorted(self.plan.rows["first"], number, side="right")) - 1
        row, path = self.plan.rows[clip], self.plan.listing.paths[clip]
        frame = int(sources(number - row["first"], self.plan.steps[clip]))
        try:
            if self.reading is None or not self.reading.reaches(path, frame):
                self.reading = _Reading(path)
            pixels = self.reading.at(frame)  # (H, W, 3)
        except UnreadableClip as error:
            self.reading = None
            return None, 0, [BadImage(path, error.reason)]
        return channels_first(fitted(pixels, self.image_size, flip)), int(row["label"]), []


class _Reading:
    """A clip's file, open, and the frame that was read last."""

    def __init__(self, path: str) -> None:
        self.path, self.number, self.pixels = path, -1, np.empty(0)
        self.frames: Iterator[Pixels] = walk_clip(path)

    def reaches(self, path, frame):
        return path == self.path and frame >= self.number

    def at(self, frame):
        """The pixels of a frame, which is not before the one that was read last."""
        while self.number < frame:
            pixels = next(self.frames, None)
            if pixels is None:
                raise UnreadableClip(self.path, "clip", f"it has no frame {frame}: it ends early")
            self.number += 1
            if self.number == frame:
                self.pixels = pixels()
        return self.pixels
