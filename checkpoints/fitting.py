"""Whether weights fit a network, and how those of another size are made to."""

from pathlib import Path

import torch
from torch import nn

from checkpoints.diffusers_format import LABEL_TABLE
from checkpoints.network_config import Tensors
from checkpoints.weights import Weights
from conditions.labels import label_index
from models import DiT
from runtime.json_files import read_json

FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip


def check_fits(network: nn.Module, tensors: Tensors, origin: Path | str) -> None:
    """Raise ValueError, naming keys and shapes, unless a state dict fits the network.

    `tensors` is the state dict, `origin` the file that it comes from.
    """
    want = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    differences = [f"{name} is missing" for name in want if name not in got]
    differences += [f"{name} is not in the network" for name in got if name not in want]
    differences += [
        f"{name} is {got[name]}, wanted {want[name]}"
        for name in want
        if name in got and got[name] != want[name]
    ]
    differences += [
        f"{name} is of {tensor.dtype}, wanted floating point"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOATS
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"{origin} is of another configuration: {'; '.join(differences[:4])}{more}. "
            "Give the `model`, `image_size`, `num_classes` and `vae` that it was trained with"
        )


def design_of(tensors: Tensors) -> str:
    """The block design, a key of models.BLOCKS, of the network whose state dict this is."""
    first = {
        name.removeprefix("blocks.0."): value
        for name, value in tensors.items()
        if name.startswith("blocks.0.")
    }
    if "scale_shift_table" in first:
        return "adaln_single"
    if "cross_attn.q.weight" in first:
        return "cross_attention"
    if "norm1.weight" in first:
        return "in_context"
    regression = first.get("adaLN_modulation.1.weight")
    return (
        "adaln"
        if regression is not None and len(regression) == 4 * regression.shape[-1]
        else "adaln_zero"
    )


def check_design(network: DiT, tensors: Tensors, origin: Path | str) -> None:
    """Raise ValueError if a state dict has blocks of another design than the network.

    `tensors` is the state dict, `origin` the file that it comes from.
    """
    theirs, ours = design_of(tensors), network.config["block"]
    if theirs != ours:
        raise ValueError(
            f"{origin} has blocks of the design {theirs}, the network here {ours}; pass "
            f'`block="{theirs}"`'
        )


def adapt(
    weights: Weights, network: DiT, labels: str | dict[int, int], origin: Path | str
) -> Tensors:
    """The tensors of Weights, made to fit a network of another image size or other classes.

    The network is then trained further. The position table is the network's own, for it is a
    function of the size. labels: "keep" the label table, for as many classes; "drop" it and keep
    the network's own, but for the null class; or {index: index in the Weights} of those to take
    over. Raises ValueError if anything else does not fit.
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
                    f"{origin} has {classes} classes, the new network {network.num_classes}; pass "
                    '`init_labels="drop"`, or a file that maps them'
                )
            if len(theirs) > classes and network.null_label is not None:
                pairs = pairs | {network.null_label: classes}
            for index, there in pairs.items():
                table[index] = theirs[there]
        tensors[LABEL_TABLE] = table
    check_fits(network, tensors, origin)
    return tensors


def read_label_map(
    path: Path | str, classes: tuple[list[str] | None, int], weights: Weights
) -> dict[int, int]:
    """{index: index in the Weights} from a JSON file {label: label there}.

    Labels are as labels.label_index takes them. Raises ValueError, naming the label, for one that
    does not exist or may mean several.
    """
    try:
        pairs = read_json(Path(path))
    except ValueError as error:
        raise ValueError(
            f"`init_labels` {path} is no JSON file of {{label: label there}} ({error})"
        ) from None
    there = (weights.config or {}).get("num_classes", len(weights.tensors.get(LABEL_TABLE, [])) - 1)

    def index(label, names, count, where):
        if not isinstance(label, (str, int)) or isinstance(label, bool):
            raise ValueError(
                f"`init_labels` {path}: {repr(label)[:60]} is no label; give one number or one name"
            )
        known: dict[str, set[int]] = {}
        # A number without quotes is no name
        for i, name in enumerate(names or [] if isinstance(label, str) else []):
            known.setdefault(name, set()).add(i)
        try:
            return label_index(str(label), count, known)
        except ValueError as error:
            raise ValueError(
                f"`init_labels` {path}: {repr(label)[:60]} is no label {where}, which has {count} "
                f"({error})"
            ) from None

    here, count = classes
    found: dict[int, int] = {}
    for new, old in pairs.items():
        number = index(new, here, count, "of the new network")
        if number in found:
            raise ValueError(
                f"`init_labels` {path}: {new!r} is class {number}, which is there twice; give it "
                "once"
            )
        found[number] = index(old, weights.classes, there, "of the checkpoint")
    return found
