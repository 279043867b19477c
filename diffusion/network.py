"""What sampling needs to know of a network: the device it is on, the precision it takes."""

from collections.abc import Callable

import torch
from torch import Tensor


def sampling_device(
    device: torch.device | str | None, noise: Tensor | None, model: Callable
) -> torch.device:
    """The device asked for, else the noise's, else that of the network's parameters.

    Raises ValueError if none of the three says one.
    """
    if device is not None:
        return torch.device(device)
    if noise is not None:
        return noise.device
    parameter = _first_parameter(model)
    if parameter is None:
        raise ValueError(
            "where to sample is not known: pass device=, or noise=, or a network with parameters "
            "as the model"
        )
    return parameter.device


def as_taken(model: Callable, x: Tensor) -> Tensor:
    """x as a network takes it: as it is, but in half precision if the weights are in that.

    Under autocast x stays as it is.
    """
    parameter = _first_parameter(model)
    halves = parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16)
    as_it_is = not halves or torch.is_autocast_enabled(x.device.type)
    return x if as_it_is else x.to(parameter.dtype)


def _first_parameter(model):
    """The first parameter of a network, or None."""
    network = getattr(model, "__self__", model)  # a bound method such as model.forward_with_cfg
    return next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
