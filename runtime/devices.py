"""Which device a process works on, and how exact its float32 is there."""

from collections.abc import Iterator
from contextlib import contextmanager
import os

import torch


def process_device(name: str | None) -> torch.device:
    """choose_device for one process of several.

    By default, and for "cuda", it is the GPU of its rank on this machine.
    """
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    return choose_device(name)


def choose_device(name: str | None) -> torch.device:
    """The torch device called `name`; the GPU, if there is one, for None.

    Raises ValueError if there is no such device.
    """
    if name is None:
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "meta":
        raise ValueError("`device` meta holds no numbers; leave the argument out or pass cpu")
    try:
        return torch.empty(0, device=name).device
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # the last for kinds that PyTorch has no part for here
        raise ValueError(
            f"`device` {name} cannot be used ({str(error).splitlines()[0]}); leave the argument "
            "out "
            "or pass cpu"
        ) from None


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Within it, float32 matrix products and convolutions on NVIDIA GPUs use TF32 or not.

    Afterwards they do as before.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
