"""Depth by noise level on digits: a short fine-tuning with exits, and the same without, against
plain sampling in fewer steps. Times are the process's own, on CPUs.

    python -m benchmarks.exits                   # an hour on a CPU core
    python -m benchmarks.exits --networks DIR    # keeps what it trains there, and goes on from it
    python -m benchmarks.exits --high CKPT       # also a pair of networks
    python -m benchmarks.exits --begin CKPT      # with a deeper network of the same digits

Begins with examples/digits/dit.safetensors, or with another. The control is trained for as many
steps on the same batches, without exits. Scores as in benchmarks.solvers, of guided samples.
"""

import argparse
from copy import deepcopy
from dataclasses import replace
import json
from pathlib import Path
import time

import torch

from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from benchmarks.solvers import (
    DIGITS, Setting, load, make_sampler, real_digits, real_statistics, score,
)  # fmt: skip
from checkpoints import load_pretrained
from checkpoints.from_whole import with_exits
from checkpoints.networks import ExitDiT
from diffusion import create_diffusion
from evaluation.features import load_extractor
from training.step import update_ema
from vae import from_uint8

# Which sixths of the blocks run from which noise level on
SIXTHS = (((4, 0.3), (3, 0.6)), ((2, 0.6),))
CONTROL, PAIR = "control", "pair"
HIGH_FROM = 0.6  # the noise level from which on the pair's second network is asked
SOLVER, STEPS = "unipc", {CONTROL: (10, 8, 7, 6, 5, 4)}
TIMED = 50  # images
FEWER = (8, 6)  # steps of the other sides
TRAINING_BATCH, LEARNING_RATE, DECAY = 64, 3e-4, 0.99


def sides(depth):
    """{name: the exits} of each side, of networks with so many blocks."""
    found = {CONTROL: ()}
    for row in SIXTHS:
        exits = tuple((sixths * depth // 6, level) for sixths, level in row)
        found[" ".join(f"{blocks}:{level}" for blocks, level in exits)] = exits
    return found


def begun(network, exits):
    """The network's weights in an ExitDiT, each of whose exits begins as a copy of the final layer;
    without exits a copy of the network.
    """
    if not exits:
        return deepcopy(network)
    config = {name: value for name, value in network.config.items() if name != "block"}
    found = ExitDiT(**config, exits=exits)
    found.load_state_dict(with_exits(network.state_dict(), found))
    return found.to(device()).eval().requires_grad_(False)


def batches(space, steps):
    """(latents, labels, t, noise) of each of so many steps, the same for every network."""
    generator = torch.Generator().manual_seed(0)
    images, labels = real_digits()
    mean, std = space.moments(from_uint8(images).to(device()))
    for _ in range(steps):
        chosen = torch.randint(len(mean), (TRAINING_BATCH,), generator=generator)
        t = torch.randint(1000, (TRAINING_BATCH,), generator=generator).to(device())
        noise = torch.randn(mean[chosen].shape, generator=generator).to(device())
        latents = space.draw(mean[chosen], std[chosen], noise)
        drop = (torch.rand(TRAINING_BATCH, generator=generator) < 0.1).long().to(device())
        noise = torch.randn(latents.shape, generator=generator).to(device())
        yield latents, dict(y=labels[chosen].to(device()), force_drop_ids=drop), t, noise


def train_on(network, space, steps):
    """A moving average of the network, trained for so many steps at the depths that it has."""
    diffusion, average = create_diffusion(""), deepcopy(network)
    network.train().requires_grad_(True).pos_embed.requires_grad_(False)
    opt = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0
    )
    for latents, condition, t, noise in batches(space, steps):
        losses = diffusion.training_losses(network, latents, t, condition, noise=noise)
        losses["loss"].mean().backward()
        opt.step()
        opt.zero_grad()
        update_ema(average, network, DECAY)
    return average


def trained(name, exits, network, space, steps, folder):
    """A side's network after so many steps, from a file in the folder where it is there."""
    network = begun(network, exits)
    path = None if folder is None else folder / f"{name}-{steps}.pt"
    if path is not None and path.exists():
        network.load_state_dict(torch.load(path))
        return network
    network = train_on(network, space, steps)
    if path is not None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    return network


def samplers_of(args, network, space):
    """{name: the Sampler of a side in so many steps}."""
    networks = {
        name: trained(name, exits, network, space, args.steps, args.networks)
        for name, exits in sides(network.config["depth"]).items()
    }  # fmt: skip
    found = {
        f"{name}, {SOLVER} {steps}": make_sampler(network, space, Setting(SOLVER, steps))
        for name, network in networks.items() for steps in STEPS.get(name, FEWER)
    }  # fmt: skip
    if args.high is None:
        return found
    high = load_pretrained(args.high)[0].to(device())
    return found | {
        f"{PAIR}, {SOLVER} {steps}": replace(
            found[f"{CONTROL}, {SOLVER} {steps}"], high=high, high_from=HIGH_FROM
        ) for steps in FEWER
    }  # fmt: skip


def scored(args, samplers, extractor, reference):
    """{name: the distances of its seeds}; what the folder's file has is not done again."""
    path = None if args.networks is None else args.networks / f"scores-{args.samples}.json"
    found = json.loads(path.read_text()) if path is not None and path.exists() else {}
    for name, sampler in samplers.items():
        scores = found.setdefault(name, [])
        for seed in range(len(scores), args.seeds):
            scores.append(round(score(sampler, extractor, reference, args.samples, seed), 4))
        print(name, scores, flush=True)
        if path is not None:
            path.write_text(json.dumps(found, indent=1) + "\n")
    return {name: found[name][: args.seeds] for name in samplers}


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=500, help="for each score (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="scores of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="of training (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of times (default: %(default)s)")
    parser.add_argument(
        "--networks", type=Path, metavar="DIR",
        help="where what is trained, and scored, is kept, to go on from it",
    )  # fmt: skip
    parser.add_argument(
        "--begin", metavar="CKPT", help="what is trained on (default: the digits' network)"
    )
    parser.add_argument(
        "--high", metavar="CKPT",
        help="also score the control with this network, say of larger patches, in its place from "
        f"noise level {HIGH_FROM} on",
    )  # fmt: skip
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    network, space = load()
    if args.begin is not None:
        network = load_pretrained(args.begin)[0].to(device())
    samplers = samplers_of(args, network, space)
    extractor = load_extractor(str(DIGITS / "classifier"), device())
    found = scored(args, samplers, extractor, real_statistics(extractor))
    labels = (torch.arange(TIMED) % 10).to(device())

    def side(sampler):
        return lambda: sampler.decode(sampler.numbered_latents(0, range(TIMED), labels)).cpu()

    timed = {name: side(sampler) for name, sampler in samplers.items()}
    # Of this process alone: other work may share the machine
    times = ratios(alternate(timed, args.rounds, time.process_time), next(iter(timed)))
    table({name: (found[name], times[name]) for name in found}, ("distance", "CPU time, quartiles"))
    depth = network.config["depth"]
    settings = vars(args) | {
        "networks": None, "begin": args.begin and Path(args.begin).name, "exits": sides(depth),
        "high": args.high and Path(args.high).name, "batch": TRAINING_BATCH, "lr": LEARNING_RATE,
        "ema_decay": DECAY,
    }  # fmt: skip
    result = {"settings": settings, "distance of each seed": found, f"CPU {RATIO}": times}
    write(f"exits-{depth}-blocks", result)


if __name__ == "__main__":
    main()
