"""The weights of a DiT as the beginning of one with exits, each of whose final layers then begins
as a copy of the DiT's.
"""

from pathlib import Path

from checkpoints.network_config import Tensors
from checkpoints.networks import ExitDiT
from checkpoints.outline import design_of
from variants.exits import DESIGN

FINAL = "final_layer."


def check_whole(tensors: Tensors, origin: Path | str) -> None:
    """Raise ValueError, naming `origin`, for the state dict of a DiT of another design."""
    if (design := design_of(tensors)) != DESIGN:
        raise ValueError(
            f"{origin} has blocks of the design {design}, and a network with `exits` has those of "
            f"{DESIGN}; leave `exits` out"
        )


def with_exits(tensors: Tensors, network: ExitDiT) -> Tensors:
    """The state dict of a fresh ExitDiT that goes on from a DiT's."""
    last = {
        name.removeprefix(FINAL): value for name, value in tensors.items() if name.startswith(FINAL)
    }
    return tensors | {
        f"exit_layers.{i}.{name}": value
        for i in range(len(network.exits))
        for name, value in last.items()
    }
