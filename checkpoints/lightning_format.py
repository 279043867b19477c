"""LightningDiT's networks (Yao & Wang, "Reconstruction vs. Generation", CVPR 2025) as our DiT.

Its state dicts have our names, but for the two Linears of a SwiGLU, and for two tensors with the
cosines and sines that rotate queries and keys, which are computed here. Its files do not say the
sizes in a way of ours, so these are read from the tensors. It learns one process alone: the flow on
the straight path whose output is the velocity, t from 0, noise, to 1, data.
"""

import math
import re
from typing import Any

import torch

from checkpoints.network_config import ARGUMENTS, Tensors
from checkpoints.outline import POSITION_TABLE, design_of, first_block, learns_sigma, parts_of
from layers.positions import grid_index, rotation
from processes.flow import FlowProcess

LINEARS = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}  # its name of a SwiGLU's → ours
ROTATION = ("feat_rope.freqs_sin", "feat_rope.freqs_cos")  # (T, width of a head) each
LEARNED = FlowProcess(path="linear", prediction="velocity").config
LABEL_TABLE = "y_embedder.embedding_table.weight"
TOLERANCE = 1e-4  # of sines and cosines that were computed in float32


def is_lightning(tensors: object) -> bool:
    """Whether this is a state dict of LightningDiT, by names that no other has."""
    names = list(tensors) if isinstance(tensors, dict) else []
    return any(name in ROTATION or ".mlp.w12." in str(name) for name in names)


def from_lightning(tensors: Tensors) -> tuple[Tensors, dict[str, Any] | None]:
    """(state dict of our network, DiT's arguments) for a state dict of LightningDiT's.

    The arguments are None where nothing tells the number of heads: without a rotation. Raises
    ValueError, naming the tensor, for a network that ours cannot be.
    """
    ours = {
        re.sub(r"\.mlp\.w\d+\.", lambda found: LINEARS.get(found[0], found[0]), name): tensor
        for name, tensor in tensors.items()
        if name not in ROTATION
    }
    if design_of(ours) != "adaln_zero":
        raise ValueError(
            "blocks.0.adaLN_modulation.1.weight is not of six vectors: shift, scale and gate, "
            "twice; LightningDiT's other kinds of block are not read"
        )
    turned = [tensors[name] for name in ROTATION if name in tensors]
    if not turned:
        return ours, None
    if len(turned) < len(ROTATION):
        raise ValueError(f"{' and '.join(ROTATION)} go together, and one of them is missing")
    try:
        config = _config_of(ours, turned[0])
    except (KeyError, IndexError) as error:
        raise ValueError(f"the weights of LightningDiT's network lack {error}") from None
    _check_rotation(turned, config)
    return ours, config


def _config_of(tensors, rotation_of_one):
    """DiT's arguments for a state dict under our names, and sines (T, width of a head)."""
    patches, classes = tensors["x_embedder.proj.weight"].shape, tensors[LABEL_TABLE]
    first = first_block(tensors)
    width, channels, patch = patches[0], patches[1], patches[-1]
    count, head = rotation_of_one.shape[0], rotation_of_one.shape[-1]
    side, parts = math.isqrt(count), parts_of(tensors)
    if side**2 != count or not head or width % head:
        raise ValueError(
            f"{ROTATION[0]} is {tuple(rotation_of_one.shape)}; wanted is (tokens of a square, "
            f"numbers of a head), of which {width} is a multiple"
        )
    depth = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    # A rotation stands beside the table of positions, where that is there
    positions = "table+rope" if POSITION_TABLE in tensors else "rope"
    return dict(
        input_size=side * patch, patch_size=patch, in_channels=channels, hidden_size=width,
        depth=len(depth), num_heads=width // head, mlp_ratio=_ratio(first, width, parts["mlp"]),
        class_dropout_prob=ARGUMENTS["class_dropout_prob"], num_classes=len(classes) - 1,
        learn_sigma=learns_sigma(tensors, patch, channels), block="adaln_zero",
        **parts | {"positions": positions},
    )  # fmt: skip


def _ratio(first, width, mlp):
    """The mlp_ratio of a block with these tensors; a SwiGLU is two thirds as wide as it says."""
    hidden = first["mlp.fc2.weight"].shape[-1]
    usual = ARGUMENTS["mlp_ratio"]
    if mlp == "swiglu":
        return usual if int(width * usual) * 2 // 3 == hidden else 1.5 * hidden / width
    return hidden / width


def _check_rotation(turned, config):
    """Raise ValueError unless sines and cosines (T, width of a head) are those of our rotation."""
    side = config["input_size"] // config["patch_size"]
    index, grid = grid_index(side, side), (side, side)
    ours = rotation(
        index, torch.full_like(index, side), grid, turned[0].shape[-1], "extend", torch.float64
    ).chunk(2, dim=-1)
    for name, theirs, expected in zip(ROTATION, turned, ours):
        rounded = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0
        fits = theirs.shape == expected.shape and torch.allclose(
            theirs.double(), expected, rtol=0, atol=max(TOLERANCE, rounded)
        )
        if not fits:
            raise ValueError(
                f"{name} is not of the rotation by rows and columns of {side} x {side} tokens with "
                "base 10,000, and no other is read; if it is for another size, save the state dict "
                "without it and give the network's arguments"
            )
