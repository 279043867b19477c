"""Draw the figures of a study and print its tables, from the numbers that study.py wrote.

    python examples/scaling/plot.py     # the committed numbers: docs/scaling.svg, -samples.png
    python examples/scaling/plot.py --results scaling --output scaling

SVG and tables are a function of points.jsonl and study.json alone, the picture of the samples/
beside them.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parent))

from runtime.command_line import Parser, door, end_at_interrupt, reason

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from itertools import groupby

import numpy as np
from PIL import Image
from scipy.stats import pearsonr, spearmanr

from runtime.disk import write_whole
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


def loss(row):
    """The mean squared error of the noise, over the steps since the score before the last."""
    return row["curve"][-1]["mse"]


def by_name(rows):
    """{name: its rows, one of each seed}, the networks with most multiply-adds last."""
    rows = sorted(
        (row for row in rows if row["block"] == "adaln_zero"),
        key=lambda row: (row["macs"], row["seed"]),
    )
    return {key: list(group) for key, group in groupby(rows, key=name)}


def by_block(rows, compared):
    """{block: its rows, one of each seed} at the size that is compared, best first."""
    rows = [row for row in rows if [row["size"], row["patch"]] == compared]
    blocks = {
        row["block"]: [other for other in rows if other["block"] == row["block"]] for row in rows
    }
    return dict(sorted(blocks.items(), key=lambda item: np.mean([final(row) for row in item[1]])))


def correlations(rows, value=final):
    """{seed: (Pearson's correlation of log multiply-adds with a row's value, with its log,
    Spearman's)} over the sizes.
    """
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        ours = [row for row in rows if row["seed"] == seed and row["block"] == "adaln_zero"]
        macs, values = np.log([row["macs"] for row in ours]), np.array([value(row) for row in ours])
        found[seed] = tuple(
            correlation(macs, y).statistic
            for correlation, y in (
                (pearsonr, values),
                (pearsonr, np.log(values)),
                (spearmanr, values),
            )
        )
    return found


def training_curve(group):
    """(training operations, distances as means over seeds) at each score of a network."""
    spent = [
        group[0]["training_flops"] * group[0]["batch_size"] * place["step"]
        for place in group[0]["curve"]
    ]
    return np.array(spent, dtype=float), np.mean(
        [[place["distance"] for place in row["curve"]] for row in group], axis=0
    )


def compute_contests(rows):
    """[(smaller network, larger one, operations, their distances)] for each pair of networks with
    the same patch size.

    At the same training operations: in the middle of what both were scored at, on lines between the
    scores in both logarithms. Pairs without such a middle are left out.
    """
    found, curves = [], {key: training_curve(group) for key, group in by_name(rows).items()}
    for i, (small, (spent, distances)) in enumerate(curves.items()):
        for large, (more_spent, others) in list(curves.items())[i + 1 :]:
            low, high = more_spent[0], spent[-1]
            if small.split("/")[1] == large.split("/")[1] and low < high:
                middle = np.sqrt(low * high)
                pair = [
                    np.exp(np.interp(np.log(middle), np.log(x), np.log(y)))
                    for x, y in ((spent, distances), (more_spent, others))
                ]
                found.append((small, large, float(middle), *map(float, pair)))
    return found


def sampling_points(rows):
    """[(name, steps, operations of sampling one image, distance)] of the networks that were sampled
    with several steps.
    """
    return [
        (key, place["steps"], 2 * group[0]["macs"] * place["steps"], place["distance"])
        for key, group in by_name(rows).items()
        for place in sorted(group[0]["by_sampling_steps"], key=lambda place: place["steps"])
    ]


def sampling_contests(rows):
    """(wins, pairs): in how many pairs the network with more multiply-adds has the better samples,
    of those in which the other spends as much on a sample, or more, by taking more steps. First
    seed.
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
    head = "| parameters | MMAC | distance, each seed | loss, each seed |\n|---|---|---|---|---|"
    yield f"| network {head}"
    yield from (table_row(key, group) for key, group in by_name(rows).items())
    yield f"\n| block, at {'/'.join(map(str, about['plan']['compared']))} {head}"
    yield from (
        table_row(block, group)
        for block, group in by_block(rows, about["plan"]["compared"]).items()
    )
    for what, value in (("distance", final), ("loss", loss)):
        yield (
            f"\nCorrelation of log multiply-adds with the {what}, with its logarithm, "
            "and of their ranks:\n"
        )
        for seed, found in correlations(rows, value).items():
            yield f"- seed {seed}: {found[0]:.3f}, {found[1]:.3f}, {found[2]:.3f}"
    yield (
        "\nAt equal training operations (GFLOP), "
        "the smaller and the larger network of a patch size:\n"
    )
    for small, large, spent, distance, other in compute_contests(rows):
        yield f"- {spent / 1e9:,.0f}: {small} {distance:.1f}, {large} {other:.1f}"
    won, pairs = sampling_contests(rows)
    yield (
        "\nTake two networks, the smaller with so many more sampling steps that it spends at least "
        f"as much on a sample. There are {pairs} such pairs (first seed); "
        f"the larger network is better in {won}."
    )
    yield f"\nReal patches, as many as samples, are at {about['distance_of_real_patches']:.2f}."


def table_row(key, group):
    """A network's row: its first seed's size, each seed's results."""
    distances, losses = (
        ", ".join(f"{final(row):.2f}" for row in group),
        ", ".join(f"{loss(row):.4f}" for row in group),
    )
    size = f"{group[0]['parameters']:,} | {group[0]['macs'] / 1e6:.2f}"
    return f"| {key} | {size} | {distances} | {losses} |"


def draw_blocks(axes, rows, about):
    for i, (block, group) in enumerate(by_block(rows, about["plan"]["compared"]).items()):
        steps = [place["step"] for place in group[0]["curve"]]
        # (seeds, steps)
        distances = np.array([[place["distance"] for place in row["curve"]] for row in group])
        axes.plot(steps, distances.mean(axis=0), color=f"C{i}", label=block)
        axes.plot(steps, distances.T, ".", color=f"C{i}")
    compared = "/".join(map(str, about["plan"]["compared"]))
    axes.set(
        title=f"block designs at {compared}", xlabel="training step", xscale="log", yscale="log"
    )
    axes.set_xticks(steps, map(str, steps), minor=False)
    axes.minorticks_off()


def draw_sizes(axes, rows, colors):
    for key, group in by_name(rows).items():
        row = group[0]
        axes.plot(
            [r["macs"] / 1e6 for r in group], [final(r) for r in group], MARKERS[row["patch"]],
            color=colors[row["size"]], label=key,
        )  # fmt: skip
    found = list(correlations(rows).values())
    linear, ranks = (", ".join(f"{one[i]:.2f}" for one in found) for i in (0, 2))
    axes.set(
        title=f"size: correlation {linear}; of ranks {ranks}",
        xlabel="million multiply-adds of an image", xscale="log", yscale="log",
    )  # fmt: skip


def draw_compute(axes, rows, colors):
    for key, group in by_name(rows).items():
        axes.plot(
            *training_curve(group), "-" + MARKERS[group[0]["patch"]],
            color=colors[group[0]["size"]], label=key,
        )  # fmt: skip
    axes.set(
        title="training compute", xlabel="operations spent on training", xscale="log", yscale="log"
    )


def draw_sampling(axes, rows, colors):
    groups = by_name(rows)
    for key, points in groupby(sampling_points(rows), key=lambda point: point[0]):
        _, steps, spent, distances = zip(*points)
        row = groups[key][0]
        axes.plot(
            np.array(spent) / 1e9, distances, "-" + MARKERS[row["patch"]],
            color=colors[row["size"]], markersize=4, label=key,
        )  # fmt: skip
    axes.set(
        title=f"sampling compute: {', '.join(map(str, steps))} steps",
        xlabel="GFLOP spent on a sample", xscale="log", yscale="log",
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
    write_whole(
        path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None})
    )


def draw_samples(rows, folder, path):
    """Write a real patch of each class, and a sample of each from each size, the smallest first,
    all from the same noise.
    """
    from matplotlib.figure import Figure

    names = ["real", *by_name(rows)]
    strips = [
        np.asarray(Image.open(folder / "samples" / f"{key.replace('/', '-')}.png")) for key in names
    ]
    height, width = strips[0].shape
    figure = Figure(
        figsize=(width * ENLARGED / 100 + 0.6, (height * ENLARGED + 4) * len(names) / 100), dpi=100
    )
    for axes, key, strip in zip(np.atleast_1d(figure.subplots(len(names))), names, strips):
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        axes.text(-4, height / 2, key, ha="right", va="center")
    figure.subplots_adjust(left=0.6 / figure.get_figwidth(), right=1, top=1, bottom=0, hspace=0.05)
    write_whole(
        path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None})
    )


def build_parser():
    parser = Parser(__file__, description=__doc__)
    results = "folder that study.py wrote (default: the committed one)"
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).resolve().parent / "results", help=results
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs", help="folder for the figures (default: docs)"
    )
    return parser


@door()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        rows, about = read_study(args.results)
        args.output.mkdir(parents=True, exist_ok=True)
        draw_samples(rows, args.results, args.output / "scaling-samples.png")
        draw_figure(rows, about, args.output / "scaling.svg")
    except (ValueError, OSError) as error:
        parser.error(reason(error))
    except (KeyError, TypeError, IndexError) as error:
        parser.error(
            f"{args.results} holds no study ({error!r}); give a folder that study.py wrote"
        )
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; pip install .[track]")
    print("\n".join(tables(rows, about)))


if __name__ == "__main__":
    main()
