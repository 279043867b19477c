"""The weights of a DiT as the beginning of a DynamicDiT, which then is that DiT."""

from pathlib import Path
from typing import Any

from checkpoints.network_config import LATER, Tensors
from checkpoints.networks import Network
from checkpoints.outline import design_of, parts_of
from variants.dynamic import sorted_by_magnitude


def from_static(
    tensors: Tensors, config: dict | None, network: Network, origin: Path | str
) -> Tensors:
    """The state dict of a fresh DynamicDiT that goes on from a DiT's: the routers are the network's
    own, all else the DiT's, heads and channels sorted so that the strongest are always on.

    `tensors` are the DiT's, `config` its arguments where they are known. Raises ValueError, naming
    `origin`, for a DiT of another design, or with other parts, than a DynamicDiT has, and for one
    with another number of heads.
    """
    said, heads = config or {}, network.config["num_heads"]
    wanted: dict[str, Any] = LATER | {"num_heads": heads}
    theirs = {"block": design_of(tensors), **parts_of(tensors)}
    theirs |= {name: said[name] for name in ("positions", "num_heads") if name in said}
    for name, there in theirs.items():
        if there != wanted[name]:
            advice = (
                "choose the `model` that it was trained with" if name == "num_heads"
                else "no other can begin one"
            )  # fmt: skip
            raise ValueError(
                f"{origin} is a DiT with {name} {there}, and a DynamicDiT goes on from one with "
                f"{wanted[name]}; {advice}"
            )
    own = network.state_dict()
    found = tensors | {name: own[name] for name in own if ".router_" in name}
    # Of another size they are refused, by what looks at all shapes
    same = all(
        name in found and found[name].shape == own[name].shape
        for name in own if name.startswith("blocks.")
    )  # fmt: skip
    return sorted_by_magnitude(found, heads) if same else found
