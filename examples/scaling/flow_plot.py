"""Draw the figure of a study of flows and print its tables, from the numbers that flow_study.py
wrote.

    python examples/scaling/flow_plot.py          # the committed numbers: docs/flow-study.svg
    python examples/scaling/flow_plot.py --results flows --output flows

Both are a function of points.jsonl and study.json alone.
"""

from pathlib import Path
import sys

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from runtime.command_line import door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import numpy as np

from plots import plot_parser, run_plot
from records import FlowPoint
from runtime.disk import write_whole

RESULTS = Path(__file__).resolve().parent / "flow_results"
# Variant → its row of the tables, in their order
NAMES = {
    "noise": "DDPM, noise", "vp": "VP, velocity", "linear": "linear, velocity",
    "gvp": "GVP, velocity", "logit-normal": "linear, velocity, logit-normal t",
}  # fmt: skip
COMPARED = "linear"  # whose ODE and SDE one panel shows


def by_variant(rows):
    """{variant: its rows, one of each seed}, in the order of NAMES."""
    found = {name: [row for row in rows if row["variant"] == name] for name in NAMES}
    return {name: sorted(group, key=lambda row: row["seed"]) for name, group in found.items()}


def reached(group):
    """{way: {calls: distances (seeds,)}} of the last weights of a variant."""
    found = {}
    for row in group:
        for place in row["by_way"]:
            by_calls = found.setdefault(place["way"], {})
            by_calls.setdefault(place["calls"], []).append(place["distance"])
    return {
        way: {calls: np.array(by_calls[calls]) for calls in sorted(by_calls)}
        for way, by_calls in found.items()
    }


def best(ways, calls, part=""):
    """(name, distances) of the way with the least mean at so many calls, of those whose names begin
    so.
    """
    known = {way: by_calls[calls] for way, by_calls in ways.items() if way.startswith(part)}
    return min(known.items(), key=lambda item: item[1].mean())


def numbers(distances):
    return ", ".join(f"{distance:.2f}" for distance in distances)


def along_training(rows, about):
    """The table of distances at each of the steps of training."""
    steps = about["plan"]["scored_at"]
    yield f"| network | {' | '.join(f'{step:,} steps' for step in steps)} |"
    yield "|---" * (len(steps) + 1) + "|"
    for variant, group in by_variant(rows).items():
        places = zip(*(row["curve"] for row in group))
        cells = [numbers(place["distance"] for place in same) for same in places]
        yield f"| {NAMES[variant]} | {' | '.join(cells)} |"


def of_ways(rows, about):
    """The table of distances of each variant by each way, and the best of each variant."""
    calls = about["plan"]["calls"]
    yield f"| network | from noise to data | {' | '.join(f'{n} calls' for n in calls)} |"
    yield "|---" * (len(calls) + 2) + "|"
    for variant, group in by_variant(rows).items():
        for way, by_calls in reached(group).items():
            cells = [numbers(by_calls[n]) for n in calls]
            yield f"| {NAMES[variant]} | {way} | {' | '.join(cells)} |"


def of_best(rows, about):
    """The table of the best way of each variant at each number of calls."""
    calls = about["plan"]["calls"]
    yield f"| network, by its best way | {' | '.join(f'{n} calls' for n in calls)} |"
    yield "|---" * (len(calls) + 1) + "|"
    for variant, group in by_variant(rows).items():
        found = [best(reached(group), n) for n in calls]
        cells = [f"{way}: {numbers(distances)}" for way, distances in found]
        yield f"| {NAMES[variant]} | {' | '.join(cells)} |"


def tables(rows, about):
    """The study's numbers as Markdown."""
    for number, table in enumerate((along_training, of_best, of_ways)):
        yield from ["", *table(rows, about)] if number else table(rows, about)
    yield f"\nReal patches, as many as samples, are at {about['distance_of_real_patches']:.2f}."


def draw_training(axes, rows, about):
    steps = about["plan"]["scored_at"]
    for i, (variant, group) in enumerate(by_variant(rows).items()):
        # (seeds, steps)
        distances = np.array([[place["distance"] for place in row["curve"]] for row in group])
        draw_line(axes, steps, distances, f"C{i}", NAMES[variant])
    calls = about["plan"]["curve_calls"]
    axes.set(title=f"training; {calls} calls of ddim, of heun for flows")
    axes.set_xlabel("training step")


def draw_best(axes, rows, about):
    calls = about["plan"]["calls"]
    for i, (variant, group) in enumerate(by_variant(rows).items()):
        distances = np.array([best(reached(group), n)[1] for n in calls]).T  # (seeds, calls)
        draw_line(axes, calls, distances, f"C{i}", NAMES[variant])
    axes.set(title="each network by its best way", xlabel="calls of the network")


def draw_ways(axes, rows, about):
    calls = about["plan"]["calls"]
    for i, (way, by_calls) in enumerate(reached(by_variant(rows)[COMPARED]).items()):
        distances = np.array([by_calls[n] for n in calls]).T  # (seeds, calls)
        draw_line(axes, calls, distances, f"C{i}", way, ":" if way.startswith("sde") else "-")
    axes.set(title=f"{NAMES[COMPARED]}: ODE and SDE", xlabel="calls of the network")


def draw_line(axes, x, distances, color, label, style="-"):
    """The mean of distances (seeds, places) as a line, each of them as a point."""
    axes.plot(x, distances.mean(axis=0), style, color=color, label=label)
    axes.plot(x, distances.T, ".", color=color)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(x, map(str, x), minor=False)
    axes.minorticks_off()


def draw_figure(rows, about, path):
    """Write the three panels as one SVG; equal numbers, equal file."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    matplotlib.rcParams["svg.hashsalt"] = "flow-study"
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, draw in zip(panels, (draw_training, draw_best, draw_ways)):
        draw(axes, rows, about)
        axes.set_ylabel("Fréchet distance")
        axes.yaxis.set_major_locator(LogLocator(10, (1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[2].legend(fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    write_whole(
        path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None})
    )


def build_parser():
    return plot_parser(__file__, __doc__, "flow_study", RESULTS)


@door()
def main(argv=None):
    drawn = draw_figure, tables, "flow-study.svg"
    run_plot(build_parser(), argv, FlowPoint, *drawn, "study of flows")


if __name__ == "__main__":
    main()
