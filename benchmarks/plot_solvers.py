"""Draw quality against cost of the samplers, as benchmarks.solvers found them; print the table.

    python -m benchmarks.plot_solvers        # docs/solvers.svg from the committed numbers
"""

import argparse
import json
from pathlib import Path

from benchmarks.sides import RATIO, RESULTS, ROOT
from benchmarks.solvers import BASE, INTERVAL, SETTINGS, UNGUIDED

SCORES = RESULTS / "solvers-scores.json"
MARKERS = {"ddpm": "o", "ddim": "s", "dpm++": "^", "unipc": "D"}


def read(results, scores):
    """({"setting, seed n": distance} of a file, {setting: time as [ratio, quartiles]}: the newest
    of a folder).
    """
    scores = json.loads(scores.read_text())["scores"]
    newest = max(
        results.glob("*-solvers-times*.json"),
        key=lambda path: (path.name[:10], len(path.name), path.name),
    )
    return scores, json.loads(newest.read_text())[RATIO]


def rows(scores, times):
    """Lines of a Markdown table, a setting each: distances with each seed, time, and how many times
    faster than BASE.
    """
    lines = ["| sampler, steps | distance | time | times faster |", "|---|---|---|---|"]
    for setting in SETTINGS + UNGUIDED:
        distances = [
            f"{scores[f'{setting}, seed {seed}']:.3f}"
            for seed in (0, 1)
            if f"{setting}, seed {seed}" in scores
        ]
        ratio, low, high = times[str(setting)]
        lines.append(
            f"| {setting} | {', '.join(distances)} | {ratio:.3f} ({low:.3f} to {high:.3f}) | "
            f"{1 / ratio:.1f} |"
        )
    return lines


def draw(scores, times, path):
    """Write the figure: a point for each setting with seed 0, filled where it is guided everywhere.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "solvers"  # equal numbers, equal file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for setting in SETTINGS:
        everywhere = setting.interval != INTERVAL
        x, y = times[str(setting)][0], scores[f"{setting}, seed 0"]
        color = f"C{list(MARKERS).index(setting.sampler)}"
        known = axes.get_legend_handles_labels()[1]
        label = setting.sampler if everywhere and setting.sampler not in known else None
        fill = "full" if everywhere else "none"
        axes.plot(
            x, y, MARKERS[setting.sampler], color=color, fillstyle=fill, linestyle="", label=label
        )
        axes.annotate(
            str(setting.steps), (x, y), textcoords="offset points", xytext=(6, 3), fontsize=8
        )
    base = [scores[f"{BASE}, seed {seed}"] for seed in (0, 1)]
    axes.axhspan(
        0.95 * sum(base) / 2, 1.05 * sum(base) / 2, color="C0", alpha=0.15,
        label=f"{BASE}, mean of two seeds ± 5%",
    )  # fmt: skip
    axes.set(
        xscale="log", xlabel="time of 100 images, as a share of 250 DDPM steps",
        ylabel="Fréchet distance, 2,000 samples",
        title="Digits, guidance 1.5: everywhere (filled), "
        f"or from {INTERVAL[0]} to {INTERVAL[1]} of the steps (hollow)",
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "solvers.svg",
        help="(default: docs/solvers.svg)",
    )  # fmt: skip
    parser.add_argument(
        "--scores", type=Path, default=SCORES,
        help="file of benchmarks.solvers (default: the committed one)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    scores, times = read(RESULTS, args.scores)
    print("\n".join(rows(scores, times)))
    draw(scores, times, args.output)


if __name__ == "__main__":
    main()
