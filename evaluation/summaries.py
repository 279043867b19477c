"""Many images to what is kept of them, dealt to the processes in turns."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from evaluation.features import Batch, Extractor, Rows
from evaluation.metrics import Moments, Summary
from runtime.team import Team


def deal(count: int, batch_size: int, team: Team = Team()) -> Iterator[list[int]]:
    """This process's batches of image indices, lists of batch_size. Every process gets the same
    number of batches; batches go to the processes in turns.

    Past the end the last image stands again and again: `summarize` leaves these out.
    """
    for start in range(0, count, batch_size * team.world_size):
        first = start + team.rank * batch_size
        yield [min(i, count - 1) for i in range(first, first + batch_size)]


def spread(count: int, kept: int) -> list[int]:
    """`kept` indices of `count`, or all if there are no more, evenly spread."""
    kept = min(count, kept)
    return [i * count // kept for i in range(kept)]


def summarize(
    extractor: Extractor, batches: Iterable[tuple[Batch, Tensor | None]], count: int,
    keep: int | None = None, with_logits: bool = False, team: Team = Team(),
) -> tuple[Summary | None, Tensor | None]:  # fmt: skip
    """(the Summary of `count` images, their digests uint8 (count, 32) or None), in the first
    process; (None, None) elsewhere.

    Images come in the batches of `deal`, as (images as the extractor takes them, on its device,
    digests uint8 (n, 32) or None). `keep` is how many images' features are kept (default: all).
    Raises ValueError for features that are not finite.
    """
    collected = Collected(count, count if keep is None else keep)
    for images, digests in batches:
        rows = extractor(images)
        gathered = gather(team, rows if with_logits else rows._replace(logits=None), digests)
        if team.rank == 0:
            collected.add(gathered)
    return (None, None) if team.rank else collected.summary(extractor.argument)


def gather(team: Team, rows: Rows, digests: Tensor | None) -> dict[str, Tensor]:
    """The parts of Rows, and digests, by name, those of all processes in the order of rank.

    Parts that are None are left out.
    """
    named = rows._asdict() | {"digests": digests}
    there = {name: part for name, part in named.items() if part is not None}
    return dict(zip(there, team.gather(list(there.values()))))


class Collected:
    """What is kept of images whose rows come in batches, in the images' order.

    Past `count` images no rows are taken in. Features of `keep` images, evenly spread, are kept.
    """

    def __init__(self, count: int, keep: int) -> None:
        self.count, self.begun = count, 0
        self.wanted = torch.tensor(spread(count, keep))  # indices of images, (keep,)
        self.moments, self.spatial = Moments(), Moments()
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.digests: list[Tensor] = []

    def add(self, gathered: dict[str, Tensor]) -> None:
        """Take in what `gather` returns of a batch in every process."""
        parts = {name: part[: self.count - self.begun] for name, part in gathered.items()}
        features = parts["features"]  # (n, D)
        self.moments.add(features)
        end = self.begun + len(features)
        chosen = self.wanted[(self.wanted >= self.begun) & (self.wanted < end)] - self.begun
        self.features.append(features.cpu()[chosen])
        if "spatial" in parts:
            self.spatial.add(parts["spatial"])
        if "logits" in parts:
            self.logits.append(parts["logits"].cpu())
        if "digests" in parts:
            self.digests.append(parts["digests"].cpu())
        self.begun = end

    def summary(self, argument: str) -> tuple[Summary, Tensor | None]:
        """(the Summary, the digests uint8 (count, 32) or None) of all images.

        Raises ValueError for features that are not finite; `argument` is the name of the one that
        chose the network.
        """
        logits_finite = all(part.isfinite().all() for part in self.logits)
        for what, is_finite in (("logits", logits_finite), ("features", self.features_finite())):
            if not is_finite:
                raise ValueError(
                    f"the {what} of some image are not finite; look at the images, or at the "
                    f"`{argument}` network"
                )
        summary = Summary(
            self.moments.statistics(), self.spatial.statistics() if self.spatial.count else None,
            torch.cat(self.features), torch.cat(self.logits) if self.logits else None,
        )  # fmt: skip
        return summary, torch.cat(self.digests) if self.digests else None

    def features_finite(self) -> bool:
        """Whether all features are finite, spatial ones too; True where too few have moments."""
        kinds = (self.moments, self.spatial)
        return all(moments.count < 2 or moments.is_finite() for moments in kinds)
