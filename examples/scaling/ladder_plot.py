"""Draw the figure of a study of a ladder and print its tables, from the numbers that
ladder_study.py wrote.

    python examples/scaling/ladder_plot.py      # the committed numbers: docs/ladder-study.svg
    python examples/scaling/ladder_plot.py --results ladder --output ladder

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
from records import LadderPoint
from runtime.disk import write_whole

RESULTS = Path(__file__).resolve().parent / "ladder_results"
ODE, SDE = ("euler", "ddim"), ("sde, w = sigma", "ddpm")  # of a flow, of a diffusion


def by_rung(rows, with_grids):
    """{rung: its rows, one of each seed}, in the order of the study; those of the ladder, or those
    that were sampled at other sizes.
    """
    found = {}
    for row in rows:
        if bool(row["by_grid"]) == with_grids:
            found.setdefault(row["rung"], []).append(row)
    return {rung: sorted(group, key=lambda row: row["seed"]) for rung, group in found.items()}


def reached(group, ways):
    """Distances (seeds,) by the one of these ways that a rung has."""
    return np.array([place["distance"] for row in group for place in row["by_way"]
                     if place["way"] in ways])  # fmt: skip


def numbers(values, digits=2):
    return ", ".join("—" if value is None else f"{value:.{digits}f}" for value in values)


def named(size):
    return "×".join(map(str, size))


def of_ladder(rows, about):
    """The table of the rungs."""
    first, last = about["plan"]["scored_at"]
    yield (
        f"| change | parameters | images | ODE, {first:,} steps | ODE, {last:,} steps "
        f"| SDE, {last:,} steps | error |"
    )
    yield "|---" * 7 + "|"
    for rung, group in by_rung(rows, False).items():
        cells = [
            rung, f"{group[0]['parameters']:,}", f"{group[0]['images']:,}",
            numbers(row["curve"][0]["distance"] for row in group),
            numbers(reached(group, ODE)), numbers(reached(group, SDE)),
            numbers((row["held_mse"] for row in group), 4),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def on_grids(rows, about):
    """{(rung, extrapolation or None): {size: rows of by_grid, one of each seed}}."""
    found = {}
    for rung, group in by_rung(rows, True).items():
        for place in (place for row in group for place in row["by_grid"]):
            by_size = found.setdefault((rung, place["extrapolation"]), {})
            by_size.setdefault(tuple(place["size"]), []).append(place)
    return found


def of_grids(rows, about):
    """The table of the other sizes."""
    sizes = [tuple(size) for size in about["plan"]["grids"]]
    heads = [f"{what}, {named(size)}" for what in ("distance", "error") for size in sizes]
    yield f"| network | tokens placed by | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 2) + "|"
    for (rung, extrapolation), by_size in on_grids(rows, about).items():
        if extrapolation:
            cells = [
                numbers((place[what] for place in by_size[size]), digits)
                for what, digits in (("distance", 2), ("held_mse", 4)) for size in sizes
            ]  # fmt: skip
            yield f"| {rung} | {extrapolation} | {' | '.join(cells)} |"


def as_trained(rows, about):
    """Lines on what the networks of the other sizes do at their own, and on the limits."""
    for (rung, extrapolation), by_size in on_grids(rows, about).items():
        if not extrapolation:
            ((size, places),) = by_size.items()
            distances = numbers(place["distance"] for place in places)
            errors = numbers((place["held_mse"] for place in places), 4)
            yield f"- {rung}, at {named(size)}: distance {distances}; error {errors}"
    for place in about["grids"]:
        yield (
            f"- at {named(place['size'])}: real patches are at {place['real']:.2f}, "
            f"enlarged ones at {place['enlarged']:.2f}"
        )


def tables(rows, about):
    """The study's numbers as Markdown."""
    yield from of_ladder(rows, about)
    yield f"\nReal patches, as many as samples, are at {about['distance_of_real_patches']:.2f}.\n"
    yield from of_grids(rows, about)
    yield ""
    yield from as_trained(rows, about)
    worked = sum(row["cpu_seconds"] for row in rows) / 60
    yield f"\nThe networks took {worked:.0f} minutes of one core's time."


def draw_ladder(axes, rows, ways, title):
    groups = by_rung(rows, False)
    for place, (rung, group) in enumerate(groups.items()):
        distances = reached(group, ways)
        color = "C1" if rung.startswith("batch") else "C0"  # beside the ladder
        axes.barh(place, distances.mean(), color=color, alpha=0.35)
        axes.plot(distances, [place] * len(distances), ".", color=color)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="Fréchet distance")
    axes.grid(axis="x", alpha=0.3)


def draw_grids(axes, rows, about):
    sizes = [tuple(size) for size in about["plan"]["grids"]]
    kinds = [(key, by_size) for key, by_size in on_grids(rows, about).items() if key[1]]
    for number, size in enumerate(sizes):
        places = np.arange(len(kinds)) + 0.4 * number
        for place, (_, by_size) in zip(places, kinds):
            distances = np.array([found["distance"] for found in by_size[size]])
            axes.barh(place, distances.mean(), 0.35, color=f"C{2 + number}", alpha=0.35)
            axes.plot(distances, [place] * len(distances), ".", color=f"C{2 + number}")
        axes.plot([], [], "s", color=f"C{2 + number}", alpha=0.5, label=named(size))
    labels = [f"{rung.split(', ')[-1]}, {extrapolation}" for (rung, extrapolation), _ in kinds]
    axes.set_yticks(np.arange(len(kinds)) + 0.2 * (len(sizes) - 1), labels)
    axes.invert_yaxis()
    trained = named([about["plan"]["image_size"]] * 2)
    axes.set(title=f"trained at {trained}, sampled at", xlabel="Fréchet distance")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()


def draw_figure(rows, about, path):
    """Write the three panels as one SVG; equal numbers, equal file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ladder-study"
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    calls = about["plan"]["calls"]
    draw_ladder(panels[0], rows, ODE, f"{calls} calls of Euler (DiT: DDIM)")
    draw_ladder(panels[1], rows, SDE, f"{calls} calls of an SDE (DiT: DDPM)")
    draw_grids(panels[2], rows, about)
    write_whole(
        path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None})
    )


def build_parser():
    return plot_parser(__file__, __doc__, "ladder_study", RESULTS)


@door()
def main(argv=None):
    drawn = draw_figure, tables, "ladder-study.svg"
    run_plot(build_parser(), argv, LadderPoint, *drawn, "study of a ladder")


if __name__ == "__main__":
    main()
