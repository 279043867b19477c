"""A run's folder: who may write in it, which arguments decide its results, where it goes on, what it logs
and what stops it.

RESULTS_DIR/NNN-MODEL/ holds run.json (the arguments, and a hash of the data), lock, log.txt, metrics.jsonl and
checkpoints/SSSSSSS.pt. All of this is the business of the main process.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
import fcntl
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, NamedTuple
import uuid

from tqdm.auto import tqdm

from checkpoints import check_whole, list_checkpoints, newest_whole_checkpoint, write_whole

# Arguments that decide what a run learns; --resume auto takes up a run whose own are equal.
DECIDING = (
    "data_path", "latents", "model", "image_size", "num_classes", "global_batch_size", "global_seed", "vae", "lr",
    "warmup_steps", "weight_decay", "grad_clip", "ema_decay", "mixed_precision", "flip", "skip_bad_images", "init_from",
    "init_labels", "block",
)  # fmt: skip
LATER = {"block": "adaln_zero"}  # what those of them meant that runs of earlier versions lack
PATHS = ("data_path", "latents", "vae", "init_from", "init_labels")  # of these, those that may be paths

LOCK_PATIENCE = 5  # seconds: a process that was just killed may not be gone yet


class Start(NamedTuple):
    """Where a run starts, and why: the checkpoint to take up (None: from step 0), and the folder (None: a new one)."""

    why: str
    checkpoint: Path | None = None
    folder: Path | None = None


def find_start(args: argparse.Namespace, data: str, lock: "FolderLock") -> Start:
    """The Start that --resume asks for, its folder locked; `data` is a hash of what the run learns from.

    Raises ValueError if --resume leads to no whole checkpoint, or another process writes in the folder.
    """
    if args.resume is None:
        return Start("a new run")
    if args.resume == "auto":
        return newest_equal_run(args, data, lock)
    path = Path(args.resume).absolute()
    folder = path if path.is_dir() else path.parent.parent
    newest = list_checkpoints(folder)[-1:]
    if path.is_dir() and not newest:
        raise ValueError(f"--resume {args.resume}: {folder} has no checkpoints/SSSSSSS.pt; give a run folder, or auto")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"--resume {args.resume}: there is no such checkpoint; give a .pt file, a run folder, or auto")
    if path.is_dir() or newest == [path]:
        others = differences(folder, args, data)
        if not others:
            lock.take(folder)
            return go_on(folder)
        why = f"which was made with other {others}"
    else:
        why = "which is not the newest of a run folder"
    for _, folder_begun in sorted(run_folders(args.results_dir), reverse=True):
        if not differences(folder_begun, args, data) and begun_at(folder_begun) == path:
            lock.take(folder_begun)
            return go_on(folder_begun)
    if path.is_dir():
        whole, complaints = newest_whole_checkpoint(folder)
        if whole is None:
            raise ValueError(f"--resume {args.resume}: {'; '.join(complaints)}; no other checkpoint is there")
        path = whole
    check_whole(path)
    return Start(f"a new run from {path}, {why}", path)


def newest_equal_run(args: argparse.Namespace, data: str, lock: "FolderLock") -> Start:
    """The Start of the newest run in --results-dir that decides the same, else of a new one."""
    seen = []
    for _, folder in sorted(run_folders(args.results_dir), reverse=True):
        others = differences(folder, args, data)
        if others:
            seen.append(f"{folder.name} has other {others}")
            continue
        lock.take(folder)
        try:
            return go_on(folder)
        except ValueError as error:
            lock.release()
            seen.append(str(error))
    why = f"no run in {args.results_dir} has equal arguments and a whole checkpoint"
    return Start(f"a new run: {why} ({'; '.join(seen[:3]) or 'there is none'})")


def go_on(folder: Path) -> Start:
    """The Start at the newest whole checkpoint of a locked folder; damaged newer ones are renamed, half-written removed.

    A run without any starts over from where it began. Raises ValueError if there are some and none is whole, OSError if
    one cannot be read.
    """
    for left_behind in (folder / "checkpoints").glob(".*.partial"):
        left_behind.unlink()
    if not list_checkpoints(folder):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        first = Path(record["from"]) if record["from"] else None
        if first:
            check_whole(first)
        return Start(f"starting over in {folder}, which has no checkpoint yet, from {first or 'step 0'}", first, folder)
    checkpoint, complaints = newest_whole_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{'; '.join(complaints)}; no other checkpoint is there")
    for damaged in list_checkpoints(folder)[-len(complaints) :] if complaints else []:
        number = sum(1 for _ in damaged.parent.glob(damaged.name + ".damaged*"))
        damaged.rename(damaged.with_name(f"{damaged.name}.damaged{number or ''}"))
    notes = f"; {'; '.join(complaints)}, now named .damaged" if complaints else ""
    return Start(f"going on from {checkpoint}{notes}", checkpoint, folder)


def new_folder(args: argparse.Namespace, data: str, lock: "FolderLock", checkpoint: Path | None = None) -> Path:
    """A new run's folder, locked and numbered from 000, which appears complete with its run.json.

    checkpoint is the one that the run begins with, if any. Raises ValueError if it cannot be made.
    """
    results = Path(args.results_dir)
    decided = {name: comparable(name, value) for name, value in vars(args).items()}  # paths as seen from anywhere
    record = {"args": decided, "data": data, "id": uuid.uuid4().hex[:12], "from": str(checkpoint or "")}
    if args.resume not in (None, "auto"):
        record["resume"] = str(Path(args.resume).absolute())
    number = max((number for number, _ in run_folders(results)), default=-1) + 1
    try:
        made = results / f".new-run-{socket.gethostname()}-{os.getpid()}"
        (made / "checkpoints").mkdir(parents=True, exist_ok=True)
        (made / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        while True:
            folder = results / f"{number:03d}-{args.model.replace('/', '-')}"
            try:
                made.rename(folder)
                break
            except OSError:  # another run that starts just now has taken the number
                if not folder.exists():
                    raise
                number += 1
    except OSError as error:
        raise ValueError(
            f"cannot make the run folder in {results} ({error.strerror}); choose another --results-dir"
        ) from None
    lock.take(folder)
    return folder


def begun_at(folder: Path) -> Path | None:
    """The path that a run was told to begin at by --resume, None if it was told none."""
    told = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("resume")
    return Path(told) if told else None


def run_id(folder: Path) -> str:
    """The name that no other run has, for trackers."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["id"]


def run_folders(results_dir: Path | str) -> list[tuple[int, Path]]:
    """(number, folder) for each folder in results_dir that is named as runs are."""
    folders = [p for p in Path(results_dir).glob("*-*") if p.is_dir() and p.name.split("-")[0].isdecimal()]
    return [(int(p.name.split("-")[0]), p) for p in folders]


def differences(folder: Path, args: argparse.Namespace, data: str) -> str:
    """In what a run folder's deciding arguments and data differ from these, comma-separated; "" if in nothing."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        theirs = LATER | record["args"]
        found = [name for name in DECIDING if comparable(name, theirs[name]) != comparable(name, getattr(args, name))]
    except (OSError, ValueError, KeyError, TypeError):
        return "arguments: it has no run.json of this train.py"
    names = [f"--{name.replace('_', '-')}" for name in found]
    return ", ".join(
        names
        or (["images in --data-path, content of --latents or of --init-labels"] if record.get("data") != data else [])
    )


def comparable(name: str, value: Any) -> Any:
    """The value of an argument, a path in the same form whatever the working folder."""
    is_path = name in PATHS and value is not None and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value


class FolderLock:
    """The right to write in one folder, which one process on any machine holds until it ends; a context manager.

    It is an flock, so the system takes it back from a process that was killed.
    """

    def __init__(self) -> None:
        self.handle: int | None = None
        self.note = ""
        os.register_at_fork(after_in_child=self._forget)  # a loader's worker may outlive us and must not hold it

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _forget(self):
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    release = _forget

    def take(self, folder: Path) -> None:
        """Take the folder's lock. Raises ValueError, naming host and process, if another holds it."""
        handle = self.handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        patience = time.monotonic() + LOCK_PATIENCE
        while not self._try(handle):
            if time.monotonic() > patience:
                holder = os.pread(handle, 300, 0).decode(errors="replace").strip() or "another process"
                self.release()
                raise ValueError(
                    f"{folder} is being written by {holder}; wait until that ends or stop it, then give the same "
                    "command again"
                )
            time.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _try(self, handle):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems
            self.note = f"the file system cannot lock ({error.strerror}): see to it that only one job writes here"
        return True


class RunLog:
    """Lines for log.txt and the console, rows for metrics.jsonl, and a progress bar on terminals. Main process only.

    Rows beyond the step that a run goes on from are cut: they will be written again.
    """

    def __init__(self, folder: Path, is_main: bool, step: int, last_step: int) -> None:
        self.file = self.metrics = None
        if is_main:
            cut_rows(folder / "metrics.jsonl", step)
            self.file = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")
            self.metrics = open(folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
        self.bar = tqdm(total=last_step, initial=step, unit="step", disable=None if is_main else True)

    def __call__(self, line: str) -> None:
        """Write a line, with the time."""
        if self.file:
            line = line.encode(errors="backslashreplace").decode()  # names of files may be no valid text
            stamped = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}"
            with self.survived():
                self.bar.write(stamped, file=sys.stdout)
                sys.stdout.flush()
            with self.survived():
                self.file.write(stamped + "\n")

    def row(self, values: dict) -> None:
        """Write a dict as a line of metrics.jsonl."""
        if self.metrics:
            with self.survived():
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
                with self.survived():
                    file.close()

    @contextmanager
    def survived(self) -> Iterator[None]:
        """Within it, a full disk is told on the console, if that takes it, and no more: lines may be lost, the run is not."""
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                print(f"the log was not written ({error.strerror})", file=sys.stderr, flush=True)


class Meter:
    """Steps, and the seconds that they took, since the last log line in this process; and when it `saved` last."""

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
    """Within it, SIGTERM, SIGUSR1 and the first Ctrl-C are noted in `received`, for the loop to stop at a good moment."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
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
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return any(row["step"] == step and name in row for row in map(json.loads, lines))


def cut_rows(path: Path, step: int) -> None:
    """Leave in a file of JSON lines those with a "step" up to this one, and none that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def disk_space(folder: Path) -> str:
    """The free space where a folder is, in GB, for a message."""
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
