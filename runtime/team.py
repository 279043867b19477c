"""Several processes that work on one task and share what they found."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from datetime import timedelta
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from runtime.command_line import reason

if TYPE_CHECKING:
    from accelerate import Accelerator  # which is slow to import, and need not be there to score

# Others wait this long while one downloads a VAE or writes a checkpoint
COLLECTIVE_TIMEOUT = timedelta(hours=1)
LAST_SECONDS = 0.2  # that Gloo's threads get to drop their tensors before Python ends


class Team(NamedTuple):
    """The processes that share the work: which of them this is, and gather(list of tensors), which
    puts the rows of all together in the order of rank.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Tensor]], list[Tensor]] = list


def make_accelerator(
    device: str | None, timeout: timedelta = COLLECTIVE_TIMEOUT, **options: Any
) -> Accelerator:
    """The Accelerator of this process, on the GPU unless `device` is "cpu" or there is none.

    `options` are accelerate's. A thread of Gloo that drops the tensors of a collective while Python
    ends aborts the process, so several processes on CPUs wait a moment before they end.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # Left to find out itself, it makes runs of their own of torchrun's processes without a GPU
    accelerator = Accelerator(
        cpu=device == "cpu" or no_gpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        **options,
    )  # fmt: skip
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        atexit.register(time.sleep, LAST_SECONDS)
    return accelerator


def once(accelerator: Accelerator, function: Callable, *args: Any) -> Any:
    """What function(*args) returns in the main process, in every process.

    The function's ValueError is raised in every process.
    """
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            result = [function(*args)]
        except ValueError as error:
            result = [error]
        except OSError as error:
            result = [
                ValueError(f"{reason(error)}; look whether it exists, may be written, and has room")
            ]
    answer = broadcast_object_list(result)[0]
    if isinstance(answer, ValueError):
        raise answer
    return answer
