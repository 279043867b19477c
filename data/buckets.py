"""Steps of images of one size: which images are in which bucket, and when a bucket has its turn.

A bucket is all images that are brought to one size, (height, width).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.batches import StepBatches
from data.shapes import Size


class BucketBatches(StepBatches):
    """As StepBatches, but all images of a step's global batch have one size of `sizes`.

    Each epoch the images of each bucket are permuted and cut into whole batches, and the batches of
    all buckets are shuffled: all drawn from (seed, epoch). What is left over in a bucket waits for
    another epoch. Raises ValueError if no bucket has as many images as a batch takes.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, ...]], global_batch_size: int, *others: Any, **more: Any
    ) -> None:
        self.buckets = list(in_buckets(sizes).values())
        super().__init__(len(sizes), global_batch_size, *others, **more)

    def count_steps(self) -> int:
        """Steps of an epoch. Raises ValueError if there is none."""
        return bucket_steps([len(images) for images in self.buckets], self.batch)

    def order_of(self, generator: np.random.Generator) -> np.ndarray:
        """The images of an epoch, batch after batch, drawn from its generator."""
        batches = [
            generator.permutation(images)[: len(images) // self.batch * self.batch]
            for images in self.buckets
        ]
        cut = np.concatenate(batches).reshape(-1, self.batch)  # (steps, batch)
        return generator.permutation(cut).ravel()  # (steps·batch,)


class ClipBatches(BucketBatches):
    """As BucketBatches, of clips with these numbers of frames: all of a step have as many. The
    third entry of a key, a number in [0, 1), says where the clip's window begins.

    Raises ValueError if neither clips nor images fill a batch.
    """

    def __init__(
        self, lengths: Sequence[int], global_batch_size: int, *others: Any, **more: Any
    ) -> None:
        super().__init__([(length,) for length in lengths], global_batch_size, *others, **more)
        self.chances = True

    def count_steps(self) -> int:
        """Steps of an epoch. Raises ValueError if there is none."""
        counts = [len(clips) for clips in self.buckets]
        if max(counts) < self.batch:
            raise ValueError(
                f"there are {' and '.join(f'{count:,}' for count in counts)} clips of one length, "
                f"which do not fill one batch of {self.batch}; lower `global_batch_size`"
            )
        return bucket_steps(counts, self.batch)


def in_buckets(sizes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
    """Size → the indices (n,) of the images that have it, sizes in order."""
    found, bucket = np.unique(np.array(sizes), axis=0, return_inverse=True)
    order = np.argsort(bucket, kind="stable")
    images = np.split(order, np.cumsum(np.bincount(bucket))[:-1])
    return {tuple(size): of for size, of in zip(found.tolist(), images)}


def bucket_steps(counts: Sequence[int], global_batch_size: int) -> int:
    """Whole batches in one pass over buckets of so many images. Raises ValueError if there is none.
    """
    steps = sum(count // global_batch_size for count in counts)
    if not steps:
        raise ValueError(
            f"no bucket has the {global_batch_size} images of a batch: the largest of "
            f"{len(counts)} has {max(counts)}; lower `global_batch_size`, or leave out "
            "`aspect_buckets`"
        )
    return steps


def told(sizes: Sequence[Size], global_batch_size: int) -> list[str]:
    """Lines for a log: how many images each bucket has, and which are never seen."""
    counts = {f"{h}x{w}": len(images) for (h, w), images in in_buckets(sizes).items()}
    shown = ", ".join(f"{size} {count:,}" for size, count in counts.items())
    lines = [f"buckets, height x width and images: {shown}"]
    if small := {size: n for size, n in counts.items() if n < global_batch_size}:
        lines.append(
            f"note: {sum(small.values()):,} images are never seen: their buckets "
            f"({', '.join(small)}) do not fill a batch of {global_batch_size}"
        )
    return lines


def told_clips(lengths: Sequence[int], global_batch_size: int) -> list[str]:
    """Lines for a log: how many clips of each length there are, and which are never seen."""
    counts = dict(sorted(Counter(lengths).items()))
    names = {frames: "images" if frames == 1 else f"clips of {frames} frames" for frames in counts}
    lines = ["; ".join(f"{count:,} {names[frames]}" for frames, count in counts.items())]
    lines += [
        f"note: {count:,} {names[frames]} are never seen: they do not fill a batch of "
        f"{global_batch_size}"
        for frames, count in counts.items()
        if count < global_batch_size
    ]
    return lines
