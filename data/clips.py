"""Clips below a folder to windows of frames, as training sees them."""

from collections.abc import Sequence
from functools import partial

from PIL import Image
import numpy as np
import torch
from torch.utils.data import Dataset

from data.images import MOST_UNREADABLE, cover
from data.listing import Listing
from data.shapes import Size
from data.source import BadImage, Key, TrainingItem
from data.windows import Windows
from runtime.clip_files import ClipInfo, UnreadableClip, probe_clips, read_frames
from runtime.image_size import ImageSize, sides

MIDDLE = 0.5  # where a window begins of which no chance says that


class ClipDataset(Dataset):
    """Clips of a Listing by (index, flip, chance), as (uint8 (3, F, H, W), label, bad clips met).

    F is the number of frames in the clip's window, which the chance chooses (without one, that in
    the middle). An unreadable clip is reported rather than raised: with skip_bad the next readable
    one with as many frames stands in for it, else there is None.
    """

    sizes: Sequence[Size] | None = None

    def __init__(
        self, listing: Listing, windows: Windows, image_size: ImageSize, skip_bad: bool = False,
        hashes: tuple[str, str] = ("", ""),
    ) -> None:  # fmt: skip
        self.listing, self.windows, self.image_size = listing, windows, image_size
        self.skip_bad = skip_bad
        self.lengths: Sequence[int] | None = windows.lengths
        self.classes, self.notes = listing.classes, (*listing.notes, *windows.notes)
        self.hash, self.sample_hash = hashes

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, key: Key) -> TrainingItem:
        index, flip, *others = key
        chance = others[0] if others else MIDDLE
        bad: list[BadImage] = []
        for i in range(min(len(self), MOST_UNREADABLE)):
            at = (index + i) % len(self)
            if self.windows.lengths[at] != self.windows.lengths[index]:
                continue
            try:
                return self._read(at, flip, chance), self.listing.labels[at], bad
            except UnreadableClip as error:
                bad.append(BadImage(self.listing.paths[at], error.reason))
            if not self.skip_bad:
                break
        return None, 0, bad

    def _read(self, index, flip, chance):
        numbers, places = np.unique(self.windows.of(index, chance), return_inverse=True)
        crop = partial(fitted, image_size=self.image_size, flip=flip)
        frames = read_frames(self.listing.paths[index], numbers.tolist(), crop=crop)
        clip = frames[places].transpose(3, 0, 1, 2)  # (3, F, H, W)
        return torch.from_numpy(np.ascontiguousarray(clip))


def fitted(pixels: np.ndarray, image_size: ImageSize, flip: bool = False) -> np.ndarray:
    """Pixels uint8 (H, W, 3) cropped to image_size as those of images are, and mirrored."""
    cropped = np.asarray(cover(Image.fromarray(pixels), sides(image_size)))  # (H, W, 3)
    return cropped[:, ::-1] if flip else cropped


def probed(listing: Listing, skip_bad: bool) -> tuple[Listing, list[ClipInfo], list[str]]:
    """The Listing of those clips that can be read, what they are, and the others, "PATH (reason)".

    Raises ValueError for one that cannot, without skip_bad, and if there are no others.
    """
    found = probe_clips(listing.paths)
    bad = [(path, why) for path, (info, why) in zip(listing.paths, found) if info is None]
    if bad and (not skip_bad or len(bad) == len(found)):
        path, why = bad[0]
        more = f", and {len(bad) - 1:,} other clips" if len(bad) > 1 else ""
        advice = "mend it" if skip_bad else "mend it, or pass `skip_bad_images=True`"
        raise ValueError(f"cannot read {path} ({why}){more}; {advice}")
    good = [number for number, (info, _) in enumerate(found) if info is not None]
    skipped = [f"{path} ({why})" for path, why in bad]
    notes = tuple(f"skipped unreadable clip {clip}" for clip in skipped)
    readable = Listing(
        [listing.paths[number] for number in good], [listing.labels[number] for number in good],
        listing.classes, (*listing.notes, *notes),
    )  # fmt: skip
    return readable, [info for info, _ in found if info is not None], skipped
