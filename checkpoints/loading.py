"""From a checkpoint's name to its network."""

from functools import partial
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.choice import NetworkChoice
from checkpoints.fitting import check_fits, check_table, learned_process
from checkpoints.formats import format_of
from checkpoints.from_images import blocks_in
from checkpoints.latte_format import latte_config
from checkpoints.names import local_path, weights_file
from checkpoints.network_config import Tensors, arguments_in, check_outline
from checkpoints.networks import (
    MODELS, NETWORKS, OURS, Network, class_in, create_network,
)  # fmt: skip
from checkpoints.outline import (
    POSITION_TABLE, class_of, design_of, grid_in, learns_sigma, parts_of,
)  # fmt: skip
from checkpoints.released import download_model, released_name
from checkpoints.weights import Weights, load_weights
from conditions.labels import imagenet_names
from processes.process import Process
from processes.table import WORDS, process_of
from runtime.image_size import ImageSize, settled, written
from runtime.json_files import read_json
from vae import HUB_VAES, LatentShape, latent_shape
from variants.text_network import TextNetwork
from variants.video import Video_models, VideoDiT


def network_of(weights: Weights, origin: Path | str) -> Network:
    """The network of Weights that have a configuration, in float32 and for evaluation.

    Raises ValueError, naming `origin`, if the two do not fit.
    """
    assert weights.config is not None
    network = outlined(weights.config, weights.tensors, origin)
    check_fits(network, weights.tensors, origin)
    check_table(network, weights.tensors, origin)
    network.load_state_dict(weights.tensors, assign=True)
    network.process = weights.process
    if isinstance(network, TextNetwork):
        network.text = weights.text
    return network.float().eval().requires_grad_(False)


def outlined(config: dict, tensors: Tensors, origin: Path | str) -> Network:
    """The network of a configuration that a file has beside its tensors, on the meta device.

    Raises ValueError, naming `origin`, if this version has no such network.
    """
    if isinstance(kind := config.get("architecture"), str):
        raise ValueError(
            f"{origin} has the configuration of timm's {kind[:60]}, a classifier, and not of a "
            "network that makes images; give a checkpoint of one"
        )
    try:
        arguments = arguments_in(config)
        check_outline(arguments, tensors)
        with torch.device("meta"):
            return create_network(arguments)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    except TypeError as error:
        raise ValueError(
            f"{origin} has a configuration that this version does not know ({error})"
        ) from None


def load_pretrained(
    name: Path | str, which: str = "ema", config: dict | None = None
) -> tuple[Network, list[str] | None]:
    """(network, class names or None) of a checkpoint: a folder or file as in
    checkpoints.load_weights, or the hub's OWNER/NAME.

    The network is in float32, for evaluation, without gradients; for training call
    `.train().requires_grad_(True)` and then `pos_embed.requires_grad_(False)`. `config` are the
    network's arguments, as its `config` has them, for a file that does not carry them. Raises
    ValueError if it cannot be loaded.
    """
    weights = load_weights(local_path(name), which)
    config = weights.config or config
    if config is None:
        raise ValueError(
            f"{name} does not say how its network is built; pass config, DiT's arguments, or give "
            "a file that export.py writes"
        )
    if not isinstance(config, dict):
        raise ValueError(f"`config` is {config!r:.60}; give a dict, DiT's arguments by name")
    return network_of(weights._replace(config=config), name), weights.classes


def import_diffusers(folder: Path | str) -> tuple[Network, list[str] | None]:
    """(network, class names or None) of a DiT, an MM-DiT or a PixArt in diffusers' format.

    It is a pipeline's folder, its transformer/, or OWNER/NAME. Its autoencoder is the folder's
    vae/. Raises ValueError if it is none, or one that ours cannot be.
    """
    file = weights_file(local_path(folder)).with_name("config.json")
    if not file.is_file() or format_of(read_json(file)) is None:
        raise ValueError(f"{folder} is no DiT of diffusers; load_pretrained reads everything else")
    return load_pretrained(folder)


class NetworkFiles(NamedTuple):
    """Where a chosen network lies: the file of its weights, the name of its autoencoder, and the
    file of the weights of a second network, None for none.
    """

    checkpoint: Path
    vae: str
    high: Path | None = None


def find_files(choice: NetworkChoice, vae: str) -> NetworkFiles:
    """The files that a choice means; what is not here is fetched, but for the autoencoder's
    weights. `vae` is taken where neither the choice nor its pipeline names an autoencoder.

    Raises ValueError if there is no such autoencoder or checkpoint. What can be wrong is found
    before anything large is fetched.
    """
    shape = latent_shape(str(choice.vae or vae))
    if choice.ckpt is None:
        model, image_size, _ = choice.sizes()
        shape.size(image_size, MODELS[model].keywords["patch_size"])
    checkpoint, second = find_checkpoint(choice), second_choice(choice)
    high = None if second is None else find_checkpoint(second)
    return NetworkFiles(checkpoint, choose_vae(choice, checkpoint) or vae, high)


def second_choice(choice: NetworkChoice) -> NetworkChoice | None:
    """The choice of the second network, which says itself what it is; None for none."""
    if choice.ckpt_high is None:
        return None
    return NetworkChoice(choice.ckpt_high, choice.weights, choice.vae)


def find_checkpoint(choice: NetworkChoice) -> Path:
    """The file of weights that a choice means: of its `ckpt`, as in checkpoints.weights_file and
    for names on the hub, or the released one. What is not here is fetched.

    Raises ValueError if there is none.
    """
    if choice.ckpt is None:
        _, image_size, num_classes = choice.sizes()
        return download_model(released_name(choice.published, image_size, num_classes))
    return weights_file(local_path(choice.ckpt))


def choose_vae(choice: NetworkChoice, checkpoint: Path) -> str | None:
    """The name of the autoencoder that is given, else of the one in the pipeline of diffusers that
    has the checkpoint; None without both.
    """
    if choice.vae is not None:
        return str(choice.vae)
    pipeline, beside = checkpoint.absolute().parents[1], checkpoint.absolute().parent
    is_pipeline = (pipeline / "model_index.json").is_file() and beside.name == "transformer"
    return str(pipeline / "vae") if is_pipeline and (pipeline / "vae").is_dir() else None


def build_network(choice: NetworkChoice, weights: Weights, vae: str) -> Network:
    """The network with these weights, in float32 and for evaluation, as its own configuration says,
    or else as the choice does. `vae` is the name of its autoencoder.

    Raises ValueError if the choice contradicts the configuration, or the weights or the autoencoder
    do not fit.
    """
    origin, shape = choice.ckpt or "the released checkpoint", latent_shape(vae)
    _check_recorded_vae(choice, weights, vae)
    if weights.config is not None:
        network = network_of(weights, origin)
        if shape.channels != network.in_channels:
            raise ValueError(
                f"`vae` {vae} has {shape.channels} channels, the network of {origin} takes "
                f"{network.in_channels}; pass the VAE that it was trained with, none for pixels"
            )
        _check_choice(choice, network, origin)
        return network
    kind = class_of(weights.tensors)
    if kind == VideoDiT.__name__:
        size_of = partial(trained_size, choice, weights.tensors, shape)
        config = latte_config(choice, weights.tensors, shape.channels, size_of, origin)
    elif kind == OURS:
        config = config_of_dit(choice, weights.tensors, shape, origin)
    else:
        raise ValueError(
            f"{origin} has the weights of a {kind} and not its configuration; give a folder with "
            "config.json, or a file of ours that has it"
        )
    return network_of(weights._replace(config=config), origin)


def recorded_vae(weights: Weights) -> str | None:
    """The name of the autoencoder behind which a run trained these weights; None if they do not
    say it.
    """
    name = ((weights.training or {}).get("args") or {}).get("vae")
    return name if isinstance(name, str) else None


def _check_recorded_vae(choice, weights, vae):
    """Raise ValueError if nobody chose a released autoencoder, and the run had one of its own."""
    released = {*HUB_VAES, *HUB_VAES.values()}
    recorded = recorded_vae(weights)
    if choice.vae is None and vae in released and recorded not in {None, *released}:
        behind = "on pixels" if recorded == "none" else f"behind the autoencoder {recorded}"
        raise ValueError(f"{choice.ckpt} was trained {behind}: give `vae` {recorded}")


def config_of_dit(
    choice: NetworkChoice, tensors: Tensors, shape: LatentShape, origin: Path | str
) -> dict[str, Any]:
    """The configuration of a DiT whose file has none, as its tensors and the choice say.

    Raises ValueError for a choice of another network, and for twice the blocks.
    """
    model, _, num_classes = choice.sizes()
    if MODELS[model].func is not NETWORKS[OURS]:
        clips = ", or of clips without its configuration" * (model in Video_models)
        raise ValueError(
            f"`model` is {model}, but {origin} is of a {OURS}{clips}; leave the argument out, or "
            f"give a model whose name begins with {OURS}"
        )
    patch_size = MODELS[model].keywords["patch_size"]
    sizes: dict[str, Any] = dict(
        input_size=trained_size(choice, tensors, shape, patch_size),
        in_channels=shape.channels, num_classes=num_classes,
        learn_sigma=learns_sigma(tensors, patch_size, shape.channels),
    )  # fmt: skip
    with torch.device("meta"):
        parts = {"block": design_of(tensors), **parts_of(tensors)}
        config = MODELS[model](**sizes, **parts).config
    if blocks_in(tensors) == 2 * config["depth"]:
        raise ValueError(
            f"{origin} has {blocks_in(tensors)} blocks, twice as many as `model` {model}: it may "
            "be of a VideoDiT, which only a configuration tells; give a folder with config.json, "
            "or a file of ours that has it"
        )
    return config


def trained_size(
    choice: NetworkChoice, tensors: Tensors, shape: LatentShape, patch_size: int
) -> ImageSize:
    """The size of the latents that a network without a configuration was trained on: that of the
    grid whose position table it has, or of the square that fills another table, else as the choice
    says.

    Raises ValueError if patches do not fill images of the size that is given.
    """
    asked = shape.size(choice.sizes()[1], patch_size) if choice.image_size is not None else None
    if grid := grid_in(tensors):
        return settled((grid[0] * patch_size, grid[1] * patch_size))
    table = tensors.get(POSITION_TABLE)
    tokens = table.shape[1] if table is not None and table.ndim == 3 else 0
    if tokens and math.isqrt(tokens) ** 2 == tokens:
        return math.isqrt(tokens) * patch_size
    return asked or shape.size(choice.sizes()[1], patch_size)


def check_trained_size(choice: NetworkChoice, network: Network, shape: LatentShape) -> None:
    """Raise ValueError if a choice has another image size than the network was trained on."""
    trained, given = settled(shape.image(network.latent_shape)), choice.image_size
    if given not in (None, trained):
        raise ValueError(
            f"`image_size` is {written(given)}, but {choice.ckpt or 'the released checkpoint'} was "
            f"trained on {written(trained)} pixels; leave the argument out"
        )


def _check_choice(choice, network, origin):
    """Raise ValueError if something that is given contradicts the network."""
    factory = MODELS[choice.sizes()[0]]
    kind = NETWORKS[class_in(network.config)]
    made: type = factory.func  # type: ignore[assignment]  # a class of networks
    same_model = issubclass(kind, made) and all(
        network.config[key] == value for key, value in factory.keywords.items()
    )
    found = {
        "model": choice.model if same_model else "another size",
        "num_classes": network.num_classes,
    }
    for name, there in found.items():
        given = getattr(choice, name)
        if given is not None and given != there:
            raise ValueError(
                f"`{name}` is {given}, but {origin} is of {there}; leave the argument out, the "
                "checkpoint says it itself"
            )


def process_learned(choice: NetworkChoice, weights: Weights, network: Network) -> Process:
    """The process that a chosen network has learned: as its file says, or as the choice does where
    the file says nothing; else the Gaussian one. A file with a configuration says it, with nothing
    under `process` the Gaussian one.

    Raises ValueError if the choice contradicts the file, or the file has settings that the process
    cannot have.
    """
    origin, given = choice.ckpt or "the released checkpoint", choice.learned
    process = learned_process(network, weights, origin)
    if given in (None, process.word):
        return process
    if weights.process is None and weights.config is None:
        return process_of(network, {"name": WORDS[given].name})
    name = "process" if choice.process else "model"
    raise ValueError(
        f"`{name}` is {getattr(choice, name)}, but {origin} has learned {process.word}; leave the "
        "argument out, the checkpoint says it itself"
    )


def class_names(choice: NetworkChoice, weights: Weights) -> list[str] | None:
    """The class names that a checkpoint has, None if unknown.

    The released ones do not say that they have ImageNet's.
    """
    return weights.classes or (imagenet_names() if choice.ckpt is None else None)
