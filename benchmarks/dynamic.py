"""A dynamic DiT of digits against the same network trained on as long without routers, and against
fewer steps.

    python -m benchmarks.dynamic --dynamic results/000-DiT-Ti-1 --control results/001-DiT-Ti-1

Both are runs of train.py from examples/digits/dit.safetensors, or from --begun, alike but for
--dynamic. Scores are as in benchmarks.solvers, with two seeds; times are of BATCH images, from
labels to pixels, in turn, and those that this process computes, so that other work on the machine
counts little.
"""

import argparse
from pathlib import Path
import time

import torch

from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from benchmarks.solvers import (
    BATCH, DIGITS, Setting, make_sampler, real_statistics, score,
)  # fmt: skip
from checkpoints import load_pretrained
from evaluation.features import load_extractor
from training.cost import sampled
from vae import load_vae

SOLVER, STEPS = "ddim", 50
FEWER = (40, 33, 25)  # steps of the control
SEEDS = (0, 1)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dynamic", required=True, metavar="CKPT", help="with routers")
    parser.add_argument("--control", required=True, metavar="CKPT", help="without")
    parser.add_argument(
        "--begun", default=str(DIGITS / "dit.safetensors"), metavar="CKPT",
        help="what both began with (default: the digits' network)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=1000, help="for each score (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of times (default: %(default)s)")
    return parser


def samplers_of(args):
    """{name: a Sampler} of all that is compared, the control first."""
    space = load_vae(str(DIGITS / "vae"), device())
    begun, dynamic, control = (
        load_pretrained(ckpt)[0].to(device()) for ckpt in (args.begun, args.dynamic, args.control)
    )
    found = {f"control, {STEPS} steps": (control, STEPS), f"dynamic, {STEPS}": (dynamic, STEPS)}
    found |= {f"control, {steps}": (control, steps) for steps in FEWER}
    found["before both"] = begun, STEPS
    return {
        name: make_sampler(network, space, Setting(SOLVER, steps))
        for name, (network, steps) in found.items()
    }


def main(argv=None):
    args = build_parser().parse_args(argv)
    samplers = samplers_of(args)
    extractor = load_extractor(str(DIGITS / "classifier"), device())
    reference = real_statistics(extractor)
    labels = (torch.arange(BATCH) % 10).to(device())

    def side(sampler):
        return lambda: sampler.decode(sampler.numbered_latents(0, range(BATCH), labels)).cpu()

    base, sides = next(iter(samplers)), {name: side(one) for name, one in samplers.items()}
    sides[base]()
    times = ratios(alternate(sides, args.rounds, time.process_time), base)
    print(times, flush=True)
    distances = {}
    for name, sampler in samplers.items():
        distances[name] = [
            round(score(sampler, extractor, reference, args.samples, seed), 4) for seed in SEEDS
        ]
        print(name, distances[name], flush=True)
    table(
        {name: (*distances[name], times[name]) for name in samplers},
        (*(f"distance, seed {seed}" for seed in SEEDS), "time, quartiles"),
    )
    left, blocks = sampled(args.dynamic), samplers[base].network.config["depth"]
    names = {name: Path(getattr(args, name)).name for name in ("begun", "dynamic", "control")}
    write(f"dynamic-{blocks}-blocks", {
        "settings": vars(args) | names | {"solver": SOLVER, "images": BATCH},
        "share of operations": round(left.macs / left.most, 4), "distance": distances,
        RATIO: times,
    })  # fmt: skip


if __name__ == "__main__":
    main()
