"""Draw how the scores of digits change while a network is trained, beside those of real held-out digits.

    python examples/digits/plot_scores.py --output docs/digits-fid.svg             # from the logs in this folder

logs/scores.jsonl are the lines with scores of a run's metrics.jsonl, logs/heldout.json is what evaluate.py reports of the
held-out digits: as many images as each score of the run is of, against the same training digits.
"""

import argparse
import json
from pathlib import Path

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
    figure.savefig(args.output, metadata={"Date": None} if args.output.endswith(".svg") else None)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
