"""diffusers' SD3Transformer2DModel ↔ our MMDiT: tensors and configurations, without diffusers.

At noise level σ, 1 at noise, theirs is told 1000·σ and predicts the velocity towards noise. Ours is
told t = 1 - σ and predicts the velocity towards data. So noise_steps is 1000, and the last Linear
has the other sign. Their table of positions is in the file and is of the whole table_side; ours is
of the trained grid.
"""

from typing import Any

import torch

from checkpoints.diffusers_format import OWN
from checkpoints.key_maps import (
    Entry, Link, check_entries, check_table_is, checked_own, learns_variance, linked, refuse,
    swapped, to_ours, to_theirs,
)  # fmt: skip
from checkpoints.network_config import Tensors, check_outline
from checkpoints.networks import CLASS
from checkpoints.outline import POSITION_TABLE
from layers.positions import of_middle
from layers.sizes import check_text_sizes

NAME, OURS = "SD3Transformer2DModel", "MMDiT"
STEPS = 1000  # of its scheduler, which its timesteps count
LENGTH = 77 + 256  # tokens of its text: CLIP's, and T5's as its pipeline cuts them
TABLE = "pos_embed.pos_embed"
ENTRIES = {
    "sample_size": Entry(int, 128), "patch_size": Entry(int, 2), "in_channels": Entry(int, 16),
    "num_layers": Entry(int, 18), "attention_head_dim": Entry(int, 64),
    "num_attention_heads": Entry(int, 18), "joint_attention_dim": Entry(int, 4096),
    "caption_projection_dim": Entry(int, 1152), "pooled_projection_dim": Entry(int, 2048),
    "out_channels": Entry(int, 16, optional=True), "pos_embed_max_size": Entry(int, 96),
    "qk_norm": Entry(str, None, optional=True),
}  # fmt: skip
FREE = ("class_dropout_prob", "text_length", "table_side")  # no tensor and no entry tells them


def is_sd3(config: dict) -> bool:
    """Whether a config.json's contents are of this class."""
    return config.get(CLASS) == NAME


def config_from_sd3(config: dict) -> dict[str, Any]:
    """MMDiT's arguments for a config.json of SD3Transformer2DModel.

    Raises ValueError for one that our network cannot be, such as 3.5-medium's with its second
    attention.
    """
    c = check_entries(config, ENTRIES, {})
    if config.get("dual_attention_layers"):
        raise ValueError(
            "its dual_attention_layers are blocks with a second attention, which have no like here"
        )
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if c["qk_norm"] not in (None, "rms_norm"):
        raise ValueError(f"its qk_norm is {c['qk_norm']!s:.60}; None and rms_norm are read")
    if c["caption_projection_dim"] != width:
        raise ValueError(
            f"its caption_projection_dim is {c['caption_projection_dim']}; wanted is its width, "
            f"{width}"
        )
    read = {
        CLASS: OURS, "input_size": c["sample_size"], "patch_size": c["patch_size"],
        "in_channels": c["in_channels"], "hidden_size": width, "depth": c["num_layers"],
        "num_heads": c["num_attention_heads"], "mlp_ratio": 4.0, "class_dropout_prob": 0.1,
        "learn_sigma": learns_variance(c["in_channels"], c["out_channels"]),
        "qk_norm": c["qk_norm"] is not None, "streams": 2, "table_side": c["pos_embed_max_size"],
        "text_width": c["joint_attention_dim"], "pooled_width": c["pooled_projection_dim"],
        "text_length": LENGTH, "noise_steps": STEPS,
    }  # fmt: skip
    return checked_own(config.get(OWN), read, FREE)


def config_to_sd3(config: dict) -> dict[str, Any]:
    """SD3Transformer2DModel's arguments for MMDiT's, and under OWN MMDiT's themselves.

    Raises ValueError, with the reason, for a network that diffusers' class cannot be.
    """
    c = config
    reasons = {
        "it has a text encoder of its own; train it with outside ones": c["text_width"] is None,
        f"its streams are {c['streams']}; wanted are 2": c["streams"] != 2,
        f"its mlp_ratio is {c['mlp_ratio']}; wanted is 4": c["mlp_ratio"] != 4,
        f"its latents are {c['input_size']}; wanted is a square": isinstance(c["input_size"], list),
        f"its noise_steps are {c['noise_steps']}, and theirs counts {STEPS}; those of an MMDiT "
        f"built with noise_steps={STEPS} can be exported": c["noise_steps"] != STEPS,
    }  # fmt: skip
    refuse(reasons, NAME)
    return {
        "sample_size": c["input_size"], "patch_size": c["patch_size"],
        "in_channels": c["in_channels"], "num_layers": c["depth"],
        "attention_head_dim": c["hidden_size"] // c["num_heads"],
        "num_attention_heads": c["num_heads"], "joint_attention_dim": c["text_width"],
        "caption_projection_dim": c["hidden_size"], "pooled_projection_dim": c["pooled_width"],
        "out_channels": c["in_channels"] * (2 if c["learn_sigma"] else 1),
        "pos_embed_max_size": _side(c), "dual_attention_layers": (),
        "qk_norm": "rms_norm" if c["qk_norm"] else None, OWN: dict(c),
    }  # fmt: skip


def from_sd3(tensors: Tensors, config: dict) -> Tensors:
    """The state dict of the MMDiT with this configuration for that of SD3Transformer2DModel.

    Raises ValueError if tensors are missing or left over, or the position table is another.
    """
    check_text_sizes(**{key: value for key, value in config.items() if key != CLASS})
    check_outline(config, tensors)
    ours = to_ours(tensors, links(config), [TABLE])
    if TABLE not in tensors:
        raise ValueError(f"the weights of diffusers' network lack {TABLE}")
    _check_table(tensors[TABLE], config, _side(config), TABLE)
    return ours | {POSITION_TABLE: _table(config, _base(config))}


def to_sd3(tensors: Tensors, config: dict) -> Tensors:
    """The state dict of SD3Transformer2DModel for that of an MMDiT with this configuration.

    Raises ValueError if its position table is another than its own.
    """
    _check_table(tensors[POSITION_TABLE], config, _base(config), POSITION_TABLE)
    return to_theirs(tensors, links(config)) | {TABLE: _table(config, _side(config))}


def links(config: dict) -> list[Link]:
    """Which tensors are which."""
    found = [
        *linked("x_embedder.proj", "pos_embed.proj"),
        *linked("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        *linked("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        *linked("pooled_embedder.0", "time_text_embed.text_embedder.linear_1"),
        *linked("pooled_embedder.2", "time_text_embed.text_embedder.linear_2"),
        *linked("words_embedder", "context_embedder"),
        *linked("final_layer.adaLN_modulation.1", "norm_out.linear", change=swapped),
        *linked("final_layer.linear", "proj_out", change=torch.neg),
    ]
    last = config["depth"] - 1
    for i in range(config["depth"]):
        of = f"blocks.{i}", f"transformer_blocks.{i}"
        found += _stream(*of, "image", "", config["qk_norm"], True)
        found += _stream(*of, "text", "_context", config["qk_norm"], i < last)
    return found


def _stream(ours, theirs, stream, context, qk_norm, ends):
    """The Links of one stream of a block."""
    here, attn = f"{ours}.{stream}", f"{theirs}.attn"
    names = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
    if context:
        names = (
            "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
        )  # fmt: skip
    *asks, out, q_norm, k_norm = (f"{attn}.{name}" for name in names)
    regression = f"{theirs}.norm1{context}.linear"
    found = linked(f"{here}.qkv", *asks)
    if qk_norm:
        found += [
            Link(f"{here}.q_norm.weight", (f"{q_norm}.weight",)),
            Link(f"{here}.k_norm.weight", (f"{k_norm}.weight",)),
        ]
    if not ends:
        return found + linked(f"{here}.adaLN_modulation.1", regression, change=swapped)
    return [
        *found, *linked(f"{here}.adaLN_modulation.1", regression), *linked(f"{here}.proj", out),
        *linked(f"{here}.mlp.fc1", f"{theirs}.ff{context}.net.0.proj"),
        *linked(f"{here}.mlp.fc2", f"{theirs}.ff{context}.net.2"),
    ]  # fmt: skip


def _base(config):
    """Rows, and columns, of the trained grid."""
    return config["input_size"] // config["patch_size"]


def _side(config):
    """Rows, and columns, of the whole table."""
    return config["table_side"] or _base(config)


def _table(config, side):
    """The middle (1, side², D), float32, of the whole table."""
    base, most = _base(config), _side(config)
    found = of_middle((side, side), (most, most), (base, base), config["hidden_size"])
    return found.float().unsqueeze(0)  # (1, T, D)


def _check_table(found, config, side, name):
    """Raise ValueError unless a table is the middle (1, side², D) of the whole one."""
    check_table_is(found, side, config["hidden_size"], lambda: _table(config, side), name)
