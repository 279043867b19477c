"""The configuration of a Latte (Ma et al. 2024) whose file has none, by its tensors' shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoints.choice import NetworkChoice
from checkpoints.diffusers_format import LABEL_TABLE
from checkpoints.from_images import blocks_in
from checkpoints.names import MODELS as NAMES
from checkpoints.network_config import Tensors
from checkpoints.networks import MODELS
from checkpoints.outline import TABLE_OF_FRAMES, learns_sigma, parts_of
from runtime.image_size import ImageSize
from variants.video import VideoDiT

# Its models' names → what says their sizes
LATTES = {
    name: made for name, made in MODELS.items()
    if made.func is VideoDiT and made.keywords.get("attention") == "latte"
}  # fmt: skip


def latte_config(
    choice: NetworkChoice, tensors: Tensors, channels: int, size_of: Callable[[int], ImageSize],
    origin: Path | str,
) -> dict[str, Any]:  # fmt: skip
    """The configuration of a network of clips with a table of frames: its sizes are those of the
    tensors, and of the model that has them or that a choice names. Latents have so many channels,
    and the size that size_of(patch_size) says.

    Raises ValueError, naming `origin`, for sizes that no such model has.
    """
    name = NAMES[choice.model] if choice.model is not None else model_with(tensors, origin)
    if name not in LATTES:
        raise ValueError(
            f"`model` is {name}, but {origin} is of a Latte; leave the argument out, or give one "
            f"of {', '.join(LATTES)}"
        )
    made, table = LATTES[name], tensors.get(LABEL_TABLE)
    patch = made.keywords["patch_size"]
    classes = 0 if table is None else len(table) - 1  # the last row is the null class's
    if choice.num_classes is not None:
        classes = choice.num_classes
    frames = tensors[TABLE_OF_FRAMES]
    if frames.ndim != 3:
        raise ValueError(f"{origin}: {TABLE_OF_FRAMES} is {tuple(frames.shape)}, wanted (1, F, D)")
    sizes = {"input_size": size_of(patch), "in_channels": channels, "frames": frames.shape[1]}
    sigma, qk_norm = learns_sigma(tensors, patch, channels), parts_of(tensors)["qk_norm"]
    with torch.device("meta"):
        network = made(**sizes, num_classes=classes, learn_sigma=sigma, qk_norm=qk_norm)
    return network.config


def model_with(tensors: Tensors, origin: Path | str) -> str:
    """The name of the model with as many blocks, of the same width and patches. Raises ValueError
    if there is none.
    """
    embedder = tensors.get("x_embedder.proj.weight")
    shape = () if embedder is None else tuple(embedder.shape)
    sizes = blocks_in(tensors), *(shape[:1] + shape[-1:])  # (depth, width, patch)
    for name, made in LATTES.items():
        keywords = made.keywords
        if (keywords["depth"], keywords["hidden_size"], keywords["patch_size"]) == sizes:
            return name
    raise ValueError(
        f"{origin} is of a Latte with {sizes[0]} blocks and x_embedder.proj.weight {shape}, which "
        f"none of {', '.join(LATTES)} has; give a file of ours that has its configuration"
    )
