"""Many images to what is kept of them, dealt to the processes in turns."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from evaluation.features import Extractor
from evaluation.metrics import Moments, Summary
from runtime.team import Team


def deal(count: int, batch_size: int, team: Team = Team()) -> Iterator[list[int]]:
    """Lists of batch_size image indices for this process, as many lists in every process, which
    take turns.

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
    extractor: Extractor, batches: Iterable[tuple[Tensor, Tensor | None]], count: int,
    keep: int | None = None, with_logits: bool = False, team: Team = Team(),
) -> tuple[Summary | None, Tensor | None]:  # fmt: skip
    """(the Summary of `count` images, their digests uint8 (count, 32) or None), in the first
    process; (None, None) elsewhere.

    Images come in the batches of `deal`, as (images uint8 (n, 3, H, W) on the extractor's device,
    digests uint8 (n, 32) or None). `keep` is how many images' features are kept (default: all).
    Raises ValueError for features that are not finite.
    """
    moments, spatial, begun = Moments(), Moments(), 0
    features: list[Tensor] = []
    logits: list[Tensor] = []
    digests: list[Tensor] = []
    wanted = torch.tensor(spread(count, count if keep is None else keep))
    for images, digest in batches:
        rows = extractor(images)._asdict() | {"digests": digest}
        if not with_logits:
            rows["logits"] = None
        rows = {name: part for name, part in rows.items() if part is not None}
        gathered = dict(zip(rows, team.gather(list(rows.values()))))
        if team.rank:
            continue
        gathered = {name: part[: count - begun] for name, part in gathered.items()}
        end = begun + len(gathered["features"])
        moments.add(gathered["features"])
        features.append(
            gathered["features"].cpu()[wanted[(wanted >= begun) & (wanted < end)] - begun]
        )
        if "spatial" in gathered:
            spatial.add(gathered["spatial"])
        for name, kept in (("logits", logits), ("digests", digests)):
            kept += [gathered[name].cpu()] if name in gathered else []
        begun = end
    if team.rank:
        return None, None
    if not all(part.isfinite().all() for part in logits):
        raise ValueError(
            "the logits of some image are not finite; look at the images, or at the --features network"
        )
    summary = Summary(
        moments.statistics(), spatial.statistics() if spatial.count else None, torch.cat(features),
        torch.cat(logits) if logits else None,
    )  # fmt: skip
    return summary, torch.cat(digests) if digests else None
