"""Checkpoint files on disk: reading one, writing one whole, and the checkpoints of a run folder."""

from contextlib import suppress
import errno
from pathlib import Path
import pickle
import zipfile

import safetensors.torch
import torch

from checkpoints import plain_pickle
from runtime.disk import readable_name, write_whole
from runtime.json_files import parse_json


def read_checkpoint(path: Path | str, mmap: bool = False) -> dict:
    """The dict in a file that torch.save wrote, tensors on the CPU.

    With mmap they are read when they are used. Raises ValueError if the file is cut short or no
    such file, holds something else, or wants to run code.
    """
    try:
        with plain_pickle.only_plain_values(), readable_name(path) as name:
            contents = torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = (
            plain_pickle.refusal(error)
            if zipfile.is_zipfile(path) or "GLOBAL" in str(error)
            else None
        )
        raise ValueError(f"{path} {reason}" if reason else _broken(path)) from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error})") from None
    except Exception:  # torch.load raises many kinds, and some advise to load the file unsafely
        raise ValueError(_broken(path)) from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint's dict")
    return contents


def check_whole(path: Path | str) -> None:
    """Raise ValueError unless every part of a checkpoint file has the checksum that it was given.

    torch.load does not look at them: it takes a file in which a bit has changed. Raises OSError if
    the file cannot be read, which says nothing of what is in it.
    """
    damaged: str | Exception | None
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
        except Exception as error:  # a changed header makes zipfile raise many kinds
            # EINVAL: a changed offset
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise OSError(error.errno, error.strerror, str(path)) from None
            damaged = error
    if damaged is not None:
        raise ValueError(
            f"{path} is damaged (checksum of {damaged})"
            if isinstance(damaged, str)
            else f"{path} is damaged ({damaged})"
        )


def _broken(path):
    return f"{path} is cut short, damaged or no checkpoint; download or copy it again"


def _read_safetensors(path):
    """(tensors, config, classes, all that its metadata say) of a .safetensors file."""
    try:
        with readable_name(path) as name, safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (
        safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f"{path} is cut short or not a safetensors file ({reason[0][:200]}); download or copy "
            "it again"
        ) from None
    try:
        config, classes = (parse_json(metadata.get(key, "null")) for key in ("config", "classes"))
    except ValueError as error:
        raise ValueError(
            f"{path} has metadata that is not JSON ({error}); save it without, and give `model`"
        ) from None
    if not isinstance(config, (dict, type(None))):
        raise ValueError(
            f"{path} has metadata whose config is a {type(config).__name__}; save it without, and "
            "give `model`"
        )
    says = {**metadata, "config": config}
    for key, text in metadata.items():
        if text.startswith("{"):
            with suppress(ValueError):
                says[key] = parse_json(text)
    return tensors, config, classes, says


def save_checkpoint(path: Path | str, contents: dict) -> None:
    """Write a dict with torch.save; after a crash, too, `path` is whole or does not exist.

    Raises OSError, with the reason, if it cannot be written.
    """

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(contents, file)

    write_whole(Path(path), write)


def checkpoint_path(run_folder: Path | str, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return Path(run_folder) / "checkpoints" / f"{step:07d}.pt"


def list_checkpoints(run_folder: Path | str) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    folder = Path(run_folder) / "checkpoints"
    return sorted((p for p in folder.glob("*.pt") if p.stem.isdecimal()), key=lambda p: int(p.stem))


def newest_checkpoint(run_folder: Path | str) -> Path:
    """The newest checkpoint of a run folder. Raises ValueError if it has none."""
    found = list_checkpoints(run_folder)
    if not found:
        raise ValueError(
            f"{run_folder} has no checkpoints/SSSSSSS.pt and no config.json; give a run folder, a "
            "checkpoint file, or a folder that save_pretrained or a pipeline of diffusers wrote"
        )
    return found[-1]


def newest_whole_checkpoint(run_folder: Path | str) -> tuple[Path | None, list[str]]:
    """(newest undamaged checkpoint of a run folder or None, what is wrong with each newer one)."""
    complaints: list[str] = []
    for path in reversed(list_checkpoints(run_folder)):
        try:
            check_whole(path)
            return path, complaints
        except ValueError as error:
            complaints.append(str(error))
    return None, complaints


def prune_checkpoints(run_folder: Path | str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run folder."""
    for path in list_checkpoints(run_folder)[:-keep]:
        path.unlink()
