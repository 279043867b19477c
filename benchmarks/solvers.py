"""Quality against cost of the samplers, on digits.

    python -m benchmarks.solvers scores      # 2,000 samples of each setting; an hour on a CPU core
    python -m benchmarks.solvers times       # 100 images of each setting, in turn; minutes
    python -m benchmarks.solvers spacings    # a minute
    python -m benchmarks.plot_solvers        # docs/solvers.svg and tables of docs/sampling.md

`spacings` measures how near each spacing of diffusers comes to the exact path. Run `scores` first,
which is long, then `times`, on an idle machine. A score is the Fréchet distance to the 1,437
training digits in the features of examples/digits/classifier. Image i of a seed has the same label
and noise x_T with every sampler. What `scores` finds in its file it does not do again, and
benchmarks/results/solvers-scores.json has all of ours: for your own give --output, and that file to
plot_solvers --scores.
"""

import argparse
import itertools
import json
from pathlib import Path
import sys
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.sides import RATIO, RESULTS, ROOT, alternate, device, machine, ratios, table, write
from checkpoints.weights import load_weights
from evaluation.features import load_extractor
from evaluation.summaries import deal, summarize
from evaluation.metrics import frechet_distance
from models import DiT
from conditions.labels import random_labels
from processes.gaussian import SCHEDULERS
from sampling.sampler import Sampler
from sampling.speed import prepare
from vae import load_vae, to_uint8

DIGITS = ROOT / "examples" / "digits"
GUIDANCE, INTERVAL = 1.5, (0.3, 0.7)
BATCH, ON_PATHS = 100, 40  # images at a time; images whose paths are compared
SPACINGS = (
    None,
    "use_karras_sigmas",
    "use_exponential_sigmas",
)  # None: equal lengths in t; the last: in the log of sigma


class Setting(NamedTuple):
    """How digits are sampled."""

    sampler: str
    steps: int
    interval: tuple = (0.0, 1.0)
    guidance: float = GUIDANCE

    def __str__(self):
        where = (
            ""
            if self.interval == (0.0, 1.0)
            else f", guided {self.interval[0]:g} to {self.interval[1]:g}"
        )
        return f"{self.sampler} {self.steps}{where}" + (
            ", no guidance" if self.guidance == 1 else ""
        )


BASE = Setting("ddpm", 250)
COUNTS = {"ddpm": (250, 50), "ddim": (50, 20, 10), "dpm++": (20, 10), "unipc": (20, 10)}
SETTINGS = [
    Setting(sampler, steps, interval)
    for sampler, counts in COUNTS.items()
    for steps in counts
    for interval in ((0.0, 1.0), INTERVAL)
]  # fmt: skip
# With a second seed
TWICE = [BASE, Setting("dpm++", 20), Setting("unipc", 20), Setting("unipc", 10)]
UNGUIDED = [Setting("unipc", 20, guidance=1.0)]


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["scores", "times", "spacings"])
    parser.add_argument(
        "--samples", type=int, default=2000, help="for each score (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of times (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path,
        help="file for scores (default: benchmarks/results/solvers-scores.json)",
    )  # fmt: skip
    return parser


def load(compiled=False):
    """(the digits network, its autoencoder) on the device."""
    weights = load_weights(DIGITS / "dit.safetensors")
    network = DiT(**weights.config)
    network.load_state_dict(weights.tensors)
    network.to(device()).eval().requires_grad_(False)
    prepare(network, compile=compiled)
    return network, load_vae(str(DIGITS / "vae"), device())


def make_sampler(network, space, setting):
    return Sampler(
        network, space, None, setting.steps, setting.sampler, cfg_scale=setting.guidance,
        cfg_interval=setting.interval,
    )  # fmt: skip


def real_digits():
    """The training digits as images uint8 (N, 3, 32, 32), and their labels (N,)."""
    sys.path.insert(0, str(DIGITS))
    from make_dataset import enlarge, load_split

    digits, labels, _, _ = load_split()
    return torch.from_numpy(np.repeat(enlarge(digits)[:, None], 3, axis=1)), torch.from_numpy(
        labels
    )


def statistics_of(extractor, images, count):
    """Mean and covariance of features; images are batches uint8 (n, 3, 32, 32)."""
    return summarize(extractor, ((batch.to(device()), None) for batch in images), count)[
        0
    ].statistics


def real_statistics(extractor):
    """Mean and covariance of the training digits' features."""
    images, _ = real_digits()
    return statistics_of(extractor, images.split(500), len(images))


def score(sampler, extractor, reference, count, seed):
    """The Fréchet distance of so many samples to the reference."""

    def images():
        for indices in deal(count, BATCH):
            labels = random_labels(seed, indices, sampler.network.num_classes).to(device())
            latents = sampler.numbered_latents(seed, indices, labels)
            yield to_uint8(sampler.space.decode(latents)).permute(0, 3, 1, 2)

    return frechet_distance(statistics_of(extractor, images(), count), reference)


def scores(args):
    """Score every setting that the file does not have yet, and write it after each."""
    path = args.output or RESULTS / "solvers-scores.json"
    found = (
        json.loads(path.read_text())
        if path.exists()
        else {"samples": args.samples, "runs": [], "scores": {}}
    )
    if found["samples"] != args.samples:
        sys.exit(
            f"{path} is of {found['samples']} samples, not {args.samples}; give another --output"
        )
    found["runs"].append(machine())
    network, space = load(compiled=True)
    extractor = load_extractor(str(DIGITS / "classifier"), device())
    reference = real_statistics(extractor)
    todo = [(setting, 0) for setting in SETTINGS[::-1] + UNGUIDED[::-1]] + [
        (setting, 1) for setting in TWICE[::-1]
    ]
    for setting, seed in todo:
        name = f"{setting}, seed {seed}"
        if name not in found["scores"]:
            distance = score(
                make_sampler(network, space, setting), extractor, reference, args.samples, seed
            )
            found["scores"][name] = round(distance, 4)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(name, found["scores"][name], flush=True)
    print(f"{path} has every setting")


def times(args):
    """Time BATCH images, from labels to pixels, with every setting in turn."""
    network, space = load()
    labels = (torch.arange(BATCH) % 10).to(device())
    samplers = {
        str(setting): make_sampler(network, space, setting) for setting in SETTINGS + UNGUIDED
    }

    def side(sampler):
        return lambda: sampler.decode(sampler.numbered_latents(0, range(BATCH), labels)).cpu()

    sides = {name: side(sampler) for name, sampler in samplers.items()}
    sides["unipc 10"]()
    found = ratios(alternate(sides, args.rounds), str(BASE))
    table(
        {name: [values] for name, values in found.items()}, ("ratio to 250 DDPM steps, quartiles",)
    )
    write("solvers-times", {"settings": {"images": BATCH, "rounds": args.rounds}, RATIO: found})


def spacings(args):
    """The root mean square distance of latents from the exact path's end, 1,000 DDIM steps, for
    each spacing of steps.
    """
    network, space = load()
    labels = (torch.arange(ON_PATHS) % 10).to(device())
    found = {}
    for guidance in (1.0, 4.0):
        exact = Sampler(network, space, None, 1000, "ddim", cfg_scale=guidance).numbered_latents(
            0, range(ON_PATHS), labels
        )

        def far(latents, exact=exact):
            return round((latents - exact).square().mean().sqrt().item(), 4)

        for steps in (50, 20, 10):
            ddim = Sampler(network, space, None, steps, "ddim", cfg_scale=guidance)
            found[f"guidance {guidance:g}, ddim {steps}"] = far(
                ddim.numbered_latents(0, range(ON_PATHS), labels)
            )
        for name, steps, spacing in itertools.product(SCHEDULERS, (20, 10, 6), SPACINGS):
            chosen = {spacing: True} if spacing else {}
            with patch.dict(SCHEDULERS, {name: SCHEDULERS[name]._replace(options=chosen)}):
                sampler = Sampler(network, space, None, steps, name, cfg_scale=guidance)
                latents = sampler.numbered_latents(0, range(ON_PATHS), labels)
            found[f"guidance {guidance:g}, {name} {steps}, {spacing or 'linspace'}"] = far(latents)
    for name, distance in found.items():
        print(f"{name:48} {distance}")
    write("solvers-spacings", {"distance of latents from the exact path's end": found})


def main(argv=None):
    args = build_parser().parse_args(argv)
    {"scores": scores, "times": times, "spacings": spacings}[args.what](args)


if __name__ == "__main__":
    main()
