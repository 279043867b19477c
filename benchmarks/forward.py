"""A forward pass against other forms of it and against the machine's limit.

    python -m benchmarks.forward        # S/2, B/4, XL/8, XL/2; minutes on a CPU
    # on a GPU:
    python -m benchmarks.forward --models DiT-XL/2 --batch-size 64 --mixed-precision bf16 \\
        --no-compile

The other forms are diffusers' network, the formulas written out, and the network compiled. All
sides have the same random weights and inputs and take turns in one process. The limit is the
machine's best product of two square matrices, measured in the same rounds in the precision of the
pass; operations are counted by PyTorch.
"""

import argparse
from functools import partial

import torch

from benchmarks.anchors import Plain, Twin
from benchmarks.networks import random_network, twin_of
from benchmarks.sides import LIMIT, RATIO, alternate, best_product, compare, device, table, write
from runtime.devices import tf32
from models import DiT_models
from sampling.speed import PRECISIONS, prepare
from training.cost import training_flops

COLUMNS = ("ratio to ours, quartiles", "share of the limit")


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["DiT-S/2", "DiT-B/4", "DiT-XL/8", "DiT-XL/2"]
    parser.add_argument(
        "--models", nargs="+", choices=DiT_models, default=models, metavar="MODEL",
        help="(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument(
        "--mixed-precision", choices=PRECISIONS, default="no", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--no-compile", nargs="*", default=["DiT-XL/2"], metavar="MODEL",
        help="models whose compiled side is left out; without a model: none "
        "(default: %(default)s, slow to compile on a CPU)",
    )  # fmt: skip
    return parser


@torch.no_grad()
def measure(name, args):
    """{side: seconds of each round}, and the operations of a pass and of the product, for a model.
    """
    network, dtype = random_network(name), PRECISIONS[args.mixed_precision]
    with device():
        x = torch.randn(args.batch_size, *network.latent_shape)  # (N, C, H, W)
        t = torch.linspace(0, 999, args.batch_size).round()
        y = torch.arange(args.batch_size)
    sides = {"ours": twin_of(network), "diffusers": Twin(network), "written out": Plain(network)}
    if name not in args.no_compile:
        sides["ours, compiled"] = twin_of(network)
    for side, called in sides.items():
        if side.startswith("ours"):
            prepare(called, args.mixed_precision, "compiled" in side)

    def call(called):
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return called(x, t, y)

    outputs = {side: call(called).float().clone() for side, called in sides.items()}
    product, product_operations = best_product(dtype or torch.float32)
    calls = {side: partial(call, called) for side, called in sides.items()} | {LIMIT: product}
    for one in calls.values():
        one()
    far = {
        side: ((out - outputs["ours"]).abs().max() / outputs["ours"].abs().max()).item()
        for side, out in outputs.items()
    }
    operations = training_flops(network.config) // 3 * args.batch_size
    return alternate(calls, args.rounds), far, operations, product_operations


def main(argv=None):
    args = build_parser().parse_args(argv)
    results = {}
    for name in args.models:
        with tf32(True):
            seconds, far, operations, product_operations = measure(name, args)
        found, shares = compare(seconds, "ours", operations, product_operations)
        print(f"{name}, batch {args.batch_size}, {operations / 1e9:.1f} GFLOP")
        table({side: (found[side], shares[side]) for side in found}, COLUMNS)
        results[name] = {
            RATIO: found, "share of the limit": shares,
            "largest difference of the output, relative to its largest value": far,
        }  # fmt: skip
    write(
        f"forward-{device().type}-{args.mixed_precision}",
        {"settings": vars(args), "models": results},
    )


if __name__ == "__main__":
    main()
