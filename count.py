"""Print what a network costs: parameters, multiply-adds, the operations of training, and memory.

    python count.py        # the paper's sizes, and ours, at 256 pixels
    python count.py --model DiT-XL/2 --image-size 512
    python count.py --model DiT-L/2 --block adaln_zero adaln cross_attention in_context adaln_single
    python count.py --model DiT-XL/2 --positions rope --norm rms --mlp swiglu
    python count.py --model DiT-XL/2 DiT-L/2 --mixed-precision bf16 --grad-checkpointing
    python count.py --model DiT-Ti/1 --vae examples/digits/vae --image-size 32 --num-classes 10
    python count.py --model MMDiT-15/2 PixArt-XL/2                 # that read captions
    python count.py --model PixArt-XL/2 --text-width 4096          # of an encoder outside
    python count.py --model DiT-XL/2 --exits 21:0.3 14:0.6         # less depth where noise is high
    python count.py --model Latte-XL/2 SpaceTime-XL/2 --frames 32  # of clips
    python count.py --ckpt dynamic.safetensors                     # as it is sampled

One row for each network, whose weights are counted and not made. A caption has as many tokens as
--text-length says; an encoder outside of the network is not in it. Of a network that makes clips an
image is a clip, of --frames frames. With --ckpt the one line is about what a checkpoint's network
takes as it is sampled, which is less than it has where train.py --dynamic or --exits trained it.
  parameters     all of them, the fixed position table too; a flow's last layer has half as many,
                 for it has no learned variance
  GMAC           billions of multiply-adds of one forward pass on one image; the paper calls them
                 Gflops
  TFLOP          trillions of floating-point operations (2 per multiply-add) of training on one
                 image: forward, and twice that backward; what --grad-checkpointing computes again
                 is not in it
  weights        in float32, which is about what sampling takes
  training       weights, gradients, AdamW's two moments and one average, 20 bytes per parameter;
                 with --mixed-precision bf16 also the copies that autocast keeps. Where several
                 processes train, each needs 4 bytes per parameter more, for exchanging gradients
  per image      what the forward pass keeps of each image of a process's batch for the backward
                 pass; with --grad-checkpointing also what one block computes again. Smaller buffers
                 that come and go, and the autoencoder, are not in it
"""

from runtime.command_line import Parser, check_alone, door, end_at_interrupt, read_size

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from argparse import Namespace

import torch

from checkpoints.networks import CLASS, MODELS, ExitDiT, arguments_of, create_network
from layers.parts import DEFAULTS as PARTS, NAMES, PAPERS
from models import BLOCKS, DiT, DiT_models
from runtime.limits import check_numbers
from training.cost import Cost, Sampled, count, sampled
from training.options import TrainOptions
from vae import latent_shape
from variants.exits import DESIGN, read_exit
from variants.video import VideoDiT

HEADER = ("model", "block", "parameters", "GMAC", "TFLOP", "weights", "training", "per image")
TEXT = ("text_width", "pooled_width", "text_length")  # arguments of networks that read captions
OWN = (*TEXT, "frames")  # arguments that some networks have
ROW = "{:<27} {:>13} {:>9} {:>9} {:>11} {:>11} {:>12}"


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    names = ", ".join(MODELS)
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, default=list(DiT_models), metavar="MODEL",
        help=f"{names} (default: all DiT)",
    )  # fmt: skip
    blocks = "one or more designs (default: adaln_zero)"
    parser.add_argument(
        "--block", nargs="+", choices=BLOCKS, default=[TrainOptions.block], help=blocks
    )
    for name, choices in NAMES.items():
        if name != "extrapolation":  # which costs nothing
            parser.add_argument(
                f"--{name}", choices=choices, default=PARTS[name],
                help="as train.py has it (default: %(default)s)",
            )  # fmt: skip
    parser.add_argument("--qk-norm", action="store_true", help="as train.py has it (default: off)")
    parser.add_argument(
        "--image-size", type=read_size, default=TrainOptions.image_size,
        help="in pixels: a number, or HEIGHTxWIDTH (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--num-classes", type=int, default=TrainOptions.num_classes,
        help="0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--vae", default=TrainOptions.vae,
        help="what lies between pixels and network: ema, mse, a hub id, a local folder, or none "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--exits", nargs="+", metavar="DEPTH:LEVEL",
        help="as train.py has it: GMAC and TFLOP are the mean over noise levels that are equally "
        "likely, as in steps of equal length (default: none)",
    )  # fmt: skip
    for name in TEXT:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int,
            help="of networks that read captions (default: of an encoder in the network, which "
            "reads 32 pieces of words)" if name == TEXT[0] else "likewise",
        )  # fmt: skip
    frames = arguments_of(VideoDiT.__name__)["frames"]
    parser.add_argument(
        "--frames", type=int, help=f"of networks that make clips (default: {frames})"
    )
    bf16 = "bf16: memory as train.py has it with this flag (default: %(default)s)"
    parser.add_argument(
        "--mixed-precision", choices=["no", "bf16"], default=TrainOptions.mixed_precision, help=bf16
    )
    parser.add_argument(
        "--ckpt",
        help="a checkpoint, without other flags: only what its network takes in a step of "
        "sampling is printed, on average over 50 steps and 8 samples",
    )
    parser.add_argument(
        "--grad-checkpointing", action="store_true", help="memory as train.py has it with this flag"
    )
    return parser


@door("--image-size")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    if args.ckpt is not None:
        with parser.refusing():
            check_alone("ckpt", given, "says itself what its network is")
            return print(told(args.ckpt, sampled(args.ckpt)))
    with parser.refusing():
        # The network itself looks at the classes
        check_numbers({"image_size": args.image_size})
        networks = described(args)
        with torch.device("meta"):
            create_network(MODELS[networks[0][0]].keywords | networks[0][1])
    print(ROW.format(labelled(*HEADER[:2]), *HEADER[2:]))
    for name, config in networks:
        with parser.refusing():  # of one size alone
            cost = count(
                MODELS[name].keywords | config, args.mixed_precision == "bf16",
                args.grad_checkpointing,
            )  # fmt: skip
        print(row(name, config.get("block") or config[CLASS], cost), flush=True)


def described(args: Namespace) -> list[tuple[str, dict]]:
    """[(name, its config)] of the networks that the flags ask for.

    Raises ValueError for an image size that does not fit one of them, and for what none has.
    """
    shape = latent_shape(args.vae)
    sizes = {
        name: shape.size(args.image_size, MODELS[name].keywords["patch_size"])
        for name in args.model
    }
    given = {name: getattr(args, name) for name in (*PAPERS._fields, *OWN)}
    shared = {"in_channels": shape.channels, "num_classes": args.num_classes}
    shared |= {name: value for name, value in given.items() if value != PARTS.get(name)}
    known = {name: arguments_of(MODELS[name].func.__name__) for name in args.model}
    for key, value in shared.items():
        if key in given and not any(key in arguments for arguments in known.values()):
            raise ValueError(f"`{key}` is {value}, and {', '.join(args.model)} has no such part")
    found = [
        (name, {key: value for key, value in config.items() if key in known[name]} | kind)
        for name in args.model
        for config, kind in configs(shared | {"input_size": sizes[name]}, name, args.block)
    ]
    return found if args.exits is None else [with_exits(args, *one) for one in found]


def with_exits(args: Namespace, name: str, config: dict) -> tuple[str, dict]:
    """(the name, the config) of a model, with exits. Raises ValueError for one that has none."""
    if MODELS[name].func is not DiT or config["block"] != DESIGN:
        raise ValueError(
            f"`exits` are of a DiT with blocks of {DESIGN}, and `model` has {name}; leave one out"
        )
    exits = [read_exit(text) for text in args.exits]
    others = {key: value for key, value in config.items() if key != "block"}
    return name, others | {CLASS: ExitDiT.__name__, "exits": exits}


def configs(config: dict, name: str, blocks: list[str]) -> list[tuple[dict, dict]]:
    """Of a model's configuration: [(it with a block design, {})] for each of them, or, of one that
    has no designs, [(it, its class)].
    """
    kind = MODELS[name].func.__name__
    if "block" in arguments_of(kind):
        return [({**config, "block": block}, {}) for block in blocks]
    return [(config, {CLASS: kind})]


def told(ckpt: str, found: Sampled) -> str:
    """A line on a checkpoint."""
    return (
        f"{ckpt}: {found.macs / 1e9:.4g} GMAC in a step, {found.macs / found.most:.1%} of the "
        f"{found.most / 1e9:.4g} of all that it has ({found.steps} steps of {found.solver}, seed 0)"
    )


def labelled(name: str, block: str) -> str:
    """The first two columns of a line."""
    return f"{name:<10} {block}"


def row(name: str, block: str, cost: Cost) -> str:
    """A line of the table."""
    return ROW.format(
        labelled(name, block), f"{cost.parameters:,}", f"{cost.macs / 1e9:.3f}",
        f"{cost.training_flops / 1e12:.4f}", f"{cost.weights / 2**30:.2f} GiB",
        f"{cost.training / 2**30:.2f} GiB", f"{cost.per_image / 2**20:.1f} MiB",
    )  # fmt: skip


if __name__ == "__main__":
    main()
