"""A training step on packed images of several sizes against one that pads each to the largest.

    python -m benchmarks.packing                              # S/2; minutes on a CPU

Forward, backward, AdamW and moving average of train.py on random latents, MIX twice by default.
"packed" has them in rows of LENGTH tokens, as --pack LENGTH. "padded" is the step on as many
latents of LENGTH tokens each: it does not even mask what is padding, which would cost more. Both
take turns in one process.
"""

import argparse

import torch

from benchmarks.networks import NETWORKS, random_network, trained
from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from layers.packing import rows_for
from training.state import Recipe, new_state
from training.step import draw, train_step

# Rows and columns of tokens: three images of the full size, and those that were smaller from the
# beginning, of 60 to 192 tokens
MIX = [(16, 16), (22, 11), (12, 21), (12, 16), (9, 12), (8, 8), (7, 10), (10, 6)]
SIDE = 16  # of a square of the full size
LENGTH = SIDE**2


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=NETWORKS, default="DiT-S/2", metavar="MODEL",
        help="(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mixes", type=int, default=2, help="of eight images in a batch (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--mixed-precision", choices=["no", "bf16"], default="no", help="(default: %(default)s)"
    )
    return parser


def sides(model, mixes, bf16):
    """{name: a call that does a step} of both sides."""
    grids = MIX * mixes
    states = {
        name: new_state(trained(random_network(model)), Recipe(bf16=bf16, pack=length))
        for name, length in {"packed": LENGTH, "padded": None}.items()
    }
    network, process = states["packed"].network, states["packed"].process
    channels, patch = network.in_channels, network.patch_size
    with device():
        latents = {
            "packed": [torch.randn(channels, patch * h, patch * w) for h, w in grids],
            "padded": torch.randn(len(grids), channels, patch * SIDE, patch * SIDE),
        }
        labels = torch.arange(len(grids))
    shape = latents["padded"].shape[1:]
    draws = draw(0, 0, len(grids), tuple(shape), 0.1, process, device())
    return {
        name: lambda name=name: train_step(states[name], latents[name], labels, draws)
        for name in states
    }


def main(argv=None):
    args = build_parser().parse_args(argv)
    tokens = [height * width for height, width in MIX] * args.mixes
    rows = len(rows_for(tokens, LENGTH))
    calls = sides(args.model, args.mixes, args.mixed_precision == "bf16")
    for call in calls.values():
        call(), call()
    seconds = alternate(calls, args.rounds)
    found = ratios(seconds, "packed")
    print(f"{args.model}, {len(tokens)} images: {rows} rows of {LENGTH} tokens, {sum(tokens)} full")
    table({name: [value] for name, value in found.items()}, ("ratio to packed, quartiles",))
    write(
        f"packing-{device().type}",
        {
            "settings": vars(args) | {"mix": MIX, "length": LENGTH},
            "rows": {"packed": rows, "padded": len(tokens)}, RATIO: found,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
