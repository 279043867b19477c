"""What it takes to score an FID-50K once the features are there.

    python -m benchmarks.scoring        # 50,000 × 2,048 against 10,000; two minutes on two cores

Measured are the time of each part and the peak memory of it all. Features are random, non-negative
and correlated, as Inception's are; sFID's of as many images, 2,023 numbers each, are taken in by
the way, as they never are all in memory.
"""

import argparse
from pathlib import Path
import time

import torch

from benchmarks.sides import write
from evaluation.metrics import (
    Moments, Summary, frechet_distance, inception_score, precision_and_recall,
)  # fmt: skip

FEATURES, SPATIAL, LOGITS, FACTORS, BATCH = 2048, 2023, 1008, 256, 500


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=50_000, help="(default: %(default)s)")
    parser.add_argument("--reference", type=int, default=10_000, help="(default: %(default)s)")
    return parser


def draw(count, dimension, seed):
    """Batches (n, dimension) of correlated non-negative rows, `count` in all."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(FACTORS, dimension, generator=torch.Generator().manual_seed(0)) / FACTORS**0.5
    )
    for begun in range(0, count, BATCH):
        n = min(BATCH, count - begun)
        noise = torch.randn(n, dimension, generator=generator)
        yield (
            torch.randn(n, FACTORS, generator=generator) @ mixing + 0.1 * noise + 0.01 * seed
        ).relu()


def summary(count, seed, with_logits):
    """The Summary of so many images with drawn features, and the seconds that moments took."""
    features, moments, spatial, seconds = torch.empty(count, FEATURES), Moments(), Moments(), 0.0
    batches = zip(draw(count, FEATURES, seed), draw(count, SPATIAL, seed))
    for part, (rows, spatial_rows) in zip(features.split(BATCH), batches):
        part.copy_(rows)
        began = time.perf_counter()
        moments.add(rows)
        spatial.add(spatial_rows)
        seconds += time.perf_counter() - began
    logits = torch.randn(count, LOGITS) if with_logits else None
    return Summary(moments.statistics(), spatial.statistics(), features, logits), seconds


def peak_memory():
    """GB that this program had in memory at most, where the system tells."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e6 if status.exists() else None


def measure(samples, reference):
    """Seconds of each part, and the peak memory in GB, for so many images."""
    seconds = {}
    ours, first = summary(samples, 1, True)
    theirs, second = summary(reference, 2, False)
    seconds["moments, for FID and sFID"] = first + second
    parts = {
        "FID": lambda: frechet_distance(ours.statistics, theirs.statistics),
        "sFID": lambda: frechet_distance(ours.spatial, theirs.spatial),
        "Inception Score": lambda: inception_score(ours.logits),
        "precision and recall": lambda: precision_and_recall(ours.features, theirs.features),
    }
    for name, part in parts.items():
        began = time.perf_counter()
        part()
        seconds[name] = time.perf_counter() - began
    return {name: round(value, 1) for name, value in seconds.items()}, peak_memory()


def main(argv=None):
    args = build_parser().parse_args(argv)
    seconds, memory = measure(args.samples, args.reference)
    total = sum(seconds.values())
    shares = {name: round(value / total, 3) for name, value in seconds.items()}
    result = {
        "settings": vars(args), "minutes in all": round(total / 60, 2), "share of the time": shares,
        "peak memory in GB, drawing included": round(memory, 2) if memory else None,
    }  # fmt: skip
    print(result)
    write("scoring", result)


if __name__ == "__main__":
    main()
