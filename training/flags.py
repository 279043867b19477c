"""The flags of train.py, and what can be wrong with them before anything is loaded."""

import argparse
from collections.abc import Callable

import torch

from runtime.command_line import Parser
from conditions.labels import CLASSES
from runtime.limits import check_numbers
from evaluation.metrics import SCORED
from models import BLOCKS, DiT_models
from runtime.surroundings import is_installed
from vae import latent_shape


def build_parser(description: str | None = None) -> Parser:
    """The parser of train.py's command line; its usage is one line, so that an error is not buried
    below it.
    """
    parser = Parser(
        "train.py", description=description,
        usage="%(prog)s --data-path DIR [flags; --help lists them]",
    )  # fmt: skip
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_network_flags(parser.add_argument_group("network").add_argument)
    add_recipe_flags(parser.add_argument_group("recipe").add_argument)
    add_speed_flags(
        parser.add_argument_group(
            "speed and memory: these change a result by rounding at most"
        ).add_argument
    )
    add_run_flags(parser.add_argument_group("run").add_argument)
    add_evaluation_flags(parser.add_argument_group("scores while training").add_argument)
    return parser


def add_data_flags(add: Callable) -> None:
    add(
        "--data-path",
        help="folder with one folder of images per class; required unless --latents is given",
    )
    add(
        "--latents", metavar="DIR",
        help="folder that extract_latents.py wrote: no image is read, no VAE run",
    )  # fmt: skip
    add(
        "--image-size", type=int, default=256,
        help="pixels along each side, after the crop (default: %(default)s)",
    )  # fmt: skip
    add(
        "--num-classes", type=int, default=1000,
        help="0: none, all images below --data-path (default: %(default)s)",
    )  # fmt: skip
    add(
        "--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror half of the images (default: on)",
    )  # fmt: skip
    skipping = "put the next image in place of an unreadable one and list it, instead of stopping"
    add("--skip-bad-images", action="store_true", help=skipping)


def add_network_flags(add: Callable) -> None:
    names = ", ".join(DiT_models)
    add(
        "--model", choices=DiT_models, default="DiT-XL/2", metavar="MODEL",
        help=f"{names} (default: %(default)s)",
    )  # fmt: skip
    add(
        "--block", choices=BLOCKS, default="adaln_zero",
        help="how t and y reach the tokens (default: %(default)s)",
    )  # fmt: skip
    add(
        "--vae", default="ema",
        help="ema, mse, a hub id, a local folder, or none for pixels (default: %(default)s)",
    )  # fmt: skip
    starting = "a new run starts from these weights (EMA); another --image-size or --num-classes is allowed"
    add("--init-from", metavar="CKPT", help=starting)
    labels = "label table of --init-from: keep, drop, or a JSON file {label: label there} (default: %(default)s)"
    add("--init-labels", metavar="{keep,drop,FILE}", default="keep", help=labels)


def add_recipe_flags(add: Callable) -> None:
    add("--epochs", type=int, default=1400, help="passes over the data (default: %(default)s)")
    add("--max-steps", type=int, help="stop after this many steps, if that comes before --epochs")
    add(
        "--global-batch-size", type=int, default=256,
        help="samples per step, all processes (default: %(default)s)",
    )  # fmt: skip
    add(
        "--lr", type=float, default=1e-4,
        help="AdamW's learning rate, constant (default: %(default)s)",
    )  # fmt: skip
    add(
        "--warmup-steps", type=int, default=0,
        help="over which it rises from 0 (default: %(default)s)",
    )  # fmt: skip
    add("--weight-decay", type=float, default=0.0, help="AdamW's (default: %(default)s)")
    add("--grad-clip", type=float, metavar="NORM", help="scale larger gradients down to this norm")
    decays = "of the weights' moving averages; the first is the one that is sampled from (default: 0.9999)"
    add("--ema-decay", type=float, nargs="+", default=[0.9999], metavar="DECAY", help=decays)
    add(
        "--global-seed", type=int, default=0,
        help="decides every random number (default: %(default)s)",
    )  # fmt: skip
    bf16 = "bf16: autocast, with float32 weights, norms and losses (default: %(default)s)"
    add("--mixed-precision", choices=["no", "bf16"], default="no", help=bf16)
    bad = "stop after this many steps in a row whose loss or gradient is not finite (default: %(default)s)"
    add("--max-bad-steps", type=int, default=10, help=bad)


def add_speed_flags(add: Callable) -> None:
    add(
        "--grad-accum", type=int, default=1,
        help="parts that a batch is run in, to save memory (default: %(default)s)",
    )  # fmt: skip
    checkpointing = "compute activations again in the backward pass: less memory, slower"
    add("--grad-checkpointing", action="store_true", help=checkpointing)
    add(
        "--compile", action="store_true", help="compile the blocks: minutes once, then faster steps"
    )
    tf32_help = "TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)"
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help=tf32_help)
    add(
        "--fsdp", action="store_true",
        help="split weights, averages and optimizer over the processes (FSDP2)",
    )  # fmt: skip


def add_run_flags(add: Callable) -> None:
    add(
        "--results-dir", default="results", help="where run folders are made (default: %(default)s)"
    )
    resuming = (
        "auto: the newest run with equal arguments, else a new one; or a checkpoint or run folder"
    )
    add("--resume", metavar="{auto,PATH}", help=resuming)
    add("--log-every", type=int, default=100, help="steps between log lines (default: %(default)s)")
    saving = "steps between checkpoints; the last step always is one (default: %(default)s)"
    add("--ckpt-every", type=int, default=50000, help=saving)
    add(
        "--ckpt-minutes", type=float, metavar="M",
        help="also save when the last checkpoint is this old",
    )  # fmt: skip
    add(
        "--keep-last", type=int, metavar="N",
        help="delete this run's older checkpoints (default: keep all)",
    )  # fmt: skip
    failing = "when a checkpoint cannot be written, the disk being full, say (default: %(default)s)"
    add("--on-save-error", choices=["stop", "continue"], default="stop", help=failing)
    add(
        "--sample-every", type=int, metavar="N",
        help="steps between preview pictures, from the EMA weights",
    )  # fmt: skip
    add("--log-with", choices=["tensorboard", "wandb"], help="also send the metrics there")
    add(
        "--num-workers", type=int, default=4,
        help="loader processes per training process (default: %(default)s)",
    )  # fmt: skip
    add("--device", choices=["cpu", "cuda", "mps"], help="default: the GPU if there is one")


def add_evaluation_flags(add: Callable) -> None:
    scoring = "steps between scores (FID and others) of samples from the EMA weights: 50 DDIM steps, no guidance"
    add("--eval-every", type=int, metavar="N", help=scoring)
    add(
        "--eval-samples", type=int, default=10_000,
        help="how many are sampled for a score (default: %(default)s)",
    )  # fmt: skip
    add(
        "--eval-reference", metavar="PATH",
        help="what they are compared with; as evaluate.py --reference",
    )  # fmt: skip
    features = (
        "by which features; as evaluate.py --features, so a TorchScript file, too, which is a program: trust where it comes "
        "from (default: %(default)s)"
    )
    add("--eval-features", default="inception", metavar="{inception,pixels,PATH}", help=features)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers out of range and sizes that do not fit, before anything is
    loaded.
    """
    if args.data_path is None and args.latents is None:
        raise ValueError("--data-path is missing; give a folder of images, or --latents")
    check_numbers(args, num_classes=CLASSES, eval_samples=SCORED)
    for decay in args.ema_decay:
        if not 0 <= decay < 1 or args.ema_decay.count(decay) > 1:
            raise ValueError(
                f"--ema-decay is {decay}; each must be at least 0 and below 1, and stand there once"
            )
    check_surroundings(args)
    if args.latents is None:
        latent_shape(args.vae).side(args.image_size, DiT_models[args.model].keywords["patch_size"])


def check_surroundings(args: argparse.Namespace) -> None:
    """Raise ValueError for a device or a tracker that is not there, and for flags that need
    another.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: PyTorch sees no CUDA device here; leave the flag out or pass --device cpu"
        )
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            "--device mps: PyTorch sees no Apple GPU here; leave the flag out or pass --device cpu"
        )
    if args.log_with and not is_installed(args.log_with):
        raise ValueError(
            f"--log-with {args.log_with}: it is not installed; pip install {args.log_with}"
        )
    if args.init_from is not None and args.resume not in (None, "auto"):
        raise ValueError(
            "--init-from and --resume PATH both say what to start from; give one of them"
        )
    if args.init_labels != "keep" and args.init_from is None:
        raise ValueError(
            f"--init-labels {args.init_labels} is about --init-from, which is not given"
        )
    if (args.eval_every is None) != (args.eval_reference is None):
        raise ValueError("--eval-every and --eval-reference go together; give both, or neither")
    if args.latents is not None and args.vae == "none":
        raise ValueError(
            "--latents with --vae none: pixels have no latents to cache; give --data-path alone"
        )
