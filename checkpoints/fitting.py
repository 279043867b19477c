"""Whether weights fit a network, how those of another size are made to, and what they learned."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from checkpoints.diffusers_format import LABEL_TABLE
from checkpoints.network_config import Tensors, arguments_in, with_process
from checkpoints.from_images import from_images
from checkpoints.from_static import from_static
from checkpoints.from_whole import check_whole, with_exits
from checkpoints.networks import (
    MODELS, NETWORKS, OURS, ExitDiT, Network, class_in, is_dynamic, makes_clips, said_of,
)  # fmt: skip
from checkpoints.outline import (
    FINAL, POSITION_TABLE, TABLE_OF_FRAMES, class_of, design_of, grid_in, learns_sigma, parts_of,
)  # fmt: skip
from checkpoints.weights import Weights
from conditions.encoders import check_encoders, check_says
from conditions.labels import label_index
from layers.parts import DEFAULTS, PAPERS
from processes.gaussian import GaussianProcess
from processes.process import Process
from processes.table import process_of
from runtime.json_files import read_json
from variants.exits import written_exits

# What of a process's config decides what t and the network's output mean
MEANING = ("name", "path", "prediction")
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


def check_table(network: Network, tensors: Tensors, origin: Path | str) -> None:
    """Raise ValueError if a state dict's position table is of another grid than the network's."""
    theirs, ours = grid_in(tensors), network.grid
    if theirs not in (None, ours):
        raise ValueError(
            f"{origin} has the position table of a grid of {theirs[0]} x {theirs[1]} tokens, and "
            f"its network one of {ours[0]} x {ours[1]}; give the `image_size` that it was trained "
            "with"
        )


def check_same_size(network: Network, config: object, origin: Path | str) -> None:
    """Raise ValueError if a checkpoint's `config`, DiT's arguments where it has them, is damaged,
    or of a network for another image size, or for clips of another number of frames.
    """
    if not isinstance(config, dict):
        return
    try:
        arguments = arguments_in(config)
    except ValueError as error:
        raise ValueError(f"{origin}: in its configuration {error}") from None
    theirs, ours = arguments.get("input_size"), network.config["input_size"]
    if theirs not in (None, ours):
        raise ValueError(
            f"{origin} was trained on latents of size {theirs}, and those here have {ours}; pass "
            "the same `image_size`, or start a new run from its weights with `init_from`"
        )
    frames, here = arguments.get("frames"), network.config.get("frames")
    if None not in (frames, here) and frames != here:
        raise ValueError(
            f"{origin} was trained on clips of {frames} frames, and those here have {here}; pass "
            "the same `frames`, or start a new run from its weights with `init_from`"
        )


# Arguments of another network than DiT that tensors of another network may differ in
FREE = (
    "input_size", "class_dropout_prob", "learn_sigma", "table_side", "frames", "num_classes",
)  # fmt: skip
# What a user says of such a network, beside its model
CHOSEN = ("text_length", "qk_norm", "extrapolation")
# What decides what exits take for noise, with the process
OF_PROCESS = ("t_clean", "t_noise")
# Classes of networks that have no models' names, and the option that asks for each
ASKED_BY = {"DynamicDiT": "dynamic", "ExitDiT": "exits"}
# What a configuration alone says, and no model's name
UNNAMED = ("noise_steps", "streams", "position_scale")


def check_text(network: Network, config: object, origin: Path | str) -> None:
    """Raise ValueError if a checkpoint's `config` is of a network, not DiT, that reads captions
    otherwise than this one, or whose parts are others.
    """
    theirs = config if isinstance(config, dict) else {}
    wanted, given = theirs.get("text"), said_of(network)
    if wanted and given:
        check_says(wanted)
        check_encoders(wanted, given, str(origin))
    # How many tokens outside encoders give, they say themselves, and no tensor depends on it
    free = FREE if network.config.get("text_width") is None else (*FREE, "text_length")
    for name, ours in network.config.items():
        if name in free or theirs.get(name, ours) == ours:
            continue
        raise ValueError(
            f"{origin} has {name} {theirs[name]!s:.60}, the network here {ours}; "
            f"{_advice(name, theirs[name])}"
        )


def _advice(name, value):
    """What to do where weights want another value of an argument than the network has."""
    if name == "exits":
        return f"pass `exits` {_exits(value)}"
    if name in CHOSEN:
        return f"pass `{name}={value!r}`"
    if name in OF_PROCESS:
        return "its exits are for another process; pass the `process` that it has learned"
    if name in UNNAMED:
        return "the two must be the same, and no `model` has what the weights have; use other ones"
    return f"give the `{'text_encoder' if 'width' in name else 'model'}` that it was trained with"


def class_in_file(tensors: Tensors, config: object) -> str:
    """The class of the network of a state dict, as its configuration says where there is one."""
    return class_in(config) if isinstance(config, dict) else class_of(tensors)


def check_design(
    network: Network, tensors: Tensors, origin: Path | str, config: object = None
) -> None:
    """Raise ValueError if a state dict is of another class of networks, or has blocks of another
    design, or of other parts, than the network.

    `tensors` is the state dict, `config` its arguments where its file, `origin`, has them.
    """
    kind, here = class_in_file(tensors, config), class_in(network.config)
    if kind != here:
        raise ValueError(
            f"{origin} has the weights of a {kind}, the network here is a {here}; "
            f"{_other_class(kind, here, config)}"
        )
    if here != OURS:
        return check_text(network, config, origin)
    theirs, ours = design_of(tensors), network.config["block"]
    if theirs != ours:
        raise ValueError(
            f"{origin} has blocks of the design {theirs}, the network here {ours}; pass "
            f'`block="{theirs}"`'
        )
    check_parts(network, tensors, origin, config)


def check_parts(
    network: Network, tensors: Tensors, origin: Path | str, config: object = None
) -> None:
    """Raise ValueError if a DiT's state dict has other parts than the network, whose parts are a
    DiT's; arguments as check_design's.
    """
    wanted, found = DEFAULTS | network.config, parts_of(tensors)
    if isinstance(config, dict):
        found["positions"] = config.get("positions", PAPERS.positions)
    elif found["positions"] == PAPERS.positions and network.pos_embed is not None:
        found["positions"] = wanted["positions"]  # the tensors do not tell which
    for name, there in found.items():
        if there != wanted[name]:
            raise ValueError(
                f"{origin} has {name} {there}, the network here {wanted[name]}; pass "
                f"`{name}={there if isinstance(there, bool) else _quoted(there)}`"
            )


def _other_class(kind, here, config):
    """What to do where weights are of one class and the network of another."""
    theirs, ours = ASKED_BY.get(kind), ASKED_BY.get(here)
    if theirs is not None:
        exits = config.get("exits") if isinstance(config, dict) else None
        wanted = {
            "dynamic": "`dynamic`, the share of operations that it is to take",
            "exits": f"`exits` {_exits(exits)}",
        }  # fmt: skip
        if ours is not None:
            return f"pass {wanted[theirs]}, and leave `{ours}` out"
        model = "" if here == OURS else f"a `model` whose name begins with {OURS}, and "
        return f"pass {model}{wanted[theirs]}"
    if ours is not None and kind == OURS:
        return f"leave `{ours}` out, or start a new run from its weights with `init_from`"
    names = [name for name, made in MODELS.items() if made.func is NETWORKS[kind]]
    families = sorted({name.partition("-")[0] for name in names})
    return f"pass a `model` whose name begins with {' or '.join(families)}"


def _exits(found):
    """Exits in a file's configuration as users write them."""
    try:
        return " ".join(written_exits(found))
    except (TypeError, ValueError):  # of a damaged one
        return "that it was trained with"


def _quoted(text):
    return f'"{text}"'


def without_sigma(
    tensors: Tensors, patch_size: int, channels: int, patch_frames: int = 1
) -> Tensors:
    """The state dict without the outputs for a variance, which are the second half of each patch
    element's. One that has other sizes stays as it is.
    """
    elements = patch_size**2 * patch_frames
    halves = {
        name: tensors[name].unflatten(0, (elements, 2 * channels))[:, :channels].flatten(0, 1)
        for name in FINAL  # (p²·2C, ...) → (p²·C, ...)
        if name in tensors and len(tensors[name]) == 2 * elements * channels
    }
    return tensors | halves


def learned_process(network: Network, weights: Weights, origin: Path | str) -> Process:
    """The process that a network's weights have learned, as their file says it.

    Raises ValueError, naming `origin`, for settings that the process cannot have.
    """
    try:
        return process_of(network, weights.process)
    except ValueError as error:
        raise ValueError(f"{origin}: of its process {str(error).replace('`', '')}") from None


def note_of_process(
    weights: Weights, network: Network, process: Process, origin: Path | str
) -> str | None:
    """What to tell of a network that goes on from these weights with a process, if they have
    learned another one, or do not say which; None for nothing.

    Raises ValueError as learned_process does.
    """
    theirs, ours = learned_process(network, weights, origin).config, process.config
    if weights.process is None and weights.config is None and ours["name"] != GaussianProcess.name:
        return (
            f"{origin} does not say which process it has learned; if that is not {_meaning(ours)}, "
            "t and the output mean something else there, and the first steps relearn them"
        )
    if _meaning(theirs) == _meaning(ours):
        return None
    return (
        f"{origin} has learned another process, {_meaning(theirs)}; this run learns "
        f"{_meaning(ours)}, in which t and the output mean something else"
    )


def _meaning(config):
    """The part of a process's config that decides what t and the output mean, in words."""
    return ", ".join(f"{name} {config[name]}" for name in MEANING if name in config)


def from_whole(
    tensors: Tensors, config: dict | None, network: Network, origin: Path | str
) -> Tensors:
    """The state dict of a DiT, as it is, for an ExitDiT that goes on from it: with_exits adds the
    rest. Raises ValueError for a DiT of another design or with other parts.
    """
    check_whole(tensors, origin)
    check_parts(network, tensors, origin, config)
    return tensors


# Whether a network goes on from a DiT's weights, and what makes its own of them
BEGUN_BY_DIT: tuple[tuple[Callable[[Network], bool], Callable[..., Tensors]], ...] = (
    (makes_clips, from_images), (is_dynamic, from_static),
    (lambda network: isinstance(network, ExitDiT), from_whole),
)  # fmt: skip


def adapt(
    weights: Weights, network: Network, labels: str | dict[int, int], origin: Path | str
) -> Tensors:
    """The tensors of Weights, made to fit a network of another image size, of another number of
    frames or of other classes; those of a DiT also to fit a VideoDiT or a DynamicDiT that goes on
    from it.

    The network is then trained further. Tables of positions are the network's own, functions of
    the size. Outputs for a variance are dropped if the network has none. labels: "keep" the label
    table, for as many classes; "drop" it and keep the network's own, but for the null class; or
    {index: index in the Weights} of those to take over. Raises ValueError if anything else does not
    fit.
    """
    config = weights.config and with_process(weights.config, None, weights.text)
    kind = class_in_file(weights.tensors, config)
    begun = [made for goes_on, made in BEGUN_BY_DIT if kind == OURS and goes_on(network)]
    for made in begun:
        weights = weights._replace(tensors=made(weights.tensors, config, network, origin))
    if not begun:
        check_design(network, weights.tensors, origin, config)
    sizes = network.config["patch_size"], network.in_channels, network.config.get("patch_frames", 1)
    own = network.state_dict()
    if network.learn_sigma and not learns_sigma(weights.tensors, *sizes):
        raise ValueError(
            f"{origin} has no outputs for a variance, and the network here has them; "
            "pass `learn_sigma=False`"
        )
    tables = {name: own[name] for name in own if name in (POSITION_TABLE, TABLE_OF_FRAMES)}
    tensors = weights.tensors | tables
    if not network.learn_sigma:
        tensors = without_sigma(tensors, *sizes)
    if kind == OURS and isinstance(network, ExitDiT):
        tensors = with_exits(tensors, network)
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
