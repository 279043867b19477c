"""A network made faster for sampling: cast once, or compiled."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from checkpoints.networks import DynamicDiT, Network
from layers.schedule import Scheduled


PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST_GRAPHS = 256  # of all blocks that are compiled; as many as Dynamo has of any code


def prepare(
    network: Network, mixed_precision: str = "no", compile: bool = False, by_blocks: bool = False
) -> None:
    """Speed up a network that is used only for sampling. Half precision gives the same outputs as
    autocast; compiling changes rounding.

    Autocast casts the weights of Linear layers and of the patch embedding at each call; here they
    are cast once. by_blocks: each block is compiled by itself, so that blocks can be left out; of
    a network with exits that is done in any case. Raises ValueError if PyTorch cannot compile, or
    not such a network.
    """
    if compile and isinstance(network, DynamicDiT):
        raise ValueError(
            "`compile=True`: a DynamicDiT computes something else at each step, and compiling it "
            "gains little (docs/dynamic.md); leave the argument out"
        )
    if dtype := PRECISIONS[mixed_precision]:
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(dtype)
    if compile:
        device = next(network.parameters()).device
        check_compiler(device)
        if by_blocks or isinstance(network, Scheduled):
            for block in network.blocks:
                block.forward = compiled_block(block.forward, device)
        else:
            network.forward = compiled(network.forward, device)  # type: ignore[method-assign]


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if PyTorch cannot compile for a device."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # compilers and PyTorch's back ends have many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"`compile=True`: PyTorch cannot compile here ({reason}); leave the argument out"
        ) from None


def compiled(forward: Callable, device: torch.device) -> Callable:
    """A network's forward pass, compiled."""
    if device.type == "cpu":
        return frozen(torch.compile(forward, dynamic=True, fullgraph=True))
    # Each size of batch has a CUDA graph of its own, replayed without the CPU
    options: dict[str, Any] | None = (
        {"triton.cudagraphs": True} if device.type == "cuda" else None
    )
    return torch.compile(forward, dynamic=False, fullgraph=True, options=options)


def compiled_block(forward: Callable, device: torch.device) -> Callable:
    """A block's forward pass, compiled: on a GPU without CUDA graphs, and for any size of batch
    from the second on, as samples that leave at an exit make many sizes.
    """
    if device.type != "cpu":
        return torch.compile(forward, fullgraph=True)
    packed = compiled(forward, device)

    @wraps(forward)
    def call(*args, **kwargs):
        # Each block has graphs of its own, which Dynamo counts together
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            return packed(*args, **kwargs)

    return call


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
