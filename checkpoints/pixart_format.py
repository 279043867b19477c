"""diffusers' PixArtTransformer2DModel ↔ our PixArt: tensors and configurations, without diffusers.

The two compute the same. The position table is not in their files.
"""

from typing import Any

import torch

from checkpoints.diffusers_format import OWN
from checkpoints.key_maps import (
    Entry, Link, check_entries, check_table_is, checked_own, learns_variance, linked, refuse,
    to_ours, to_theirs,
)  # fmt: skip
from checkpoints.network_config import Tensors, check_outline
from checkpoints.networks import CLASS
from checkpoints.outline import POSITION_TABLE
from layers.placement import Placement
from layers.positions import POSITIONS
from layers.sizes import check_text_sizes

NAME, OURS = "PixArtTransformer2DModel", "PixArt"
OLDER = "Transformer2DModel"  # in the first folders
LENGTH = 120  # tokens of its text, as its pipeline cuts them
TABLE = "pos_embed.pos_embed"  # in some files all the same
NORM = "ada_norm_single"
ENTRIES = {
    "num_attention_heads": Entry(int, 16), "attention_head_dim": Entry(int, 72),
    "in_channels": Entry(int, 4), "out_channels": Entry(int, 8, optional=True),
    "num_layers": Entry(int, 28), "cross_attention_dim": Entry(int, 1152, optional=True),
    "sample_size": Entry(int, 128), "patch_size": Entry(int, 2),
    "caption_channels": Entry(int, None, optional=True),
    "interpolation_scale": Entry(float, None, optional=True),
    "use_additional_conditions": Entry(bool, None, optional=True),
}  # fmt: skip
FIXED = {
    "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": NORM,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "attention_type": "default", "dropout": 0.0,
}  # fmt: skip
# Latents of this side have embeddings of the resolution unless they say otherwise
ADDITIONAL = 128
SCALED = 64  # the side up to which positions are not scaled unless they say otherwise
FREE = ("class_dropout_prob", "text_length")  # no tensor and no entry tells them


def is_pixart(config: dict) -> bool:
    """Whether a config.json's contents are of this class, by its own name or its older one."""
    name = config.get(CLASS)
    return name == NAME or (name == OLDER and config.get("norm_type") == NORM)


def config_from_pixart(config: dict) -> dict[str, Any]:
    """PixArt's arguments for a config.json of PixArtTransformer2DModel.

    Raises ValueError for one that our network cannot be, such as those that are told the
    resolution.
    """
    c = check_entries(config, ENTRIES, FIXED)
    additional = c["use_additional_conditions"]
    if additional or (additional is None and c["sample_size"] == ADDITIONAL):
        raise ValueError(
            "it has use_additional_conditions, embeddings of the resolution, which have no like "
            "here"
        )
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if c["caption_channels"] is None:
        raise ValueError("its caption_channels are none; wanted is the width of a text encoder")
    if c["cross_attention_dim"] != width:
        raise ValueError(
            f"its cross_attention_dim is {c['cross_attention_dim']}; wanted is its width, {width}"
        )
    scale = c["interpolation_scale"] or max(c["sample_size"] // SCALED, 1)
    read = {
        CLASS: OURS, "input_size": c["sample_size"], "patch_size": c["patch_size"],
        "in_channels": c["in_channels"], "hidden_size": width, "depth": c["num_layers"],
        "num_heads": c["num_attention_heads"], "mlp_ratio": 4.0, "class_dropout_prob": 0.1,
        "learn_sigma": learns_variance(c["in_channels"], c["out_channels"]),
        "position_scale": scale, "text_width": c["caption_channels"], "text_length": LENGTH,
    }  # fmt: skip
    return checked_own(config.get(OWN), read, FREE)


def config_to_pixart(config: dict) -> dict[str, Any]:
    """PixArtTransformer2DModel's arguments for PixArt's, and under OWN PixArt's themselves.

    Raises ValueError, with the reason, for a network that diffusers' class cannot be.
    """
    c = config
    placed = c.get("extrapolation", "interpolate")
    reasons = {
        "it has a text encoder of its own; train it with an outside one": c["text_width"] is None,
        f"its mlp_ratio is {c['mlp_ratio']}; wanted is 4": c["mlp_ratio"] != 4,
        f"its latents are {c['input_size']}; wanted is a square": isinstance(c["input_size"], list),
        f"its extrapolation is {placed}; wanted is interpolate": placed != "interpolate",
    }  # fmt: skip
    refuse(reasons, NAME)
    return {
        "num_attention_heads": c["num_heads"],
        "attention_head_dim": c["hidden_size"] // c["num_heads"], "in_channels": c["in_channels"],
        "out_channels": c["in_channels"] * (2 if c["learn_sigma"] else 1),
        "num_layers": c["depth"], "cross_attention_dim": c["hidden_size"],
        "sample_size": c["input_size"], "patch_size": c["patch_size"],
        "caption_channels": c["text_width"], "interpolation_scale": c["position_scale"],
        "use_additional_conditions": False, OWN: dict(c),
    }  # fmt: skip


def from_pixart(tensors: Tensors, config: dict) -> Tensors:
    """The state dict of the PixArt with this configuration for that of PixArtTransformer2DModel.

    Raises ValueError if tensors are missing or left over, or a position table is another.
    """
    check_text_sizes(**{key: value for key, value in config.items() if key != CLASS})
    check_outline(config, tensors)
    ours = to_ours(tensors, links(config), [TABLE])
    if TABLE in tensors:
        _check_table(tensors[TABLE], config, TABLE)
    return ours | {POSITION_TABLE: _table(config)}


def to_pixart(tensors: Tensors, config: dict) -> Tensors:
    """The state dict of PixArtTransformer2DModel for that of a PixArt with this configuration.

    Raises ValueError if its position table is another than its own.
    """
    _check_table(tensors[POSITION_TABLE], config, POSITION_TABLE)
    return to_theirs(tensors, links(config))


def links(config: dict) -> list[Link]:
    """Which tensors are which."""
    embedder = "adaln_single.emb.timestep_embedder"
    found = [
        *linked("x_embedder.proj", "pos_embed.proj"),
        *linked("t_embedder.mlp.0", f"{embedder}.linear_1"),
        *linked("t_embedder.mlp.2", f"{embedder}.linear_2"),
        *linked("shared_modulation.1", "adaln_single.linear"),
        *linked("words_embedder.0", "caption_projection.linear_1"),
        *linked("words_embedder.2", "caption_projection.linear_2"),
        Link("final_layer.scale_shift_table", ("scale_shift_table",)),
        *linked("final_layer.linear", "proj_out"),
    ]
    for i in range(config["depth"]):
        here, there = f"blocks.{i}", f"transformer_blocks.{i}"
        asks = [f"{there}.attn1.{part}" for part in ("to_q", "to_k", "to_v")]
        found += [
            Link(f"{here}.scale_shift_table", (f"{there}.scale_shift_table",)),
            *linked(f"{here}.attn.qkv", *asks),
            *linked(f"{here}.attn.proj", f"{there}.attn1.to_out.0"),
            *linked(f"{here}.cross_attn.q", f"{there}.attn2.to_q"),
            *linked(f"{here}.cross_attn.kv", f"{there}.attn2.to_k", f"{there}.attn2.to_v"),
            *linked(f"{here}.cross_attn.proj", f"{there}.attn2.to_out.0"),
            *linked(f"{here}.mlp.fc1", f"{there}.ff.net.0.proj"),
            *linked(f"{here}.mlp.fc2", f"{there}.ff.net.2"),
        ]
    return found


def _side(config):
    """Rows, and columns, of the trained grid."""
    return config["input_size"] // config["patch_size"]


def _table(config):
    """The position table of the trained grid, (1, T, D), float32."""
    grid, width = (_side(config), _side(config)), config["hidden_size"]
    exact = Placement(
        POSITIONS["table"], grid, width // config["num_heads"], "interpolate", torch.float64,
        config["position_scale"],
    )  # fmt: skip
    return exact.of_grid(grid, width).float().unsqueeze(0)  # (1, T, D)


def _check_table(found, config, name):
    """Raise ValueError unless a table is this one."""
    width = config["hidden_size"]
    check_table_is(found, _side(config), width, lambda: _table(config), name)
