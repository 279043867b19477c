"""Checkpoint files: reading any that a DiT may come in, and writing our own.

A half-written one of ours never counts. Ours is a dict of plain values and tensors: model, ema
(state dicts), opt, args, step, config (the network's arguments, its class unless that is DiT, under
process which process it has learned, under text which outside encoders read its captions), classes
(names in index order, or None), rng (seed, processes, device type), log (the unfinished log window)
and, where there are several decays, emas ({decay: state dict}, all but the first, which is ema).
Also read: such a dict with model and ema alone, a bare state dict, a .safetensors file with
`config` and `classes` as JSON in its metadata or with a config.json beside it, and the networks of
diffusers that formats.py has. Nothing is ever unpickled beyond tensors, plain containers and what
plain_pickle.py admits by name.
"""

from collections.abc import Iterable
import errno
import json
from pathlib import Path
import re
from typing import NamedTuple

import safetensors.torch
import torch

from checkpoints.diffusers_format import OWN_CLASSES, OWN_TEXT
from checkpoints.files import _read_safetensors, read_checkpoint
from checkpoints.formats import Format, format_of
from checkpoints.lightning_format import LEARNED, from_lightning, is_lightning
from checkpoints.names import PRETRAINED_FILES, weights_file
from checkpoints.network_config import Tensors, arguments_in, text_in, with_process
from checkpoints.process_marks import process_said
from runtime.disk import write_whole
from runtime.json_files import read_json

# Left in names by DistributedDataParallel, torch.compile, FSDP, checkpointing and Lightning's
# Fabric
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module"
    r"|_checkpoint_wrapped_module|_forward_module)\."
)
# Under which a file may have a state dict: of the trained weights, of their average, or of one of
# the two.
RAW, AVERAGE = (
    ("model",),
    ("ema", "ema_model", "model_ema", "ema_state_dict", "model_ema_state_dict", "state_dict_ema"),
)
EITHER = ("state_dict", "model_state_dict", "module", "network", "net")
# A tensor that every DiT has, ours and diffusers'
FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")
NOT_WEIGHTS = ("n_averaged",)  # a count, in state dicts of torch's AveragedModel
WITHOUT_MARKS = {
    *RAW, *AVERAGE, *EITHER, "opt", "optimizer", "optimizer_states", "optimizer_state_dict", "rng",
    "emas", "log",
}  # fmt: skip


class Weights(NamedTuple):
    """One set of weights, a state dict on the CPU.

    The network's arguments and class names are with it where the file has them. `training` is
    {"step": ..., "args": ...} of the run, where the file has them; `process` is what the file says
    of the process that the network has learned, a Process's `config`; `text` is what it says of the
    outside encoders of its captions, a Reader's `says`.
    """

    tensors: Tensors
    config: dict | None
    classes: list[str] | None
    training: dict | None = None
    process: dict | None = None
    text: list[dict] | None = None


def load_weights(path: Path | str, which: str = "ema") -> Weights:
    """The Weights in a checkpoint file or in a folder as in weights_file.

    `which` is as in weights_choice. A file with a single set of weights is taken as the EMA, which
    is what is published. Raises ValueError if the file is missing, broken, unsafe or no checkpoint,
    or has no such weights.
    """
    path = weights_file(path)
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}; give a .pt or .safetensors file, a run folder, or a "
            "folder with config.json"
        )
    if path.suffix == ".safetensors":
        contents, config, classes, says = _read_safetensors(path)
    else:
        contents = read_checkpoint(path)
        config, classes = contents.get("config"), contents.get("classes")
        says = {key: value for key, value in contents.items() if key not in WITHOUT_MARKS}
    tensors = _chosen(contents, which, path)
    foreign = is_lightning(tensors)
    process = process_said(says, path, LEARNED if foreign else None)
    training = None
    if isinstance(contents.get("args"), dict):
        training = {"step": contents.get("step"), "args": contents["args"]}
    try:
        if foreign:
            tensors, config = from_lightning(tensors)
        text = text_in(config) if isinstance(config, dict) else None
        config = arguments_in(config) if isinstance(config, dict) else None
    except ValueError as error:
        of = "" if foreign else "in its configuration "
        raise ValueError(f"{path}: {of}{error}") from None
    weights = Weights(tensors, config, classes, training, process, text)
    beside = path.with_name("config.json")
    is_pretrained = path.suffix == ".safetensors" or path.name in PRETRAINED_FILES
    if is_pretrained and config is None and beside.is_file():
        weights = _configured(weights, beside)
    check_classes(weights.classes, weights.config, path)
    return weights


def _chosen(contents, which, path):
    """The state dict `which` in a file's contents, under the bare network's names.

    Raises ValueError if there is none.
    """
    try:
        sets = _weight_sets(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = sets.get(which)
    if not is_state_dict(tensors):
        entries = ", ".join(str(key)[:60] for key in list(contents)[:6])
        raise ValueError(
            f"{path} holds no {which!r} weights: its entries are {entries}; "
            'a state dict is wanted, or a dict with ema or with model (`weights="raw"`)'
            + (
                f"; `weights` can be {', '.join(sets)}"
                if sets and (len(sets) > 1 or which != "ema")
                else ""
            )
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
    if (
        type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        or "_flat_param" in name
    ):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, a part of weights that are split over processes "
            "or packed otherwise; save "
            "the whole state dict (FSDP: StateDictOptions(full_state_dict=True))"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        raise ValueError(
            f"{name} is a {kind} tensor; plain tensors with values are wanted, save it again as "
            "those"
        )
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ValueError(
            f"{name} has fewer values than its shape {tuple(tensor.shape)} says; save its "
            "contiguous() copy"
        )


def check_readable(classes: list[str] | None) -> None:
    """Raise ValueError, naming the class, if a class name is no text that others could read.

    A folder's name in Latin-1 is such a name.
    """
    for index, name in enumerate(classes or []):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the name of class {index}, {name!r}, is not in UTF-8, and others could not read "
                "it; call it otherwise in the checkpoint's entry `classes`, or export with "
                '`format="safetensors"`'
            ) from None


def check_classes(classes: object, config: dict | None, origin: Path | str) -> None:
    """Raise ValueError unless `classes` is None, or names, at most as many as the network's.

    The network is of this configuration.
    """
    if classes is None:
        return
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"{origin} has class names that are no list of texts; write them so, or leave them out"
        )
    count = (config or {}).get("num_classes", len(classes))
    if len(classes) > count:
        raise ValueError(
            f"{origin} has {len(classes)} class names for {count} classes; give one name for each"
        )


def _configured(weights, file):
    """Weights with what a config.json says, and as ours if it is of a network of diffusers'.

    Raises ValueError if it is of another network.
    """
    config = read_json(file)
    process = process_said(config, file)
    try:
        if (theirs := format_of(config)) is not None:
            converted = _converted(weights, config, theirs, file)
            return converted._replace(process=process or converted.process)
        return weights._replace(
            config=arguments_in(config), classes=names_of(config),
            process=process or weights.process, text=text_in(config),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _converted(weights: Weights, said: dict, theirs: Format, file: Path) -> Weights:
    """Weights of a network of diffusers', whose config.json, `file`, has `said` this, as ours.

    Raises ValueError for a network or a pipeline that ours cannot be.
    """
    config, place = theirs.config_from(said), file.parent.parent / "model_index.json"
    index = place if place.is_file() else None
    process = theirs.learned(index)
    classes = (names_of(read_json(index)) if index else None) or said.get(OWN_CLASSES)
    tensors = theirs.tensors_from(weights.tensors, config)
    text = text_in(said, OWN_TEXT) or theirs.text(index)
    return Weights(tensors, config, classes, process=process, text=text)


def names_of(config: dict) -> list[str] | None:
    """The class names, in index order, under id2label in a config.json's contents, or None.

    Raises ValueError for anything else under it.
    """
    wrong = (
        "id2label is not {index: name} with an index from 0 on for each class, and a text as name"
    )
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


def _weight_sets(contents):
    """The sets of weights in a file's contents, under the names of weights_choice.

    Their tensors have the bare network's names.
    """
    if not any(isinstance(contents.get(key), dict) for key in (*RAW, *AVERAGE, *EITHER)):
        return _sets_of_names(contents)
    sets = {}
    for kind, keys in {"ema": AVERAGE, "raw": RAW}.items():
        found = [contents[key] for key in keys if isinstance(contents.get(key), dict)]
        if len(found) == 1 or (found and found[0] is contents.get(keys[0])):
            sets[kind] = _bare(found[0])
    either = [
        contents[key]
        for key in EITHER
        if isinstance(contents.get(key), dict) and _places(contents[key])
    ]
    if len(either) == 1 and not any(contents.get(key) is not None for key in RAW):
        inside = _sets_of_names(either[0])
        if any(contents.get(key) is not None for key in AVERAGE):
            inside = {"raw": inside.get("raw", inside.get("ema"))}
        sets = inside | sets
    sets |= {f"ema@{decay}": _bare(tensors) for decay, tensors in averages(contents).items()}
    return {name: tensors for name, tensors in sets.items() if tensors is not None}


def _bare(tensors):
    """The one network in a state dict, without what stands before its names.

    A state dict of something else stays as it is.
    """
    sets = _sets_of_names(tensors)
    return next(iter(sets.values())) if len(sets) == 1 else tensors


def _sets_of_names(tensors):
    """{"ema": the one network in a state dict}, or of two networks in it, as a LightningModule has
    them, that and "raw".
    """
    if not all(isinstance(name, str) for name in tensors):
        return {"ema": tensors}
    tensors = clean_names(
        {name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS}
    )
    before = _places(tensors)
    if not before or "" in before:
        return {"ema": tensors}
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in before
    }
    words = {prefix: re.split(r"[._]", prefix) for prefix in parts}
    averaged = [
        prefix for prefix in parts if "ema" in words[prefix] and "online" not in words[prefix]
    ]
    raw = [prefix for prefix in parts if prefix not in averaged]
    if len(parts) == 1 and not any(
        "ema" in re.split(r"[._]", name.partition(".")[0]) for name in tensors
    ):
        return {"ema": parts[before[0]]}
    found = {"ema": averaged, "raw": raw}
    return {kind: parts[prefixes[0]] for kind, prefixes in found.items() if len(prefixes) == 1}


def _places(tensors):
    """What stands before the names of each network in a state dict."""
    names = [WRAPPERS.sub("", name) for name in tensors if isinstance(name, str)]
    return [
        name.removesuffix(first)
        for name in names
        for first in FIRST
        if f".{name}".endswith(f".{first}")
    ]


def averages(contents: dict) -> dict[float, Tensors]:
    """{decay: state dict} of every moving average in a training checkpoint, the main one first."""
    args, others = contents.get("args"), contents.get("emas")
    decays = args.get("ema_decay") if isinstance(args, dict) else None
    found: dict[float, Tensors] = {}
    if isinstance(decays, list) and decays and isinstance(decays[0], (int, float)):
        found[decays[0]] = contents.get("ema") or {}
    return found | (others if isinstance(others, dict) else {})


def weights_choice(text: str) -> str:
    """The name of a set of weights: "ema", "raw", or "ema@DECAY" for one of several averages.

    Raises ValueError for others.
    """
    if not isinstance(text, str):
        raise ValueError(f"`weights` is {text!r:.60}; give ema, raw or ema@DECAY")
    if text in ("ema", "raw"):
        return text
    kind, _, decay = text.partition("@")
    if kind != "ema" or not decay.replace(".", "", 1).isdecimal():
        raise ValueError(f"{text!r} is none of ema, raw and ema@DECAY, such as ema@0.9999")
    return f"ema@{float(decay)}"


def clean_names(tensors: Tensors) -> Tensors:
    """The state dict with the names that the bare network gives its tensors.

    Raises ValueError if two of them get one name.
    """
    cleaned = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        names = [WRAPPERS.sub("", name) for name in tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{twice} is there twice, with and without the marks of a wrapper; save one of the two "
            "alone"
        )
    return cleaned


def save_weights(path: Path, weights: Weights) -> None:
    """Write Weights as a .safetensors file, whole or not at all.

    The file's metadata has the config, the process in it, and the classes. Raises OSError, with the
    reason, if it cannot be written.
    """
    config = weights.config and with_process(weights.config, weights.process, weights.text)
    metadata = {"config": json.dumps(config), "classes": json.dumps(weights.classes)}
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}

    def write(temporary):
        temporary.touch()
        mode = temporary.stat().st_mode  # which safetensors narrows to the owner
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
            temporary.chmod(mode)
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from None

    write_whole(Path(path), write)
