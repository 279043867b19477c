"""Checkpoint files: reading any that a DiT may come in, and writing our own so that a half-written one never counts.

Ours is a dict of plain values and tensors: model, ema (state dicts), opt, args, step, config (DiT's arguments), classes
(names in index order, or None) and rng. Also read: such a dict with model and ema alone, a bare state dict, and a
.safetensors file with `config` and `classes` as JSON in its metadata. Nothing is ever unpickled beyond tensors, plain
containers and the argparse.Namespace that older training scripts stored.
"""

import argparse
import json
import os
from pathlib import Path
import pickle
import re
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod)\."
)  # left in names by DistributedDataParallel and torch.compile


class Weights(NamedTuple):
    """One set of weights (a state dict on the CPU), with DiT's arguments and class names where the file has them."""

    tensors: dict
    config: dict | None
    classes: list | None


def load_weights(path, which="ema"):
    """The Weights in a checkpoint file, or in the newest checkpoint of a run folder; `which` is "ema" or "raw".

    A file with a single set of weights is taken as the EMA, which is what is published.
    Raises ValueError if the file is missing, broken, unsafe or no checkpoint, or has no such weights.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; give the path of a .pt or .safetensors file")
    if path.suffix == ".safetensors":
        contents, config, classes = _read_safetensors(path)
    else:
        contents = read_checkpoint(path)
        config, classes = contents.get("config"), contents.get("classes")
    sets = {"ema": contents.get("ema"), "raw": contents.get("model")}
    if not any(isinstance(tensors, dict) for tensors in sets.values()):
        sets = {"ema": contents}
    tensors = sets.get(which)
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in tensors.items())
    ):
        raise ValueError(
            f"{path} holds no {which!r} weights: its entries are {', '.join(map(str, list(contents)[:6]))}; "
            "a state dict is wanted, or a dict with ema or with model (--weights raw)"
        )
    return Weights(clean_names(tensors), config if isinstance(config, dict) else None, classes)


def read_checkpoint(path):
    """The dict in a file that torch.save wrote, tensors on the CPU.

    Raises ValueError if the file is cut short or no such file, holds something else, or wants to run code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path} was not loaded: it asks for {refused[1]}, and a checkpoint of weights needs no code; "
                "do not trust this file, or save it again as a state dict"
            ) from None
        raise ValueError(_broken(path)) from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error})") from None
    except Exception:  # a broken file makes torch.load raise many kinds, some of which advise to load it unsafely
        raise ValueError(_broken(path)) from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint's dict")
    return contents


def _broken(path):
    return f"{path} is cut short, damaged or no checkpoint; download or copy it again"


def _read_safetensors(path):
    """(tensors, config, classes) of a .safetensors file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is cut short or not a safetensors file ({error}); download or copy it again"
        ) from None
    try:
        return tensors, *(json.loads(metadata.get(key, "null")) for key in ("config", "classes"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has metadata that is not JSON ({error}); save it without, and give --model") from None


def clean_names(tensors):
    """The state dict with the names that the bare network gives its tensors."""
    return {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def check_fits(network, tensors, origin):
    """Raise ValueError, naming keys and shapes, unless the state dict `tensors` from file `origin` fits the network."""
    want = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    differences = [f"{name} is missing" for name in want if name not in got]
    differences += [f"{name} is not in the network" for name in got if name not in want]
    differences += [
        f"{name} is {got[name]}, wanted {want[name]}" for name in want if name in got and got[name] != want[name]
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"{origin} is of another configuration: {'; '.join(differences[:4])}{more}. "
            "Give the --model, --image-size, --num-classes and --vae that it was trained with"
        )


def save_checkpoint(path, contents):
    """Write a dict for torch.save so that `path` either is whole or does not exist, also after a crash."""
    _write_then_rename(Path(path), lambda temporary: torch.save(contents, temporary))


def save_weights(path, weights):
    """Write Weights as a .safetensors file with config and classes in its metadata, whole or not at all."""
    metadata = {"config": json.dumps(weights.config), "classes": json.dumps(weights.classes)}
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    _write_then_rename(Path(path), lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


def _write_then_rename(path, write):
    """Call write(temporary path), bring the file safely to disk, and give it its name."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    for to_disk, rename in ((temporary, True), (path.parent, False)):
        handle = os.open(to_disk, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        if rename:
            os.replace(temporary, path)


def checkpoint_path(run_folder, step):
    """Where a run keeps its checkpoint of a step."""
    return Path(run_folder) / "checkpoints" / f"{step:07d}.pt"


def list_checkpoints(run_folder):
    """The checkpoints of a run folder, oldest first."""
    folder = Path(run_folder) / "checkpoints"
    return sorted((p for p in folder.glob("*.pt") if p.stem.isdecimal()), key=lambda p: int(p.stem))


def newest_checkpoint(run_folder):
    """The newest checkpoint of a run folder. Raises ValueError if it has none."""
    found = list_checkpoints(run_folder)
    if not found:
        raise ValueError(f"{run_folder} has no checkpoints/SSSSSSS.pt; give a run folder, or a checkpoint file")
    return found[-1]
