"""A run's folder: who may write in it, which arguments decide its results, where it goes on, what
it logs and what stops it.

RESULTS_DIR/NNN-MODEL/ holds run.json (the arguments, and a hash of the data), lock, log.txt,
metrics.jsonl and checkpoints/SSSSSSS.pt. All of this is the business of the main process.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
import socket
from typing import Any, NamedTuple
import uuid

from checkpoints.files import (
    check_whole, list_checkpoints, newest_whole_checkpoint, read_checkpoint,
)  # fmt: skip
from checkpoints.names import weights_file
from checkpoints.network_config import LATER
from runtime.disk import file_hash, sync_folder, write_whole
from runtime.json_files import read_json
from training.folder_lock import FolderLock

# Arguments that decide what a run learns; --resume auto takes up a run whose own are equal.
DECIDING = (
    "data_path", "latents", "model", "image_size", "num_classes", "global_batch_size",
    "global_seed", "vae", "lr", "warmup_steps", "weight_decay", "grad_clip", "ema_decay",
    "mixed_precision", "flip", "skip_bad_images", "init_from", "init_labels", "block",
)  # fmt: skip
# Of these, those that may be paths
PATHS = ("data_path", "latents", "vae", "init_from", "init_labels")


class Data(NamedTuple):
    """What a run learns from: a hash of names and labels, or of a cache's manifest; and one of some
    of its files' bytes.

    The second is "" where the first says it all.
    """

    names: str
    sample: str = ""


class Start(NamedTuple):
    """Where a run starts, and why: the checkpoint to take up (None: from step 0), and the folder
    (None: a new one).
    """

    why: str
    checkpoint: Path | None = None
    folder: Path | None = None


def find_start(args: argparse.Namespace, data: Data, lock: "FolderLock") -> Start:
    """The Start that --resume asks for, its folder locked; `data` is what the run learns from.

    Raises ValueError if --resume leads to no whole checkpoint, or another process writes in the
    folder.
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
        raise ValueError(
            f"--resume {args.resume}: {folder} has no checkpoints/SSSSSSS.pt; give a run folder, or auto"
        )
    if not (path.is_dir() or path.is_file()):
        raise ValueError(
            f"--resume {args.resume}: there is no such checkpoint; give a .pt file, a run folder, or auto"
        )
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
            raise ValueError(
                f"--resume {args.resume}: {'; '.join(complaints)}; no other checkpoint is there"
            )
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
    """Raise ValueError if a folder has checkpoints of a run that may be this one, and no record
    that tells whether it is.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return
    advice = f"give --resume {folder} to go on from its newest checkpoint in a new folder, or take that folder away"
    try:
        record = read_record(folder)
    except ValueError as error:
        same = decided_the_same(checkpoints[-1], args)
        if same or (same is None and (folder / "lock").exists()):
            raise ValueError(
                f"--resume auto cannot tell whether {folder} is this run ({error}); {advice}"
            ) from None
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
    """Whether a checkpoint says that its run had these deciding arguments, paths aside; None if it
    says nothing.
    """
    try:
        theirs = read_checkpoint(checkpoint, mmap=True).get("args")
    except ValueError:
        return None
    return (
        all(name in PATHS for name in different(theirs, args)) if isinstance(theirs, dict) else None
    )


def go_on(folder: Path, note: str = "") -> Start:
    """The Start at the newest whole checkpoint of a locked folder; damaged newer ones are renamed,
    half-written removed.

    The note is told with it. A run without any starts over from where it began. Raises ValueError
    if there are some and none is whole, OSError if one cannot be read.
    """
    for left_behind in (folder / "checkpoints").glob(".*.partial"):
        left_behind.unlink()
    if not list_checkpoints(folder):
        record = read_record(folder)
        first = Path(record["from"]) if record.get("from") else None
        if first and not first.is_file():
            raise ValueError(
                f"{folder} began at {first}, which is gone, and has no checkpoint yet; take that folder away"
            )
        if first:
            check_whole(first)
        return Start(
            f"starting over in {folder}, which has no checkpoint yet, from {first or 'step 0'}",
            first, folder,
        )  # fmt: skip
    checkpoint, complaints = newest_whole_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{'; '.join(complaints)}; no other checkpoint is there")
    for damaged in list_checkpoints(folder)[-len(complaints) :] if complaints else []:
        number = sum(1 for _ in damaged.parent.glob(damaged.name + ".damaged*"))
        damaged.rename(damaged.with_name(f"{damaged.name}.damaged{number or ''}"))
    notes = f"; {'; '.join(complaints)}, now named .damaged" if complaints else ""
    return Start(f"going on from {checkpoint}{notes}{note}", checkpoint, folder)


def new_folder(
    args: argparse.Namespace, data: Data, lock: "FolderLock", checkpoint: Path | None = None
) -> Path:
    """A new run's folder, locked and numbered from 000, which appears complete with its run.json.

    checkpoint is the one that the run begins with, if any. Raises ValueError if it cannot be made.
    """
    results = Path(args.results_dir)
    # Paths as seen from anywhere
    decided = {name: comparable(name, value) for name, value in vars(args).items()}
    record = {
        "args": decided, "data": data.names, "id": uuid.uuid4().hex[:12],
        "from": str(checkpoint or ""),
    }  # fmt: skip
    record["content"] = {
        name: content for name in PATHS if (content := content_hash(name, args, data))
    }
    if args.resume not in (None, "auto"):
        record["resume"] = str(Path(args.resume).absolute())
    number = max((number for number, _ in run_folders(results)), default=-1) + 1
    try:
        made = results / f".new-run-{socket.gethostname()}-{os.getpid()}"
        (made / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1)
        write_whole(
            made / "run.json", lambda temporary: temporary.write_text(text, encoding="utf-8")
        )
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
    folders = [
        p for p in Path(results_dir).glob("*-*") if p.is_dir() and p.name.split("-")[0].isdecimal()
    ]
    return [(int(p.name.split("-")[0]), p) for p in folders]


def differences(folder: Path, args: argparse.Namespace, data: Data) -> str:
    """In what a run folder's deciding arguments and data differ from these, comma-separated; "" if
    in nothing.

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
    return ", ".join(
        list(map(as_flag, found)) or ([other_data] if record["data"] != data.names else [])
    )


def different(theirs: dict, args: argparse.Namespace) -> list[str]:
    """The names of the deciding arguments that differ between a run's, as a dict, and these."""
    theirs = LATER | theirs
    return [
        name
        for name in DECIDING
        if name not in theirs
        or comparable(name, theirs[name]) != comparable(name, getattr(args, name))
    ]


def moved(folder: Path, args: argparse.Namespace) -> str:
    """What to tell of the paths of a run that are others now, with the same files; "" if none is.
    """
    theirs = read_record(folder)["args"]
    return "".join(
        f"; {as_flag(name)} was {theirs.get(name)}, which held the same"
        for name in different(theirs, args)
    )


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
    """A hash of what lies at the path that an argument gives; "" if it gives none, or data that say
    no more than names.
    """
    value = vars(args).get(name)
    if name in ("data_path", "latents"):
        # Latents are of the images with their names alone
        known = data.names if vars(args).get("latents") else data.sample
        return known if value else ""
    path = Path(value or "")
    if not value or not path.exists():
        return ""
    if name == "init_from":
        path = weights_file(path)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    return hashlib.sha256(
        "".join(f"{file.name} {file_hash(file)}\n" for file in files).encode()
    ).hexdigest()


def start_key(args: argparse.Namespace, data: Data) -> str:
    """A short hash of all that decides a run's results, wherever its files lie."""
    decided = {name: None if name in PATHS else getattr(args, name) for name in DECIDING}
    return hashlib.sha256(json.dumps([decided, data.names], default=str).encode()).hexdigest()[:12]
