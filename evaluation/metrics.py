"""Features → scores: Fréchet distance, Inception Score, precision and recall.

The conventions are those of ADM's evaluation suite. Shapes: features (N, D), logits (N, K); a mean
(D,) and a covariance (D, D) are float64. Nothing here knows what an image is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.limits import Range

NEIGHBOURS = 3  # k of precision and recall
SCORED = Range(NEIGHBOURS + 1, 10**6)  # how many images a score may be of
SPLIT = 5000  # consecutive images that one Inception Score is taken of
ROWS_AT_ONCE = 1024  # of a matrix of distances


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D, with N - 1) of features, NumPy arrays in float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """The mean and covariance of rows that come in batches, kept in float64.

    After Chan, Golub & LeVeque 1983. Batches leave only rounding behind: about 1e-15, relative to
    the rows' spread.
    """

    mean: Tensor  # (D,), this and the next from the first batch on
    scatter: Tensor  # (D, D)

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, D), n at least 1.

        The sums stay on the rows' device, or on the CPU where that has no float64.
        """
        rows = rows.to("cpu" if rows.device.type == "mps" else rows.device).double()
        if not self.count:
            self.mean = torch.zeros(rows.shape[1], dtype=rows.dtype, device=rows.device)
            # (D, D)
            self.scatter = torch.zeros(
                rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device
            )
        mean, total = rows.mean(dim=0), self.count + len(rows)
        shift = mean - self.mean
        self.scatter.addmm_((rows - mean).T, rows - mean)
        self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def is_finite(self) -> bool:
        """Whether all rows so far were finite, and their moments are."""
        return bool(self.mean.isfinite().all() and self.scatter.isfinite().all())

    def statistics(self) -> Statistics:
        """The Statistics of all rows so far.

        Raises ValueError if there are fewer than two, or some were not finite.
        """
        if self.count < 2:
            raise ValueError(
                f"{self.count} image(s) have no covariance; give at least 2, and for a score "
                "thousands"
            )
        if not self.is_finite():
            raise ValueError("the features of some image are not finite; look at the images")
        return Statistics(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The Fréchet distance of two Gaussians with these Statistics, at least 0.

    The distance is |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2·(Σ₁Σ₂)^½). Heusel et al. 2017, eq. 6. With Σ = R·Rᵀ
    the last trace is the sum of the singular values of R₁ᵀR₂, which holds for covariances without
    full rank as well; no term is added to their diagonals.
    """
    product = _root(a.covariance).T @ _root(b.covariance)  # (rank of a, rank of b)
    overlap = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    # In this order, NaN stays NaN
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def _root(covariance):
    """R (D, rank) with R·Rᵀ = the covariance; directions that hold only rounding are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values.max() * len(values) * np.finfo(values.dtype).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y), for each SPLIT consecutive images,
    averaged (Salimans et al. 2016).
    """
    scores = []
    for part in logits.split(SPLIT):
        log_p = part.double().log_softmax(dim=1)  # (n, K)
        log_mean = log_p.logsumexp(dim=0) - np.log(len(part))  # (K,)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_and_recall(
    samples: Tensor, reference: Tensor, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """The shares of samples near the reference, and of the reference near samples.

    After Kynkäänniemi et al. 2019. A point is near a set if it lies no farther from some member
    than that member's k-th neighbour. Features are (N, D) and (M, D), in float32. Raises ValueError
    for k images or fewer.
    """
    for side in (samples, reference):
        if len(side) <= k:
            raise ValueError(f"{len(side)} images do not have {k} neighbours each; give more")
    center = reference.mean(dim=0)  # which changes no distance, and makes them more exact
    samples, reference = samples - center, reference - center
    # A point is at distance 0 of itself and its copies; rounding must not take it out of a ball of
    # radius 0.
    largest = torch.stack([side.square().sum(dim=1).max() for side in (samples, reference)]).max()
    slack = 8 * torch.finfo(samples.dtype).eps * largest
    precision = _share_inside(samples, reference, _radii(reference, k) + slack)
    recall = _share_inside(reference, samples, _radii(samples, k) + slack)
    return precision, recall


def _radii(points, k):
    """The squared distance of each point (N, D) to its k-th neighbour, (N,)."""
    blocks = _distances(points, points)
    # The nearest is itself
    return torch.cat([block.topk(k + 1, largest=False).values[:, k] for block in blocks])


def _share_inside(points, centers, radii):
    """The share of points (N, D) within the squared radius (M,) of some center (M, D)."""
    inside = sum((block <= radii).any(dim=1).sum() for block in _distances(points, centers))
    return inside.item() / len(points)


def _distances(a, b):
    """The squared distances of points (N, D) and (M, D), by blocks (n, M) of rows."""
    b_squared = b.square().sum(dim=1)
    for rows in a.split(ROWS_AT_ONCE):
        squares = rows.square().sum(dim=1, keepdim=True) + b_squared  # (n, M)
        yield squares.addmm_(rows, b.T, alpha=-2)


@dataclass
class Summary:
    """What is kept of a set of images: the moments of all features, and of all spatial ones;
    features (n, D) and logits (n, K) of as many images as are asked for. None: there is none.
    """

    statistics: Statistics | None = None
    spatial: Statistics | None = None
    features: Tensor | None = None
    logits: Tensor | None = None


def score(samples: Summary, reference: Summary) -> dict[str, float | None]:
    """fid, sfid, inception_score, precision and recall of two Summaries, as a dict.

    A score is None where they lack what it needs.
    """
    precision: float | None = None
    recall: float | None = None
    if samples.features is not None and reference.features is not None:
        if min(len(samples.features), len(reference.features)) > NEIGHBOURS:
            precision, recall = precision_and_recall(samples.features, reference.features)
    return {
        "fid": _distance_of(samples.statistics, reference.statistics),
        "sfid": _distance_of(samples.spatial, reference.spatial),
        "inception_score": inception_score(samples.logits) if samples.logits is not None else None,
        "precision": precision, "recall": recall,
    }  # fmt: skip


def _distance_of(a: Statistics | None, b: Statistics | None) -> float | None:
    return None if a is None or b is None else frechet_distance(a, b)
