"""Draw the scores of digits while a network is trained, beside those of real held-out digits.

    # from the logs in this folder:
    python examples/digits/plot_scores.py --output docs/digits-fid.svg

logs/scores.jsonl are the lines with scores of a run's metrics.jsonl, logs/heldout.json is what
evaluate.py reports of the held-out digits: as many images as each score of the run is of, against
the same training digits.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import io
import json

from runtime.json_files import read_bounded
from sampling.pictures import write_file

LOGS = Path(__file__).resolve().parent / "logs"
PANELS = {
    "FID, in the classifier's features": ["fid"],
    "precision and recall": ["precision", "recall"],
}


def read_scores(path):
    """The lines of a metrics.jsonl that have scores, dicts in the order of their steps."""
    return [
        row
        for row in map(json.loads, read_bounded(path).decode("utf-8-sig").splitlines())
        if "eval_fid" in row
    ]


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--scores", type=Path, default=LOGS / "scores.jsonl", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--heldout", type=Path, default=LOGS / "heldout.json", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--output", default="scores.svg", help="picture to write (default: %(default)s)"
    )
    return parser


@door()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        rows, floor = (
            read_scores(args.scores),
            json.loads(read_bounded(args.heldout).decode("utf-8-sig"))["scores"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        parser.error(
            f"cannot read the scores ({error}); give a metrics.jsonl and what evaluate.py --output "
            "wrote"
        )
    if not rows:
        parser.error(
            f"{args.scores} has no scores; give the metrics.jsonl of a run with --eval-every"
        )
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "digits"  # equal numbers, equal file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for i, name in enumerate(names):
            steps, values = zip(*((row["step"], row[f"eval_{name}"]) for row in rows))
            axes.plot(steps, values, "o-", markersize=3, color=f"C{i}", label=f"{name}, samples")
            axes.axhline(
                floor[name], linestyle="--", color=f"C{i}", label=f"{name}, real held-out digits"
            )
        axes.set(title=title, xlabel="step", yscale="log" if names == ["fid"] else "linear")
        axes.legend()
    kind = Path(args.output).suffix[1:] or "png"
    metadata = {"Date": None} if kind == "svg" else None
    with parser.refusing():  # an ending that matplotlib does not know, too
        file = io.BytesIO()
        figure.savefig(file, format=kind, metadata=metadata)
        write_file(args.output, file.getvalue())
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
