"""A Sampler from a checkpoint and the options."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.choice import NetworkChoice
from checkpoints.loading import (
    NetworkFiles, build_network, class_names, find_files, process_learned, second_choice,
)  # fmt: skip
from checkpoints.networks import Network, makes_clips, patch_frames, reads_text
from checkpoints.weights import Weights, load_weights
from conditions.reading import reader_for
from layers.sizes import MOST_IN_TABLE, is_number
from runtime.devices import choose_device
from runtime.image_size import sides, written
from sampling.options import OWN, SamplingOptions, solver_options
from sampling.pair import check_high
from sampling.sampler import Sampler
from sampling.speed import prepare
from vae import PixelSpace, latent_shape, load_vae

VAE = "mse"  # for pictures, where nobody names the autoencoder
QUICK = "dpm++"  # for pictures to look at, where nobody names a solver and the process has this one
NOT_BY_NAME = {"ckpt", "vae", "num_sampling_steps"}  # fields with parameters of their own
# Options that the Sampler does not have: what they say is done to the network, or to latent_shape
OF_NETWORK = ("compile", "extrapolation", "frames")


def load_sampler(
    checkpoint: Path | str | None = None, *, vae: Path | str | None = None,
    steps: int | None = None, device: torch.device | str | None = None, **options: Any,
) -> Sampler:  # fmt: skip
    """The Sampler of a checkpoint, as sample.py's --ckpt takes them; None: the released weights.

    vae, as --vae takes them; None: that of the checkpoint's pipeline, else VAE. steps: how many the
    sampler takes; None: its own number. device: None for the GPU if there is one. options are
    fields of NetworkChoice and SamplingOptions, such as weights="raw" or cfg_scale=4.0.

    Raises ValueError for a checkpoint, autoencoder and options that do not fit together, and for
    options that do not exist.
    """
    network, sampling = (
        {field.name for field in fields(kind)} - NOT_BY_NAME
        for kind in (NetworkChoice, SamplingOptions)
    )
    if unknown := sorted(options.keys() - network - sampling):
        raise ValueError(
            f"there is no option {', '.join(unknown)}; there are checkpoint, vae, steps, device, "
            f"{', '.join(sorted(network | sampling))}"
        )
    choice = NetworkChoice(
        checkpoint, vae=vae,
        **{name: value for name, value in options.items() if name in network},
    )  # fmt: skip
    how = SamplingOptions(
        num_sampling_steps=steps,
        **{name: value for name, value in options.items() if name in sampling},
    )
    place = choose_device(None if device is None else str(device))
    return build_sampler(choice, find_files(choice, VAE), how, place)


def build_sampler(
    choice: NetworkChoice, files: NetworkFiles, options: SamplingOptions, device: torch.device,
    quick: bool = False,
) -> Sampler:  # fmt: skip
    """The Sampler of a chosen network, whose files find_files has found.

    quick: the solver is QUICK, if the process has it, where the options name none.

    What can be wrong is found before the autoencoder's weights are loaded. Raises ValueError for a
    checkpoint, autoencoder and options that do not fit together.
    """
    weights = load_weights(files.checkpoint, choice.weights)
    network = build_network(choice, weights, files.vae).to(device)
    process = process_learned(choice, weights, network)
    usual = QUICK if quick and QUICK in process.solvers else None
    values = options.settled(process, usual, reads_text(network), makes_clips(network))
    check_high(choice.ckpt_high, options.high_from)
    high = second_network(choice, files, device)
    own, compiled = solver_options(values), values["compile"]
    plain = {name: value for name, value in values.items() if name not in (*OWN, *OF_NETWORK)}
    networks = [one for one in (network, high) if one is not None]
    for one in networks:
        extrapolate(one, options.extrapolation)
    sampler = Sampler(
        network, PixelSpace(), class_names(choice, weights), checkpoint=files.checkpoint,
        process=process, solver_options=own,
        latent_shape=asked_latent(choice, network, files.vae, options.frames),
        reader=reader_for(network, choice.text_encoder), frame_rate=trained_rate(weights),
        high=high, **plain,
    )  # fmt: skip
    for one in networks:
        prepare(one, options.mixed_precision, compiled, by_blocks=options.cache is not None)
    return replace(sampler, space=load_vae(files.vae, device))


def second_network(
    choice: NetworkChoice, files: NetworkFiles, device: torch.device
) -> Network | None:
    """The network of a choice's `ckpt_high`; None for none.

    Raises ValueError for a checkpoint that does not say how its network is built, or that does not
    fit.
    """
    second = second_choice(choice)
    if second is None or files.high is None:
        return None
    weights = load_weights(files.high, second.weights)
    if weights.config is None:
        raise ValueError(
            f"`ckpt_high` {choice.ckpt_high} does not say how its network is built; give a "
            "checkpoint that does, such as one of train.py"
        )
    return build_network(second, weights, files.vae).to(device)


def extrapolate(network: Network, extrapolation: str | None) -> None:
    """Have the network place tokens of other grids than its own so; None leaves it as it is.

    Raises ValueError for one that is about rotations, for a network without any.
    """
    if extrapolation is not None and network.extrapolation is None:
        raise ValueError(
            f"`extrapolation` is {extrapolation}, and a {type(network).__name__} places the tokens "
            "of other sizes by a rule of its own; leave the argument out"
        )
    if extrapolation == "ntk" and not network.positions.rotates:
        raise ValueError(
            '`extrapolation="ntk"` slows rotations down, and the network has a position table '
            "without any; choose another, or leave the argument out"
        )
    network.extrapolation = extrapolation or network.extrapolation


def asked_latent(
    choice: NetworkChoice, network: Network, vae: str, frames: int | None = None
) -> tuple[int, ...] | None:
    """The shape (C, H, W) of the latents of images of the size that is asked for, or (C, F, H, W)
    of clips of that size and of so many frames; None where neither is asked for.

    Raises ValueError if the network's patches do not fill it, or these are too many, and for frames
    of a network that makes images.
    """
    check_frames(frames, network)
    if choice.image_size is None and frames is None:
        return None
    (channels, *count, height, width), named = network.latent_shape, f"`frames` {frames}"
    if frames is not None:
        count = [frames]
    if choice.image_size is not None:
        shape, named = latent_shape(vae), f"`image_size` {written(choice.image_size)}"
        channels = shape.channels
        height, width = sides(shape.size(choice.image_size, network.patch_size))
    tokens = height * width // network.patch_size**2
    if tube := patch_frames(network):
        tokens *= count[0] // tube
    most = MOST_IN_TABLE // network.config["hidden_size"]
    if tokens > most:
        raise ValueError(
            f"{named} makes {tokens:,} tokens, and a network of this width takes {most:,}; lower it"
        )
    return channels, *count, height, width


def trained_rate(weights: Weights) -> float | None:
    """Frames a second of the clips that a run was trained on, None where a file does not say it.
    """
    args: dict[str, Any] = (weights.training or {}).get("args") or {}
    rate, stride = args.get("frame_rate") or 0, args.get("frame_stride") or 1
    known = is_number(rate) and is_number(stride) and rate > 0 and stride > 0
    return rate / stride if known else None


def check_frames(frames: int | None, network: Network) -> None:
    """Raise ValueError unless a network draws clips of so many frames; None is always right."""
    if frames is None:
        return
    tube = patch_frames(network)
    if tube is None:
        raise ValueError(
            f"`frames` is {frames}, and the network makes images; leave the argument out"
        )
    if frames % tube:
        below = frames // tube * tube
        near = f"{below} or {below + tube}" if below else tube
        raise ValueError(
            f"`frames` {frames} is not a multiple of {tube}, the frames of a patch of the network; "
            f"use {near}"
        )
