"""Compare how likely held-out digits are to a flow and to a diffusion network, both as densities.

    python examples/digits/compare_likelihood.py --data-path digits/heldout

The flow's bits per dimension are those of evaluate.py --likelihood. The diffusion network's are the
variational bound of calc_bpd_loop, whose last term counts grey levels of width 2/255 on [-1, 1]:
log2 of that width is added to make it a density's. Beyond that range calc_bpd_loop takes the
outermost levels to be without end, which latents are not made for; so the bound is also given with
a density as its last term. Both networks see the same latents, the autoencoder's means.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json
import math

import torch

from checkpoints.choice import NetworkChoice
from checkpoints.loading import load_pretrained
from diffusion import create_diffusion
from evaluation.likelihood import LEVELS, LikelihoodOptions, load_measured
from processes.noise import ImageNoise

HERE = Path(__file__).resolve().parent
WIDTH = math.log2(2 / LEVELS)  # of a grey level


def read_digits(measured, count):
    """(indices, pixels (n, 3, S, S), labels (n,)) of so many digits, evenly spread."""
    every = len(measured.images)
    indices = [i * every // count for i in range(count)]
    pixels, labels, _ = zip(*(measured.images[i, False] for i in indices))
    return indices, torch.stack(pixels), torch.tensor(measured.labels)[list(labels)]


def bound(network, x, labels, noise_fn):
    """The bound of calc_bpd_loop (N,) as a density's bits per dimension, by its own last term and
    by one that is a density.
    """
    diffusion = create_diffusion("", learn_sigma=network.learn_sigma)
    told = {"clip_denoised": False, "model_kwargs": {"y": labels}}
    terms = diffusion.calc_bpd_loop(network, x, noise_fn=noise_fn, **told)
    t = torch.zeros(len(x), dtype=torch.int64)
    p = diffusion.p_mean_variance(network, diffusion.q_sample(x, t, noise_fn(x)), t, **told)
    normal = torch.distributions.Normal(p["mean"], torch.exp(p["log_variance"] / 2))
    last = -normal.log_prob(x).flatten(1).mean(dim=1) / math.log(2)  # (N,)
    total = terms["total_bpd"]
    return total + WIDTH, total - terms["vb"][:, -1] + last


@torch.no_grad()
def compare(measured, network, count):
    """{name: mean and standard error of bits per dimension} of so many digits."""
    indices, pixels, labels = read_digits(measured, count)
    noise_fn = ImageNoise(measured.options.seed, indices, "cpu")
    x, _ = measured.seen(pixels, noise_fn)
    bins, density = bound(network, x, labels, noise_fn)
    found = {
        "flow": measured.bits_of(indices, pixels, labels),
        "diffusion, calc_bpd_loop less its level's width": bins,
        "diffusion, the same with a density as its last term": density,
        "a standard normal": math.log2(2 * math.pi) / 2 + (x**2).flatten(1).mean(1) / math.log(4),
    }
    return {
        name: {"bits_per_dim": bits.mean().item(), "error": bits.std().item() / count**0.5}
        for name, bits in found.items()
    }


def build_parser():
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    add("--data-path", required=True, help="folder of digits that make_dataset.py wrote")
    add("--flow", default=HERE / "flow.safetensors", help="(default: the one here)")
    add("--diffusion", default=HERE / "dit.safetensors", help="(default: the one here)")
    add("--vae", default=HERE / "vae", help="(default: the one here)")
    add("--num-digits", type=int, default=120, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


@door("--num-digits")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        options = LikelihoodOptions(args.data_path, seed=args.seed)
        choice = NetworkChoice(args.flow, vae=args.vae)
        measured = load_measured(choice, options, torch.device("cpu"))
        if not 2 <= args.num_digits <= len(measured.images):
            raise ValueError(
                f"`num_digits` is {args.num_digits}; it must be from 2 to {len(measured.images)}"
            )
        network, _ = load_pretrained(args.diffusion)
    print(json.dumps(compare(measured, network, args.num_digits), indent=1))


if __name__ == "__main__":
    main()
