"""What should be said beside a score: too few images, other sizes, an order that matters."""

import torch

from evaluation.inputs import EvaluationInput
from evaluation.metrics import NEIGHBOURS, SPLIT, Summary, inception_score

PUBLISHED = 50_000  # published scores use this many samples
NEEDS = {  # score → what it needs of samples and of the reference
    "fid": "mu and sigma, or images alone", "sfid": "mu_s and sigma_s, or images alone",
    "precision": f"more than {NEIGHBOURS} images", "recall": f"more than {NEIGHBOURS} images",
}  # fmt: skip
UNEVEN = 0.03  # share of the Inception Score by which another order may change it without a word


def remarks(
    scores: dict[str, float | None], samples: tuple[int, tuple[int, int] | None],
    reference: EvaluationInput, summaries: tuple[Summary, Summary], features: str,
) -> list[str]:  # fmt: skip
    """What a reader of the scores must know, as sentences.

    samples is (how many, their size (W, H), or None for several), summaries those of samples and
    reference, features the extractor's name.
    """
    (count, size), (ours, _) = samples, summaries
    assert ours.features is not None  # of samples they are kept
    return [
        *(reference.images.notes if reference.images else ()),
        *on_number(count),
        *on_rank(count, reference, ours.features.shape[1]),
        *on_missing_scores(scores, reference, ours),
        *on_unsigned_statistics(reference, features),
        *on_order(scores, ours),
        *on_sizes(size, reference),
    ]


def on_number(count: int) -> list[str]:
    """That there are fewer samples than published scores use."""
    if count >= PUBLISHED:
        return []
    return [
        f"{count:,} samples; published scores are of {PUBLISHED:,}, and with fewer FID comes out "
        "higher"
    ]


def on_rank(count: int, reference: EvaluationInput, dimension: int) -> list[str]:
    """That there are too few images for so many features."""
    numbers = {"samples": count}
    if reference.images and not (reference.statistics or reference.spatial):
        numbers["reference images"] = len(reference.images)
    return [
        f"{number:,} {what} are too few for {dimension:,} features: their covariance has no full "
        "rank, and FID says little"
        for what, number in numbers.items()
        if number <= dimension
    ]


def on_missing_scores(
    scores: dict[str, float | None], reference: EvaluationInput, ours: Summary
) -> list[str]:
    """Which scores are missing, and what they need; what mixed sizes take is told by on_sizes."""
    is_mixed = reference.images is not None and reference.images.mixed
    lacking = [
        name
        for name in NEEDS
        if scores[name] is None and not (name == "sfid" and (ours.spatial is None or is_mixed))
    ]
    if not lacking:
        return []
    needs = "; ".join(f"{name} needs {NEEDS[name]}" for name in lacking)
    remaining = ", ".join(name for name, value in scores.items() if value is not None) or "nothing"
    return [
        f"samples, or the reference {reference.path}, lack something: {needs}. What remains: "
        f"{remaining}"
    ]


def on_unsigned_statistics(reference: EvaluationInput, features: str) -> list[str]:
    """That a reference file does not say by which features it was made; ADM's are by Inception."""
    if not reference.statistics or reference.made_from or features == "inception":
        return []
    return [
        f"{reference.path} does not say of which features its mu and sigma are; taken for those of "
        f"{features}"
    ]


def on_order(scores: dict[str, float | None], ours: Summary) -> list[str]:
    """That the Inception Score would be another one if the samples were in random order."""
    logits, there = ours.logits, scores["inception_score"]
    if logits is None or there is None or len(logits) <= SPLIT:  # one part has one score
        return []
    mixed = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    other = inception_score(logits[mixed])
    if not abs(there - other) > UNEVEN * other:
        return []
    return [
        f"inception_score depends on the order of the samples, since it is taken of each {SPLIT:,} "
        f"consecutive ones, as in ADM's suite: it is {there:.4g} in this order, perhaps class by "
        f"class, and {other:.4g} in a random one; published scores are of samples in random order"
    ]


def on_sizes(size: tuple[int, int] | None, reference: EvaluationInput) -> list[str]:
    """That samples and reference images have other sizes (W, H), or several, which is None."""
    theirs = size
    if reference.images:
        theirs = None if reference.images.mixed else reference.images.size
    if size is None or theirs is None:
        sides = {"samples": size, "reference images": theirs}
        mixed = " and ".join(name for name, one in sides.items() if one is None)
        return [
            f"{mixed} are of several sizes: the features bring each image by itself to the size "
            "that they take, whatever its aspect, and sfid, which compares places in images, is "
            "left out"
        ]
    if theirs == size:
        return []
    return [
        f"samples are of {size[0]}x{size[1]} pixels, the reference of {theirs[0]}x{theirs[1]}"
    ]
