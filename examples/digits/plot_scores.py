"""Draw how the scores of digits change while a network is trained, beside those of real held-out digits.

    python examples/digits/plot_scores.py --output docs/digits-fid.svg             # from the logs in this folder

logs/scores.jsonl are the lines with scores of a run's metrics.jsonl, logs/heldout.json is what evaluate.py reports of the
held-out digits: as many images as each score of the run is of, against the same training digits.
"""

import argparse
import io
import json
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pictures import write_file

LOGS = Path(__file__).resolve().parent / "logs"
PANELS = {"FID, in the classifier's features": ["fid"], "precision and recall": ["precision", "recall"]}


def read_scores(path):
    """The lines of a metrics.jsonl that have scores, dicts in the order of their steps."""
    return [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "eval_fid" in row]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=LOGS / "scores.jsonl", help="(default: %(default)s)")
    parser.add_argument("--heldout", type=Path, default=LOGS / "heldout.json", help="(default: %(default)s)")
    parser.add_argument("--output", default="scores.svg", help="picture to write (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        rows, floor = read_scores(args.scores), json.loads(args.heldout.read_text(encoding="utf-8"))["scores"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"cannot read the scores ({error}); give a metrics.jsonl and what evaluate.py --output wrote")
    if not rows:
        parser.error(f"{args.scores} has no scores; give the metrics.jsonl of a run with --eval-every")
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "digits"  # equal numbers, equal file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for i, name in enumerate(names):
            steps, values = zip(*((row["step"], row[f"eval_{name}"]) for row in rows))
            axes.plot(steps, values, "o-", markersize=3, color=f"C{i}", label=f"{name}, samples")
            axes.axhline(floor[name], linestyle="--", color=f"C{i}", label=f"{name}, real held-out digits")
        axes.set(title=title, xlabel="step", yscale="log" if names == ["fid"] else "linear")
        axes.legend()
    content, form = io.BytesIO(), Path(args.output).suffix[1:] or None
    try:
        figure.savefig(content, format=form, metadata={"Date": None} if form == "svg" else None)
        write_file(args.output, content.getvalue())
    except ValueError as error:  # matplotlib's, too, of a format that it does not know
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
