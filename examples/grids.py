"""Grids of images that share their noise: what lies between two classes, and what guidance does.

    python examples/grids.py interpolate             # the digits of this repository, in seconds
    python examples/grids.py interpolate --class-labels 3 8 3 8 --steps-between 5
    python examples/grids.py guidance --class-labels 2 4 --cfg-scale 1 2 8
    python examples/grids.py guidance --ckpt results/000-DiT-XL-2 --vae ema --class-labels 207 360

`interpolate` draws a row for each pair of classes, from the first to the second: the network is
given embeddings on the line between theirs. `guidance` draws a row for each class and a column for
each scale. Other flags are those of sample.py.
"""

import argparse
from dataclasses import replace
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import numpy as np
import torch

from runtime.devices import choose_device, tf32
from models import DiT
from sampling.pictures import captions, ending, picture, save
from conditions.labels import label_indices, readable
from runtime.disk import check_writable
from checkpoints.loading import find_files
from sampling.flags import (
    add_network_flags, add_process_flags, check_flags, network_choice, sampling_options,
)  # fmt: skip
from sampling.loading import QUICK, build_sampler
from sampling.options import SamplingOptions
from sampling.speed import prepare

DIGITS = ROOT / "examples" / "digits"


def build_parser():
    parser = Parser(__file__, description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{interpolate,guidance}")
    own = dict(conflict_handler="resolve")  # some flags of sample.py mean something else here
    line = kinds.add_parser("interpolate", help="rows that go from one class to another", **own)
    add_flags(
        line, labels=["1", "7", "3", "8", "4", "9", "6", "0"],
        labels_help="two for each row, from and to",
    )  # fmt: skip
    line.add_argument(
        "--steps-between", type=int, default=7,
        help="images between the two classes (default: %(default)s)",
    )  # fmt: skip
    sweep = kinds.add_parser("guidance", help="a column for each scale of guidance", **own)
    add_flags(sweep, labels=["0", "3", "5", "8"], labels_help="one for each row")
    sweep.add_argument(
        "--cfg-scale", type=float, nargs="+", default=[1.0, 1.5, 2.0, 4.0, 8.0],
        help="one for each column; 1 is no guidance (default: 1 1.5 2 4 8)",
    )  # fmt: skip
    return parser


def add_flags(parser, labels, labels_help):
    """Add what both kinds of grid have."""
    network = add_network_flags(parser, vae=None)
    network.add_argument(
        "--ckpt", help="as for sample.py; goes with --vae (default: the digits of this repository)"
    )
    network.add_argument(
        "--vae", help="as for sample.py; goes with --ckpt (default: that of the digits)"
    )
    network.add_argument(
        "--device", help="such as cpu or cuda:1 (default: the GPU if there is one)"
    )
    add_process_flags(parser, cfg_scale=1.5)
    parser.set_defaults(sampler=QUICK)
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--class-labels", nargs="+", metavar="LABEL", default=labels,
        help=f"numbers, else names if the checkpoint knows them; {labels_help} "
        f"(default: {' '.join(labels)})",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0,
        help="a row's noise depends on it and the row's number (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--output",
        help="file to write, replaced if it exists (default: interpolate.png or guidance.png)",
    )


@door("the number of --class-labels, of --cfg-scale or --steps-between")
def main(argv=None):
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    with parser.refusing():
        args = filled(args)
        device = choose_device(args.device)
        with tf32(args.tf32):
            images, texts, settings = KINDS[args.kind](args, given, device)
    rows, columns = images.shape[:2]
    canvas = picture(
        images.reshape(-1, *images.shape[2:]), [text for row in texts for text in row],
        per_row=columns,
    )  # fmt: skip
    try:
        save(canvas, args.output, settings)
    except ValueError as error:
        parser.fail(str(error))
    print(f"wrote {args.output}: {rows} rows of {columns} images")


def filled(args):
    """The arguments with what is the digits' unless told otherwise.

    Raises ValueError for flags that make no sense for any network.
    """
    if (args.ckpt is None) != (args.vae is None):
        raise ValueError(
            "--ckpt and --vae go together, a network and the autoencoder that it was trained with; "
            "pass both"
        )
    values = {"output": args.output or f"{args.kind}.png"}
    if args.ckpt is None:
        values |= {"ckpt": str(DIGITS / "dit.safetensors"), "vae": str(DIGITS / "vae")}
    check_writable(values["output"])
    ending(values["output"])
    return argparse.Namespace(**vars(args) | values)


def sampler_of(args, given, options, device):
    """The Sampler of the network that the flags ask for."""
    choice = network_choice(args, given)
    return build_sampler(choice, find_files(choice, args.vae), options, device, quick=True)


def interpolation(args, given, device):
    """Images (rows, columns, H, W, 3), uint8, their texts, and the settings of the picture. `given`
    are the names of the flags that the command line gives.

    Raises ValueError for flags that do not fit one another.
    """
    if args.steps_between < 0:
        raise ValueError(f"--steps-between is {args.steps_between}; 0 is the least")
    check_flags(args)
    options = sampling_options(args, given)
    if len(args.class_labels) % 2:
        raise ValueError(
            f"--class-labels: {len(args.class_labels)} given; give two for each row, from and to"
        )
    sampler = sampler_of(args, given, options, device)
    labels, names = classes_of(sampler, args.class_labels)
    pairs, shares = (
        list(zip(labels[::2], labels[1::2])),
        np.linspace(0, 1, args.steps_between + 2).tolist(),
    )
    network = between(sampler.network, pairs, shares).to(device)
    prepare(network, options.mixed_precision, options.compile, options.cache is not None)
    sampler = replace(sampler, network=network)
    ways = torch.arange(network.num_classes, device=device).view(len(pairs), len(shares))
    images = [draw(sampler, args.seed, [row] * len(way), way) for row, way in enumerate(ways)]
    texts = [
        [a, *(f"{share:.3g}" for share in shares[1:-1]), b] for a, b in zip(names[::2], names[1::2])
    ]
    return np.stack(images), texts, vars(args) | options.settled(sampler.process, sampler.sampler)


def between(network, pairs, shares):
    """The network with other classes: for each pair (a, b) and each share s one with the embedding
    (1-s)·a + s·b.
    """
    state = network.state_dict()
    table = state["y_embedder.embedding_table.weight"]
    mixed = torch.stack([(1 - s) * table[a] + s * table[b] for a, b in pairs for s in shares])
    # With the null row
    state["y_embedder.embedding_table.weight"] = torch.cat([mixed, table[network.num_classes :]])
    new = DiT(**{**network.config, "num_classes": len(mixed)})
    new.load_state_dict(state)
    new.extrapolation = network.extrapolation
    return new.eval()


def guidance_sweep(args, given, device):
    """Images (rows, columns, H, W, 3), uint8, their texts, and the settings of the picture. `given`
    are the names of the flags that the command line gives.

    Raises ValueError for flags that do not fit one another.
    """
    check_flags(args)
    everywhere = {"cfg_interval": SamplingOptions.cfg_interval}
    variants = [
        # An interval is for guidance, and a column with scale 1 has none
        sampling_options(args, given, cfg_scale=scale, **everywhere if scale == 1 else {})
        for scale in args.cfg_scale
    ]
    first = sampler_of(args, given, variants[0], device)
    labels, names = classes_of(first, args.class_labels)
    samplers = [
        replace(first, cfg_scale=each.cfg_scale, cfg_interval=each.cfg_interval)
        for each in variants
    ]
    rows = torch.tensor(labels, device=device)
    columns = [draw(sampler, args.seed, range(len(labels)), rows) for sampler in samplers]
    texts = [[f"scale {scale:g}: {name}" for scale in args.cfg_scale] for name in names]
    settled = variants[0].settled(first.process, first.sampler)
    guidance = {"cfg_scale": args.cfg_scale, "cfg_interval": args.cfg_interval}
    return np.stack(columns, axis=1), texts, vars(args) | settled | guidance


def classes_of(sampler, given):
    """The class indices for --class-labels, and their names.

    Raises ValueError for one that the network does not have.
    """
    if sampler.network.num_classes == 0:
        raise ValueError(
            "the network was trained without classes, so there is nothing to go between or to "
            "guide towards"
        )
    try:
        labels = label_indices(given, sampler.network.num_classes, sampler.classes)
    except ValueError as error:
        raise ValueError(f"--class-labels {error}") from None
    return labels, captions(labels, sampler.network.num_classes, readable(sampler.classes))


def draw(sampler, seed, indices, labels):
    """Images (N, H, W, 3), a uint8 array, of labels (N,); those with the same index have the same
    noise.
    """
    return sampler.decode(sampler.numbered_latents(seed, indices, labels)).cpu().numpy()


KINDS = {"interpolate": interpolation, "guidance": guidance_sweep}


if __name__ == "__main__":
    main()
