"""Attention over all tokens of a clip against attention in the frames and along them in turn: a
forward pass of clips of more and more frames.

    python -m benchmarks.space_time                       # Ti/2; a few minutes on a CPU

Both networks have as many blocks, of the same width, and random weights. Clips are latents of
4 x 8 x 8 numbers a frame. All lengths of both sides take turns in one process; operations are
counted by PyTorch.
"""

import argparse
from functools import partial
import time

import torch

from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from checkpoints.networks import create_network
from sampling.speed import PRECISIONS
from training.cost import training_flops
from variants.video import SIZES

SIDES = {"in turn": "latte", "over all": "full"}  # name: a kind of attention
PATCH, LATENT = 2, 8
OPERATIONS = "operations as a ratio"
GROWTH = "time as a ratio to that of the first number of frames"
COLUMNS = ("ratio to in turn, quartiles", "operations")


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, help="(default: %(default)s)")
    add("--size", choices=SIZES, default="Ti")
    add("--frames", type=int, nargs="+", default=[4, 8, 16, 32], metavar="FRAMES")
    add("--batch-size", type=int, default=4)
    add("--rounds", type=int, default=15)
    add("--mixed-precision", choices=PRECISIONS, default="no")
    return parser


def random_network(size, attention, frames):
    """The network with normal weights of standard deviation 0.05, that samples only."""
    torch.manual_seed(0)
    sizes = dict(input_size=LATENT, patch_size=PATCH, frames=frames, attention=attention)
    with device():
        network = create_network({"_class_name": "VideoDiT", **SIZES[size], **sizes}).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return network.requires_grad_(False)


def forward(network, batch_size, dtype):
    """A call that does a forward pass of so many clips."""
    with device():
        x = torch.randn(batch_size, *network.latent_shape)  # (N, C, F, H, W)
        t, y = torch.linspace(0, 999, batch_size), torch.arange(batch_size)

    def call():
        with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return network(x, t, y)

    return call


def compared(networks, seconds, frames, batch_size):
    """What both sides take on clips of so many frames, as ratios to the first side; prints it."""
    base = next(iter(SIDES))
    found = ratios({side: seconds[side, frames] for side in SIDES}, base)
    operations = {
        side: training_flops(networks[side, frames].config) // 3 * batch_size for side in SIDES
    }
    shares = {side: round(count / operations[base], 3) for side, count in operations.items()}
    print(f"{frames} frames, {operations[base] / 1e9:.2f} GFLOP {base}")
    table({side: (found[side], shares[side]) for side in SIDES}, COLUMNS)
    return {RATIO: found, "operations": operations, OPERATIONS: shares}


def main(argv=None):
    args = build_parser().parse_args(argv)
    networks = {
        (side, frames): random_network(args.size, attention, frames)
        for frames in args.frames for side, attention in SIDES.items()
    }  # fmt: skip
    dtype = PRECISIONS[args.mixed_precision]
    calls = {key: forward(network, args.batch_size, dtype) for key, network in networks.items()}
    for call in calls.values():
        call(), call()
    # On a CPU of this process alone: other work may share the machine
    clock = time.process_time if device().type == "cpu" else time.perf_counter
    seconds = alternate(calls, args.rounds, clock)
    lengths = {
        frames: compared(networks, seconds, frames, args.batch_size) for frames in args.frames
    }
    growth = {
        side: ratios({frames: seconds[side, frames] for frames in args.frames}, args.frames[0])
        for side in SIDES
    }
    write(
        f"space-time-{device().type}-{args.mixed_precision}",
        {"settings": vars(args), "frames": lengths, GROWTH: growth},
    )


if __name__ == "__main__":
    main()
