"""Images or latents with what is said of them, as Text for a network that reads captions."""

from collections.abc import Sequence
import hashlib
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from conditions.text import Reader, Share
from data.captions import Captions
from data.shapes import Size
from data.source import Key, Source, TrainingItem
from data.text_cache import CachedText
from layers.text import Text


SEVERAL = 2**20  # many times as many as a clip has captions
Widths = tuple[int | None, int | None]


class Texts(Protocol):
    """What gives the Text of each image. `null`, `shares` and `says` are those of a Reader.

    `hash` tells the captions from others, `notes` say in sentences what a user should know, and
    `length` is how many tokens a Text has, `widths` how wide each is and the vector of the whole;
    None: as the network's own encoder has it.
    """

    null: Text
    shares: tuple[Share, ...]
    says: list[dict[str, Any]] | None
    hash: str
    notes: tuple[str, ...]
    length: int
    widths: Widths

    def of(self, index: int, chance: float) -> Text:
        """The Text of one of an image's captions, chosen by a chance in [0, 1); of an image without
        any `null`.
        """


class ReadTexts:
    """The Texts of Captions, as a Reader makes them when they are asked for: for a network that has
    an encoder of its own, whose Reader has a `length`.
    """

    says: list[dict[str, Any]] | None = None
    widths: Widths = (None, None)

    def __init__(
        self, captions: Captions, reader: Reader, length: int, notes: tuple[str, ...] = ()
    ) -> None:
        self.captions, self.reader, self.length = captions, reader, length
        self.null, self.shares = reader.null, reader.shares
        self.hash, self.notes = captions.hash, (*captions.notes, *notes)

    def of(self, index: int, chance: float) -> Text:
        """As Texts has it."""
        several = self.captions.of(index)
        return self.reader.encode([several[at_chance(chance, len(several))]] if several else [""])


class CachedTexts:
    """The Texts of a CachedText: what encoders outside of the network made of the captions."""

    def __init__(self, cached: CachedText) -> None:
        self.cached = cached
        self.null, self.shares = cached.null, cached.shares
        self.says: list[dict[str, Any]] | None = cached.says
        self.hash, self.notes = cached.hash, cached.notes
        images, missing = cached.manifest["images"], cached.manifest["missing"]
        if missing:
            empty = f"{missing:,} of {images:,} images have no caption; the empty caption stands"
            self.notes = (*self.notes, f"{empty} for theirs")
        pooled = self.null.pooled
        self.length, width = self.null.tokens.shape[1:]
        self.widths: Widths = width, None if pooled is None else pooled.shape[-1]

    def of(self, index: int, chance: float) -> Text:
        """As Texts has it."""
        rows = self.cached.rows(index)
        return self.cached.text(rows[at_chance(chance, len(rows))]) if len(rows) else self.null


def at_chance(chance: float, count: int) -> int:
    """Which of so many is chosen by a chance in [0, 1): each by as many chances."""
    return min(count - 1, int(chance * count))


class Captioned(Dataset):
    """A Source with captions in place of labels: its items' second entry is the Text of one of the
    image's captions, which the third entry of a key chooses.

    The labels of the source that it is made of must be the numbers of its images.
    """

    classes: list[str] | None = None

    def __init__(self, source: Source, texts: Texts) -> None:
        self.source, self.texts = source, texts
        self.notes = (*source.notes, *texts.notes)
        self.hash = hashlib.sha256(f"{source.hash} {texts.hash}".encode()).hexdigest()
        self.sample_hash = source.sample_hash
        self.sizes: Sequence[Size] | None = source.sizes
        self.lengths: Sequence[int] | None = source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> TrainingItem:
        index, flip, *others = key
        chance = others[0] if others else 0.0
        inside = (index, flip) if self.lengths is None else (index, flip, self._rest(chance))
        image, number, bad = self.source[inside]
        assert isinstance(number, int)
        return image, self.texts.of(number, chance), bad

    def _rest(self, chance):
        """A chance for where a clip's window begins, which tells nothing of the caption."""
        return chance * SEVERAL % 1

    def drawn(self, seed: int, indices: Sequence[int]) -> Text:
        """Captions for samples with these indices: those of images that are drawn at random, each
        by (seed, index) alone.
        """
        texts = []
        for index in indices:
            generator = np.random.default_rng([seed, index])
            texts.append(
                self.texts.of(int(generator.integers(len(self))), float(generator.random()))
            )
        return Text.join(texts)


def notes_on_length(captions: Captions, reader: Reader, length: int) -> tuple[str, ...]:
    """A sentence on the captions that a reader cuts, if there are any."""
    cut, longest, most = 0, "", -1
    for said in captions:
        for caption in said:
            # A piece has a byte at least
            if len(caption) >= length and (left := reader.cut_at(caption)) is not None:
                cut += 1
                if len(caption) > most:
                    longest, most = left, len(caption)
    if not cut:
        return ()
    return (
        f"{cut:,} of {captions.count:,} captions are longer than `text_length` {length}; the "
        f"longest, of {most:,} characters, is cut after {longest[-60:]!r}",
    )
