"""Checkpoint files: reading any that a DiT may come in, and writing our own so that a half-written one never counts.

Ours is a dict of plain values and tensors: model, ema (state dicts), opt, args, step, config (DiT's arguments), classes
(names in index order, or None), rng (seed, processes, device type), log (the unfinished log window) and, where there are
several decays, emas ({decay: state dict}, all but the first, which is ema). Also read: such a dict with model and ema alone, a
bare state dict, a .safetensors file with `config` and `classes` as JSON in its metadata or with a config.json beside it, and
diffusers' DiT. Nothing is ever unpickled beyond tensors, plain containers and what plain_pickle.py admits by name.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
import errno
import hashlib
import json
import math
import os
from pathlib import Path
import pickle
import re
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
import zipfile

import safetensors
import safetensors.torch
import torch
from torch import nn

from diffusers_format import LABEL_TABLE, OWN_CLASSES, Tensors, config_from_diffusers, from_diffusers, is_diffusers
from dit_config import arguments_in
from labels import label_index
from models import DiT
import plain_pickle
from process_marks import check_process

PRETRAINED = "model.safetensors"  # in a folder with config.json, as on the Hugging Face hub
MOST_TEXT = 256 << 20  # bytes of a file of text that is read; a list of a million files is far below
MOST_DIGITS, MOST_DEPTH = 100, 100  # of a whole number, and of brackets, in JSON
LONGEST_NAME = 255  # bytes, on the file systems that are met
# What the system says where a folder cannot be opened or synced, as on Windows and on some network disks.
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
OUR_CLASS = "DiT"  # what such a config.json calls our network under _class_name
PRETRAINED_FILES = (PRETRAINED, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
WRAPPERS = re.compile(  # left in names by DistributedDataParallel, torch.compile, FSDP, checkpointing and Lightning's Fabric
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Under which a file may have a state dict: of the trained weights, of their average, or of one of the two.
RAW, AVERAGE = ("model",), ("ema", "ema_model", "model_ema", "ema_state_dict", "model_ema_state_dict", "state_dict_ema")
EITHER = ("state_dict", "model_state_dict", "module", "network", "net")
FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")  # a tensor that every DiT has, ours and diffusers'
NOT_WEIGHTS = ("n_averaged",)  # a count, in state dicts of torch's AveragedModel
WITHOUT_MARKS = {*RAW, *AVERAGE, *EITHER, "opt", "optimizer", "optimizer_states", "optimizer_state_dict", "rng", "emas", "log"}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


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
    check_name(path)
    if not path.is_dir():
        return path
    if (path / ".metadata").is_file():
        raise ValueError(
            f"{path} is a checkpoint of torch.distributed, split over files; make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt"
        )
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
    if path.suffix == ".safetensors":
        contents, config, classes, says = _read_safetensors(path)
    else:
        contents = read_checkpoint(path)
        config, classes = contents.get("config"), contents.get("classes")
        says = {key: value for key, value in contents.items() if key not in WITHOUT_MARKS}
    check_process(says, path)
    training = None
    if isinstance(contents.get("args"), dict):
        training = {"step": contents.get("step"), "args": contents["args"]}
    try:
        config = arguments_in(config) if isinstance(config, dict) else None
    except ValueError as error:
        raise ValueError(f"{path}: in its configuration {error}") from None
    weights = Weights(_chosen(contents, which, path), config, classes, training)
    beside = path.with_name("config.json")
    is_pretrained = path.suffix == ".safetensors" or path.name in PRETRAINED_FILES
    if is_pretrained and config is None and beside.is_file():
        weights = _configured(weights, beside)
    check_classes(weights.classes, weights.config, path)
    return weights


def _chosen(contents, which, path):
    """The state dict `which` in a file's contents, under the bare network's names. Raises ValueError if there is none."""
    try:
        sets = _weight_sets(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = sets.get(which)
    if not is_state_dict(tensors):
        entries = ", ".join(str(key)[:60] for key in list(contents)[:6])
        raise ValueError(
            f"{path} holds no {which!r} weights: its entries are {entries}; "
            "a state dict is wanted, or a dict with ema or with model (--weights raw)"
            + (f"; --weights can be {', '.join(sets)}" if sets and (len(sets) > 1 or which != "ema") else "")
        )
    for name, tensor in tensors.items():
        _check_plain(tensor, f"{path}: {name}")
    return tensors


def is_state_dict(tensors: object) -> bool:
    """Whether this is a dict of names and tensors, and not empty."""
    if not isinstance(tensors, dict) or not tensors:
        return False
    return all(isinstance(name, str) and torch.is_tensor(value) for name, value in tensors.items())


def _check_plain(tensor, name):
    """Raise ValueError unless a tensor has its values in itself, one beside the other."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or "_flat_param" in name:
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, a part of weights that are split over processes or packed otherwise; save "
            "the whole state dict (FSDP: StateDictOptions(full_state_dict=True))"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        raise ValueError(f"{name} is a {kind} tensor; plain tensors with values are wanted, save it again as those")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ValueError(f"{name} has fewer values than its shape {tuple(tensor.shape)} says; save its contiguous() copy")


def check_readable(classes: list[str] | None) -> None:
    """Raise ValueError, naming the class, if a class name is no text that others could read, such as a folder's in Latin-1."""
    for index, name in enumerate(classes or []):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the name of class {index}, {name!r}, is not in UTF-8, and others could not read it; call it otherwise in the "
                "checkpoint's entry `classes`, or export with --format safetensors"
            ) from None


def check_classes(classes: object, config: dict | None, origin: Path | str) -> None:
    """Raise ValueError unless `classes` are names, at most as many as a network of this configuration has, or None."""
    if classes is None:
        return
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{origin} has class names that are no list of texts; write them so, or leave them out")
    count = (config or {}).get("num_classes", len(classes))
    if len(classes) > count:
        raise ValueError(f"{origin} has {len(classes)} class names for {count} classes; give one name for each")


def _configured(weights, file):
    """Weights with what a config.json says, and as ours if it is diffusers'. Raises ValueError if it is of another network."""
    config = read_json(file)
    name = config.get("_class_name", OUR_CLASS)
    check_process(config, file)
    try:
        if is_diffusers(config):
            theirs, config, pipeline = config, config_from_diffusers(config), file.parent.parent / "model_index.json"
            named = names_of(_checked_pipeline(pipeline)) if pipeline.is_file() else None
            return Weights(from_diffusers(weights.tensors, config), config, named or theirs.get(OWN_CLASSES))
        if name != OUR_CLASS:
            raise ValueError(f"it is of {str(name)[:60]}, not of a DiT")
        return weights._replace(config=arguments_in(config), classes=names_of(config))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _checked_pipeline(index):
    """What a pipeline's model_index.json says. Raises ValueError if it, or its scheduler, is of another process."""
    contents, scheduler = read_json(index), index.parent / "scheduler" / "scheduler_config.json"
    check_process(contents, index)
    if scheduler.is_file():
        check_process(read_json(scheduler), scheduler)
    return contents


def names_of(config: dict) -> list[str] | None:
    """The class names, in index order, under id2label in a config.json's contents; None if there are none.

    Raises ValueError for anything else under it.
    """
    wrong = "id2label is not {index: name} with an index from 0 on for each class, and a text as name"
    labels = config.get("id2label") or {}
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        raise ValueError(wrong)
    try:
        found = {int(index): name for index, name in labels.items()}
        return [found[i] for i in range(len(labels))] or None
    except (KeyError, ValueError):
        raise ValueError(wrong) from None


def id2label(classes: Iterable[str]) -> dict[str, str]:
    """Class names as config.json and diffusers' pipeline have them."""
    return {str(i): name for i, name in enumerate(classes)}


def read_json(file: Path) -> dict:
    """The dict in a JSON file in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32.

    Raises ValueError, naming the file, if it cannot be read or holds something else.
    """
    try:
        contents = parse_json(read_bounded(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file} ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} is no configuration: it holds a {type(contents).__name__}")
    return contents


def read_bounded(path: Path | str, most: int = MOST_TEXT) -> bytes:
    """What is in a file, or comes out of a pipe. Raises ValueError for more than `most` bytes, as devices without end have."""
    with open(path, "rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return contents


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError if it is none, or has numbers or a depth that no sensible one has."""

    def refuse(name):
        raise ValueError(f"it has the number {name}, which JSON does not know")

    def whole(digits):
        return int(digits) if len(digits) <= MOST_DIGITS else refuse(f"of {len(digits):,} digits")

    def real(digits):
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits[:20])

    too_deep = "it is nested too deeply"
    try:
        contents = json.loads(text, parse_constant=refuse, parse_int=whole, parse_float=real)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [[contents]]
    for _ in range(MOST_DEPTH):
        level = [part for container in level for part in _parts(container)]
    if level:
        raise ValueError(too_deep)
    return contents


def _parts(container):
    """The containers right inside one."""
    inside = container.values() if isinstance(container, dict) else container
    return [part for part in inside if isinstance(part, (dict, list))]


def _weight_sets(contents):
    """The sets of weights in a file's contents, under the names of weights_choice and with the bare network's names."""
    if not any(isinstance(contents.get(key), dict) for key in (*RAW, *AVERAGE, *EITHER)):
        return _sets_of_names(contents)
    sets = {}
    for kind, keys in {"ema": AVERAGE, "raw": RAW}.items():
        found = [contents[key] for key in keys if isinstance(contents.get(key), dict)]
        if len(found) == 1 or (found and found[0] is contents.get(keys[0])):
            sets[kind] = _bare(found[0])
    either = [contents[key] for key in EITHER if isinstance(contents.get(key), dict) and _places(contents[key])]
    if len(either) == 1 and not any(contents.get(key) is not None for key in RAW):
        inside = _sets_of_names(either[0])
        if any(contents.get(key) is not None for key in AVERAGE):
            inside = {"raw": inside.get("raw", inside.get("ema"))}
        sets = inside | sets
    sets |= {f"ema@{decay}": _bare(tensors) for decay, tensors in averages(contents).items()}
    return {name: tensors for name, tensors in sets.items() if tensors is not None}


def _bare(tensors):
    """The one network in a state dict, without what stands before its names; a state dict of something else as it is."""
    sets = _sets_of_names(tensors)
    return next(iter(sets.values())) if len(sets) == 1 else tensors


def _sets_of_names(tensors):
    """{"ema": the one network in a state dict}, or of two networks in it, as a LightningModule has them, that and "raw"."""
    if not all(isinstance(name, str) for name in tensors):
        return {"ema": tensors}
    tensors = clean_names({name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS})
    before = _places(tensors)
    if not before or "" in before:
        return {"ema": tensors}
    parts = {prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)} for prefix in before}
    words = {prefix: re.split(r"[._]", prefix) for prefix in parts}
    averaged = [prefix for prefix in parts if "ema" in words[prefix] and "online" not in words[prefix]]
    raw = [prefix for prefix in parts if prefix not in averaged]
    if len(parts) == 1 and not any("ema" in re.split(r"[._]", name.partition(".")[0]) for name in tensors):
        return {"ema": parts[before[0]]}
    found = {"ema": averaged, "raw": raw}
    return {kind: parts[prefixes[0]] for kind, prefixes in found.items() if len(prefixes) == 1}


def _places(tensors):
    """What stands before the names of each network in a state dict."""
    names = [WRAPPERS.sub("", name) for name in tensors if isinstance(name, str)]
    return [name.removesuffix(first) for name in names for first in FIRST if f".{name}".endswith(f".{first}")]


def averages(contents: dict) -> dict[float, Tensors]:
    """{decay: state dict} of every moving average in a training checkpoint, the main one first."""
    args, others = contents.get("args"), contents.get("emas")
    decays = args.get("ema_decay") if isinstance(args, dict) else None
    found: dict[float, Tensors] = {}
    if isinstance(decays, list) and decays and isinstance(decays[0], (int, float)):
        found[decays[0]] = contents.get("ema") or {}
    return found | (others if isinstance(others, dict) else {})


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
        with plain_pickle.only_plain_values(), readable_name(path) as name:
            contents = torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = plain_pickle.refusal(error) if zipfile.is_zipfile(path) or "GLOBAL" in str(error) else None
        raise ValueError(f"{path} {reason}" if reason else _broken(path)) from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error})") from None
    except Exception:  # a broken file makes torch.load raise many kinds, some of which advise to load it unsafely
        raise ValueError(_broken(path)) from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint's dict")
    return contents


@contextmanager
def readable_name(path: Path | str) -> Iterator[Path]:
    """The path; if it is not in UTF-8, which libraries that are not Python's refuse, a link to it that is."""
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as folder:
            link = Path(folder) / f"link{path.suffix.encode(errors='ignore').decode()}"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


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
    """(tensors, config, classes, all that its metadata say) of a .safetensors file."""
    try:
        with readable_name(path) as name, safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f"{path} is cut short or not a safetensors file ({reason[0][:200]}); download or copy it again"
        ) from None
    try:
        config, classes = (parse_json(metadata.get(key, "null")) for key in ("config", "classes"))
    except ValueError as error:
        raise ValueError(f"{path} has metadata that is not JSON ({error}); save it without, and give --model") from None
    if not isinstance(config, (dict, type(None))):
        raise ValueError(f"{path} has metadata whose config is a {type(config).__name__}; save it without, and give --model")
    says = {**metadata, "config": config}
    for key, text in metadata.items():
        if text.startswith("{"):
            with suppress(ValueError):
                says[key] = parse_json(text)
    return tensors, config, classes, says


def clean_names(tensors: Tensors) -> Tensors:
    """The state dict with the names that the bare network gives its tensors.

    Raises ValueError if two of them get one name.
    """
    cleaned = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        names = [WRAPPERS.sub("", name) for name in tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice, with and without the marks of a wrapper; save one of the two alone")
    return cleaned


def check_fits(network: nn.Module, tensors: Tensors, origin: Path | str) -> None:
    """Raise ValueError, naming keys and shapes, unless the state dict `tensors` from file `origin` fits the network."""
    want = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    differences = [f"{name} is missing" for name in want if name not in got]
    differences += [f"{name} is not in the network" for name in got if name not in want]
    differences += [
        f"{name} is {got[name]}, wanted {want[name]}" for name in want if name in got and got[name] != want[name]
    ]
    differences += [
        f"{name} is of {tensor.dtype}, wanted floating point" for name, tensor in tensors.items() if tensor.dtype not in FLOATS
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
    """{index: index in the Weights} from a JSON file {label: label there}: labels as labels.label_index takes them.

    Raises ValueError, naming the label, for one that does not exist or may mean several.
    """
    try:
        pairs = read_json(Path(path))
    except ValueError as error:
        raise ValueError(f"--init-labels {path} is no JSON file of {{label: label there}} ({error})") from None
    there = (weights.config or {}).get("num_classes", len(weights.tensors.get(LABEL_TABLE, [])) - 1)

    def index(label, names, count, where):
        if not isinstance(label, (str, int)) or isinstance(label, bool):
            raise ValueError(f"--init-labels {path}: {repr(label)[:60]} is no label; give one number or one name")
        known: dict[str, set[int]] = {}
        for i, name in enumerate(names or [] if isinstance(label, str) else []):  # a number without quotes is no name
            known.setdefault(name, set()).add(i)
        try:
            return label_index(str(label), count, known)
        except ValueError as error:
            raise ValueError(
                f"--init-labels {path}: {repr(label)[:60]} is no label {where}, which has {count} ({error})"
            ) from None

    here, count = classes
    found: dict[int, int] = {}
    for new, old in pairs.items():
        number = index(new, here, count, "of the new network")
        if number in found:
            raise ValueError(f"--init-labels {path}: {new!r} is class {number}, which is there twice; give it once")
        found[number] = index(old, weights.classes, there, "of the checkpoint")
    return found


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


def check_name(path: Path) -> None:
    """Raise ValueError if no file can be called so, or its place cannot be looked at."""
    try:
        with suppress(FileNotFoundError):
            path.lstat()
    except (OSError, ValueError) as error:  # the second of a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)[:300]} is no name for a file or folder ({reason}); give another") from None


def file_hash(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hidden_name(path: Path, suffix: str) -> Path:
    """A hidden name in the folder of `path`: its own with this suffix, cut if only the suffix makes it too long."""
    name = path.name
    if len(os.fsencode(name)) <= LONGEST_NAME:
        while len(os.fsencode(f".{name}{suffix}")) > LONGEST_NAME:
            name = name[1:]
    return path.parent / f".{name}{suffix}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), bring the file safely to disk, and give it its name; a failed write leaves nothing.

    Raises OSError if the disk refuses, or if something else than a file has the name: a device would be gone for all.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file, and is not replaced by one", str(path))
    temporary = hidden_name(path, ".partial")
    try:
        write(temporary)
        _to_disk(temporary, os.O_RDWR)  # Windows syncs only what may be written
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        reason: BaseException | None = error
        while reason and not isinstance(reason, OSError):  # torch.save hides the disk's answer behind its own
            reason = reason.__context__
        if isinstance(reason, OSError) and reason.errno:
            raise OSError(reason.errno, reason.strerror, str(path)) from None  # for a message that names the file
        raise (reason or error) from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder safely to disk, where its file system can do that. Raises OSError if the disk refuses."""
    try:
        _to_disk(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _to_disk(path, access):
    handle = os.open(path, access)
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
