"""diffusers' DiTTransformer2DModel ↔ our DiT: tensors and configurations, without diffusers itself.

The two compute the same, but diffusers keeps an embedder of t and y in every block, the attention's
regression in three parts and the position table out of the file, and its pipeline takes label 1000
for "no class". So an exported label table has 1,001 rows, with the null class in the last, and the
configuration of the network that it came from is kept under OWN.
"""

import torch

from checkpoints.network_config import Tensors, arguments_in, check_kind, check_outline, shown
from layers.parts import DEFAULTS
from layers.sizes import check_sizes
from models import get_2d_sincos_pos_embed

# The second in folders older than the first
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# diffusers leaves entries that begin so alone
OWN, OWN_CLASSES, OWN_TEXT = "_dit", "_dit_classes", "_dit_text"
# DiT's, and what the first folders of diffusers say, which makes a difference of some 1e-5
NORM_EPS = (1e-6, 1e-5)
NULL_LABEL = 1000  # DiTPipeline's
WHOLE = {  # outside the blocks, diffusers' name → ours
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
BLOCK = {  # within a block
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
KINDS_THERE = {  # of the entries of its configuration that count here
    **dict.fromkeys(
        (
            "num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
            "num_layers", "sample_size", "patch_size", "num_embeds_ada_norm",
        ), int,
    ),
    "norm_eps": float, "norm_elementwise_affine": bool, "attention_bias": bool,
    "activation_fn": str,
}  # fmt: skip
EMBEDDERS = {  # in every block of theirs, once in ours
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
TABLE, LABEL_TABLE = (
    "norm1.emb.class_embedder.embedding_table.weight",
    "y_embedder.embedding_table.weight",
)
PARTS = [f"attn1.{part}" for part in ("to_q", "to_k", "to_v")]


def is_diffusers(config: dict) -> bool:
    """Whether a config.json's contents are of diffusers' DiT."""
    return (
        config.get("_class_name") in CLASSES
        and config.get("norm_type", "ada_norm_zero") == "ada_norm_zero"
    )


def config_to_diffusers(config: dict, null_label: int = NULL_LABEL) -> dict:
    """DiTTransformer2DModel's arguments for DiT's, and under OWN DiT's themselves.

    null_label is the null class's row there. Raises ValueError, with the reason, for a network that
    diffusers' class or its pipeline cannot be.
    """
    c = config
    reasons = {
        f"its blocks are of the design {c['block']}": c["block"] != "adaln_zero",
        f"its mlp_ratio is {c['mlp_ratio']}": c["mlp_ratio"] != 4,
        f"its latents are {c['input_size']}": isinstance(c["input_size"], list),
        **{f"its {name} is {c[name]}": True for name in DEFAULTS if name in c},
        "it has no classes": not c["num_classes"],
        f"it has {c['num_classes']} classes, and label {null_label} stands for none there": c[
            "num_classes"
        ]
        > null_label,
        "it was trained without label dropout, and the pipeline guides": not c[
            "class_dropout_prob"
        ],
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"diffusers' DiT cannot be this network: {reason}; wanted are adaln_zero, the "
                f"paper's parts, square latents, mlp_ratio 4 and 1 to {null_label} classes with "
                "label dropout"
            )
    return {
        "num_attention_heads": c["num_heads"],
        "attention_head_dim": c["hidden_size"] // c["num_heads"], "in_channels": c["in_channels"],
        "out_channels": c["in_channels"] * (2 if c["learn_sigma"] else 1), "num_layers": c["depth"],
        "sample_size": c["input_size"], "patch_size": c["patch_size"],
        "num_embeds_ada_norm": null_label, "norm_eps": 1e-6, OWN: dict(config),
    }  # fmt: skip


def to_diffusers(tensors: Tensors, config: dict, null_label: int = NULL_LABEL) -> Tensors:
    """The state dict of diffusers' network for that of a DiT with this configuration.

    null_label is as in config_to_diffusers.
    """
    null, own_table = config["num_classes"], tensors[LABEL_TABLE]
    # (1001, D), zero where there is no class
    table = own_table.new_zeros(null_label + 1, own_table.shape[1])
    table[:null], table[null_label] = own_table[:null], own_table[null]
    pairs = dict(WHOLE)
    theirs = {}
    for i in range(config["depth"]):
        there, here = f"transformer_blocks.{i}", f"blocks.{i}"
        theirs[f"{there}.{TABLE}"] = table
        pairs |= {f"{there}.{name}": ours for name, ours in EMBEDDERS.items()}
        pairs |= {f"{there}.{name}": f"{here}.{ours}" for name, ours in BLOCK.items()}
        for kind in ("weight", "bias"):
            thirds = tensors[f"{here}.attn.qkv.{kind}"].chunk(3)  # (D, ...) each
            theirs |= {
                f"{there}.{part}.{kind}": third for part, third in zip(PARTS, thirds, strict=True)
            }
    return theirs | {
        f"{name}.{kind}": tensors[f"{ours}.{kind}"]
        for name, ours in pairs.items()
        for kind in ("weight", "bias")
    }


def names_in_diffusers(depth: int) -> set[str]:
    """The names in a state dict of diffusers' network with so many blocks."""
    within = [*BLOCK, *EMBEDDERS, *PARTS]
    names = [*WHOLE, *(f"transformer_blocks.{i}.{name}" for i in range(depth) for name in within)]
    tables = {f"transformer_blocks.{i}.{TABLE}" for i in range(depth)}
    return tables | {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def config_from_diffusers(config: dict) -> dict:
    """DiT's arguments for a config.json of diffusers' DiT, whoever wrote it.

    Raises ValueError for one that our network cannot be.
    """
    for key, kind in KINDS_THERE.items():
        if config.get(key) is not None:
            check_kind(key, config[key], kind)
    heads, width = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    channels = config.get("in_channels", 4)
    out_channels = config.get("out_channels") or channels
    classes = config.get("num_embeds_ada_norm", NULL_LABEL)
    other = {
        "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
        "attention_bias": True, "norm_type": "ada_norm_zero",
    }  # fmt: skip
    differing = [
        f"{key} {shown(config[key])}"
        for key, value in other.items()
        if config.get(key, value) != value
    ]
    if config.get("norm_eps", NORM_EPS[1]) not in NORM_EPS:
        differing.append(f"norm_eps {shown(config['norm_eps'])}")
    if out_channels not in (channels, 2 * channels):
        differing.append(f"out_channels {out_channels} for {channels} in_channels")
    if differing:
        raise ValueError(f"this network of diffusers' is no DiT: {', '.join(differing)}")
    read = dict(
        input_size=config.get("sample_size", 32), patch_size=config.get("patch_size", 2),
        in_channels=channels, hidden_size=heads * width, depth=config.get("num_layers", 28),
        num_heads=heads, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=classes,
        learn_sigma=out_channels == 2 * channels, block="adaln_zero",
    )  # fmt: skip
    own = config.get(OWN, read)
    if not isinstance(own, dict) or own.keys() != read.keys():
        raise ValueError(f"{OWN} is not what it should be, all of DiT's arguments; take it out")
    own = arguments_in(own)
    contradicted = [
        key
        for key in read
        if key not in ("num_classes", "class_dropout_prob") and own.get(key) != read[key]
    ]
    if contradicted or not 0 < own["num_classes"] <= classes:
        raise ValueError(
            f"the configuration contradicts itself: {', '.join(contradicted) or 'num_classes'} "
            f"under {OWN}"
        )
    return own


def from_diffusers(tensors: Tensors, config: dict) -> Tensors:
    """The state dict of the DiT with this configuration for that of diffusers' network.

    Raises ValueError if tensors are missing or left over, or if the blocks differ in an embedder:
    a DiT has one for all.
    """
    check_sizes(**config)
    check_outline(config, tensors)
    known = names_in_diffusers(config["depth"])
    left = [name for name in tensors if name not in known and name != "pos_embed.pos_embed"]
    if left:
        raise ValueError(
            "the weights of diffusers' network have more than its configuration: "
            f"{', '.join(left[:4])}"
        )
    blocks = [f"transformer_blocks.{i}" for i in range(config["depth"])]
    try:
        _check_embedders(tensors, blocks)
        table = tensors[f"{blocks[0]}.{TABLE}"]  # (1001, D)
        null = torch.cat([table[: config["num_classes"]], table[-1:]])  # (num_classes + 1, D)
        pairs = {ours: name for name, ours in WHOLE.items()}
        pairs |= {ours: f"{blocks[0]}.{name}" for name, ours in EMBEDDERS.items()}
        ours = {LABEL_TABLE: null}
        for i, there in enumerate(blocks):
            pairs |= {f"blocks.{i}.{here}": f"{there}.{name}" for name, here in BLOCK.items()}
            for kind in ("weight", "bias"):
                thirds = [tensors[f"{there}.{part}.{kind}"] for part in PARTS]
                ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(thirds)  # (3·D, ...)
        ours |= {
            f"{here}.{kind}": tensors[f"{name}.{kind}"]
            for here, name in pairs.items()
            for kind in ("weight", "bias")
        }
    except KeyError as error:
        raise ValueError(f"the weights of diffusers' network lack {error.args[0]}") from None
    side = config["input_size"] // config["patch_size"]
    position = torch.from_numpy(get_2d_sincos_pos_embed(config["hidden_size"], side))
    return ours | {"pos_embed": position[None].float()}  # (1, T, D)


def _check_embedders(tensors, blocks):
    """Raise ValueError unless every block has the first block's embedders."""
    names = [f"{name}.{kind}" for name in EMBEDDERS for kind in ("weight", "bias")] + [TABLE]
    for there in blocks[1:]:
        for name in names:
            if not torch.equal(tensors[f"{there}.{name}"], tensors[f"{blocks[0]}.{name}"]):
                raise ValueError(
                    f"its blocks have embedders of their own ({there}.{name} is not that of "
                    f"{blocks[0]}), as after training "
                    "with diffusers; a DiT has one for all blocks, so it cannot be read as one"
                )
