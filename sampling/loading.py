"""A Sampler from a checkpoint and the options."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints.loading import build_network, choose_vae, class_names, find_checkpoint
from checkpoints.weights import load_weights
from models import DiT_models
from processes.table import process_of
from sampling.sampler import Sampler
from sampling.speed import prepare
from vae import PixelSpace, latent_shape, load_vae


def load_sampler(args: Namespace, device: torch.device, checkpoint: Path | None = None) -> Sampler:
    """The Sampler that the flags ask for, of this checkpoint if one is given.

    What can be wrong is found before the VAE's weights are loaded.

    Raises ValueError for a checkpoint, VAE and flags that do not fit together.
    """
    shape = latent_shape(args.vae)
    if args.ckpt is None:
        shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
    checkpoint = checkpoint or find_checkpoint(args)
    args.vae = choose_vae(args, checkpoint)
    weights = load_weights(checkpoint, args.weights)
    network = build_network(args, weights, latent_shape(args.vae)).to(device)
    names = (
        "num_sampling_steps", "sampler", "eta", "cfg_scale", "cfg_channels", "mixed_precision",
        "cfg_interval",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    sampler = Sampler(
        network, PixelSpace(), class_names(args, weights), checkpoint=checkpoint,
        process=process_of(network, weights.process), **options,
    )  # fmt: skip
    prepare(network, args.mixed_precision, args.compile)
    return replace(sampler, space=load_vae(args.vae, device))
