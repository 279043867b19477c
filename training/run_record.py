"""What run.json says of a run, and whether it is the run that is asked for."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
import uuid

from checkpoints.names import weights_file
from data.options import TEXT
from runtime.disk import file_hash
from runtime.json_files import read_json
from training.options import DECIDING, PATHS, UNRECORDED, TrainOptions


class Data(NamedTuple):
    """What tells the data of a run from other data.

    `names` is a hash of names and labels, or of a cache's manifest. `sample` is a hash of the bytes
    of some files; it is "" for a cache, whose manifest says it all.
    """

    names: str
    sample: str = ""


def new_record(options: TrainOptions, data: Data, checkpoint: Path | None) -> dict:
    """The contents of a new run's run.json; the run begins with checkpoint, if there is one."""
    # Paths as seen from anywhere
    decided = {name: comparable(name, value) for name, value in options.recorded().items()}
    record: dict[str, Any] = {
        "args": decided, "data": data.names, "id": uuid.uuid4().hex[:12],
        "from": str(checkpoint or ""),
    }  # fmt: skip
    record["content"] = {
        name: content for name in PATHS if (content := content_hash(name, options, data))
    }
    if options.resume not in (None, "auto"):
        record["resume"] = str(Path(options.resume).absolute())
    return record


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
        and set(DECIDING) <= {*UNRECORDED, *record["args"]}
    ):
        raise ValueError(f"{folder / 'run.json'} is damaged")
    return record


def begun_at(folder: Path) -> Path | None:
    """The path that a run was told to begin at by `resume`, None if it was told none."""
    told = read_record(folder).get("resume")
    return Path(told) if told else None


def run_id(folder: Path) -> str:
    """The name that no other run has, for trackers."""
    return read_record(folder)["id"]


def differences(folder: Path, options: TrainOptions, data: Data) -> str:
    """The deciding options in which a run folder differs from these, comma-separated, or that its
    data differ; "" for neither.

    Another path with the same content is no difference.
    """
    try:
        record = read_record(folder)
    except ValueError as error:
        return f"arguments: it has no run.json of this train.py ({error})"
    known = record.get("content") or {}
    found = [
        name
        for name in different(record["args"], options)
        if not (name in known and known[name] == content_hash(name, options, data))
    ]
    if not found and record["data"] != data.names:
        if options.condition == TEXT:
            return "images or captions in `data_path`, or content of `latents`"
        return "images in `data_path`, content of `latents` or of `init_labels`"
    return quoted(found)


def different(theirs: dict, options: TrainOptions) -> list[str]:
    """The names of the deciding options that differ between a run's, as recorded, and these."""
    theirs, ours = UNRECORDED | theirs, options.recorded()
    return [
        name
        for name in DECIDING
        if name not in theirs or comparable(name, theirs[name]) != comparable(name, ours[name])
    ]


def moved(folder: Path, options: TrainOptions) -> str:
    """What to tell of a run's paths that are others now, with the same files; "" for none."""
    theirs = read_record(folder)["args"]
    return "".join(
        f"; `{name}` was {theirs.get(name)}, which held the same"
        for name in different(theirs, options)
    )


def gone_paths(record: dict, options: TrainOptions, data: Data) -> list[str]:
    """The options whose path in a record is gone, with no hash of what was there.

    [] if the run differs from these options or data in anything else.
    """
    others, known = different(record["args"], options), record.get("content") or {}
    untold = [
        name
        for name in others
        if name in PATHS and name not in known and not Path(str(record["args"].get(name))).exists()
    ]
    return untold if untold == others and record["data"] == data.names else []


def quoted(names: list[str]) -> str:
    """Names of options for a message, comma-separated."""
    return ", ".join(f"`{name}`" for name in names)


def comparable(name: str, value: Any) -> Any:
    """The value of an option, a path in the same form whatever the working folder."""
    try:
        is_path = name in PATHS and isinstance(value, str) and Path(value).exists()
    except (OSError, ValueError):  # no path that this file system can have
        return value
    return os.path.realpath(value) if is_path else value


def content_hash(name: str, options: TrainOptions, data: Data) -> str:
    """A hash of what lies at the path of an option.

    Without a path, or where `data` has names alone, the hash is "".
    """
    value = getattr(options, name)
    if name in ("data_path", "latents"):
        # Latents are of the images with their names alone
        known = data.names if options.latents else data.sample
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


def start_key(options: TrainOptions, data: Data) -> str:
    """A short hash of all that decides a run's results, wherever its files lie."""
    recorded = options.recorded()
    decided = {name: None if name in PATHS else recorded[name] for name in DECIDING}
    return hashlib.sha256(json.dumps([decided, data.names], default=str).encode()).hexdigest()[:12]
