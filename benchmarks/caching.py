"""Caching against fewer steps: what the blocks add, extrapolated at some steps, on digits.

    python -m benchmarks.caching ddim       # 50 guided steps; ten minutes on a CPU core
    python -m benchmarks.caching euler      # the same of the digits' flow
    python -m benchmarks.caching ddpm
    python -m benchmarks.caching ddim --ckpt deep.safetensors   # of benchmarks.train_deep

Every way of sampling draws the same images of the same noise. `distance` is the Fréchet distance to
the training digits, as in benchmarks.solvers, for each seed; `from the full path` how far latents
are from those of 50 whole steps (root mean square); `time` a ratio to these 50 steps, of the
seconds that this process computes, so that other work on the machine counts little. Beside --cache
there are two other places: `parts`, the outputs of attention and MLP in every block, as TaylorSeer
has them, and `output`, what the network, guided, returns.
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
import time
from typing import NamedTuple

import torch

from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from benchmarks.solvers import BATCH, DIGITS, GUIDANCE, real_statistics, statistics_of
from checkpoints.networks import create_network
from checkpoints.weights import load_weights
from conditions.labels import random_labels
from evaluation.features import load_extractor
from evaluation.metrics import frechet_distance
from processes.table import process_of
from sampling.caching import History, parse_cache
from sampling.sampler import Sampler
from vae import load_vae, to_uint8

STEPS = 50
FLOWS = ("euler", "sde")  # solvers of flows
# Solvers that need few steps, and as many as ask the network 18 times
OTHERS = {"diffusion": {"dpm++": 18, "unipc": 18}, "flow": {"heun": 9}}


class Way(NamedTuple):
    """A way of sampling: `cache` as sampling has it, at a place of PLACES."""

    sampler: str
    steps: int
    cache: str | None = None
    place: str = "blocks"

    def __str__(self):
        where = "" if self.place == "blocks" else f" of {self.place}"
        return f"{self.sampler} {self.steps}" + (f" {self.cache}{where}" if self.cache else "")


@dataclass
class Elsewhere(Sampler):
    """A Sampler that extrapolates something else than what all blocks add: `elsewhere` is its
    Taylor. Of guidance everywhere, or nowhere.
    """

    elsewhere: tuple = ()

    def computed(self):
        return self.elsewhere.computed(self.guided()), self.steps()


class OfOutput(Elsewhere):
    """It extrapolates what the network returns."""

    def predictor(self, labels, given=None):
        ask, history = super().predictor(labels, given), History(self.elsewhere.order + 1)
        computed, times = self.computed()

        def predict(x, t, step):
            if not computed[step]:
                return sum(weight * value for weight, value in history.weighted(times[step]))
            out = ask(x, t, step)
            history.keep(times[step], out)
            return out

        return predict


class OfParts(Elsewhere):
    """It extrapolates the outputs of attention and MLP of every block, before their gates."""

    def plans(self):
        """For each kind of part whether it is asked at each of the steps."""
        return dict.fromkeys(("attn", "mlp"), self.computed()[0])

    def predictor(self, labels, given=None):
        ask, times = super().predictor(labels, given), self.steps()
        length = self.elsewhere.order + 1
        parts = [
            (getattr(block, kind), plan, History(length))
            for block in self.network.blocks
            for kind, plan in self.plans().items()
        ]

        def predict(x, t, step):
            with ExitStack() as stack:
                for part, computed, history in parts:
                    if computed[step]:
                        stack.enter_context(kept_outputs(part, history, times[step]))
                    else:
                        part.forward = lambda *_, kept=history, **__: sum(
                            weight * value for weight, value in kept.weighted(times[step])
                        )
                        stack.callback(delattr, part, "forward")
                return ask(x, t, step)

        return predict


def kept_outputs(part, history, time):
    """A context in which a History keeps, at a time, what a module returns."""
    return part.register_forward_hook(lambda _, __, out: history.keep(time, out))


PLACES = {"blocks": Sampler, "parts": OfParts, "output": OfOutput}


def ways(sampler):
    """(those that are scored, the full one first; the others)."""
    others = OTHERS["flow" if sampler in FLOWS else "diffusion"]
    scored = [
        Way(sampler, STEPS), Way(sampler, 18), *(Way(*other) for other in others.items()),
        Way(sampler, STEPS, "taylor:3,1"), Way(sampler, STEPS, "taylor:3,2"),
    ]  # fmt: skip
    caches = ("taylor:2,1", "taylor:2,2", "taylor:3,0", "taylor:4,1", "taylor:4,2")
    return scored, [
        Way(sampler, 26), *(Way(sampler, STEPS, cache) for cache in caches),
        *(Way(sampler, STEPS, "taylor:3,2", place) for place in ("parts", "output")),
    ]  # fmt: skip


class Ground(NamedTuple):
    """What is sampled from."""

    network: torch.nn.Module
    process: object
    space: object


def ground_of(sampler, path=None):
    """The Ground of a network of digits, whose weights a file has: without one, of that of
    examples/digits which has learned the sampler's process.
    """
    usual = DIGITS / f"{'flow' if sampler in FLOWS else 'dit'}.safetensors"
    weights = load_weights(path or usual)
    network = create_network(weights.config)
    network.load_state_dict(weights.tensors)
    network.to(device()).eval().requires_grad_(False)
    process = process_of(network, weights.process) if weights.process else process_of(network)
    return Ground(network, process, load_vae(str(DIGITS / "vae"), device()))


def options_of(ground, way):
    """The arguments of a Sampler of a way, but for its cache."""
    return dict(
        network=ground.network, space=ground.space, classes=None, num_sampling_steps=way.steps,
        sampler=way.sampler, cfg_scale=GUIDANCE, process=ground.process,
    )  # fmt: skip


def sampler_of(ground, way):
    """The Sampler of a way."""
    if way.place == "blocks":
        return Sampler(**options_of(ground, way), cache=way.cache)
    return PLACES[way.place](**options_of(ground, way), elsewhere=parse_cache(way.cache))


def latents(sampler, count, seed):
    """So many latents (N, C, H, W)."""
    classes = sampler.network.num_classes
    return torch.cat([
        sampler.numbered_latents(
            seed, one.tolist(), random_labels(seed, one.tolist(), classes).to(device())
        )
        for one in torch.arange(count).split(BATCH)
    ])  # fmt: skip


def distances(samplers, count, seeds):
    """{name of a Sampler: its Fréchet distance for each seed}."""
    extractor = load_extractor(str(DIGITS / "classifier"), device())
    reference = real_statistics(extractor)
    scores = {name: [] for name in samplers}
    for seed in range(seeds):
        for name, sampler in samplers.items():
            images = [
                to_uint8(sampler.space.decode(part)).permute(0, 3, 1, 2)
                for part in latents(sampler, count, seed).split(BATCH)
            ]
            found = frechet_distance(statistics_of(extractor, images, count), reference)
            scores[name].append(round(found, 4))
            print(f"{name}, seed {seed}: {found:.4f}", flush=True)
    return scores


def measured(samplers, scored, args):
    """What is written of Samplers, {name: Sampler}, of which the first is the full one; those of
    these names are scored. `args` has the numbers of parser_of.
    """
    full = next(iter(samplers))
    drawn = {name: latents(sampler, args.images, 0) for name, sampler in samplers.items()}
    far = {name: rms(one - drawn[full]) for name, one in drawn.items()}
    print(far, flush=True)
    sides = {
        name: lambda sampler=sampler: latents(sampler, args.images, 0)
        for name, sampler in samplers.items()
    }
    found = ratios(alternate(sides, args.rounds, time.process_time), full)
    chosen = {name: samplers[name] for name in scored} if args.samples else {}
    scores = distances(chosen, args.samples, args.seeds) if chosen else {}
    table(
        {name: (scores.get(name, ""), far[name], found[name]) for name in sides},
        ("distance of each seed", "from full", "time, quartiles"),
    )
    return {"distance of each seed": scores, "from the full path": far, RATIO: found}


def rms(x):
    """The root mean square, for a result."""
    return round(x.square().mean().sqrt().item(), 4)


def parser_of(samplers, about):
    """The command line of a benchmark of these samplers."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sampler", choices=samplers)
    parser.add_argument(
        "--samples", type=int, default=300, help="for each score; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=40,
        help="that are timed, and whose paths are compared (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of times (default: %(default)s)")
    return parser


def build_parser():
    parser = parser_of(["ddim", "ddpm", "euler"], __doc__)
    parser.add_argument(
        "--ckpt", type=Path, metavar="FILE",
        help="weights of another network of the same digits, as export.py writes them",
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    scored, others = ways(args.sampler)
    ground = ground_of(args.sampler, args.ckpt)
    samplers = {str(way): sampler_of(ground, way) for way in [*scored, *others]}
    result = measured(samplers, [*map(str, scored)], args)
    blocks = ground.network.config["depth"]
    settings = vars(args) | {
        "ckpt": args.ckpt and args.ckpt.name, "blocks": blocks, "guidance": GUIDANCE
    }
    write(f"caching-{args.sampler}-{blocks}-blocks", {"settings": settings} | result)


if __name__ == "__main__":
    main()
