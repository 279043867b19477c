"""The weights of a DiT as the beginning of a network of clips, which then makes of every frame
what the DiT makes of it.
"""

from pathlib import Path
from typing import Any

from checkpoints.network_config import LATER, Tensors
from checkpoints.networks import MODELS, Network
from checkpoints.outline import design_of, parts_of
from variants.video import VideoDiT

BLOCKS, TIME = "blocks.", 2  # every second block goes along the frames
BEGUN = "alternate"  # the attention of networks that a DiT is a part of


def blocks_in(tensors: Tensors) -> int:
    """How many blocks a state dict has."""
    found = {name.split(".")[1] for name in tensors if name.startswith(BLOCKS)}
    return len(found)


def from_images(
    tensors: Tensors, config: dict | None, network: Network, origin: Path | str
) -> Tensors:
    """The state dict of a fresh VideoDiT that goes on from a DiT's: the blocks along the frames are
    the network's own, the others, and all else, the DiT's.

    `tensors` are the DiT's, `config` its arguments where they are known. Raises ValueError, naming
    `origin`, unless the network is a DiT of the same size but for its blocks along the frames.
    """
    try:
        check_begins(tensors, config or {}, network, origin)
    except ValueError as error:
        unsaid = "; if it is of a network of clips, give a file of ours with its configuration"
        raise ValueError(f"{error}{unsaid * (config is None)}") from None
    found = {name: value for name, value in tensors.items() if not name.startswith(BLOCKS)}
    for name, value in network.state_dict().items():
        if name.startswith(BLOCKS):
            number, inside = name.removeprefix(BLOCKS).split(".", 1)
            of, along_frames = divmod(int(number), TIME)
            found[name] = value if along_frames else tensors.get(f"{BLOCKS}{of}.{inside}", value)
    return found


def check_begins(tensors: Tensors, config: dict, network: Network, origin: Path | str) -> None:
    """Raise ValueError unless a DiT's weights can begin a network of clips."""
    ours = network.config
    if not isinstance(network, VideoDiT) or ours["attention"] != BEGUN:
        raise ValueError(
            f"{origin} has the weights of a DiT, which makes images; of networks of clips it can "
            f"begin those alone that have attention {BEGUN} and labels: give a `model` whose name "
            "begins with VideoDiT, of the size that the weights have"
        )
    embedder = tensors.get("x_embedder.proj.weight")
    width, patch = (None, None) if embedder is None else (len(embedder), embedder.shape[-1])
    parts = {"block": design_of(tensors), **parts_of(tensors)}
    parts["positions"] = config.get("positions", parts["positions"])
    theirs: dict[str, Any] = {
        "depth": blocks_in(tensors), "hidden_size": width, "patch_size": patch, **parts,
    }  # fmt: skip
    theirs |= {name: config[name] for name in ("num_heads", "mlp_ratio") if name in config}
    wanted = LATER | ours | {"depth": ours["depth"] // TIME}
    for name, there in theirs.items():
        if there != wanted[name]:
            advice = f"pass `qk_norm={there}`" if name == "qk_norm" else other_model(theirs)
            raise ValueError(
                f"{origin} is a DiT with {name} {there}, and the network of clips here goes on "
                f"from one with {wanted[name]}; {advice}"
            )
    if ours["patch_frames"] != 1:
        raise ValueError(
            f"{origin} is a DiT, whose patches have one frame, and those here have "
            f"{ours['patch_frames']}; choose another `model`"
        )


def other_model(theirs: dict[str, Any]) -> str:
    """What to do where a DiT with these arguments does not begin the network of the chosen model.
    """
    if any(theirs.get(name, value) != value for name, value in LATER.items() if name != "qk_norm"):
        return "no `model` of clips has that"
    wanted = {name: theirs[name] for name in ("hidden_size", "patch_size")}
    wanted |= {"depth": TIME * theirs["depth"], "attention": BEGUN}
    for name, made in MODELS.items():
        arguments = {"attention": BEGUN} | made.keywords
        if made.func is VideoDiT and wanted.items() <= arguments.items():
            return f'pass `model="{name}"`'
    return "no `model` of clips has such blocks"
