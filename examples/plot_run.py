"""Draw a training run from its metrics.jsonl.

    python examples/plot_run.py results/000-DiT-XL-2 --output run.png

Needs Matplotlib: pip install matplotlib. Panels: the loss and its parts, the mean squared error in
each quarter of the steps t, the gradient norm, images per second; with --eval-every also the
scores.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import io
import itertools
import json

from sampling.pictures import write_file

PANELS = {
    "loss": ["loss", "mse", "vb"],
    "mse per quarter of t (1: little noise)": ["mse_q1", "mse_q2", "mse_q3", "mse_q4"],
    "gradient norm": ["gradient_norm"], "images per second": ["images_per_second"],
}  # fmt: skip
# Where there are some
SCORES = {"FID": ["eval_fid"], "precision and recall": ["eval_precision", "eval_recall"]}


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, drawn over one another"
    )
    parser.add_argument(
        "--output", default="run.png", help="picture to write (default: %(default)s)"
    )
    return parser


@door()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        parser.error("matplotlib is not installed; pip install matplotlib")
    try:
        runs = {str(run): read_rows(run) for run in args.runs}
    except OSError as error:
        parser.error(
            f"cannot read {error.filename} ({error.strerror}); give a run folder of train.py"
        )
    except ValueError as error:
        parser.error(str(error))
    panels = PANELS | (
        SCORES if any("eval_fid" in row for rows in runs.values() for row in rows) else {}
    )
    figure = Figure(figsize=(11, 3.5 * len(panels) / 2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(panels) // 2, 2).flat, panels.items()):
        for style, (run, rows) in zip(itertools.cycle(["-", "--", ":", "-."]), runs.items()):
            for i, name in enumerate(names):
                label = name if len(runs) == 1 else f"{name}, {run}"
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    axes.plot(*zip(*points), style, color=f"C{i}", label=label)
        axes.set(title=title, xlabel="step")
        axes.legend()
    with parser.refusing():  # an ending that matplotlib does not know, too
        file = io.BytesIO()
        figure.savefig(file, format=Path(args.output).suffix[1:] or "png")
        write_file(args.output, file.getvalue())
    print(f"wrote {args.output}")


def read_rows(run):
    """The rows of a run's metrics, dicts in the order of their steps.

    Raises ValueError, naming the line, for others.
    """
    path, rows = run / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("}\n"):
            continue  # a run that was killed may leave half a line
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1]["step"], int):
                raise ValueError("its step is no whole number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            where = f"line {number} of {path}"
            raise ValueError(
                f"{where} has no metrics ({error}); give a run folder of train.py"
            ) from None
    return rows


if __name__ == "__main__":
    main()
