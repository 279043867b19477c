"""Loader processes: started, waited for, and ended with the program whatever happens."""

import atexit
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
import ctypes
from functools import partial
import multiprocessing
import os
import signal
import sys
from threading import Thread
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.batches import NO_SHARED_MEMORY, collate
from data.source import Source
from runtime.command_line import LOST_WORKER, why_lost

TELL_SECONDS = 60  # between lines about a batch that does not come
WAIT = 5.0  # seconds for a batch, after which somebody looks whether to wait on
GRACE = 3.0  # seconds that a loader's worker has to end by itself
PR_SET_PDEATHSIG = 1  # of prctl(2)
END_WORKER = getattr(signal, "SIGUSR2", None)


def heed_the_trainer(_: int) -> None:
    """Make a loader's worker ignore the signals that a scheduler sends to all processes of a job:
    the training process answers them.

    END_WORKER ends the worker, whatever it waits for.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if END_WORKER is not None:
        signal.signal(END_WORKER, lambda *_: os._exit(0))
    # Linux can end it with its trainer, though it be blocked
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def make_loader(
    dataset: Dataset | Source, batches: Iterable[list[Any]], num_workers: int,
    pin_memory: bool = False, collate_fn: Callable = collate,
) -> DataLoader:  # fmt: skip
    """A DataLoader over batches of keys, such as StepBatches; it yields what collate_fn returns.

    `read` walks through it.
    """
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches, num_workers=num_workers, collate_fn=collate_fn,
        pin_memory=pin_memory, worker_init_fn=heed_the_trainer,
        timeout=WAIT if num_workers else 0,
        # The workers' seeds, which nothing uses, come from here instead of torch's own generator
        generator=torch.Generator(),
    )  # fmt: skip


class LoaderFailed(ValueError):
    """A loader's worker was ended by the system, or had no memory.

    The text says what happened and what to do.
    """


def say_waiting(seconds: float, say: Callable[[str], None] | None = None) -> None:
    """Say every TELL_SECONDS for how long no batch has come, by `say` or on the error output.

    `read` calls this every WAIT seconds.
    """
    if int(seconds / TELL_SECONDS) > int((seconds - WAIT) / TELL_SECONDS):
        line = f"no batch for {seconds:.0f} s: is the disk with the images there? waiting on"
        say(line) if say else print(line, file=sys.stderr, flush=True)


def read(loader: DataLoader, waiting: Callable[[float], None] = say_waiting) -> Generator[Any]:
    """The loader's batches.

    Close the generator: that ends the loader's workers, whatever blocks them. While no batch comes,
    waiting(seconds) is called every WAIT seconds; an error that it raises ends the wait. Raises
    LoaderFailed.
    """
    before = set(multiprocessing.active_children())
    refused = None
    # What torch has half built complains when it goes
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        batches = iter(loader)
    except OSError as error:  # no room for the workers' queues
        refused = error.strerror or str(error)
    finally:
        sys.unraisablehook = hook
    workers = [child for child in multiprocessing.active_children() if child not in before]
    if refused:
        _end(workers, 0.0)
        raise LoaderFailed(f"the loader's workers cannot start ({refused}): {NO_SHARED_MEMORY}")
    end_at_exit = partial(_end, workers, 0.0)
    # For whoever does not come to close this: Python itself would wait for ever
    atexit.register(end_at_exit)
    began = time.monotonic()
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                waiting(time.monotonic() - began)
                continue
            except (OSError, EOFError) as error:  # it was just sending a batch
                if not workers:
                    raise
                raise LoaderFailed(f"DataLoader worker was lost ({error}): {LOST_WORKER}") from None
            yield batch
            began = time.monotonic()
    except RuntimeError as error:  # torch tells of a lost worker wherever the program is
        raise explained(error) from None
    finally:
        if workers:
            with suppress(RuntimeError):  # by which torch tells that a worker was killed
                Thread(target=_end, args=(workers, GRACE), daemon=True).start()
            with suppress(RuntimeError):
                batches.__del__()  # type: ignore[attr-defined]  # waits for the workers
        atexit.unregister(end_at_exit)


def _end(workers, patience):
    """End those of a loader's workers that are still there after so many seconds."""
    for number, seconds in (
        (END_WORKER, patience),
        (getattr(signal, "SIGKILL", signal.SIGTERM), GRACE),
    ):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(worker.exitcode is None for worker in workers):
            time.sleep(0.05)
        for worker in workers:
            if worker.exitcode is None and number is not None:
                with suppress(ProcessLookupError, RuntimeError):
                    os.kill(worker.pid, number)


def explained(error: RuntimeError) -> Exception:
    """LoaderFailed for what torch raises when a loader's worker fails, or the error itself."""
    text = str(error)
    if "shared memory" in text:
        return LoaderFailed(
            f"the loader's workers have too little shared memory: {NO_SHARED_MEMORY}"
        )
    if "open files" in text or "ancdata" in text:
        return LoaderFailed(
            "the loader's workers need more open files than allowed; pass fewer `num_workers`, "
            "or ulimit -n 65536"
        )
    if "DataLoader worker (pid" in text:
        return LoaderFailed(why_lost(error))
    return error
