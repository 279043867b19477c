"""What training asks of a source of images or latents, whatever keeps them."""

from typing import NamedTuple, Protocol

from torch import Tensor


class BadImage(NamedTuple):
    """A file that could not be read, and why."""

    path: str
    reason: str


# What a source gives for an (index, flip): pixels or moments, None if unreadable; label; bad
# images met.
TrainingItem = tuple[Tensor | None, int, list[BadImage]]


class Source(Protocol):
    """What training learns from: it has a length, and a TrainingItem for each (index, flip).

    Pixels are uint8 (3, S, S). Moments are (2, C, h, w): mean and standard deviation of latents.
    Workers of a loader get a copy by pickle.
    """

    classes: list[str] | None  # names in index order; None without classes
    notes: tuple[str, ...]  # what a user should know, in sentences
    hash: str  # tells the source from others by what is quickly read, such as names and labels
    sample_hash: str  # of the bytes of some files; "" where `hash` says it all

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, bool]) -> TrainingItem: ...
