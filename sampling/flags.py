"""The flags of sample.py and sample_ddp.py that say what is sampled from which network, and how."""

from argparse import (
    ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace, _ArgumentGroup,
)  # fmt: skip
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from checkpoints.choice import IMAGE_SIZE, MODEL, NUM_CLASSES, NetworkChoice
from checkpoints.names import MODELS
from checkpoints.weights import weights_choice
from conditions.labels import CLASSES
from flow.flow import EPS
from flow.forms import FORMS
from layers.positions import EXTRAPOLATIONS
from models import DiT_models
from processes.flow import FlowProcess
from processes.gaussian import TRAINED_STEPS, GaussianProcess
from processes.table import SOLVERS, WORDS
from runtime.command_line import read_size
from runtime.limits import check_numbers
from sampling.options import LAST_STEP_NAMES, SamplingOptions, check_seed
from sampling.sampler import CFG_CHANNELS, CFG_CHANNELS_OF_TEXT
from sampling.speed import PRECISIONS

# Flags whose defaults count only where the checkpoint does not say it
CHECKPOINT_SAYS = ("vae", "model", "image_size", "num_classes", "process", "text_encoder")


def add_sampling_flags(parser: ArgumentParser, vae: str, cfg_scale: float) -> None:
    """Add the flags that decide what is sampled from which network.

    `vae` and `cfg_scale` are their defaults.
    """
    network = add_network_flags(parser, vae)
    network.add_argument(
        "--device", help="such as cpu or cuda:1 (default: the GPU if there is one)"
    )
    add_encoder_flag(network)
    network.add_argument(
        "--ckpt-high", metavar="CKPT",
        help="a second checkpoint, as --ckpt, of a network that says how it is built, for the "
        "noisy steps: those from --high-from on (default: none)",
    )  # fmt: skip
    network.add_argument(
        "--high-from", type=float, metavar="LEVEL",
        help="the noise level from which on the network of --ckpt-high is asked, from 0, clean, to "
        f"1: t/{TRAINED_STEPS} in diffusion, 1 - t in a flow",
    )  # fmt: skip
    add_process_flags(parser, cfg_scale)


def add_encoder_flag(network: _ArgumentGroup) -> None:
    """Add the flag that says where text encoders lie, which is None where it is not given."""
    network.add_argument(
        "--text-encoder", nargs="+", metavar="NAME",
        help="of a network whose captions outside text encoders read: where these lie, each a "
        "local folder or a hub id, which is fetched (default: where the checkpoint says, if they "
        "are on this machine)",
    )  # fmt: skip


def add_network_flags(
    parser: ArgumentParser, vae: str | None,
    without: str = f"the released {MODEL}, fetched on first use",
    size: str = "of the pictures, also for a checkpoint that says its own",
) -> _ArgumentGroup:  # fmt: skip
    """Add those of the sampling flags that say which network.

    `vae` is that flag's default, `without` says what is used without --ckpt, and `size` what
    --image-size is of. Returns their argument group.
    """
    network = parser.add_argument_group("network")
    network.add_argument(
        "--ckpt",
        help="checkpoint file (.pt, .safetensors), run folder, folder with config.json, pipeline "
        "of diffusers, or OWNER/NAME "
        f"of one of the last two on the Hugging Face hub (default: {without})",
    )
    network.add_argument(
        "--weights", type=_weights, default=NetworkChoice.weights, metavar="{ema,raw,ema@DECAY}",
        help="which of the checkpoint's weights (default: %(default)s)",
    )  # fmt: skip
    network.add_argument(
        "--vae",
        default=vae,
        help="ema, mse, a hub id, a local folder, or none for pixels (default: "
        f"{vae or 'the one that the checkpoint names'}; of a pipeline of diffusers its own)",
    )
    bare = parser.add_argument_group("network, for checkpoints that do not say")
    bare.add_argument(
        "--model", choices=MODELS, default=MODEL, metavar="MODEL",
        help=f"one of {', '.join(DiT_models)}, or of the same with SiT for DiT, which is "
        "--process flow (default: %(default)s)",
    )  # fmt: skip
    bare.add_argument(
        "--image-size", type=read_size, default=IMAGE_SIZE,
        help=f"{size}: pixels, or HEIGHTxWIDTH (default: as it was trained; the released weights: "
        "%(default)s)",
    )  # fmt: skip
    bare.add_argument(
        "--num-classes", type=int, default=NUM_CLASSES,
        help="0 for a network without classes (default: %(default)s)",
    )  # fmt: skip
    bare.add_argument(
        "--process", choices=WORDS,
        help="what it has learned; a flow is SiT's, linear with velocities (default: what "
        "--model says, or diffusion)",
    )  # fmt: skip
    return network


def add_process_flags(parser: ArgumentParser, cfg_scale: float) -> None:
    """Add those of them that say how it is sampled."""
    process = parser.add_argument_group("process")
    process.add_argument(
        "--sampler", choices=SOLVERS, default=GaussianProcess.usual,
        help="of diffusion ddpm: ancestral sampling; ddim; dpm++: DPM-Solver++(2M); unipc: UniPC "
        "of order 2; of a flow euler, heun, dopri5: the ODE; sde, sde-heun: the SDE by "
        f"Euler-Maruyama and by Heun (default: %(default)s; of a flow {FlowProcess.usual})",
    )  # fmt: skip
    process.add_argument(
        "--num-sampling-steps",
        "--steps",
        type=int,
        default=SOLVERS[GaussianProcess.usual].steps,
        help=f"of diffusion at most {TRAINED_STEPS}, one less for dpm++ and unipc; heun and "
        "sde-heun ask the network twice a step; dopri5 chooses its own steps, and tells its "
        "solution at so many moments (default: "
        f"{', '.join(f'{name} {solver.steps}' for name, solver in SOLVERS.items())})",
    )
    process.add_argument(
        "--eta", type=float, default=SamplingOptions.eta,
        help="noise that ddim adds: 0 none, 1 as much as ddpm (default: %(default)s)",
    )  # fmt: skip
    add_guidance_flags(process, cfg_scale)
    process.add_argument(
        "--mixed-precision", choices=PRECISIONS, default=SamplingOptions.mixed_precision,
        help="the network's; the steps and the VAE stay in float32 (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--tf32", action=BooleanOptionalAction, default=True,
        help="TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)",
    )  # fmt: skip
    process.add_argument(
        "--compile",
        action="store_true",
        help="compile the network (on a GPU with CUDA graphs): seconds to minutes at the start of "
        "every run, so for many images rather than one picture; results differ by float rounding",
    )
    process.add_argument(
        "--cache", metavar="taylor:INTERVAL,ORDER",
        help="ask the network's blocks only at one step of INTERVAL, and in between go on with a "
        "polynomial of this ORDER through what they said before, 0 being the same again; for 50 "
        "steps and more, such as taylor:3,1 (default: ask them at every step)",
    )  # fmt: skip
    add_size_flags(process)
    process.add_argument(
        "--frames", type=int,
        help="of a network that makes clips: how many frames they have (default: as many as the "
        "network was trained on)",
    )  # fmt: skip
    add_flow_flags(parser.add_argument_group("process: flow, whose t goes from 0, noise, to 1"))


def add_guidance_flags(process: _ArgumentGroup, cfg_scale: float) -> None:
    """Add those that say how samples are guided."""
    process.add_argument(
        "--cfg-scale", type=float, default=cfg_scale,
        help="guidance; 1 is none (default: %(default)s)",
    )  # fmt: skip
    process.add_argument(
        "--negative-prompt", metavar="TEXT",
        help="of a network that reads text: what guidance leads away from (default: the empty "
        "prompt)",
    )  # fmt: skip
    process.add_argument(
        "--cfg-channels", type=_channels, default=CFG_CHANNELS,
        help="latent channels to guide, or all (default: %(default)s; of a network that reads text "
        f"or makes clips {CFG_CHANNELS_OF_TEXT})",
    )  # fmt: skip
    process.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=list(SamplingOptions.cfg_interval),
        metavar=("LO", "HI"),
        help="guide only at steps whose level, 0 being clean and 1 noise, is from LO to HI: "
        f"t/{TRAINED_STEPS} in diffusion, 1 - t in a flow; elsewhere without "
        "guidance, on half the batch, at about half the cost (default: 0 1, everywhere)",
    )


def add_size_flags(process: _ArgumentGroup) -> None:
    """Add the option of pictures of another size, which is None where it is not given."""
    process.add_argument(
        "--extrapolation", choices=EXTRAPOLATIONS,
        help="where tokens are in pictures of another size than the network was trained on: "
        "interpolate: spread within its positions; extend: beyond them; crop: in their middle; "
        "ntk: extend, with slower rotations (default: as the network says, else interpolate; "
        "extend for one with rotations alone)",
    )  # fmt: skip


def add_flow_flags(flow: _ArgumentGroup) -> None:
    """Add the options of a flow's solvers, which are None where they are not given."""
    add, default = flow.add_argument, FlowProcess.solvers["sde"].options
    add(
        "--time-shift", type=float, metavar="SHIFT",
        help="above 1 more of the steps lie near noise: t/(SHIFT + (1 - SHIFT)t) of even ones; "
        "Stable Diffusion 3's shift, whose t runs the other way, is the same number (default: as "
        "the network was trained)",
    )  # fmt: skip
    add(
        "--sample-eps", type=float, metavar="EPS",
        help="how far steps stay from an end where a term is infinite (default: 0 for a velocity "
        f"on the paths linear and gvp, else {EPS:g})",
    )  # fmt: skip
    add(
        "--diffusion-form", choices=FORMS,
        help="of sde and sde-heun: D(t) in dx = (velocity + D score) dt + sqrt(2D) dW, half of "
        f"the w in SiT's paper (default: {default['diffusion_form']})",
    )  # fmt: skip
    add(
        "--diffusion-norm", type=float, metavar="FACTOR",
        help=f"of sde and sde-heun: a factor in D (default: {default['diffusion_norm']:g})",
    )  # fmt: skip
    add(
        "--last-step", choices=LAST_STEP_NAMES,
        help="of sde and sde-heun, without noise: mean, of the SDE; euler, of the ODE; tweedie, to "
        f"the data that the network predicts; or none (default: {default['last_step']})",
    )  # fmt: skip
    add(
        "--last-step-size", type=float, metavar="H",
        help="of sde and sde-heun: the last step begins at t = 1 - H "
        f"(default: {default['last_step_size']:g})",
    )  # fmt: skip
    tolerances = FlowProcess.solvers["dopri5"].options
    for name, error in {"atol": "absolute", "rtol": "relative"}.items():
        add(
            f"--{name}", type=float,
            help=f"of dopri5: the {error} error of a step, of each image by itself (default: "
            f"{tolerances[name]:g})",
        )  # fmt: skip


def _weights(text):
    try:
        return weights_choice(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _channels(text):
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} is neither a number of channels, 1 or more, nor all")
    return text if text == "all" else int(text)


def check_flags(args: Namespace) -> None:
    """Raise ValueError for a seed, or another number, that no flag can have."""
    check_seed(getattr(args, "seed", 0) or getattr(args, "global_seed", 0))
    # given_frames are places here, and of train.py a number
    numbers = {name: value for name, value in vars(args).items() if name != "given_frames"}
    check_numbers(numbers, num_classes=CLASSES)


def network_choice(args: Namespace, given: Collection[str]) -> NetworkChoice:
    """The NetworkChoice of a command line; `given` are the names of the flags that it gives.

    Raises ValueError as NetworkChoice.
    """
    others = {name: getattr(args, name) for name in CHECKPOINT_SAYS if name in given}
    others["ckpt_high"] = getattr(args, "ckpt_high", None)
    return NetworkChoice(args.ckpt, args.weights, **others)


def sampling_options(args: Namespace, given: Collection[str], **others: Any) -> SamplingOptions:
    """The SamplingOptions of a command line.

    `given` is as in network_choice, `others` take the places of flags. Raises ValueError as
    SamplingOptions.
    """
    named = [field.name for field in fields(SamplingOptions) if field.name in args]
    values = {name: getattr(args, name) for name in named}
    for name in {"sampler", "num_sampling_steps", "cfg_channels"} - set(given):
        values[name] = None  # what suits network, process and sampler, which may not be the flag's
    return SamplingOptions(**values | others)
