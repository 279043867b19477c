"""Distance against calls of the network, for diffusion and flow and all their solvers, on digits.

    python -m benchmarks.calls scores      # 1,000 samples of each setting, two seeds; an hour
    python -m benchmarks.calls plot        # docs/calls.svg and the table of docs/flow.md

The two networks are those of examples/digits, equal but for outputs of a variance, and trained for
as many steps on the same digits. A score is the Fréchet distance to the 1,437 training digits in
the features of examples/digits/classifier, without guidance. Image i of a seed has the same label
and the same first noise everywhere. A call is one evaluation of the network on the whole batch;
dopri5's are those of the sample that needs most. What `scores` finds in its file it does not do
again: for scores of your own give --output, and that file to `plot` with --scores.
"""

import argparse
import json
from pathlib import Path
import re
import sys
from typing import NamedTuple

import torch

from benchmarks.sides import RESULTS, ROOT, device, machine
from benchmarks.solvers import BATCH, DIGITS, real_statistics, score
from checkpoints.loading import network_of
from checkpoints.weights import load_weights
from evaluation.features import load_extractor
from processes.table import process_of
from sampling.sampler import Sampler
from vae import load_vae

SCORES = RESULTS / "calls-scores.json"
SEEDS = (0, 1)
CALLS = (10, 20, 50)
NETWORKS = {"diffusion": "dit.safetensors", "flow": "flow.safetensors"}


class Solver(NamedTuple):
    """A solver as it is measured: of which network, how many calls a step takes, its options."""

    network: str
    sampler: str
    calls: int = 1
    options: tuple = ()

    def __str__(self):
        told = ", ".join(f"{name} {value}" for name, value in self.options)
        return f"{self.sampler}, {told}" if told else self.sampler


SOLVERS = [
    Solver("diffusion", "ddpm"), Solver("diffusion", "ddim"), Solver("diffusion", "dpm++"),
    Solver("diffusion", "unipc"), Solver("flow", "euler"), Solver("flow", "heun", 2),
    Solver("flow", "sde"), Solver("flow", "sde-heun", 2),
]  # fmt: skip
TOLERANCES = (1e-1, 1e-2, 1e-3)  # of dopri5, which chooses its own number of calls
MARKERS = dict(zip((*map(str, SOLVERS), "dopri5"), "osD^osvPX"))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["scores", "plot"])
    parser.add_argument(
        "--samples", type=int, default=1000, help="for each score (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help=f"file to write (default: {SCORES.name}, or docs/calls.svg)"
    )
    parser.add_argument(
        "--scores", type=Path, default=SCORES, help="what plot draws (default: the committed ones)"
    )
    return parser


def load(name):
    """(a network of the digits, its process, its autoencoder)."""
    weights = load_weights(DIGITS / NETWORKS[name])
    network = network_of(weights, name).to(device())
    return network, process_of(network, weights.process), load_vae(str(DIGITS / "vae"), device())


def make_sampler(network, process, space, sampler, steps, options=()):
    return Sampler(
        network, space, None, steps, sampler, process=process, solver_options=dict(options)
    )


def counted(network):
    """A list that grows with each call of the network."""
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def settings():
    """(name, solver, its number of steps) of everything that is scored."""
    for solver in SOLVERS:
        for calls in CALLS:
            yield f"{solver.network}: {solver}, {calls} calls", solver, calls // solver.calls
    for tolerance in TOLERANCES:
        options = (("atol", tolerance / 1000), ("rtol", tolerance))
        yield f"flow: dopri5, rtol {tolerance:g}", Solver("flow", "dopri5", 1, options), 1


def scores(args):
    """Score every setting that the file does not have yet, and write it after each."""
    path = args.output or SCORES
    found = {"samples": args.samples, "runs": [], "scores": {}}
    if path.exists():
        found = json.loads(path.read_text())
    if found["samples"] != args.samples:
        sys.exit(
            f"{path} is of {found['samples']} samples, not {args.samples}; give another --output"
        )
    found["runs"].append(machine())
    extractor = load_extractor(str(DIGITS / "classifier"), device())
    reference = real_statistics(extractor)
    loaded = {name: load(name) for name in NETWORKS}
    calls = {name: counted(network) for name, (network, _, _) in loaded.items()}
    batches = -(-args.samples // BATCH)
    for seed in SEEDS:
        for name, solver, steps in settings():
            key = f"{name}, seed {seed}"
            if key in found["scores"]:
                continue
            sampler = make_sampler(*loaded[solver.network], solver.sampler, steps, solver.options)
            calls[solver.network].clear()
            distance = score(sampler, extractor, reference, args.samples, seed)
            made = len(calls[solver.network]) / batches
            found["scores"][key] = {"distance": round(distance, 4), "calls": round(made, 1)}
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(key, found["scores"][key], flush=True)


def rows(found):
    """Lines of a Markdown table: for each setting its calls, and its distances with the seeds."""
    lines = ["| solver | calls | distance, each seed | mean |", "|---|---|---|---|"]
    for name, _, _ in settings():
        got = [found[f"{name}, seed {seed}"] for seed in SEEDS]
        told = ", ".join(f"{one['distance']:.3f}" for one in got)
        calls = sum(one["calls"] for one in got) / len(got)
        mean = sum(one["distance"] for one in got) / len(got)
        solver = re.sub(r", [0-9]+ calls$", "", name)
        lines.append(f"| {solver} | {calls:g} | {told} | {mean:.3f} |")
    return lines


def draw(found, path):
    """Write the figure: for each seed a panel with a line for each solver."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "calls"  # equal numbers, equal file
    from matplotlib.figure import Figure

    lines = {}
    for name, solver, _ in settings():
        lines.setdefault((solver.network, solver.sampler), []).append(name)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, len(SEEDS), sharex=True)
    for axes, seed in zip(panels, SEEDS):
        for i, ((network, sampler), names) in enumerate(lines.items()):
            got = [found[f"{name}, seed {seed}"] for name in names]
            axes.plot(
                [one["calls"] for one in got], [one["distance"] for one in got], MARKERS[sampler],
                color=f"C{i}", linestyle="--" if network == "diffusion" else "-",
                label=f"{network}: {sampler}" if seed == SEEDS[0] else None,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="calls of the network", title=f"seed {seed}")
        axes.set_xticks(CALLS, map(str, CALLS))
        axes.minorticks_off()
    panels[0].set_ylabel("Fréchet distance, 1,000 samples")
    figure.legend(loc="outside right")
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def plot(args):
    """Print the table and draw the figure."""
    found = json.loads(args.scores.read_text())["scores"]
    print("\n".join(rows(found)))
    draw(found, args.output or ROOT / "docs" / "calls.svg")


def main(argv=None):
    args = build_parser().parse_args(argv)
    with torch.no_grad():
        {"scores": scores, "plot": plot}[args.what](args)


if __name__ == "__main__":
    main()
