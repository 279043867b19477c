"""A run's log, its metrics, its clock, and what stops it: signals, and its early end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import json
import os
from pathlib import Path
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from runtime.disk import write_whole


class RunEnded(Exception):
    """What ends a run before its last step; the log has its message.

    That is damaged images, losses that are not finite, or a full disk. `told` says that every
    process raises it, so that the log has told the user enough.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a run, which the log has said."""


class RunLog:
    """Lines for log.txt and the console, rows for metrics.jsonl, and a progress bar on terminals.

    Main process only. Lines name options as Python does, in backticks; worded(line) says them as
    the user does. Rows beyond the step that a run goes on from are cut: they will be written again.
    """

    def __init__(
        self, folder: Path, is_main: bool, step: int, last_step: int,
        worded: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        self.worded = worded
        self.file = self.metrics = None
        if is_main:
            cut_rows(folder / "metrics.jsonl", step)
            self.file = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")
            self.metrics = open(folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
        self.bar = tqdm(
            total=last_step, initial=step, unit="step", disable=None if is_main else True
        )

    def __call__(self, line: str) -> None:
        """Write a line, worded and with the time."""
        if self.file:
            line = self.worded(line)
            # Names of files may be no valid text
            line = line.encode(errors="backslashreplace").decode()
            stamped = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}"
            with self.survived("the console"):
                self.bar.write(stamped, file=sys.stdout)
                sys.stdout.flush()
            with self.survived(self.file.name):
                self.file.write(stamped + "\n")

    def row(self, values: dict) -> None:
        """Write a dict as a line of metrics.jsonl."""
        if self.metrics:
            with self.survived(self.metrics.name):
                self.metrics.write(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Bring the rows to disk: a checkpoint stands for all that is before it."""
        if self.metrics:
            self.metrics.flush()
            os.fsync(self.metrics.fileno())

    def close(self) -> None:
        self.bar.close()
        for file in (self.file, self.metrics):
            if file:
                with self.survived(file.name):
                    file.close()

    @contextmanager
    def survived(self, name: str) -> Iterator[None]:
        """If the disk is full, print that and go on.

        Lines of the file `name` may be lost, the run continues.
        """
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                print(
                    f"{name}: the log was not written ({error.strerror})", file=sys.stderr,
                    flush=True,
                )  # fmt: skip


class Meter:
    """Steps, and the seconds that they took, since the last log line in this process.

    The object also knows when the process `saved` last.
    """

    def __init__(self) -> None:
        self.steps, self.started = 0, time.monotonic()
        self.saved = self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def steps_per_second(self) -> float:
        """Since the last call, or the beginning."""
        now = time.monotonic()
        rate = self.steps / max(now - self.started, 1e-9)
        self.steps, self.started = 0, now
        return rate


class StopSignals:
    """Within it, SIGTERM, SIGUSR1 and the first Ctrl-C are noted in `received`.

    The loop stops at a good moment. Python hears signals in its main thread alone: in another
    thread this notes and changes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        heard = threading.current_thread() is threading.main_thread()
        names = ("SIGTERM", "SIGUSR1", "SIGINT") if heard else ()
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:  # a second one stops at once
            signal.signal(signal.SIGINT, signal.default_int_handler)


def has_row(folder: Path, step: int, name: str) -> bool:
    """Whether a run's metrics.jsonl has `name` for a step."""
    return any(
        row["step"] == step and name in row for row, _ in whole_rows(folder / "metrics.jsonl")
    )


def whole_rows(path: Path) -> Iterator[tuple[dict, str]]:
    """(row, its line) of each whole line of a file of JSON lines.

    A whole line is a dict with a number as "step".
    """
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with suppress(ValueError, RecursionError):
            row = json.loads(line) if line.endswith("\n") else None
            if isinstance(row, dict) and isinstance(row.get("step"), (int, float)):
                yield row, line


def cut_rows(path: Path, step: int) -> None:
    """Leave in a file of JSON lines the whole ones with a "step" up to this one."""
    if not path.exists():
        return
    kept = [line for row, line in whole_rows(path) if row["step"] <= step]
    write_whole(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))
