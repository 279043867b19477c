"""Which samples a step sees, and how they become a batch."""

from collections.abc import Iterable, Iterator
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, get_worker_info

from data.source import BadImage, Key, TrainingItem
from layers.text import Text

NO_SHARED_MEMORY = (
    "/dev/shm is too small for their batches; pass `num_workers=0` or fewer, or enlarge it "
    "(docker run --shm-size=8g, or --ipc=host)"
)


def collate(items: list[TrainingItem]) -> tuple[Tensor | None, Tensor | Text, list[BadImage]]:
    """(images or moments (n, ...), labels (n,) or n captions, bad images met). If one image could
    not be read and none stands in for it, images is None.
    """
    return _collated(items, stack)


class Ragged(NamedTuple):
    """Images or moments of several shapes: all their numbers, one after another, in `flat`."""

    flat: Tensor
    shapes: list[tuple[int, ...]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Ragged":
        """The same on a device."""
        return self._replace(flat=self.flat.to(device, non_blocking=non_blocking))

    def parts(self) -> list[Tensor]:
        """Each of them, in order."""
        parts = self.flat.split([math.prod(shape) for shape in self.shapes])
        return [part.view(*shape) for part, shape in zip(parts, self.shapes)]


def alike(parts: list[Tensor]) -> list[list[int]]:
    """The numbers of the parts that have one shape, for each shape there is."""
    groups: dict[torch.Size, list[int]] = {}
    for number, part in enumerate(parts):
        groups.setdefault(part.shape, []).append(number)
    return list(groups.values())


def collate_ragged(
    items: list[TrainingItem],
) -> tuple[Ragged | None, Tensor | Text, list[BadImage]]:
    """As `collate`, of images or moments that have shapes of their own."""
    return _collated(items, _ragged)


def _ragged(tensors):
    flat = torch.cat([one.flatten() for one in tensors])
    return Ragged(stack([flat])[0], [tuple(one.shape) for one in tensors])


def _collated(items, join):
    images, labels, bad = zip(*items)
    batch = None if any(image is None for image in images) else join(images)
    return batch, _conditions(labels), [one for several in bad for one in several]


def _conditions(values):
    """Labels as (n,), or captions, each a Text of one, as a Text of n."""
    if isinstance(values[0], Text):
        return Text.join(values, lambda parts: stack(part[0] for part in parts))
    return stack([torch.tensor(label) for label in values])


def stack(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of one shape as one tensor (n, ...).

    In a loader's worker, its memory is shared with the training process. Otherwise the queue would
    move the tensor there later, in a thread whose errors nobody hears of.
    """
    tensors = list(tensors)
    if get_worker_info() is None:
        return torch.stack(tensors)
    shared = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype).share_memory_()
    return torch.stack(tensors, out=shared)


class StepBatches(Sampler):
    """The (index, flip) pairs of one process's share of each step's global batch. With `chances`
    each has a third entry, a number in [0, 1): by which of an image's captions one is chosen.

    Steps are those from `start` to `stop` - 1. Each epoch is a permutation drawn from (seed,
    epoch), cut into whole batches; flips and chances are drawn from (seed, step). Raises ValueError
    if there are fewer images than one batch takes.
    """

    def __init__(
        self, num_images: int, global_batch_size: int, seed: int, start: int, stop: int,
        rank: int = 0, world_size: int = 1, flip: bool = True, chances: bool = False,
    ) -> None:  # fmt: skip
        self.chances = chances
        self.num_images, self.batch, self.seed = num_images, global_batch_size, seed
        self.steps_per_epoch = self.count_steps()
        self.start, self.stop, self.flip = start, stop, flip
        self.ordered_epoch: int | None = None  # the epoch that was asked for last
        self.order = np.empty(0, np.int64)  # its images, batch after batch
        share = global_batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.stop):
            flips = self.flip & (
                np.random.default_rng([self.seed, 1, step]).random(self.batch) < 0.5
            )
            columns = [self.indices(step), flips]
            if self.chances:
                columns.append(np.random.default_rng([self.seed, 2, step]).random(self.batch))
            yield list(zip(*(column[self.share].tolist() for column in columns)))

    def indices(self, step: int) -> np.ndarray:
        """Which images the global batch of a step holds, an int64 array (global_batch_size,)."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.ordered_epoch:
            self.order = self.order_of(np.random.default_rng([self.seed, 0, epoch]))
            self.ordered_epoch = epoch
        return self.order[i * self.batch : (i + 1) * self.batch]

    def count_steps(self) -> int:
        """Steps of an epoch. Raises ValueError if there is none."""
        return steps_per_epoch(self.num_images, self.batch)

    def order_of(self, generator: np.random.Generator) -> np.ndarray:
        """The images of an epoch, whole batches and what is left over, drawn from its generator."""
        return generator.permutation(self.num_images)


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Whole batches in one pass over the images. Raises ValueError if there is none."""
    if num_images < global_batch_size:
        raise ValueError(
            f"{num_images} images do not fill one batch of {global_batch_size}; "
            "lower `global_batch_size`"
        )
    return num_images // global_batch_size
