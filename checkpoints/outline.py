"""What the names and shapes of a state dict say of its network."""

import math
from typing import Any

import torch

from checkpoints.network_config import Tensors
from checkpoints.networks import OURS
from layers.parts import PAPERS

FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")
POSITION_TABLE = "pos_embed"
FIRST_BLOCK = "blocks.0."
TABLE_OF_FRAMES = "temp_embed"
# A tensor that networks of a class alone have; the first that is there counts
OF_CLASS = {
    "MMDiT": "words_embedder.weight", "PixArt": "words_embedder.2.weight",
    "VideoDiT": TABLE_OF_FRAMES, "ExitDiT": "exit_layers.0.linear.weight",
    "DynamicDiT": f"{FIRST_BLOCK}router_heads.weight",
}  # fmt: skip
CLOSE = 0.01  # two sines that are equal but for bfloat16's rounding


def class_of(tensors: Tensors) -> str:
    """The class, a key of checkpoints.networks.NETWORKS, of the network whose state dict this is;
    DiT's where nothing tells another, as nothing does of most networks of clips.
    """
    return next((name for name, mark in OF_CLASS.items() if mark in tensors), OURS)


def first_block(tensors: Tensors) -> Tensors:
    """The tensors of a state dict's first block, by their names within it."""
    return {
        name.removeprefix(FIRST_BLOCK): value
        for name, value in tensors.items()
        if name.startswith(FIRST_BLOCK)
    }


def design_of(tensors: Tensors) -> str:
    """The block design, a key of models.BLOCKS, of the DiT whose state dict this is."""
    first = first_block(tensors)
    if "scale_shift_table" in first:
        return "adaln_single"
    if "cross_attn.q.weight" in first:
        return "cross_attention"
    regression = first.get("adaLN_modulation.1.weight")
    if regression is not None:
        return "adaln" if len(regression) == 4 * regression.shape[-1] else "adaln_zero"
    return "in_context" if "norm1.weight" in first else "adaln_zero"


def parts_of(tensors: Tensors) -> dict[str, Any]:
    """Positions, norm, MLP and qk_norm of the DiT whose state dict this is, as DiT takes them.

    A table that is there is taken as all that tells positions: "table+rope" has no other tensors.
    """
    first = first_block(tensors)
    into, out = first.get("mlp.fc1.weight"), first.get("mlp.fc2.weight")
    gated = into is not None and out is not None and len(into) == 2 * out.shape[-1]
    return {
        "positions": PAPERS.positions if POSITION_TABLE in tensors else "rope",
        "norm": "rms" if "norm1.weight" in first and "norm1.bias" not in first else PAPERS.norm,
        "mlp": "swiglu" if gated else PAPERS.mlp,
        "qk_norm": "attn.q_norm.weight" in first,
    }


def grid_in(tensors: Tensors) -> tuple[int, int] | None:
    """Rows and columns of the grid whose sines and cosines a state dict's position table has; None
    for a table of other numbers, or none.
    """
    table = tensors.get(POSITION_TABLE)
    if table is None or table.ndim != 3 or len(table) != 1 or not table.numel():
        return None
    tokens, width = table.shape[1:]
    # The sines of the first frequency, 1, of each token's column and row
    found = table[0, :, [0, width // 2]].double()  # (T, 2)
    index = torch.arange(tokens, dtype=torch.float64)
    shorter = [side for side in range(1, math.isqrt(tokens) + 1) if tokens % side == 0]
    for columns in {*shorter, *(tokens // side for side in shorter)}:
        wanted = torch.stack([index % columns, index // columns], dim=1).sin()  # (T, 2)
        if torch.allclose(found, wanted, rtol=0, atol=CLOSE):
            return tokens // columns, columns
    return None


def learns_sigma(
    tensors: Tensors, patch_size: int, channels: int, patch_frames: int = 1
) -> bool:
    """Whether a state dict has outputs for a variance beside those for so many channels; yes if it
    has no final layer.
    """
    return len(tensors.get(FINAL[1], ())) != patch_size**2 * patch_frames * channels
