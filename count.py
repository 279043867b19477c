"""Print what a DiT costs: parameters, multiply-adds, the operations of training on an image, and memory.

    python count.py                                                   # the paper's sizes, and ours, at 256 pixels
    python count.py --model DiT-XL/2 --image-size 512
    python count.py --model DiT-XL/2 --block adaln_zero adaln cross_attention in_context adaln_single
    python count.py --model DiT-XL/2 DiT-L/2 --mixed-precision bf16 --grad-checkpointing
    python count.py --model DiT-Ti/1 --vae examples/digits/vae --image-size 32 --num-classes 10

One row for each network, whose weights are counted and not made:
  parameters     all of them, the fixed position table too
  GMAC           billions of multiply-adds of one forward pass on one image; the paper calls them Gflops
  TFLOP          trillions of floating-point operations (2 per multiply-add) of training on one image: forward, and twice
                 that backward; what --grad-checkpointing computes again is not in it
  weights        in float32, which is about what sampling takes
  training       weights, gradients, AdamW's two moments and one average, 20 bytes per parameter; with --mixed-precision
                 bf16 also the copies that autocast keeps. Where several processes train, each needs 4 bytes per parameter
                 more, for exchanging gradients
  per image      what the forward pass keeps of each image of a process's batch for the backward pass; with
                 --grad-checkpointing also what one block computes again. Smaller buffers that come and go, and the
                 autoencoder, are not in it
"""

from command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from argparse import Namespace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from limits import check_numbers
from models import BLOCKS, DiT, DiT_models
from training import training_flops
from vae import latent_shape

TRAINING_BYTES = 4 * 5  # of a parameter in float32: weight, gradient, two moments, average
HEADER = ("model", "block", "parameters", "GMAC", "TFLOP", "weights", "training", "per image")
ROW = "{:<10} {:<16} {:>13} {:>9} {:>9} {:>11} {:>11} {:>12}"


class Cost(NamedTuple):
    """What one network takes; sizes in bytes."""

    parameters: int
    macs: int
    training_flops: int
    weights: int
    training: int
    per_image: int


def count(config: dict, bf16: bool = False, grad_checkpointing: bool = False) -> Cost:
    """The Cost of the DiT with these arguments. Raises ValueError if they do not fit together."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiT(**config).parameters())
    flops = training_flops(config)
    copies, per_image = kept(config, bf16, grad_checkpointing)
    if grad_checkpointing:
        per_image += (kept(config, bf16, False)[1] - per_image) // config["depth"]  # one block, as it is without
    return Cost(parameters, flops // 6, flops, 4 * parameters, TRAINING_BYTES * parameters + copies, per_image)


def kept(config: dict, bf16: bool, grad_checkpointing: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass: (whatever the batch, for each of its images)."""
    one, two = (kept_for_backward(config, n, bf16, grad_checkpointing) for n in (1, 2))
    return 2 * one - two, two - one


def kept_for_backward(config: dict, batch_size: int, bf16: bool, grad_checkpointing: bool) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, counted on tensors without contents."""
    kept: dict[int, torch.Tensor] = {}
    with FakeTensorMode():
        network = DiT(**config).train()
        network.grad_checkpointing = grad_checkpointing
        parameters = {p.untyped_storage()._cdata for p in network.parameters()}

        def keep(tensor):
            if tensor.untyped_storage()._cdata not in parameters:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        x = torch.zeros(batch_size, network.in_channels, network.input_size, network.input_size)
        labels = torch.zeros(batch_size, dtype=torch.long) if network.num_classes else None
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = network(x, torch.zeros(batch_size), labels)
        del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    names = ", ".join(DiT_models)
    parser.add_argument(
        "--model",
        nargs="+",
        choices=DiT_models,
        default=list(DiT_models),
        metavar="MODEL",
        help=f"{names} (default: all)",
    )
    blocks = "one or more designs (default: adaln_zero)"
    parser.add_argument("--block", nargs="+", choices=BLOCKS, default=["adaln_zero"], help=blocks)
    parser.add_argument("--image-size", type=int, default=256, help="in pixels (default: %(default)s)")
    parser.add_argument("--num-classes", type=int, default=1000, help="0 for none (default: %(default)s)")
    vae = "what lies between pixels and network: ema, mse, a hub id, a local folder, or none (default: %(default)s)"
    parser.add_argument("--vae", default="ema", help=vae)
    bf16 = "bf16: memory as train.py has it with this flag (default: %(default)s)"
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help=bf16)
    parser.add_argument("--grad-checkpointing", action="store_true", help="memory as train.py has it with this flag")
    return parser


@door("--image-size")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(Namespace(image_size=args.image_size))  # the network itself looks at the classes
        shape = latent_shape(args.vae)
        sides = {name: shape.side(args.image_size, DiT_models[name].keywords["patch_size"]) for name in args.model}
        configs = [
            dict(input_size=sides[name], in_channels=shape.channels, num_classes=args.num_classes, block=block)
            for name in args.model
            for block in args.block
        ]
        with torch.device("meta"):
            DiT(**configs[0])
    print(ROW.format(*HEADER))
    for name, config in zip((name for name in args.model for _ in args.block), configs):
        with parser.refusing():  # of one size alone
            cost = count(DiT_models[name].keywords | config, args.mixed_precision == "bf16", args.grad_checkpointing)
        print(
            ROW.format(
                name, config["block"], f"{cost.parameters:,}", f"{cost.macs / 1e9:.3f}", f"{cost.training_flops / 1e12:.4f}",
                f"{cost.weights / 2**30:.2f} GiB", f"{cost.training / 2**30:.2f} GiB", f"{cost.per_image / 2**20:.1f} MiB",
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
