"""A trial of step-dependent depth on digits: fewer blocks where noise is high, as the network is
and after a short training.

    python -m benchmarks.depth                            # ten minutes on a CPU core

Sampled by unipc in 20 guided steps. At steps t from a threshold on, some of the six blocks are left
out. First every choice is scored with the committed weights; then the better ones of those that may
save enough, and for comparison the whole network, are trained on with their depth for a while.
Scores as in benchmarks.solvers.
"""

import argparse
from copy import deepcopy

import torch

from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from benchmarks.solvers import (
    BATCH, DIGITS, Setting, load, make_sampler, real_digits, real_statistics, score,
)  # fmt: skip
from diffusion import create_diffusion
from evaluation.features import load_extractor
from models import DiT
from training.step import update_ema
from vae import from_uint8

SETTING = Setting("unipc", 20)
LEFT_OUT = [(2,), (2, 3), (1, 2, 3)]
THRESHOLDS = (250, 100)
TRAINED_ON = [((), 1000), ((1, 2, 3), 250), ((1, 2, 3), 100)]
TRAINING_BATCH, LEARNING_RATE, DECAY = 64, 3e-4, 0.99


class StepDepth(DiT):
    """A DiT that leaves out some blocks at steps t from a threshold on."""

    left_out, threshold = (), 1000

    def forward(self, x, t, y=None, force_drop_ids=None):
        """As a DiT's; samples above and below the threshold are computed apart."""
        every, out = self.blocks, None
        high = t >= self.threshold
        for mask, left_out in ((high, self.left_out), (~high, ())):
            if mask.any():
                self.blocks = torch.nn.ModuleList(
                    block for i, block in enumerate(every) if i not in left_out
                )
                drop = None if force_drop_ids is None else force_drop_ids[mask]
                part = super().forward(x[mask], t[mask], y[mask], drop)
                out = part.new_zeros(len(x), *part.shape[1:]) if out is None else out
                out[mask] = part
                self.blocks = every
        return out


def build(network, left_out, threshold):
    """The network's weights in a StepDepth."""
    found = StepDepth(**network.config).to(device()).eval().requires_grad_(False)
    found.load_state_dict(network.state_dict())
    found.left_out, found.threshold = left_out, threshold
    return found


def train_on(network, space, steps):
    """A moving average of the network, trained on the digits for so many steps at the depth it has.
    """
    diffusion, generator = create_diffusion(""), torch.Generator().manual_seed(0)
    images, labels = real_digits()
    mean, std = space.moments(from_uint8(images).to(device()))
    average = deepcopy(network)
    network.train().requires_grad_(True).pos_embed.requires_grad_(False)
    opt = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0
    )
    for _ in range(steps):
        chosen = torch.randint(len(mean), (TRAINING_BATCH,), generator=generator)
        t = torch.randint(1000, (TRAINING_BATCH,), generator=generator).to(device())
        latents = space.draw(
            mean[chosen], std[chosen],
            torch.randn(mean[chosen].shape, generator=generator).to(device()),
        )  # fmt: skip
        drop = (torch.rand(TRAINING_BATCH, generator=generator) < 0.1).long().to(device())
        noise = torch.randn(latents.shape, generator=generator).to(device())
        condition = dict(y=labels[chosen].to(device()), force_drop_ids=drop)
        diffusion.training_losses(network, latents, t, condition, noise=noise)[
            "loss"
        ].mean().backward()
        opt.step()
        opt.zero_grad()
        update_ema(average, network, DECAY)
    return average


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=500, help="for each score (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=800, help="of training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of times (default: %(default)s)")
    args = parser.parse_args(argv)
    network, space = load()
    extractor = load_extractor(str(DIGITS / "classifier"), device())
    reference = real_statistics(extractor)
    labels = (torch.arange(BATCH) % 10).to(device())

    def side(depth):
        sampler = make_sampler(depth, space, SETTING)
        return lambda: sampler.decode(sampler.numbered_latents(0, range(BATCH), labels)).cpu()

    def scored(depth):
        return round(
            score(make_sampler(depth, space, SETTING), extractor, reference, args.samples, 0), 4
        )

    whole = "all six"
    networks = {whole: build(network, (), 1000)}
    for threshold in THRESHOLDS:
        for left_out in LEFT_OUT:
            networks[f"without {left_out} from t={threshold}"] = build(network, left_out, threshold)
    found = {}
    for name, depth in networks.items():
        found[name] = scored(depth)
        print(name, found[name], flush=True)
    trained = {}
    for left_out, threshold in TRAINED_ON:
        name = f"without {left_out} from t={threshold}" if left_out else whole
        trained[name] = scored(train_on(build(network, left_out, threshold), space, args.steps))
        print(name, "after training", trained[name], flush=True)
    seconds = alternate({name: side(depth) for name, depth in networks.items()}, args.rounds)
    times = ratios(seconds, whole)
    table(
        {name: (found[name], trained.get(name, ""), times[name]) for name in found},
        ("distance", "trained", "time, quartiles"),
    )
    settings = {
        **vars(args), "sampler": str(SETTING), "batch": TRAINING_BATCH, "lr": LEARNING_RATE,
        "ema_decay": DECAY,
    }  # fmt: skip
    write(
        "depth",
        {"settings": settings, "distance": found, "distance after training": trained, RATIO: times},
    )


if __name__ == "__main__":
    main()
