"""Draw the figure of the study of captions and print its tables, from the numbers that
caption_study.py wrote.

    python examples/captions/caption_plot.py          # the committed numbers: docs/captions.svg
    python examples/captions/caption_plot.py --results captions --output captions

Both are a function of points.jsonl and study.json alone.
"""

from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "examples" / n) for n in ("scaling", "captions"))]

from runtime.command_line import door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import numpy as np

from plots import plot_parser, run_plot
from records import CaptionPoint
from runtime.disk import write_whole

RESULTS = Path(__file__).resolve().parent / "results"
# Of a place of the curve: what a panel shows, how it is called, and whether it is a share
PANELS = {
    "heldout_mse": ("loss on held-out digits", False),
    "all": ("samples with all that was asked for", True),
    "distance": ("Fréchet distance", False),
}
SHARES = ("digit", "thickness", "width", "slant", "all")


def by_network(rows):
    """{network: its rows, one of each seed}, in their order."""
    names = dict.fromkeys(row["network"] for row in rows)
    return {name: [row for row in rows if row["network"] == name] for name in names}


def several(group, shown):
    """The numbers of each seed, as `shown`(row) returns them, between commas."""
    return ", ".join(map(shown, group))


def at_the_end(rows):
    """The table of each network's last scores."""
    names = "parameters", "loss", "distance", *SHARES, "all, left out of training"
    yield f"| network | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for name, group in by_network(rows).items():
        last = [row["curve"][-1] for row in group]
        cells = [
            f"{group[0]['parameters']:,}",
            several(last, lambda place: f"{place['heldout_mse']:.3f}"),
            several(last, lambda place: f"{place['distance']:.2f}"),
            *(several(last, lambda place: f"{place[share]:.0%}") for share in SHARES),
            several(group, lambda row: f"{row['left_out']['all']:.0%}"),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def along_training(rows, about):
    """The table of the shares with all that was asked for, along the training."""
    steps = about["plan"]["scored_at"]
    yield f"| network | {' | '.join(f'{step:,} steps' for step in steps)} |"
    yield "|---" * (len(steps) + 1) + "|"
    for name, group in by_network(rows).items():
        places = zip(*(row["curve"] for row in group))
        cells = [several(same, lambda place: f"{place['all']:.0%}") for same in places]
        yield f"| {name} | {' | '.join(cells)} |"


def tables(rows, about):
    """The study's numbers as Markdown."""
    yield from at_the_end(rows)
    yield from ["", *along_training(rows, about)]
    yield f"\nThe held-out digits themselves are at {about['distance_of_real_digits']:.2f}."


def draw_panel(axes, rows, about, key):
    """One panel of PANELS: a line for each network's mean over its seeds, a point for each."""
    steps, (title, is_share) = about["plan"]["scored_at"], PANELS[key]
    for i, (name, group) in enumerate(by_network(rows).items()):
        values = np.array([[place[key] for place in row["curve"]] for row in group])  # (seeds, S)
        axes.plot(steps, values.mean(axis=0), color=f"C{i}", label=name)
        axes.plot(steps, values.T, ".", color=f"C{i}")
    axes.set(title=title, xlabel="training step", xticks=steps)
    axes.grid(alpha=0.3)
    if is_share:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def draw_figure(rows, about, path):
    """Write the panels as one SVG; equal numbers, equal file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "captions"
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, key in zip(panels, PANELS):
        draw_panel(axes, rows, about, key)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    write_whole(
        path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None})
    )


def build_parser():
    return plot_parser(__file__, __doc__, "caption_study", RESULTS)


@door()
def main(argv=None):
    drawn = draw_figure, tables, "captions.svg"
    run_plot(build_parser(), argv, CaptionPoint, *drawn, "study of captions")


if __name__ == "__main__":
    main()
