"""Checkpoint files: reading any that a DiT may come in, and writing our own so that a half-written one never counts.

Ours is a dict of plain values and tensors: model, ema (state dicts), opt, args, step, config (DiT's arguments), classes
(names in index order, or None), rng (seed, processes, device type), log (the unfinished log window) and, where there are
several decays, emas ({decay: state dict}, all but the first, which is ema). Also read: such a dict with model and ema alone, a
bare state dict, a .safetensors file with `config` and `classes` as JSON in its metadata or with a config.json beside it, and
diffusers' DiT. Nothing is ever unpickled beyond tensors, plain containers and the argparse.Namespace that older training
scripts stored.
"""

import argparse
from collections.abc import Callable, Iterable
import errno
import hashlib
import json
import os
from pathlib import Path
import pickle
import re
from typing import Any, NamedTuple
import zipfile

import safetensors
import safetensors.torch
import torch
from torch import nn

from diffusers_format import LABEL_TABLE, OWN_CLASSES, Tensors, config_from_diffusers, from_diffusers, is_diffusers
from models import DiT

PRETRAINED = "model.safetensors"  # in a folder with config.json, as on the Hugging Face hub
OUR_CLASS = "DiT"  # what such a config.json calls our network under _class_name
PRETRAINED_FILES = (PRETRAINED, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod)\."
)  # left in names by DistributedDataParallel and torch.compile
NAME_MAX = 255  # bytes of a file's name, on the file systems in use


class Weights(NamedTuple):
    """One set of weights (a state dict on the CPU), with DiT's arguments and class names where the file has them.

    `training` is {"step": ..., "args": ...} of the run, where the file has them.
    """

    tensors: Tensors
    config: dict | None
    classes: list[str] | None
    training: dict | None = None


def weights_file(path: Path | str) -> Path:
    """The file of weights that a path means: itself; a run folder's newest checkpoint; that of a folder with config.json or,
    written by a pipeline of diffusers, with model_index.json.

    Raises ValueError if there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / "model_index.json").is_file():
        path = path / "transformer"
    if not (path / "config.json").is_file():
        return newest_checkpoint(path)
    for name in PRETRAINED_FILES:
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"{path} has config.json but none of {', '.join(PRETRAINED_FILES)}; weights in several files (shards) or with a "
        "variant in their names are not read, save them again as one"
    )


def load_weights(path: Path | str, which: str = "ema") -> Weights:
    """The Weights in a checkpoint file or in a folder as in weights_file; `which` is as in weights_choice.

    A file with a single set of weights is taken as the EMA, which is what is published.
    Raises ValueError if the file is missing, broken, unsafe or no checkpoint, or has no such weights.
    """
    path = weights_file(path)
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}; give a .pt or .safetensors file, a run folder, or a folder with config.json"
        )
    config = classes = training = None
    if path.suffix == ".safetensors":
        contents, config, classes = _read_safetensors(path)
    else:
        contents = read_checkpoint(path)
        config, classes = contents.get("config"), contents.get("classes")
        if isinstance(contents.get("args"), dict):
            training = {"step": contents.get("step"), "args": contents["args"]}
    tensors = _chosen(contents, which, path)
    weights = Weights(clean_names(tensors), config if isinstance(config, dict) else None, classes, training)
    beside = path.with_name("config.json")
    is_pretrained = path.suffix == ".safetensors" or path.name in PRETRAINED_FILES
    if is_pretrained and config is None and beside.is_file():
        weights = _configured(weights, beside)
    check_classes(weights.classes, weights.config, path)
    return weights


def _chosen(contents, which, path):
    """The state dict `which` in a file's contents. Raises ValueError if there is none."""
    sets = _weight_sets(contents)
    tensors = sets.get(which)
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in tensors.items())
    ):
        raise ValueError(
            f"{path} holds no {which!r} weights: its entries are {', '.join(map(str, list(contents)[:6]))}; "
            "a state dict is wanted, or a dict with ema or with model (--weights raw)"
            + (f"; --weights can be {', '.join(sets)}" if len(sets) > 1 or which != "ema" else "")
        )
    return tensors


def check_classes(classes: object, config: dict | None, origin: Path | str) -> None:
    """Raise ValueError unless `classes` are names, at most as many as a network of this configuration has, or None."""
    if classes is None:
        return
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{origin} has class names that are no list of texts; write them so, or leave them out")
    count = (config or {}).get("num_classes", len(classes))
    if isinstance(count, int) and len(classes) > count:
        raise ValueError(f"{origin} has {len(classes)} class names for {count} classes; give one name for each")


def _configured(weights, file):
    """Weights with what a config.json says, and as ours if it is diffusers'. Raises ValueError if it is of another network."""
    config = read_json(file)
    name = config.get("_class_name", OUR_CLASS)
    try:
        if is_diffusers(config):
            theirs, config, pipeline = config, config_from_diffusers(config), file.parent.parent / "model_index.json"
            named = names_of(read_json(pipeline)) if pipeline.is_file() else None
            return Weights(from_diffusers(weights.tensors, config), config, named or theirs.get(OWN_CLASSES))
        if name != OUR_CLASS:
            raise ValueError(f"it is of {name}, not of a DiT")
        arguments = {key: value for key, value in config.items() if key not in ("_class_name", "id2label")}
        return weights._replace(config=arguments, classes=names_of(config))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, KeyError, AttributeError, IndexError) as error:  # of values that are not of the kind they should be
        raise ValueError(f"{file} is no configuration of a DiT ({type(error).__name__}: {error})") from None


def names_of(config: dict) -> list[str] | None:
    """The class names, in index order, under id2label in a config.json's contents; None if there are none."""
    try:
        found = {int(index): name for index, name in (config.get("id2label") or {}).items()}
        return [found[i] for i in range(len(found))] or None
    except (AttributeError, KeyError, ValueError):
        raise ValueError("id2label is not {index: name} with an index from 0 on for each class") from None


def id2label(classes: Iterable[str]) -> dict[str, str]:
    """Class names as config.json and diffusers' pipeline have them."""
    return {str(i): name for i, name in enumerate(classes)}


def read_json(file: Path) -> dict:
    """The dict in a JSON file. Raises ValueError if it cannot be read or holds something else."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file} ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} is no configuration: it holds a {type(contents).__name__}")
    return contents


def _weight_sets(contents):
    """The sets of weights in a file's contents, under the names of weights_choice."""
    if not any(isinstance(contents.get(key), dict) for key in ("ema", "model")):
        return {"ema": contents}
    sets = {"ema": contents.get("ema"), "raw": contents.get("model")}
    sets |= {f"ema@{decay}": tensors for decay, tensors in averages(contents).items()}
    return {name: tensors for name, tensors in sets.items() if tensors is not None}


def averages(contents: dict) -> dict[float, Tensors]:
    """{decay: state dict} of every moving average in a training checkpoint, the main one first."""
    args = contents.get("args")
    decays = args.get("ema_decay") if isinstance(args, dict) else None
    first = {decays[0]: contents.get("ema")} if isinstance(decays, list) and decays else {}
    return first | (contents.get("emas") or {})


def weights_choice(text: str) -> str:
    """What --weights may name: "ema", "raw", or "ema@DECAY" for one of several averages. Raises ValueError for others."""
    if text in ("ema", "raw"):
        return text
    kind, _, decay = text.partition("@")
    if kind != "ema" or not decay.replace(".", "", 1).isdecimal():
        raise ValueError(f"{text!r} is none of ema, raw and ema@DECAY, such as ema@0.9999")
    return f"ema@{float(decay)}"


def read_checkpoint(path: Path | str, mmap: bool = False) -> dict:
    """The dict in a file that torch.save wrote, tensors on the CPU; with mmap they are read when they are used.

    Raises ValueError if the file is cut short or no such file, holds something else, or wants to run code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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


def check_whole(path: Path | str) -> None:
    """Raise ValueError unless every part of a checkpoint file has the checksum that it was written with.

    torch.load does not look at them: it takes a file in which a bit has changed. Raises OSError if the file cannot be read,
    which says nothing of what is in it.
    """
    damaged: str | Exception | None
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
        except Exception as error:  # a changed header makes zipfile raise many kinds
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a changed offset
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


def clean_names(tensors: Tensors) -> Tensors:
    """The state dict with the names that the bare network gives its tensors."""
    return {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def check_fits(network: nn.Module, tensors: Tensors, origin: Path | str) -> None:
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


def design_of(tensors: Tensors) -> str:
    """The block design, a key of models.BLOCKS, of the network whose state dict this is."""
    first = {name.removeprefix("blocks.0."): value for name, value in tensors.items() if name.startswith("blocks.0.")}
    if "scale_shift_table" in first:
        return "adaln_single"
    if "cross_attn.q.weight" in first:
        return "cross_attention"
    if "norm1.weight" in first:
        return "in_context"
    regression = first.get("adaLN_modulation.1.weight")
    return "adaln" if regression is not None and len(regression) == 4 * regression.shape[-1] else "adaln_zero"


def check_design(network: DiT, tensors: Tensors, origin: Path | str) -> None:
    """Raise ValueError if the state dict `tensors` from file `origin` has blocks of another design than the network."""
    theirs, ours = design_of(tensors), network.config["block"]
    if theirs != ours:
        raise ValueError(f"{origin} has blocks of the design {theirs}, the network here {ours}; pass --block {theirs}")


def adapt(weights: Weights, network: DiT, labels: str | dict[int, int], origin: Path | str) -> Tensors:
    """The tensors of Weights made to fit a network of another image size or of other classes, to train it further.

    The position table is the network's own, for it is a function of the size. labels: "keep" the label table, for as
    many classes; "drop" it and keep the network's own, but for the null class; or {index: index in the Weights} of those
    to take over. Raises ValueError if anything else does not fit.
    """
    check_design(network, weights.tensors, origin)
    own = network.state_dict()
    tensors = weights.tensors | {"pos_embed": own["pos_embed"]}
    theirs = tensors.pop(LABEL_TABLE, None)
    if LABEL_TABLE in own:
        table = own[LABEL_TABLE].clone()
        if theirs is not None and theirs.shape[1:] == table.shape[1:]:
            classes = (weights.config or {}).get("num_classes", len(theirs) - 1)
            same = {i: i for i in range(classes)} if labels == "keep" else {}
            pairs = labels if isinstance(labels, dict) else same
            if labels == "keep" and classes != network.num_classes:
                raise ValueError(
                    f"{origin} has {classes} classes, the new network {network.num_classes}; pass --init-labels drop, or a "
                    "file that maps them"
                )
            if len(theirs) > classes and network.null_label is not None:
                pairs = pairs | {network.null_label: classes}
            for index, there in pairs.items():
                table[index] = theirs[there]
        tensors[LABEL_TABLE] = table
    check_fits(network, tensors, origin)
    return tensors


def read_label_map(path: Path | str, classes: tuple[list[str] | None, int], weights: Weights) -> dict[int, int]:
    """{index: index in the Weights} from a JSON file {label: label there}: indices, else class names.

    Raises ValueError, naming the label, for one that does not exist.
    """
    try:
        pairs = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = pairs.items()
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--init-labels {path} is no JSON file of {{label: label there}} ({reason})") from None
    there = (weights.config or {}).get("num_classes", len(weights.tensors.get(LABEL_TABLE, [])) - 1)

    def index(label, names, count, where):
        if not isinstance(label, (str, int)):
            raise ValueError(f"--init-labels {path}: {label!r} is no label; give one number or one name")
        names = {name: i for i, name in enumerate(names or [])}
        number = int(label) if str(label).isdecimal() else names.get(label, -1)
        if not 0 <= number < count:
            raise ValueError(f"--init-labels {path}: {label!r} is no label {where}, which has {count}")
        return number

    here, count = classes
    return {
        index(new, here, count, "of the new network"): index(old, weights.classes, there, "of the checkpoint")
        for new, old in pairs
    }


def save_checkpoint(path: Path | str, contents: dict) -> None:
    """Write a dict for torch.save so that `path` either is whole or does not exist, also after a crash.

    Raises OSError, with the reason, if it cannot be written.
    """

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(contents, file)

    write_whole(Path(path), write)


def save_weights(path: Path, weights: Weights) -> None:
    """Write Weights as a .safetensors file with config and classes in its metadata, whole or not at all.

    Raises OSError, with the reason, if it cannot be written.
    """
    metadata = {"config": json.dumps(weights.config), "classes": json.dumps(weights.classes)}
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}

    def write(temporary):
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from None

    write_whole(Path(path), write)


def file_hash(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: Path, suffix: str) -> Path:
    """A hidden name in the folder of `path`: its own with this suffix, cut if only the suffix makes it too long."""
    name = path.name
    if len(os.fsencode(name)) <= NAME_MAX:
        while len(os.fsencode(f".{name}{suffix}")) > NAME_MAX:
            name = name[1:]
    return path.parent / f".{name}{suffix}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), bring the file safely to disk, and give it its name; a failed write leaves nothing.

    Raises OSError if the disk refuses.
    """
    temporary = beside(path, ".partial")
    try:
        write(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        reason: BaseException | None = error
        while reason and not isinstance(reason, OSError):  # torch.save hides the disk's answer behind its own
            reason = reason.__context__
        raise (reason or error) from None


def _to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
            f"{run_folder} has no checkpoints/SSSSSSS.pt and no config.json; give a run folder, a checkpoint file, or a folder "
            "that save_pretrained or a pipeline of diffusers wrote"
        )
    return found[-1]


def newest_whole_checkpoint(run_folder: Path | str) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint of a run folder that is not damaged, else None; what is wrong with each newer one)."""
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
