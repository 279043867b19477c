"""A run's folder: who may write in it, which arguments decide its results, where it goes on, what it logs
and what stops it.

RESULTS_DIR/NNN-MODEL/ holds run.json (the arguments, and a hash of the data), lock, log.txt, metrics.jsonl and
checkpoints/SSSSSSS.pt. All of this is the business of the main process.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
import hashlib
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any, NamedTuple
import uuid

from tqdm.auto import tqdm

from checkpoints import (
    check_whole, file_hash, list_checkpoints, newest_whole_checkpoint, read_checkpoint, read_json, sync_folder, weights_file,
    write_whole,
)  # fmt: skip
from presence import lock

# Arguments that decide what a run learns; --resume auto takes up a run whose own are equal.
DECIDING = (
    "data_path", "latents", "model", "image_size", "num_classes", "global_batch_size", "global_seed", "vae", "lr",
    "warmup_steps", "weight_decay", "grad_clip", "ema_decay", "mixed_precision", "flip", "skip_bad_images", "init_from",
    "init_labels", "block",
)  # fmt: skip
LATER = {"block": "adaln_zero"}  # what those of them meant that runs of earlier versions lack
PATHS = ("data_path", "latents", "vae", "init_from", "init_labels")  # of these, those that may be paths

LOCK_PATIENCE = 5  # seconds: a process that was just killed may not be gone yet
START_PATIENCE = 600  # seconds that another start of the same run may take, until it has its folder


class Data(NamedTuple):
    """What a run learns from: a hash of names and labels, or of a cache's manifest; and one of some of its files' bytes.

    The second is "" where the first says it all.
    """

    names: str
    sample: str = ""


class Start(NamedTuple):
    """Where a run starts, and why: the checkpoint to take up (None: from step 0), and the folder (None: a new one)."""

    why: str
    checkpoint: Path | None = None
    folder: Path | None = None


def find_start(args: argparse.Namespace, data: Data, lock: "FolderLock") -> Start:
    """The Start that --resume asks for, its folder locked; `data` is what the run learns from.

    Raises ValueError if --resume leads to no whole checkpoint, or another process writes in the folder.
    """
    if args.resume is None:
        return Start("a new run")
    if args.resume == "auto":
        lock.begin(Path(args.results_dir), start_key(args, data))
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
            return go_on(folder, moved(folder, args))
        why = f"which was made with other {others}"
    else:
        why = "which is not the newest of a run folder"
    lock.begin(Path(args.results_dir), start_key(args, data))
    for _, folder_begun in sorted(run_folders(args.results_dir), reverse=True):
        if not differences(folder_begun, args, data) and begun_at(folder_begun) == path:
            lock.take(folder_begun)
            return go_on(folder_begun, moved(folder_begun, args))
    if path.is_dir():
        whole, complaints = newest_whole_checkpoint(folder)
        if whole is None:
            raise ValueError(f"--resume {args.resume}: {'; '.join(complaints)}; no other checkpoint is there")
        path = whole
    check_whole(path)
    return Start(f"a new run from {path}, {why}", path)


def newest_equal_run(args: argparse.Namespace, data: Data, lock: "FolderLock") -> Start:
    """The Start of the newest run in --results-dir that decides the same, else of a new one.

    Raises ValueError if a run may be the same one, which its folder does not tell.
    """
    seen = []
    for _, folder in sorted(run_folders(args.results_dir), reverse=True):
        check_tells(folder, args, data)
        others = differences(folder, args, data)
        if others:
            seen.append(f"{folder.name} has other {others}")
            continue
        lock.take(folder)
        try:
            return go_on(folder, moved(folder, args))
        except ValueError as error:
            lock.release()
            lock.begin(Path(args.results_dir), start_key(args, data))
            seen.append(str(error))
    why = f"no run in {args.results_dir} has equal arguments and a whole checkpoint"
    return Start(f"a new run: {why} ({'; '.join(seen[:3]) or 'there is none'})")


def check_tells(folder: Path, args: argparse.Namespace, data: Data) -> None:
    """Raise ValueError if a folder has checkpoints of a run that may be this one, and no record that tells whether it is."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return
    advice = f"give --resume {folder} to go on from its newest checkpoint in a new folder, or take that folder away"
    try:
        record = read_record(folder)
    except ValueError as error:
        same = decided_the_same(checkpoints[-1], args)
        if same or (same is None and (folder / "lock").exists()):
            raise ValueError(f"--resume auto cannot tell whether {folder} is this run ({error}); {advice}") from None
        return
    known = record.get("content") or {}
    gone = [
        name
        for name in different(record["args"], args)
        if name in PATHS and name not in known and not Path(str(record["args"].get(name))).exists()
    ]
    if gone and gone == different(record["args"], args) and record["data"] == data.names:
        raise ValueError(
            f"--resume auto cannot tell whether {folder} is this run: its {', '.join(map(as_flag, gone))} is gone, and what is "
            f"given now has the same names; {advice}"
        )


def decided_the_same(checkpoint: Path, args: argparse.Namespace) -> bool | None:
    """Whether a checkpoint says that its run had these deciding arguments, paths aside; None if it says nothing."""
    try:
        theirs = read_checkpoint(checkpoint, mmap=True).get("args")
    except ValueError:
        return None
    return all(name in PATHS for name in different(theirs, args)) if isinstance(theirs, dict) else None


def go_on(folder: Path, note: str = "") -> Start:
    """The Start at the newest whole checkpoint of a locked folder; damaged newer ones are renamed, half-written removed.

    The note is told with it. A run without any starts over from where it began. Raises ValueError if
    there are some and none is whole, OSError if one cannot be read.
    """
    for left_behind in (folder / "checkpoints").glob(".*.partial"):
        left_behind.unlink()
    if not list_checkpoints(folder):
        record = read_record(folder)
        first = Path(record["from"]) if record.get("from") else None
        if first and not first.is_file():
            raise ValueError(f"{folder} began at {first}, which is gone, and has no checkpoint yet; take that folder away")
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
    return Start(f"going on from {checkpoint}{notes}{note}", checkpoint, folder)


def new_folder(args: argparse.Namespace, data: Data, lock: "FolderLock", checkpoint: Path | None = None) -> Path:
    """A new run's folder, locked and numbered from 000, which appears complete with its run.json.

    checkpoint is the one that the run begins with, if any. Raises ValueError if it cannot be made.
    """
    results = Path(args.results_dir)
    decided = {name: comparable(name, value) for name, value in vars(args).items()}  # paths as seen from anywhere
    record = {"args": decided, "data": data.names, "id": uuid.uuid4().hex[:12], "from": str(checkpoint or "")}
    record["content"] = {name: content for name in PATHS if (content := content_hash(name, args, data))}
    if args.resume not in (None, "auto"):
        record["resume"] = str(Path(args.resume).absolute())
    number = max((number for number, _ in run_folders(results)), default=-1) + 1
    try:
        made = results / f".new-run-{socket.gethostname()}-{os.getpid()}"
        (made / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1)
        write_whole(made / "run.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        while True:
            folder = results / f"{number:03d}-{args.model.replace('/', '-')}"
            try:
                made.rename(folder)
                break
            except OSError:  # another run that starts just now has taken the number
                if not folder.exists():
                    raise
                number += 1
        sync_folder(results)
    except OSError as error:
        raise ValueError(
            f"cannot make the run folder in {results} ({error.strerror}); choose another --results-dir"
        ) from None
    lock.take(folder)
    return folder


def read_record(folder: Path) -> dict:
    """What run.json says: args, data, id and, where they are known, content, from and resume.

    Raises ValueError if it is missing or damaged.
    """
    record = read_json(folder / "run.json")
    if not (
        isinstance(record.get("args"), dict)
        and isinstance(record.get("data"), str)
        and isinstance(record.get("id"), str)
        and isinstance(record.get("content", {}), dict)
        and all(isinstance(record.get(name, ""), str) for name in ("from", "resume"))
        and set(DECIDING) <= {*LATER, *record["args"]}
    ):
        raise ValueError(f"{folder / 'run.json'} is damaged")
    return record


def begun_at(folder: Path) -> Path | None:
    """The path that a run was told to begin at by --resume, None if it was told none."""
    told = read_record(folder).get("resume")
    return Path(told) if told else None


def run_id(folder: Path) -> str:
    """The name that no other run has, for trackers."""
    return read_record(folder)["id"]


def run_folders(results_dir: Path | str) -> list[tuple[int, Path]]:
    """(number, folder) for each folder in results_dir that is named as runs are."""
    folders = [p for p in Path(results_dir).glob("*-*") if p.is_dir() and p.name.split("-")[0].isdecimal()]
    return [(int(p.name.split("-")[0]), p) for p in folders]


def differences(folder: Path, args: argparse.Namespace, data: Data) -> str:
    """In what a run folder's deciding arguments and data differ from these, comma-separated; "" if in nothing.

    A path may be another if what is there is the same.
    """
    try:
        record = read_record(folder)
    except ValueError as error:
        return f"arguments: it has no run.json of this train.py ({error})"
    known = record.get("content") or {}
    found = [
        name
        for name in different(record["args"], args)
        if not (name in known and known[name] == content_hash(name, args, data))
    ]
    other_data = "images in --data-path, content of --latents or of --init-labels"
    return ", ".join(list(map(as_flag, found)) or ([other_data] if record["data"] != data.names else []))


def different(theirs: dict, args: argparse.Namespace) -> list[str]:
    """The names of the deciding arguments that differ between a run's, as a dict, and these."""
    theirs = LATER | theirs
    return [
        name
        for name in DECIDING
        if name not in theirs or comparable(name, theirs[name]) != comparable(name, getattr(args, name))
    ]


def moved(folder: Path, args: argparse.Namespace) -> str:
    """What to tell of the paths of a run that are others now, with the same files; "" if none is."""
    theirs = read_record(folder)["args"]
    return "".join(f"; {as_flag(name)} was {theirs.get(name)}, which held the same" for name in different(theirs, args))


def as_flag(name: str) -> str:
    """What an argument is called on the command line."""
    return f"--{name.replace('_', '-')}"


def comparable(name: str, value: Any) -> Any:
    """The value of an argument, a path in the same form whatever the working folder."""
    try:
        is_path = name in PATHS and isinstance(value, str) and Path(value).exists()
    except (OSError, ValueError):  # no path that this file system can have
        return value
    return str(Path(value).resolve()) if is_path else value


def content_hash(name: str, args: argparse.Namespace, data: Data) -> str:
    """A hash of what lies at the path that an argument gives; "" if it gives none, or data that say no more than names."""
    value = vars(args).get(name)
    if name in ("data_path", "latents"):
        known = data.names if vars(args).get("latents") else data.sample  # latents are of the images with their names alone
        return known if value else ""
    path = Path(value or "")
    if not value or not path.exists():
        return ""
    if name == "init_from":
        path = weights_file(path)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    return hashlib.sha256("".join(f"{file.name} {file_hash(file)}\n" for file in files).encode()).hexdigest()


def start_key(args: argparse.Namespace, data: Data) -> str:
    """A short hash of all that decides a run's results, wherever its files lie."""
    decided = {name: None if name in PATHS else getattr(args, name) for name in DECIDING}
    return hashlib.sha256(json.dumps([decided, data.names], default=str).encode()).hexdigest()[:12]


class FolderLock:
    """The right to write in one folder, which one process on any machine holds until it ends; a context manager.

    It is an flock, so the system takes it back from a process that was killed. Before there is a
    folder, `begin` gives the right to start a run.
    """

    def __init__(self) -> None:
        self.handles: dict[Path, int] = {}
        self.note = ""
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # a loader's worker may outlive us and must not hold it

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _forget(self):
        for handle in self.handles.values():
            os.close(handle)
        self.handles.clear()

    def release(self) -> None:
        """Give back whatever is held; a lock that `begin` took leaves no file."""
        for path in self.handles:
            if path.name != "lock":
                with suppress(OSError):
                    path.unlink()
                with suppress(OSError):  # if nothing else is there, it was made for this
                    path.parent.rmdir()
        self._forget()

    def begin(self, results: Path, key: str) -> None:
        """Wait for other starts of the same run, which `key` tells, to have their folder or fail; held until `take`.

        Raises ValueError if that takes more than START_PATIENCE seconds, or the folder cannot be written.
        """
        path = results / f".starting-{key}"
        try:
            results.mkdir(parents=True, exist_ok=True)
            while not self._hold(path, START_PATIENCE):
                pass
        except OSError as error:
            raise ValueError(f"cannot write in {results} ({error.strerror}); choose another --results-dir") from None

    def take(self, folder: Path) -> None:
        """Take the folder's lock, in place of what was held.

        Raises ValueError, naming host and process, if another holds it.
        """
        before, self.handles = self.handles, {}
        try:
            self._hold(folder / "lock", LOCK_PATIENCE)
        finally:
            taken, self.handles = self.handles, before
            self.release()
            self.handles = taken

    def _hold(self, path, patience):
        """Lock a file; False if it is no longer the one of that name. Raises ValueError if another process has it so long."""
        handle = self.handles[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + patience
        while not self._try(handle):
            if time.monotonic() > deadline:
                holder = os.pread(handle, 300, 0).decode(errors="replace").strip() or "another process"
                os.close(self.handles.pop(path))
                raise ValueError(
                    f"{path.parent} is being written by {holder}; wait until that ends or stop it, then give the same "
                    "command again"
                )
            time.sleep(0.1)
        if not path.exists() or os.fstat(handle).st_ino != path.stat().st_ino:
            os.close(self.handles.pop(path))
            return False
        with suppress(OSError):  # a full disk: nobody needs to read it
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return True

    def _try(self, handle):
        try:
            return lock(handle)
        except OSError as error:  # some network file systems
            reason = error.strerror or error
            self.note = f"the file system cannot lock ({reason}): see to it that only one job writes here"
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
        """If the disk refuses, print that a line of the file `name` is lost, and go on: the run is not lost."""
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                print(f"{name}: the log was not written ({error.strerror})", file=sys.stderr, flush=True)


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
    """Within it, SIGTERM, SIGUSR1 and the first Ctrl-C are noted in `received`, for the loop to stop at a good moment.

    Python hears signals in its main thread alone: in another one, nothing is noted and nothing changed.
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
    return any(row["step"] == step and name in row for row, _ in whole_rows(folder / "metrics.jsonl"))


def whole_rows(path: Path) -> Iterator[tuple[dict, str]]:
    """(row, its line) of each whole line of a file of JSON lines that is a dict with a number as "step"."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with suppress(ValueError, RecursionError):
            row = json.loads(line) if line.endswith("\n") else None
            if isinstance(row, dict) and isinstance(row.get("step"), (int, float)):
                yield row, line


def cut_rows(path: Path, step: int) -> None:
    """Leave in a file of JSON lines those with a "step" up to this one, and none that was cut short."""
    if not path.exists():
        return
    kept = [line for row, line in whole_rows(path) if row["step"] <= step]
    write_whole(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def disk_space(folder: Path) -> str:
    """The free space where a folder is, in GB, for a message."""
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
