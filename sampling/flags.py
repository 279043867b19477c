"""The flags of sample.py and sample_ddp.py that say what is sampled from which network, and how."""

from argparse import (
    Action, ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace, _ArgumentGroup,
)  # fmt: skip
from typing import Any

from checkpoints.weights import weights_choice
from runtime.limits import RANGES, check_numbers, short
from models import DiT_models
from processes.gaussian import TRAINED_STEPS
from processes.table import SOLVERS
from sampling.sampler import check_steps
from sampling.speed import PRECISIONS

MODEL, IMAGE_SIZE, NUM_CLASSES = "DiT-XL/2", 256, 1000  # unless told otherwise


def add_sampling_flags(parser: ArgumentParser, vae: str, cfg_scale: float) -> None:
    """Add the flags that decide what is sampled from which network; vae and cfg_scale are their
    defaults.
    """
    network = add_network_flags(parser, vae)
    network.add_argument(
        "--device", help="such as cpu or cuda:1 (default: the GPU if there is one)"
    )
    add_process_flags(parser.add_argument_group("process"), cfg_scale)


def add_network_flags(
    parser: ArgumentParser, vae: str | None,
    without: str = f"the released {MODEL}, fetched on first use",
) -> _ArgumentGroup:  # fmt: skip
    """Add those of them that say which network; vae is that flag's default, `without` says what is
    used without --ckpt.

    Returns their argument group.
    """
    network = parser.add_argument_group("network")
    network.add_argument(
        "--ckpt",
        help="checkpoint file (.pt, .safetensors), run folder, folder with config.json, pipeline of diffusers, or OWNER/NAME "
        f"of one of the last two on the Hugging Face hub (default: {without})",
    )
    network.add_argument(
        "--weights", type=_weights, default="ema", metavar="{ema,raw,ema@DECAY}",
        help="which of the checkpoint's weights (default: %(default)s)",
    )  # fmt: skip
    network.add_argument(
        "--vae",
        action=Said,
        default=vae,
        help="ema, mse, a hub id, a local folder, or none for pixels (default: "
        f"{vae or 'the one that the checkpoint names'}; of a pipeline of diffusers its own)",
    )
    bare = parser.add_argument_group("network, for checkpoints that do not say")
    bare.add_argument(
        "--model", action=Said, choices=DiT_models, default=MODEL, metavar="MODEL",
        help=f"one of {', '.join(DiT_models)} (default: %(default)s)",
    )  # fmt: skip
    bare.add_argument(
        "--image-size", action=Said, type=int, default=IMAGE_SIZE,
        help="in pixels (default: %(default)s)",
    )  # fmt: skip
    bare.add_argument(
        "--num-classes", action=Said, type=int, default=NUM_CLASSES,
        help="0 for a network without classes (default: %(default)s)",
    )  # fmt: skip
    return network


def add_process_flags(process: _ArgumentGroup, cfg_scale: float) -> None:
    """Add those of them that say how it is sampled."""
    process.add_argument(
        "--sampler", choices=SOLVERS, default="ddpm",
        help="ddpm: ancestral sampling; ddim; dpm++: DPM-Solver++(2M); unipc: UniPC of order 2 (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--num-sampling-steps",
        "--steps",
        action=Said,
        type=int,
        default=SOLVERS["ddpm"].steps,
        help=f"at most {TRAINED_STEPS}, one less for dpm++ and unipc (default: "
        f"{', '.join(f'{name} {solver.steps}' for name, solver in SOLVERS.items())})",
    )
    process.add_argument(
        "--eta", type=float, default=0.0,
        help="noise that ddim adds: 0 none, 1 as much as ddpm (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--cfg-scale", type=float, default=cfg_scale,
        help="guidance; 1 is none (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--cfg-channels", type=_channels, default=3,
        help="latent channels to guide, or all (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LO", "HI"),
        help=f"guide only at steps t with LO <= t/{TRAINED_STEPS} <= HI, 0 being clean and 1 noise; elsewhere without "
        "guidance, on half the batch, at about half the cost (default: 0 1, everywhere)",
    )
    process.add_argument(
        "--mixed-precision", choices=PRECISIONS, default="no",
        help="the network's; the steps and the VAE stay in float32 (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--tf32", action=BooleanOptionalAction, default=True,
        help="TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)",
    )  # fmt: skip
    process.add_argument(
        "--compile",
        action="store_true",
        help="compile the network (on a GPU with CUDA graphs): seconds to minutes at the start of every run, so for many "
        "images rather than one picture; results differ by float rounding",
    )


class Said(Action):
    """Stores a flag's value, and in `said` that it was given: at its default it looks like one that
    was not.
    """

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        setattr(namespace, self.dest, values)
        namespace.said = {*getattr(namespace, "said", ()), self.dest}


def _weights(text):
    try:
        return weights_choice(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _channels(text):
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} is neither a number of channels, 1 or more, nor all")
    return text if text == "all" else int(text)


def check_sampling_flags(args: Namespace) -> None:
    """Set the number of steps to the sampler's own if none was given.

    Raises ValueError for flags that make no sense whatever the checkpoint.
    """
    seed, (least, most) = (
        getattr(args, "seed", 0) or getattr(args, "global_seed", 0),
        RANGES["seed"],
    )
    if not least <= seed <= most:
        raise ValueError(f"the seed is {short(seed)}; it must be at least 0 and below 2**63")
    check_numbers(args)
    if "num_sampling_steps" not in getattr(args, "said", ()):
        args.num_sampling_steps = SOLVERS[args.sampler].steps
    check_steps(args.sampler, args.num_sampling_steps)
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta is {args.eta}; it must be from 0 to 1")
    if args.eta and args.sampler != "ddim":
        own = "has its own noise" if args.sampler == "ddpm" else "adds none"
        raise ValueError(f"--eta {args.eta} is for --sampler ddim; {args.sampler} {own}")
    low, high = args.cfg_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"--cfg-interval is {low} {high}; give two shares of the noise levels, t/1000, with 0 <= LO <= HI <= 1"
        )
    if args.cfg_interval != [0.0, 1.0] and args.cfg_scale == 1:
        raise ValueError(
            f"--cfg-interval {low} {high} is for guidance, and --cfg-scale 1 is none; pass another scale"
        )
