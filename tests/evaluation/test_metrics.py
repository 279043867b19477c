"""metrics.py: scores against closed forms, scipy, and small implementations written down here from
the papers.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist
import torch

from conftest import ROOT, randn
from evaluation.metrics import (
    SPLIT, Moments, Statistics, Summary, frechet_distance, inception_score, precision_and_recall,
    score,
)  # fmt: skip


def statistics(rows, batch=50):
    moments = Moments()
    for part in rows.split(batch):
        moments.add(part)
    return moments.statistics()


def covariance(dimension, seed, rank=None):
    """A random covariance, of full rank with eigenvalues of 0.1 to 2 unless a rank is given."""
    basis = np.linalg.qr(randn(dimension, dimension, seed=seed).numpy())[0]
    values = np.linspace(0.1, 2, dimension)
    values[rank or dimension :] = 0
    return basis * values @ basis.T


# ---- moments ----


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_moments_in_batches_are_those_of_all_rows(batch):
    rows = 3 * randn(1000, 6, dtype=torch.float32) + torch.tensor([0.0, 1, 10, 100, 1000, 1e5])
    found, exact = statistics(rows, batch), rows.double().numpy()
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert np.allclose(found.mean, exact.mean(axis=0), rtol=1e-14, atol=1e-13)
    assert np.allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_of_too_few_or_broken_rows():
    moments = Moments()
    moments.add(torch.ones(1, 3))
    with pytest.raises(ValueError, match="have no covariance; give at least 2"):
        moments.statistics()
    moments.add(torch.tensor([[1.0, float("nan"), 0]]))
    with pytest.raises(ValueError, match="not finite"):
        moments.statistics()


# ---- Fréchet distance ----


def test_frechet_distance_of_gaussians_with_a_closed_form():
    """Commuting covariances: |Δμ|² + Σ(√λ - √κ)²; in one dimension (Δμ)² + (σ - τ)²."""
    basis = np.linalg.qr(randn(40, 40).numpy())[0]
    first, second = np.linspace(0.5, 3, 40), np.linspace(4, 0.2, 40)
    mean, other = randn(40, seed=1).numpy(), randn(40, seed=2).numpy()
    wanted = np.square(mean - other).sum() + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    found = frechet_distance(
        Statistics(mean, basis * first @ basis.T), Statistics(other, basis * second @ basis.T)
    )
    assert found == pytest.approx(wanted, rel=1e-12)
    one = [
        Statistics(np.array([mean]), np.array([[sigma**2]]))
        for mean, sigma in ((1.0, 2.0), (4.0, 0.5))
    ]
    assert frechet_distance(*one) == pytest.approx(9 + 1.5**2, rel=1e-14)


@pytest.mark.parametrize("dimension", [2, 33, 200])
def test_frechet_distance_agrees_with_scipy(dimension):
    a, b = (Statistics(randn(dimension, seed=s).numpy(), covariance(dimension, s)) for s in (3, 4))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    wanted = np.square(a.mean - b.mean).sum() + np.trace(
        a.covariance + b.covariance - 2 * root.real
    )
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("rows, dimension", [(400, 30), (20, 300)])
def test_a_set_against_itself_is_at_distance_zero(rows, dimension):
    found = statistics(randn(rows, dimension) * torch.logspace(-3, 2, dimension))
    assert 0 <= frechet_distance(found, found) <= 1e-6 * np.trace(found.covariance)


def test_frechet_distance_without_full_rank():
    """Where covariances commute the closed form holds with zeros in it; a set of equal images has
    none at all.
    """
    zero = np.zeros(10)
    for ranks in ((4, 10), (4, 4), (10, 3)):
        spectra = [np.where(np.arange(10) < rank, np.linspace(1, 2, 10), 0) for rank in ranks]
        basis = np.linalg.qr(randn(10, 10).numpy())[0]
        wanted = np.square(np.sqrt(spectra[0]) - np.sqrt(spectra[1])).sum()
        found = frechet_distance(
            *(Statistics(zero, basis * values @ basis.T) for values in spectra)
        )
        assert found == pytest.approx(wanted, rel=1e-10, abs=1e-12)
    equal = Statistics(zero, np.zeros((10, 10)))
    assert frechet_distance(equal, equal) == 0
    assert frechet_distance(equal, Statistics(zero, np.eye(10))) == pytest.approx(10)


# ---- Inception Score ----


def exponential_divergence(probabilities):
    """exp E KL(p(y|x) ‖ p(y)), term by term."""
    mean = probabilities.mean(axis=0)
    total = 0.0
    for row in probabilities:
        total += sum(p * (np.log(p) - np.log(q)) for p, q in zip(row, mean) if p > 0)
    return np.exp(total / len(probabilities))


def test_inception_score_is_the_mean_over_consecutive_blocks():
    logits = 3 * randn(SPLIT + 700, 4, dtype=torch.float32)
    p = torch.softmax(logits.double(), dim=1).numpy()
    wanted = np.mean([exponential_divergence(p[:SPLIT]), exponential_divergence(p[SPLIT:])])
    assert SPLIT == 5000 and inception_score(logits) == pytest.approx(wanted, rel=1e-9)
    order = torch.argsort(logits[:, 0])
    # The order matters, as in ADM's
    assert inception_score(logits[order]) != pytest.approx(wanted, rel=1e-3)


def test_inception_score_where_classes_are_certain():
    """K sure and equally frequent classes: K; always the same answer: 1.

    Probabilities of 0 do no harm.
    """
    certain = 1000 * torch.eye(7).repeat(30, 1)
    assert inception_score(certain) == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.ones(50, 7)) == pytest.approx(1, rel=1e-12)


# ---- precision and recall ----


def shares(samples, reference, k):
    """Precision and recall as the paper defines them, on exact distances."""

    def inside(points, centers):
        radii = np.sort(cdist(centers, centers), axis=1)[:, k]
        return np.mean(
            [(np.linalg.norm(centers - point, axis=1) <= radii).any() for point in points]
        )

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_their_definition(k):
    # More than one block of rows
    reference, samples = randn(300, 8), 0.7 * randn(1500, 8, seed=1) + 0.4
    wanted = shares(samples.numpy(), reference.numpy(), k)
    assert 0.2 < wanted[1] < 1 and 0.2 < wanted[0] < 1 and wanted[0] != wanted[1]
    assert precision_and_recall(samples, reference, k) == pytest.approx(wanted, abs=1e-12)
    in_float32 = precision_and_recall(samples.float(), reference.float(), k)
    assert in_float32 == pytest.approx(wanted, abs=1e-3)


def test_precision_and_recall_of_a_set_against_itself():
    far_away = randn(2000, 64, dtype=torch.float32) + 1000
    assert precision_and_recall(far_away, far_away) == (1, 1)
    # Whose third neighbours are at distance 0
    copies = randn(5, 64, dtype=torch.float32).repeat(40, 1)
    assert precision_and_recall(copies, copies) == (1, 1)


def test_precision_and_recall_tell_sameness_from_strangeness():
    reference = randn(500, 4, dtype=torch.float32)
    precision, recall = precision_and_recall(reference[:1].repeat(200, 1), reference)
    assert precision == 1 and recall < 0.01
    assert precision_and_recall(reference + 100, reference) == (0, 0)
    with pytest.raises(ValueError, match="3 images do not have 3 neighbours each"):
        precision_and_recall(reference[:3], reference)


# ---- all together ----


def test_scores_are_those_that_both_sides_allow():
    rows, logits = randn(80, 5, dtype=torch.float32), randn(80, 3, dtype=torch.float32)
    full = Summary(statistics(rows), statistics(rows[:, :2]), rows, logits)
    assert score(full, full) == {
        "fid": pytest.approx(0, abs=1e-9), "sfid": pytest.approx(0, abs=1e-9),
        "inception_score": pytest.approx(inception_score(logits)), "precision": 1, "recall": 1,
    }  # fmt: skip
    lean = score(full, Summary(statistics=full.statistics))
    assert [name for name, value in lean.items() if value is None] == [
        "sfid", "precision", "recall",
    ]  # fmt: skip
    assert score(Summary(full.statistics), full)["inception_score"] is None
    few = score(full, Summary(full.statistics, features=rows[:3]))
    # Three have no third neighbour each
    assert few["precision"] is few["recall"] is None and few["fid"] is not None


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_an_fid_50k_is_scored_in_under_six_minutes_and_3_gb():
    """50,000 × 2,048 features against 10,000, precision and recall included."""
    code = (
        "import json; from benchmarks.scoring import measure; "
        "print(json.dumps(measure(50_000, 10_000)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, memory = json.loads(done.stdout)
    print(seconds, memory)
    assert sum(seconds.values()) < 360 and memory < 3
