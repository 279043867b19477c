"""A network made faster for sampling: cast once, or compiled."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from checkpoints.networks import Network
from layers.schedule import Scheduled


PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepare(network: Network, mixed_precision: str = "no", compile: bool = False) -> None:
    """Speed up a network that is used only for sampling. Half precision gives the same outputs as
    autocast; compiling changes rounding.

    Autocast casts the weights of Linear layers and of the patch embedding at each call; here they
    are cast once. Raises ValueError if PyTorch cannot compile, or not such a network.
    """
    if compile and isinstance(network, Scheduled):
        raise ValueError(
            f"`compile=True`: networks of {type(network).__name__} compute something else at each "
            "step, and are not compiled as a whole; leave the argument out"
        )
    if dtype := PRECISIONS[mixed_precision]:
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(dtype)
    if compile:
        device = next(network.parameters()).device
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))
        except Exception as error:  # compilers and PyTorch's back ends have many kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(
                f"`compile=True`: PyTorch cannot compile here ({reason}); leave the argument out"
            ) from None
        if device.type == "cpu":
            forward = frozen(torch.compile(network.forward, dynamic=True, fullgraph=True))
        else:  # each size of batch has a CUDA graph of its own, replayed without the CPU
            options: dict[str, Any] | None = (
                {"triton.cudagraphs": True} if device.type == "cuda" else None
            )
            forward = torch.compile(network.forward, dynamic=False, fullgraph=True, options=options)
        network.forward = forward  # type: ignore[method-assign]


def frozen(forward: Callable) -> Callable:
    """A compiled forward pass with inductor's `freezing`.

    The weights become constants, packed for oneDNN. Freezing cannot be an option of the
    compilation: Dynamo reads the setting before the options count. Inductor takes oneDNN only for
    batches of any size (dynamic=True); for a fixed size it takes MKL, which is slower here.
    """

    @wraps(forward)
    def call(*args, **kwargs):
        with torch._inductor.config.patch(freezing=True):
            return forward(*args, **kwargs)

    return call
