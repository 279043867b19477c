"""What should be said beside a score: too few images, other sizes, an order that matters."""

import torch

from evaluation.metrics import NEIGHBOURS, SPLIT, Summary, inception_score
from evaluation.sides import Side

PUBLISHED = 50_000  # samples, of which published scores are
NEEDS = {  # score → what it needs of both sides
    "fid": "mu and sigma, or images alone", "sfid": "mu_s and sigma_s, or images alone",
    "precision": f"more than {NEIGHBOURS} images", "recall": f"more than {NEIGHBOURS} images",
}  # fmt: skip
UNEVEN = 0.03  # share of the Inception Score by which another order may change it without a word


def remarks(
    scores: dict[str, float | None], samples: tuple[int, tuple[int, int]], reference: Side,
    summaries: tuple[Summary, Summary], features: str,
) -> list[str]:  # fmt: skip
    """What a reader of the scores must know, as sentences.

    samples is (how many, their size (W, H)), reference the Side, summaries those of both, features
    the extractor's name.
    """
    (count, size), (ours, _) = samples, summaries
    notes = list(reference.images.notes) if reference.images else []
    assert ours.features is not None  # of samples they are kept
    dimension = ours.features.shape[1]
    if count < PUBLISHED:
        notes.append(
            f"{count:,} samples; published scores are of {PUBLISHED:,}, and with fewer FID comes out higher"
        )
    few = [(count, "samples")]
    if reference.images and not (reference.statistics or reference.spatial):
        few.append((len(reference.images), "reference images"))
    for number, what in few:
        if number <= dimension:
            notes.append(
                f"{number:,} {what} are too few for {dimension:,} features: their covariance has no full rank, and FID says "
                "little"
            )
    lacking = [
        name
        for name in NEEDS
        if scores[name] is None and not (name == "sfid" and ours.spatial is None)
    ]
    if lacking:
        needs = "; ".join(f"{name} needs {NEEDS[name]}" for name in lacking)
        remaining = (
            ", ".join(name for name, value in scores.items() if value is not None) or "nothing"
        )
        notes.append(
            f"samples, or the reference {reference.path}, lack something: {needs}. What remains: {remaining}"
        )
    if reference.statistics and not reference.made_from and features != "inception":
        notes.append(
            f"{reference.path} does not say of which features its mu and sigma are; taken for those of {features}"
        )
    if ours.logits is not None and len(ours.logits) > SPLIT:  # one Inception Score and more
        mixed = torch.randperm(len(ours.logits), generator=torch.Generator().manual_seed(0))
        there, other = scores["inception_score"], inception_score(ours.logits[mixed])
        if there is not None and abs(there - other) > UNEVEN * other:
            notes.append(
                f"inception_score depends on the order of the samples, since it is taken of each {SPLIT:,} consecutive ones, "
                f"as in ADM's suite: it is {there:.4g} in this order, perhaps class by class, and {other:.4g} in a random one; "
                "published scores are of samples in random order"
            )
    if reference.images and reference.images.size != size:
        notes.append(
            "samples are of {}x{} pixels, the reference of {}x{}".format(
                *size, *reference.images.size
            )
        )
    return notes
