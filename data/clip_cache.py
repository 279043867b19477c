"""Cached latents of clips as a source of windows of frames."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from data.cache import CachedLatents
from data.clips import MIDDLE
from data.shapes import Size
from data.source import Key, TrainingItem
from data.windows import Windows


class CachedClips(Dataset):
    """Windows of cached clips, by (index, flip, chance).

    An item is (moments (2, C, F, h, w): mean and std, label, []); F is the number of frames in the
    clip's window, which the chance chooses (without one, that in the middle). `cached` are the
    latents of all frames. Raises ValueError as Windows, and if they are of images.
    """

    sizes: Sequence[Size] | None = None

    def __init__(
        self, cached: CachedLatents, frames: int, stride: int = 1, frame_rate: float | None = None
    ) -> None:
        if cached.clips is None:
            raise ValueError(
                "the latents are of images, for training without `frames`; make those of clips by "
                "extract_latents.py --clips"
            )
        self.cached, self.manifest = cached, cached.manifest
        self.classes: list[str] | None = cached.classes
        self.hash, self.sample_hash, self.kind = cached.hash, cached.sample_hash, cached.kind
        self.firsts = cached.clips["first"].tolist()
        self.labels: Sequence[int] = cached.clips["label"].tolist()
        names = [f"number {number}" for number in range(len(self.labels))]
        rates = [rate or None for rate in cached.clips["rate"].tolist()]
        counts = cached.clips["frames"].tolist()
        self.windows = Windows(names, counts, rates, frames, stride, frame_rate)
        self.notes: tuple[str, ...] = self.windows.notes
        self.lengths: Sequence[int] | None = self.windows.lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> TrainingItem:
        index, flip, *others = key
        frames = self.firsts[index] + self.windows.of(index, others[0] if others else MIDDLE)
        moments = np.moveaxis(self.cached.moments[frames, int(flip)], 0, 2)  # (2, C, F, h, w)
        return torch.from_numpy(np.ascontiguousarray(moments)), self.labels[index], []
