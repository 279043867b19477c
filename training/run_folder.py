"""A run's folder: where a run starts or goes on, and how a new folder is made.

RESULTS_DIR/NNN-MODEL/ holds run.json (run_record.py), lock (folder_lock.py), log.txt and
metrics.jsonl (run_log.py), and checkpoints/SSSSSSS.pt. All of this is the business of the main
process.
"""

import json
import os
from pathlib import Path
import socket
from typing import NamedTuple

from checkpoints.files import (
    check_whole, list_checkpoints, newest_whole_checkpoint, read_checkpoint,
)  # fmt: skip
from runtime.disk import sync_folder, write_whole
from training.folder_lock import FolderLock
from training.options import PATHS, TrainOptions
from training.run_record import (
    Data, begun_at, different, differences, gone_paths, moved, new_record, quoted, read_record,
    start_key,
)  # fmt: skip


class Start(NamedTuple):
    """Where a run starts, and why.

    A start has a checkpoint to take up (None: from step 0), and a folder (None: a new one).
    """

    why: str
    checkpoint: Path | None = None
    folder: Path | None = None


def find_start(options: TrainOptions, data: Data, lock: FolderLock) -> Start:
    """The Start that `resume` asks for, its folder locked; `data` is what the run learns from.

    Raises ValueError if `resume` leads to no whole checkpoint, or another process writes in the
    folder.
    """
    if options.resume is None:
        return Start("a new run")
    if options.resume == "auto":
        lock.begin(Path(options.results_dir), start_key(options, data))
        return newest_equal_run(options, data, lock)
    return start_from(Path(options.resume).absolute(), options, data, lock)


def start_from(path: Path, options: TrainOptions, data: Data, lock: FolderLock) -> Start:
    """The Start of a run that is told to begin at `path`, a checkpoint or a run folder: in that
    folder if the run is the same, else in the folder of the run that began there, or in a new one.

    Raises ValueError as find_start does.
    """
    folder = path if path.is_dir() else path.parent.parent
    newest = list_checkpoints(folder)[-1:]
    check_there(path, newest, options)
    if not path.is_dir() and newest != [path]:
        why = "which is not the newest of a run folder"
    elif others := differences(folder, options, data):
        why = f"which was made with other {others}"
    else:
        lock.take(folder)
        return go_on(folder, moved(folder, options))
    lock.begin(Path(options.results_dir), start_key(options, data))
    for begun in newest_first(options.results_dir):
        if not differences(begun, options, data) and begun_at(begun) == path:
            lock.take(begun)
            return go_on(begun, moved(begun, options))
    if path.is_dir():
        whole, complaints = newest_whole_checkpoint(path)
        if whole is None:
            raise ValueError(
                f"`resume` {options.resume}: {'; '.join(complaints)}; no other checkpoint is there"
            )
        path = whole
    check_whole(path)
    return Start(f"a new run from {path}, {why}", path)


def check_there(path: Path, newest: list[Path], options: TrainOptions) -> None:
    """Raise ValueError unless `path` is a file, or a folder with a newest checkpoint."""
    if path.is_dir() and not newest:
        raise ValueError(
            f"`resume` {options.resume}: {path} has no checkpoints/SSSSSSS.pt; "
            "give a run folder, or auto"
        )
    if not (path.is_dir() or path.is_file()):
        raise ValueError(
            f"`resume` {options.resume}: there is no such checkpoint; "
            "give a .pt file, a run folder, or auto"
        )
    if path.suffix == ".safetensors":
        raise ValueError(
            f"`resume` {options.resume} holds weights alone; a new run starts from them with "
            "`init_from`"
        )


def newest_equal_run(options: TrainOptions, data: Data, lock: FolderLock) -> Start:
    """The Start of the newest run in `results_dir` that decides the same, else of a new one.

    Raises ValueError if a run may be the same one, which its folder does not tell.
    """
    seen = []
    for folder in newest_first(options.results_dir):
        check_tells(folder, options, data)
        others = differences(folder, options, data)
        if others:
            seen.append(f"{folder.name} has other {others}")
            continue
        lock.take(folder)
        try:
            return go_on(folder, moved(folder, options))
        except ValueError as error:
            lock.release()
            lock.begin(Path(options.results_dir), start_key(options, data))
            seen.append(str(error))
    why = f"no run in {options.results_dir} has equal arguments and a whole checkpoint"
    return Start(f"a new run: {why} ({'; '.join(seen[:3]) or 'there is none'})")


def check_tells(folder: Path, options: TrainOptions, data: Data) -> None:
    """Raise ValueError if a folder has checkpoints of what may be this run, and no record of it."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return
    untold = f'`resume="auto"` cannot tell whether {folder} is this run'
    advice = (
        f"give `resume` {folder} to go on from its newest checkpoint in a new folder, or take that "
        "folder away"
    )
    try:
        record = read_record(folder)
    except ValueError as error:
        same = decided_the_same(checkpoints[-1], options)
        if same or (same is None and (folder / "lock").exists()):
            raise ValueError(f"{untold} ({error}); {advice}") from None
        return
    if gone := gone_paths(record, options, data):
        raise ValueError(
            f"{untold}: its {quoted(gone)} is gone, and what is given now has the same names; "
            f"{advice}"
        )


def decided_the_same(checkpoint: Path, options: TrainOptions) -> bool | None:
    """Whether a checkpoint says that its run had these deciding options, paths aside.

    The answer is None if the checkpoint says nothing.
    """
    try:
        theirs = read_checkpoint(checkpoint, mmap=True).get("args")
    except ValueError:
        return None
    if not isinstance(theirs, dict):
        return None
    return all(name in PATHS for name in different(theirs, options))


def go_on(folder: Path, note: str = "") -> Start:
    """The Start at the newest whole checkpoint of a locked folder.

    Damaged newer ones are renamed, half-written ones removed. The note is told with it. A run
    without any starts over from where it began. Raises ValueError if there are some and none is
    whole, OSError if one cannot be read.
    """
    for left_behind in (folder / "checkpoints").glob(".*.partial"):
        left_behind.unlink()
    if not list_checkpoints(folder):
        return start_over(folder)
    checkpoint, complaints = newest_whole_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{'; '.join(complaints)}; no other checkpoint is there")
    for damaged in list_checkpoints(folder)[-len(complaints) :] if complaints else []:
        number = sum(1 for _ in damaged.parent.glob(damaged.name + ".damaged*"))
        damaged.rename(damaged.with_name(f"{damaged.name}.damaged{number or ''}"))
    notes = f"; {'; '.join(complaints)}, now named .damaged" if complaints else ""
    return Start(f"going on from {checkpoint}{notes}{note}", checkpoint, folder)


def start_over(folder: Path) -> Start:
    """The Start of a run whose folder has no checkpoint: where it began.

    Raises ValueError if that is gone or damaged.
    """
    record = read_record(folder)
    first = Path(record["from"]) if record.get("from") else None
    if first and not first.is_file():
        raise ValueError(
            f"{folder} began at {first}, which is gone, and has no checkpoint yet; "
            "take that folder away"
        )
    if first:
        check_whole(first)
    return Start(
        f"starting over in {folder}, which has no checkpoint yet, from {first or 'step 0'}",
        first, folder,
    )  # fmt: skip


def new_folder(
    options: TrainOptions, data: Data, lock: FolderLock, checkpoint: Path | None = None
) -> Path:
    """A new run's folder, locked and numbered from 000, which appears complete with its run.json.

    checkpoint is the one that the run begins with, if any. Raises ValueError if it cannot be made.
    """
    results, record = Path(options.results_dir), new_record(options, data, checkpoint)
    try:
        made = results / f".new-run-{socket.gethostname()}-{os.getpid()}"
        (made / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1)
        write_whole(
            made / "run.json", lambda temporary: temporary.write_text(text, encoding="utf-8")
        )
        folder = numbered(made, results, options.model.replace("/", "-"))
        sync_folder(results)
    except OSError as error:
        raise ValueError(
            f"cannot make the run folder in {results} ({error.strerror}); "
            "choose another `results_dir`"
        ) from None
    lock.take(folder)
    return folder


def numbered(made: Path, results: Path, name: str) -> Path:
    """The folder `made`, renamed to results/NNN-name, with the number after the largest there."""
    number = max((number for number, _ in run_folders(results)), default=-1) + 1
    while True:
        folder = results / f"{number:03d}-{name}"
        try:
            return made.rename(folder)
        except OSError:  # another run that starts just now has taken the number
            if not folder.exists():
                raise
            number += 1


def newest_first(results_dir: Path | str) -> list[Path]:
    """The run folders in results_dir, those with the largest numbers first."""
    return [folder for _, folder in sorted(run_folders(results_dir), reverse=True)]


def run_folders(results_dir: Path | str) -> list[tuple[int, Path]]:
    """(number, folder) for each folder in results_dir that is named as runs are."""
    folders = [
        p for p in Path(results_dir).glob("*-*") if p.is_dir() and p.name.split("-")[0].isdecimal()
    ]
    return [(int(p.name.split("-")[0]), p) for p in folders]
