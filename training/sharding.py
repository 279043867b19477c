"""Networks whose tensors are split over processes (FSDP2)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoints.networks import Network



def shard_network(network: Network, device_type: str, processes: int) -> Network:
    """The network, its tensors now split over the processes.

    A block is put together when its turn comes.
    """
    mesh = init_device_mesh(device_type, (processes,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes, if it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, if it is split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor split as the parameter is, where it has its shape."""
    if (
        isinstance(parameter, DTensor)
        and torch.is_tensor(tensor)
        and tensor.shape == parameter.shape
    ):
        return distribute_tensor(
            tensor.to(parameter.device), parameter.device_mesh, parameter.placements
        )
    return tensor


def unsharded(contents: Any, keep: bool = True) -> Any:
    """A tree of dicts and lists with every split tensor put together, on the CPU.

    A process that does not keep the tree gets None.
    """
    if isinstance(contents, dict):
        return {key: unsharded(value, keep) for key, value in contents.items()}
    if isinstance(contents, list):
        return [unsharded(value, keep) for value in contents]
    if not isinstance(contents, DTensor):
        return contents
    full = contents.full_tensor()
    return full.cpu() if keep else None


def load_tensors(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a network that may be split."""
    own = network.state_dict()
    network.load_state_dict(
        {name: sharded_like(own[name], tensor) for name, tensor in tensors.items()}
    )
