"""A training step against the same step of diffusers' network, and against a plain loop over the
network's formulas.

    python -m benchmarks.training                             # S/2, B/4; minutes on a CPU
    python -m benchmarks.training --models DiT-XL/2 --batch-size 64 --mixed-precision bf16 \\
      --compile                                               # on a GPU

Forward, backward, AdamW and moving average on random latents. "ours" is train.py's step;
"diffusers" is that step with diffusers' network; "written out" is a loop as one writes it first:
AdamW as it comes, the average parameter by parameter, nothing reported. All take turns in one
process. The limit is the machine's best product of two square matrices in the same rounds;
operations are three times those of the forward pass.
"""

import argparse
from copy import deepcopy

import torch

from benchmarks.anchors import Plain, Twin
from benchmarks.forward import COLUMNS
from benchmarks.networks import random_network, trained
from benchmarks.sides import LIMIT, RATIO, alternate, best_product, compare, device, table, write
from runtime.devices import tf32
from diffusion import create_diffusion
from models import DiT_models
from training.cost import training_flops
from training.state import Recipe, new_state
from training.step import draw, train_step


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["DiT-S/2", "DiT-B/4"]
    parser.add_argument(
        "--models", nargs="+", choices=DiT_models, default=models, metavar="MODEL",
        help="(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--mixed-precision", choices=["no", "bf16"], default="no", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="also ours with each block compiled, as train.py does",
    )  # fmt: skip
    return parser


class PlainLoop:
    """A training loop without any care: calling it does a step."""

    def __init__(self, network, bf16):
        self.network, self.bf16 = network.train(), bf16
        self.model, self.ema = Plain(network), deepcopy(network).requires_grad_(False)
        self.opt = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad], lr=1e-4, weight_decay=0
        )

    def __call__(self, diffusion, latents, labels, draws):
        def predict(x, t, **condition):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                return self.model(x, t, **condition).float()

        condition = dict(y=labels, force_drop_ids=draws.drop)
        losses = diffusion.training_losses(predict, latents, draws.t, condition, noise=draws.noise)
        self.opt.zero_grad()
        losses["loss"].mean().backward()
        self.opt.step()
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.network.parameters()):
                average.mul_(0.9999).add_(value, alpha=1 - 0.9999)


def measure(name, batch_size, rounds, bf16, compiled):
    """For a model, {side: seconds of each round}, and the operations of a step and the product."""
    recipe = Recipe(bf16=bf16)
    diffusion = create_diffusion("")
    latents = torch.randn(batch_size, 4, 32, 32, device=device())
    labels = torch.arange(batch_size, device=device())
    states = {
        "ours": new_state(trained(random_network(name)), recipe),
        "diffusers": new_state(Twin(random_network(name)).requires_grad_(True), recipe),
    }
    if compiled:
        states["ours, compiled"] = new_state(trained(random_network(name)), recipe)
        for block in states["ours, compiled"].network.blocks:
            block.compile()
    process = states["ours"].process
    step = latents, labels, draw(0, 0, batch_size, (4, 32, 32), 0.1, process, device())
    plain = PlainLoop(trained(random_network(name)), bf16)
    product, product_operations = best_product(torch.bfloat16 if bf16 else torch.float32)
    sides = {side: lambda state=state: train_step(state, *step) for side, state in states.items()}
    sides |= {"written out": lambda: plain(diffusion, *step), LIMIT: product}
    for side in sides.values():
        for _ in range(2):
            side()
    operations = training_flops(states["ours"].network.config) * batch_size
    return alternate(sides, rounds), operations, product_operations


def main(argv=None):
    args = build_parser().parse_args(argv)
    bf16, results = args.mixed_precision == "bf16", {}
    for name in args.models:
        with tf32(True):
            seconds, operations, product_operations = measure(
                name, args.batch_size, args.rounds, bf16, args.compile
            )
        found, shares = compare(seconds, "ours", operations, product_operations)
        print(f"{name}, batch {args.batch_size}, {operations / 1e9:.1f} GFLOP")
        table({side: (found[side], shares[side]) for side in found}, COLUMNS)
        results[name] = {RATIO: found, "share of the limit": shares}
    write(
        f"training-{device().type}-{args.mixed_precision}",
        {"settings": vars(args), "models": results},
    )


if __name__ == "__main__":
    main()
