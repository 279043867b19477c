"""From a checkpoint's name to its network."""

from argparse import Namespace
from pathlib import Path

import torch

from checkpoints.diffusers_format import is_diffusers
from checkpoints.fitting import check_fits, design_of
from checkpoints.names import local_path, weights_file
from checkpoints.network_config import arguments_in, check_outline
from checkpoints.released import download_model, released_name
from checkpoints.weights import Weights, load_weights
from conditions.labels import imagenet_names
from models import DiT, DiT_models
from runtime.json_files import read_json
from vae import LatentShape


def network_of(weights: Weights, origin: Path | str) -> DiT:
    """The network of Weights that have a configuration, in float32 and for evaluation.

    Raises ValueError, naming `origin`, if the two do not fit.
    """
    assert weights.config is not None
    try:
        config = arguments_in(weights.config)
        check_outline(config, weights.tensors)
        with torch.device("meta"):
            network = DiT(**config)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    except TypeError as error:
        raise ValueError(
            f"{origin} has a configuration that this version does not know ({error})"
        ) from None
    check_fits(network, weights.tensors, origin)
    network.load_state_dict(weights.tensors, assign=True)
    return network.float().eval().requires_grad_(False)


def load_pretrained(
    name: Path | str, which: str = "ema", config: dict | None = None
) -> tuple[DiT, list[str] | None]:
    """(network, class names or None) of a checkpoint: a folder or file as in
    checkpoints.load_weights, or the hub's OWNER/NAME.

    The network is in float32, for evaluation, without gradients; for training call
    `.train().requires_grad_(True)` and then `pos_embed.requires_grad_(False)`. `config` are DiT's
    arguments for a file that does not carry them. Raises ValueError if it cannot be loaded.
    """
    weights = load_weights(local_path(name), which)
    config = weights.config or config
    if config is None:
        raise ValueError(
            f"{name} does not say how its network is built; pass config, DiT's arguments"
        )
    return network_of(weights._replace(config=config), name), weights.classes


def import_diffusers(folder: Path | str) -> tuple[DiT, list[str] | None]:
    """(network, class names or None) of a DiT in diffusers' format: a pipeline's folder, its
    transformer/, or OWNER/NAME.

    Its autoencoder is the folder's vae/. Raises ValueError if it is none, or its blocks have
    embedders of their own.
    """
    file = weights_file(local_path(folder)).with_name("config.json")
    if not file.is_file() or not is_diffusers(read_json(file)):
        raise ValueError(f"{folder} is no DiT of diffusers; load_pretrained reads everything else")
    return load_pretrained(folder)


def find_checkpoint(args: Namespace) -> Path:
    """The file of weights that --ckpt means, as in checkpoints.weights_file and for names on the
    hub, or the released one. What is not here is fetched.

    Raises ValueError if there is none.
    """
    if args.ckpt is None:
        return download_model(released_name(args.model, args.image_size, args.num_classes))
    return weights_file(local_path(args.ckpt))


def choose_vae(args: Namespace, checkpoint: Path) -> str:
    """The name of the VAE: that of --vae if it was given, else that of the pipeline of diffusers in
    which the checkpoint is, else the default.
    """
    pipeline = checkpoint.absolute().parents[1]
    beside = pipeline / "vae"
    is_pipeline = (
        pipeline / "model_index.json"
    ).is_file() and checkpoint.absolute().parent.name == "transformer"
    return (
        str(beside)
        if is_pipeline and beside.is_dir() and "vae" not in getattr(args, "said", ())
        else args.vae
    )


def build_network(args: Namespace, weights: Weights, shape: LatentShape) -> DiT:
    """The network with these weights, in float32 and for evaluation, from its own configuration or
    else from the flags.

    Raises ValueError if a flag contradicts the configuration, or the weights or the VAE do not fit.
    """
    origin = args.ckpt or "the released checkpoint"
    if weights.config is not None:
        network = network_of(weights, origin)
        _check_flags(args, network, shape, origin)
        return network
    side = shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
    sizes = dict(input_size=side, in_channels=shape.channels, num_classes=args.num_classes)
    with torch.device("meta"):
        config = DiT_models[args.model](**sizes, block=design_of(weights.tensors)).config
    return network_of(weights._replace(config=config), origin)


def _check_flags(args, network, shape, origin):
    """Raise ValueError if the VAE, or a flag that was given, contradicts the network."""
    if shape.channels != network.in_channels:
        raise ValueError(
            f"--vae {args.vae} has {shape.channels} channels, the network of {origin} takes {network.in_channels}; "
            "pass the VAE that it was trained with"
        )
    sizes = DiT_models[args.model].keywords
    same_model = all(network.config[key] == value for key, value in sizes.items())
    found = {
        "model": args.model if same_model else "another size",
        "image_size": network.input_size * shape.ratio, "num_classes": network.num_classes,
    }  # fmt: skip
    for name in sorted(found.keys() & getattr(args, "said", set())):
        if getattr(args, name) != found[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but {origin} is of {found[name]}; leave the flag "
                "out, the checkpoint says it itself"
            )


def class_names(args: Namespace, weights: Weights) -> list[str] | None:
    """The class names that a checkpoint has; the released ones do not say that they have
    ImageNet's. None if unknown.
    """
    return weights.classes or (imagenet_names() if args.ckpt is None else None)
