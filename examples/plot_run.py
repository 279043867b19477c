"""Draw a training run from its metrics.jsonl.

    python examples/plot_run.py results/000-DiT-XL-2 --output run.png        # pip install matplotlib

Panels: the loss and its parts, the mean squared error in each quarter of the steps t, the gradient norm, images per second;
with --eval-every also the scores.
"""

import argparse
import io
import itertools
import json
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pictures import write_file

PANELS = {
    "loss": ["loss", "mse", "vb"],
    "mse per quarter of t (1: little noise)": ["mse_q1", "mse_q2", "mse_q3", "mse_q4"],
    "gradient norm": ["gradient_norm"],
    "images per second": ["images_per_second"],
}
SCORES = {"FID": ["eval_fid"], "precision and recall": ["eval_precision", "eval_recall"]}  # where there are some


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, drawn over one another")
    parser.add_argument("--output", default="run.png", help="picture to write (default: %(default)s)")
    return parser


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
        parser.error(f"cannot read {error.filename} ({error.strerror}); give a run folder of train.py")
    except ValueError as error:
        parser.error(f"a run's metrics.jsonl is damaged ({error}); give a run folder of train.py")
    panels = PANELS | (SCORES if any("eval_fid" in row for rows in runs.values() for row in rows) else {})
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
    content = io.BytesIO()
    try:
        figure.savefig(content, format=Path(args.output).suffix[1:] or None)
        write_file(args.output, content.getvalue())
    except ValueError as error:  # matplotlib's, too, of a format that it does not know
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"wrote {args.output}")


def read_rows(run):
    """The rows of a run's metrics, dicts in the order of their steps."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]  # a run that was killed may leave half a line


if __name__ == "__main__":
    main()
