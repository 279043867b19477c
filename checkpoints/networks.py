"""The networks that there are: by the class that a configuration names, and by their models' names.

A variant of DiT is a file in variants/ and a row in each table.
"""

from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch

from layers.text import Text
from layers.text_encoder import PIECE
from models import DiT, DiT_models
from variants.dynamic import Dynamic
from variants.exits import Exits
from variants.mmdit import MMDiT, MMDiT_models
from variants.pixart import PixArt, PixArt_models
from variants.space_time import SpaceTime
from variants.text_network import TextNetwork
from variants.video import TextVideo, Video_models, VideoDiT


class ExitDiT(Exits, DiT):
    """A DiT whose depth depends on a sample's noise level."""


class DynamicDiT(Dynamic, DiT):
    """A DiT whose blocks leave parts of themselves out."""


CLASS = "_class_name"  # in a configuration; one without it is DiT's
OURS = "DiT"
Network = DiT | TextNetwork | VideoDiT
NETWORKS: dict[str, type[Network]] = {
    OURS: DiT, "MMDiT": MMDiT, "PixArt": PixArt, "VideoDiT": VideoDiT, "TextVideo": TextVideo,
    "ExitDiT": ExitDiT, "DynamicDiT": DynamicDiT,
}  # fmt: skip
# Class of networks → the same with routers, which has no models' names of its own
DYNAMIC: Mapping[type, type[Network]] = {DiT: DynamicDiT}
# "DiT-XL/2" → a factory that takes the network's other arguments as keywords. What is put into one
# of the four tables later is here, too.
MODELS: Mapping[str, partial] = ChainMap(Video_models, PixArt_models, MMDiT_models, DiT_models)

# What else stands in a configuration of ours: not an argument that decides the network
NOT_ARGUMENTS = (CLASS, "id2label", "process", "text")


def class_in(config: dict) -> str:
    """The name of the class that a configuration is for. Raises ValueError for an unknown one."""
    name = config.get(CLASS, OURS)
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"it is of {str(name)[:60]}, which is none of {', '.join(NETWORKS)}")
    return name


def arguments_of(name: str) -> dict[str, Any]:
    """{argument: its default} of the class with this name."""
    parameters = signature(NETWORKS[name]).parameters
    return {
        key: parameter.default for key, parameter in parameters.items() if key not in NOT_ARGUMENTS
    }


def create_network(config: dict[str, Any]) -> Network:
    """The network that a configuration is of, a network's `config`, its weights random.

    Raises ValueError for sizes that do not fit, TypeError for arguments that there are not.
    """
    arguments = {key: value for key, value in config.items() if key != CLASS}
    return NETWORKS[class_in(config)](**arguments)


def reads_text(network: Network | type[Network]) -> bool:
    """Whether a network, or the networks of a class, take captions."""
    kind = network if isinstance(network, type) else type(network)
    return issubclass(kind, TextNetwork)


def makes_clips(network: Network | type[Network]) -> bool:
    """Whether the samples of a network, or of the networks of a class, are clips."""
    kind = network if isinstance(network, type) else type(network)
    return issubclass(kind, SpaceTime)


def is_dynamic(network: Network | type[Network]) -> bool:
    """Whether a network, or the networks of a class, leave out parts of themselves by routers."""
    kind = network if isinstance(network, type) else type(network)
    return issubclass(kind, DynamicDiT)


def routes(network: Network) -> tuple[int, ...]:
    """The shape of the noise that a sample's switches have in training; () of a network without.
    """
    return network.routes if isinstance(network, DynamicDiT) else ()


def patch_frames(network: Network) -> int | None:
    """How many frames a patch has, of a network that makes clips; None of another."""
    return network.patch_frames if isinstance(network, SpaceTime) else None


def said_of(network: Network) -> list[dict[str, Any]] | None:
    """What a checkpoint says of the encoders that read captions for a network; None for none."""
    return network.text if isinstance(network, TextNetwork) else None


def sample_condition(network: Network, count: int) -> Any:
    """Conditions that a network takes, of so many samples, to be counted rather than looked at:
    labels, captions of its full text length, or None for a network that takes neither.
    """
    if isinstance(network, TextNetwork):
        length = network.text_length
        mask = torch.ones(count, length, dtype=torch.bool)
        if network.text_encoder is not None:
            return Text(torch.zeros(count, length, PIECE, dtype=torch.long), mask)
        pooled = torch.zeros(count, network.pooled_width) if network.pooled_width else None
        return Text(torch.zeros(count, length, network.text_width), mask, pooled)
    return torch.zeros(count, dtype=torch.long) if network.num_classes else None
