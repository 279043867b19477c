"""Draw the figures of a study and print its tables, from the numbers that study.py wrote.

    python examples/scaling/plot.py                                # the committed numbers: docs/scaling.svg, -samples.png
    python examples/scaling/plot.py --results scaling --output scaling

SVG and tables are a function of points.jsonl and study.json alone, the picture of the samples/ beside them.
"""

import argparse
from itertools import groupby
from pathlib import Path
import sys

import numpy as np
from PIL import Image
from scipy.stats import pearsonr, spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records import read_study

ROOT = Path(__file__).resolve().parents[2]
MARKERS = {2: "o", 4: "s", 8: "^"}
ENLARGED = 3  # samples, in the picture


def name(row):
    """Such as "M/2"."""
    return f"{row['size']}/{row['patch']}"


def final(row):
    """The distance at the last step."""
    return row["curve"][-1]["distance"]


def by_name(rows):
    """{name: its rows, one of each seed}, the networks with most multiply-adds last."""
    rows = sorted((row for row in rows if row["block"] == "adaln_zero"), key=lambda row: (row["macs"], row["seed"]))
    return {key: list(group) for key, group in groupby(rows, key=name)}


def by_block(rows, compared):
    """{block: its rows, one of each seed} at the size that is compared, best first."""
    rows = [row for row in rows if [row["size"], row["patch"]] == compared]
    blocks = {row["block"]: [other for other in rows if other["block"] == row["block"]] for row in rows}
    return dict(sorted(blocks.items(), key=lambda item: np.mean([final(row) for row in item[1]])))


def correlations(rows):
    """{seed: (Pearson's correlation of log multiply-adds with distance, with log distance, Spearman's)} over the sizes."""
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        ours = [row for row in rows if row["seed"] == seed and row["block"] == "adaln_zero"]
        macs, distances = np.log([row["macs"] for row in ours]), np.array([final(row) for row in ours])
        found[seed] = tuple(
            correlation(macs, y).statistic
            for correlation, y in ((pearsonr, distances), (pearsonr, np.log(distances)), (spearmanr, distances))
        )
    return found


def compute_frontier(rows):
    """[(training operations, name, distance)]: each point of training at which a network was better than all cheaper ones.

    Distances are means over seeds.
    """
    points = []
    for key, group in by_name(rows).items():
        for i, place in enumerate(group[0]["curve"]):
            spent = group[0]["training_flops"] * group[0]["batch_size"] * place["step"]
            points.append((spent, key, float(np.mean([row["curve"][i]["distance"] for row in group]))))
    best, frontier = np.inf, []
    for point in sorted(points):
        if point[2] < best:
            best = point[2]
            frontier.append(point)
    return frontier


def sampling_points(rows):
    """[(name, steps, operations of sampling one image, distance)] of the networks that were sampled with several steps."""
    return [
        (key, place["steps"], 2 * group[0]["macs"] * place["steps"], place["distance"])
        for key, group in by_name(rows).items()
        for place in sorted(group[0]["by_sampling_steps"], key=lambda place: place["steps"])
    ]


def sampling_contests(rows):
    """(wins, pairs): in how many pairs the network with more multiply-adds has the better samples, of those in which the other
    spends as much on a sample, or more, by taking more steps. First seed.
    """
    points, order = sampling_points(rows), list(by_name(rows))
    pairs = [
        large[3] < small[3]
        for small in points
        for large in points
        if order.index(small[0]) < order.index(large[0]) and small[2] >= large[2]
    ]
    return sum(pairs), len(pairs)


def tables(rows, about):
    """The study's numbers as Markdown."""
    yield "| network | parameters | MMAC | distance, each seed |\n|---|---|---|---|"
    for key, group in by_name(rows).items():
        first, distances = group[0], ", ".join(f"{final(row):.2f}" for row in group)
        yield f"| {key} | {first['parameters']:,} | {first['macs'] / 1e6:.2f} | {distances} |"
    yield f"\n| block, at {'/'.join(map(str, about['plan']['compared']))} | parameters | MMAC | distance, each seed |\n|---|---|---|---|"
    for block, group in by_block(rows, about["plan"]["compared"]).items():
        first, distances = group[0], ", ".join(f"{final(row):.2f}" for row in group)
        yield f"| {block} | {first['parameters']:,} | {first['macs'] / 1e6:.2f} | {distances} |"
    yield "\nCorrelation of log multiply-adds with the distance, with its logarithm, and of their ranks:"
    for seed, found in correlations(rows).items():
        yield f"- seed {seed}: {found[0]:.3f}, {found[1]:.3f}, {found[2]:.3f}"
    yield "\nBest for the training operations spent (GFLOP, network, distance):"
    for spent, key, value in compute_frontier(rows):
        yield f"- {spent / 1e9:,.0f}: {key}, {value:.2f}"
    won, pairs = sampling_contests(rows)
    yield (
        f"\nOf {pairs} pairs in which the network with fewer multiply-adds spends as much on a sample or more, by taking more "
        f"steps, the other one is better in {won} (first seed)."
    )
    yield f"As many real patches are at {about['distance_of_real_patches']:.2f}."


def draw_blocks(axes, rows, about):
    for i, (block, group) in enumerate(by_block(rows, about["plan"]["compared"]).items()):
        steps = [place["step"] for place in group[0]["curve"]]
        distances = np.array([[place["distance"] for place in row["curve"]] for row in group])  # (seeds, steps)
        axes.plot(steps, distances.mean(axis=0), color=f"C{i}", label=block)
        axes.plot(steps, distances.T, ".", color=f"C{i}")
    compared = "/".join(map(str, about["plan"]["compared"]))
    axes.set(title=f"block designs at {compared}", xlabel="training step", xscale="log", yscale="log")
    axes.set_xticks(steps, map(str, steps), minor=False)
    axes.minorticks_off()


def draw_sizes(axes, rows, colors):
    for key, group in by_name(rows).items():
        row = group[0]
        axes.plot(
            [r["macs"] / 1e6 for r in group],
            [final(r) for r in group],
            MARKERS[row["patch"]],
            color=colors[row["size"]],
            label=key,
        )
    found = list(correlations(rows).values())
    linear, ranks = (", ".join(f"{one[i]:.2f}" for one in found) for i in (0, 2))
    axes.set(
        title=f"size: correlation {linear}; of ranks {ranks}", xlabel="million multiply-adds of an image", xscale="log", yscale="log"
    )  # fmt: skip


def draw_compute(axes, rows, colors):
    for key, group in by_name(rows).items():
        row = group[0]
        spent = [row["training_flops"] * row["batch_size"] * place["step"] / 1e12 for place in row["curve"]]
        distances = np.mean([[place["distance"] for place in r["curve"]] for r in group], axis=0)
        axes.plot(spent, distances, "-" + MARKERS[row["patch"]], color=colors[row["size"]], label=key)
    axes.set(title="training compute", xlabel="TFLOP spent on training", xscale="log", yscale="log")


def draw_sampling(axes, rows, colors):
    groups = by_name(rows)
    for key, points in groupby(sampling_points(rows), key=lambda point: point[0]):
        _, steps, spent, distances = zip(*points)
        row = groups[key][0]
        axes.plot(
            np.array(spent) / 1e9,
            distances,
            "-" + MARKERS[row["patch"]],
            color=colors[row["size"]],
            markersize=4,
            label=key,
        )
    axes.set(
        title=f"sampling compute: {', '.join(map(str, steps))} steps", xlabel="GFLOP spent on a sample", xscale="log", yscale="log"
    )  # fmt: skip


def draw_figure(rows, about, path):
    """Write the four panels as one SVG; equal numbers, equal file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    colors = {size: f"C{i}" for i, size in enumerate(about["plan"]["sizes"])}
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    blocks, sizes, compute, sampling = figure.subplots(2, 2).flat
    draw_blocks(blocks, rows, about)
    draw_sizes(sizes, rows, colors)
    draw_compute(compute, rows, colors)
    draw_sampling(sampling, rows, colors)
    for axes in (blocks, sizes, compute, sampling):
        axes.set_ylabel("Fréchet distance")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=1 if axes is blocks else 3)
    figure.savefig(path, metadata={"Date": None})


def draw_samples(rows, folder, path):
    """Write one sample of each class from each size, the smallest first, all from the same noise."""
    from matplotlib.figure import Figure

    names = list(by_name(rows))
    strips = [np.asarray(Image.open(folder / "samples" / f"{key.replace('/', '-')}.png")) for key in names]
    height, width = strips[0].shape
    figure = Figure(figsize=(width * ENLARGED / 100 + 0.6, (height * ENLARGED + 4) * len(names) / 100), dpi=100)
    for axes, key, strip in zip(np.atleast_1d(figure.subplots(len(names))), names, strips):
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        axes.text(-4, height / 2, key, ha="right", va="center")
    figure.subplots_adjust(left=0.6 / figure.get_figwidth(), right=1, top=1, bottom=0, hspace=0.05)
    figure.savefig(path, metadata={"Software": None})


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    results = "folder that study.py wrote (default: the committed one)"
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results", help=results)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for the figures (default: docs)")
    args = parser.parse_args(argv)
    try:
        rows, about = read_study(args.results)
        args.output.mkdir(parents=True, exist_ok=True)
        draw_samples(rows, args.results, args.output / "scaling-samples.png")
        draw_figure(rows, about, args.output / "scaling.svg")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; pip install .[track]")
    print("\n".join(tables(rows, about)))


if __name__ == "__main__":
    main()
