"""A network made faster for sampling: cast once, or compiled."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from models import DiT

PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepare(network: DiT, mixed_precision: str = "no", compile: bool = False) -> None:
    """Make a network fast that only samples from here on.

    Its outputs stay what they are under autocast; compiled, they round otherwise.

    What autocast would cast at each call, the weights of Linear layers and of the patch embedding,
    is cast once. Raises ValueError where PyTorch cannot compile.
    """
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
    """A compiled forward pass with inductor's `freezing`: the weights become constants, packed for
    oneDNN.

    Not an option of the compilation, since Dynamo asks for the setting before those count. oneDNN
    is taken for batches of any size only (dynamic=True); for a fixed one it would be MKL, which is
    slower here.
    """

    @wraps(forward)
    def call(*args, **kwargs):
        with torch._inductor.config.patch(freezing=True):
            return forward(*args, **kwargs)

    return call
