"""What training asks of a source of images or latents, whatever keeps them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from data.shapes import Size
from layers.text import Text


class BadImage(NamedTuple):
    """A file that could not be read, and why."""

    path: str
    reason: str


# What a source gives for an (index, flip): pixels or moments, None if unreadable; label, or Text of
# one caption; bad images met.
TrainingItem = tuple[Tensor | None, int | Text, list[BadImage]]
# (index, flip), or, where captions or windows of clips are chosen among, (index, flip, chance in
# [0, 1))
Key = tuple[int, bool] | tuple[int, bool, float]


class Source(Protocol):
    """What training learns from: it has a length, and a TrainingItem for each (index, flip), or of
    clips for each (index, flip, chance), whose chance says where a window of frames begins.

    Pixels are uint8 (3, height, width). Moments are (2, C, h, w): mean and standard deviation of
    latents. All have one size, unless there are `sizes`. The source crops and mirrors, and refuses
    labels of num_classes or more when it is made; with num_classes=0 every label is 0. Workers of a
    loader get a copy by pickle: leave out what is only mapped or open, as CachedLatents does.
    """

    # Names in index order; numbers as texts where classes have no names; None without classes
    classes: list[str] | None
    notes: tuple[str, ...]  # what a user should know, in sentences
    # Tells the source from others by what is quickly read, such as names and labels. A run goes on
    # only with a source of the same hash.
    hash: str
    # Of the bytes of some files. A source that lies elsewhere now is the same with both hashes the
    # same; "" means that `hash` is made of all the contents (only for `latents` so far).
    sample_hash: str
    # Height and width in pixels of each image as it is returned, for training on many sizes (and
    # then `hash` tells them, too); None if all have one size.
    sizes: Sequence[Size] | None
    # How many frames each clip has as it is returned, for training on clips: pixels are then uint8
    # (3, F, height, width), moments (2, C, F, h, w). Those with one are images. None if all are
    # images, without F.
    lengths: Sequence[int] | None

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> TrainingItem: ...
