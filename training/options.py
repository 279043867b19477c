"""What a training run is asked for: its options, and which of them decide what it learns.

The defaults stand here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import partial
import os
from pathlib import Path
from typing import Any

from checkpoints.network_config import LATER
from checkpoints.networks import (
    DYNAMIC, MODELS, ExitDiT, Network, arguments_of, makes_clips, reads_text,
)  # fmt: skip
from conditions.labels import CLASSES
from data.opening import SOURCES
from data.options import CONDITIONS, LABELS, TEXT, DataOptions
from data.shapes import SQUARE
from evaluation.metrics import SCORED
from flow.flow import LOSS_WEIGHTS
from flow.paths import PATHS as FLOW_PATHS
from flow.prediction import PREDICTIONS
from layers.parts import DEFAULTS as PARTS, NAMES
from models import BLOCKS, DiT, summed
from processes.gaussian import GaussianProcess
from processes.table import SETTINGS, WORDS
from runtime.image_size import ImageSize, settled
from runtime.limits import Range, check_kinds, check_numbers, is_number
from variants.exits import DESIGN, checked_exits, read_exit, written_exits

# Options that decide what a run learns; resume="auto" takes up a run whose own are equal. Messages
# have them in this order, and so has the hash that names a start.
DECIDING = (
    "data_path", "latents", "model", "image_size", "num_classes", "global_batch_size",
    "global_seed", "vae", "lr", "warmup_steps", "weight_decay", "grad_clip", "ema_decay",
    "mixed_precision", "flip", "skip_bad_images", "init_from", "init_labels", "block", "process",
    *SETTINGS, "learn_sigma", *PARTS, "aspect_buckets", "pack", "condition", "text_length",
    "text_encoder", "frames", "frame_stride", "frame_rate", "given_frames", "exits", "dynamic",
)  # fmt: skip
# Options that a run may change when it goes on: they decide how far, how fast and with what records
NOT_DECIDING = (
    "epochs", "max_steps", "max_bad_steps", "grad_accum", "grad_checkpointing", "compile", "tf32",
    "fsdp", "results_dir", "resume", "log_every", "ckpt_every", "ckpt_minutes", "keep_last",
    "on_save_error", "sample_every", "log_with", "num_workers", "device", "eval_every",
    "eval_samples", "eval_reference", "eval_features",
)  # fmt: skip
# Deciding options that may be paths: another path with the same content decides the same
PATHS = ("data_path", "latents", "vae", "init_from", "init_labels")
# Defaults of deciding options that older runs did not record: a new deciding option needs its row
# here, or older runs cannot go on
UNRECORDED = {
    **LATER, "process": GaussianProcess.word, **dict.fromkeys(SETTINGS),
    "learn_sigma": GaussianProcess.learns_sigma, "aspect_buckets": False, "pack": None,
    "condition": LABELS, "text_length": None, "text_encoder": None, "frames": None,
    "frame_stride": 1, "frame_rate": None, "given_frames": 0.0, "exits": None, "dynamic": None,
}  # fmt: skip

# Option → what it may be, where that is a few words
CHOICES: dict[str, Collection[str]] = {
    "model": MODELS, "condition": CONDITIONS, "block": BLOCKS, "mixed_precision": ["no", "bf16"],
    "on_save_error": ["stop", "continue"], "log_with": ["tensorboard", "wandb"],
    "device": ["cpu", "cuda", "mps"], "process": WORDS, "path": FLOW_PATHS,
    "prediction": PREDICTIONS, "loss_weight": [word for word in LOSS_WEIGHTS if word], **NAMES,
}  # fmt: skip

# Options that are arguments of some classes of networks, and the values that leave them out
NETWORK_OPTIONS: dict[str, tuple[Any, ...]] = {
    "num_classes": (DataOptions.num_classes, 0), "block": (LATER["block"],),
    **{name: (value,) for name, value in PARTS.items()}, "text_length": (None,),
}  # fmt: skip
TEXT_LENGTH = 32  # of the network's own encoder: captions of about as many short words
SHARE = Range(0.0, 1.0)
# Options of clips, and the values that leave them out
OF_CLIPS = {"frame_stride": 1, "frame_rate": None, "given_frames": 0}


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run, which are the flags of train.py: its --help says what each is.

    None stands for what is not given. Paths may be Path objects, `ema_decay` any sequence; they are
    kept as texts and as a tuple. Raises ValueError, when it is made, for what is wrong whatever the
    data and the machine.
    """

    # data
    data_path: Path | str | None = None
    latents: Path | str | None = None
    image_size: ImageSize = DataOptions.image_size
    num_classes: int = DataOptions.num_classes
    condition: str | None = None
    text_length: int | None = None
    text_encoder: Sequence[str] | None = None
    flip: bool = DataOptions.flip
    skip_bad_images: bool = DataOptions.skip_bad_images
    aspect_buckets: bool = False
    pack: int | None = None
    # clips; None: images
    frames: int | None = None
    frame_stride: int = 1
    frame_rate: float | None = None
    given_frames: float = 0.0
    # network
    model: str = "DiT-XL/2"
    block: str = "adaln_zero"
    positions: str = PARTS["positions"]
    norm: str = PARTS["norm"]
    mlp: str = PARTS["mlp"]
    qk_norm: bool = PARTS["qk_norm"]
    extrapolation: str | None = PARTS["extrapolation"]
    vae: str = DataOptions.vae
    init_from: Path | str | None = None
    init_labels: str = "keep"
    learn_sigma: bool | None = None
    exits: Sequence[str] | None = None  # "DEPTH:LEVEL" each
    dynamic: float | None = None
    # process; the settings of a flow are None in another process
    process: str = GaussianProcess.word
    path: str | None = None
    prediction: str | None = None
    loss_weight: str | None = None
    time_sampling: str | None = None
    time_shift: float | None = None
    cosine_loss: bool | None = None
    train_eps: float | None = None
    # recipe
    epochs: int = 1400
    max_steps: int | None = None
    global_batch_size: int = 256
    lr: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float | None = None
    ema_decay: tuple[float, ...] = (0.9999,)
    global_seed: int = 0
    mixed_precision: str = "no"
    max_bad_steps: int = 10
    # speed and memory
    grad_accum: int = 1
    grad_checkpointing: bool = False
    compile: bool = False
    tf32: bool = True
    fsdp: bool = False
    # run
    results_dir: Path | str = "results"
    resume: Path | str | None = None
    log_every: int = 100
    ckpt_every: int = 50000
    ckpt_minutes: float | None = None
    keep_last: int | None = None
    on_save_error: str = "stop"
    sample_every: int | None = None
    log_with: str | None = None
    num_workers: int = 4
    device: str | None = None
    # scores while training
    eval_every: int | None = None
    eval_samples: int = 10_000
    eval_reference: Path | str | None = None
    eval_features: str = "inception"

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, _plain(value))
        check_kinds(self)
        object.__setattr__(self, "image_size", settled(self.image_size))
        if all(getattr(self, name) is None for name in SOURCES):
            raise ValueError("`data_path` is missing; give a folder of images, or `latents`")
        check_numbers(self, num_classes=CLASSES, eval_samples=SCORED, given_frames=SHARE)
        self._check_decays()
        self._check_choices()
        self._settle_exits()
        self._settle_condition()
        self._check_clips()
        self._check_pairs()
        self._settle_process()

    @property
    def sizes(self) -> str:
        """Which sizes images are brought to, as DataOptions has it."""
        return "buckets" if self.aspect_buckets else SQUARE if self.pack is None else "own"

    @property
    def patch_size(self) -> int:
        """The network's."""
        return MODELS[self.model].keywords["patch_size"]

    @property
    def network_class(self) -> type[Network]:
        """The class of the network."""
        if self.exits is not None:
            return ExitDiT
        kind: type[Network] = MODELS[self.model].func  # type: ignore[assignment]  # of NETWORKS
        return kind if self.dynamic is None else DYNAMIC.get(kind, kind)

    @property
    def sized_network(self) -> partial:
        """A factory of networks of the model's size, which takes their other arguments."""
        return partial(self.network_class, **MODELS[self.model].keywords)

    @property
    def network_arguments(self) -> dict[str, Any]:
        """What of the options the network is built with: not what data and captions decide."""
        known = arguments_of(self.network_class.__name__)
        names = ("num_classes", "block", "frames", *PARTS)
        given = {name: getattr(self, name) for name in names if name in known}
        if self.exits is not None:
            kind = WORDS[self.process]
            given["exits"] = [read_exit(text) for text in self.exits]
            given |= {"t_clean": float(kind.clean), "t_noise": float(kind.noisy)}
        return given | {"learn_sigma": bool(self.learn_sigma)}

    @property
    def process_said(self) -> dict[str, Any]:
        """What files say of the process that is to be learned, a Process's `config`."""
        kind = WORDS[self.process]
        return {"name": kind.name} | {name: getattr(self, name) for name in kind.settings}

    @property
    def samples(self) -> str:
        """What it trains on, in a word."""
        return "images" if self.frames is None else "clips"

    @property
    def patch_frames(self) -> int:
        """How many frames a patch of the network has; 1 of one that makes images."""
        return MODELS[self.model].keywords.get("patch_frames", 1)

    def recorded(self) -> dict[str, Any]:
        """The options as run.json, log.txt and checkpoints have them under "args".

        The dict is {name: value}, in order, sequences as lists.
        """
        return {name: _in_a_file(value) for name, value in vars(self).items()}

    def _settle_process(self):
        """Give the process's settings, and learn_sigma, the values that they stand for.

        Raises ValueError for those that it does not have, or not with such values.
        """
        kind = WORDS[self.process]
        given = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
        for name in given:
            if name not in kind.settings:
                owner = next(word for word, other in WORDS.items() if name in other.settings)
                raise ValueError(
                    f'`{name}` is a setting of `process="{owner}"`, and `process` is '
                    f"{self.process}; pass that, or leave `{name}` out"
                )
        for name, value in kind.settled(given).items():
            object.__setattr__(self, name, value)
        if self.learn_sigma not in (None, True, False):
            raise ValueError(f"`learn_sigma` is {self.learn_sigma!r:.60}; it is true or false")
        if self.learn_sigma is None:
            object.__setattr__(self, "learn_sigma", kind.learns_sigma)

    def _settle_condition(self):
        """Give `condition` and what depends on it the values that they stand for.

        Raises ValueError for a condition that the model does not read, and for options that its
        network does not have.
        """
        reads = TEXT if reads_text(self.network_class) else LABELS
        if self.condition not in (None, reads):
            others = [
                name for name, made in MODELS.items()
                if (self.condition == TEXT) == reads_text(made.func)  # type: ignore[arg-type]
            ]  # fmt: skip
            raise ValueError(
                f"`condition` is {self.condition}, and `model` {self.model} reads {reads}; leave "
                f"`condition` out, or choose another `model`: {', '.join(others)}"
            )
        object.__setattr__(self, "condition", reads)
        self._check_dynamic()
        known = arguments_of(self.network_class.__name__)
        for name, without in NETWORK_OPTIONS.items():
            if name not in known and getattr(self, name) not in without:
                raise self.has_no(name, getattr(self, name))
        self._settle_text() if reads == TEXT else self._check_no_encoder()

    def has_no(self, name: str, value: Any) -> ValueError:
        """The error for an option that the network does not have."""
        which = f"which reads {self.condition}" if self.dynamic is None else "with `dynamic`"
        return ValueError(
            f"`{name}` is {value}, and `model` {self.model}, {which}, has no "
            f"such thing; leave `{name}` out"
        )

    def _check_dynamic(self):
        """Raise ValueError for routers that the model cannot have, or that begin with no DiT."""
        if self.dynamic is None:
            return
        if MODELS[self.model].func not in DYNAMIC:
            raise ValueError(
                f"`dynamic` is {self.dynamic}, and `model` {self.model} has no routers; choose a "
                "`model` whose name begins with DiT, or leave `dynamic` out"
            )
        if self.init_from is None and self.resume in (None, "auto"):
            raise ValueError(
                f"`dynamic` is {self.dynamic}, which goes on from a trained DiT; name its "
                "checkpoint with `init_from`"
            )
        if self.pack is not None:
            raise ValueError(
                f"`pack` is {self.pack}, and with `dynamic` images are not packed; pass "
                "`aspect_buckets=True` instead"
            )

    def _settle_text(self):
        """Give the options of a network that reads captions the values that they stand for."""
        object.__setattr__(self, "num_classes", 0)
        if self.text_encoder is not None and self.text_length is not None:
            raise ValueError(
                "`text_length` is of the network's own encoder, and `text_encoder` names others; "
                "give one of them"
            )
        if self.pack is not None:
            raise ValueError(
                f"`pack` is for networks that read labels, and `model` {self.model} reads text; "
                "pass `aspect_buckets=True` instead"
            )
        if self.init_labels != "keep":
            raise ValueError(
                f"`init_labels` is about classes, and `model` {self.model} reads text; leave it out"
            )
        if self.text_encoder is None and self.text_length is None:
            object.__setattr__(self, "text_length", TEXT_LENGTH)

    def _check_no_encoder(self):
        """Raise ValueError for encoders of text that nothing is done with."""
        if self.text_encoder is not None:
            raise ValueError(
                f"`text_encoder` is given, and `model` {self.model} reads labels; leave it out"
            )

    def _check_decays(self):
        """Raise ValueError unless each decay of the averages is one, and stands there once."""
        if not isinstance(self.ema_decay, tuple) or not self.ema_decay:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; give a tuple of one or more decays")
        for decay in self.ema_decay:
            if not is_number(decay) or not 0 <= decay < 1 or self.ema_decay.count(decay) > 1:
                raise ValueError(
                    f"`ema_decay` is {decay!r:.60}; each must be at least 0 and below 1, "
                    "and stand there once"
                )

    def _check_choices(self):
        """Raise ValueError for a word that is none of CHOICES."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and value != getattr(TrainOptions, name):
                raise ValueError(f"`{name}` is {value}; choose from {', '.join(choices)}")

    def _settle_exits(self):
        """Give `exits` their one form. Raise ValueError for any that the model cannot be trained
        with.
        """
        if self.exits is None:
            return
        if MODELS[self.model].func is not DiT or self.block != DESIGN:
            raise ValueError(
                f"`exits` are for a DiT with blocks of {DESIGN}, and `model` is {self.model}, "
                f"`block` {self.block}; leave `exits` out, or choose others"
            )
        if self.init_from is None and self.resume in (None, "auto"):
            raise ValueError(
                "`exits` are trained from a whole network's weights; give them with `init_from`"
            )
        for name in ("dynamic", "pack", "compile", "fsdp"):
            if getattr(self, name):
                raise ValueError(
                    f"`exits` and `{name}` do not go together; leave one of them out"
                )
        pairs = [read_exit(text) for text in self.exits]
        checked_exits(pairs, MODELS[self.model].keywords["depth"])
        if pairs[-1][1] == 1:
            raise ValueError(
                "`exits` has the noise level 1, noise alone, which no time of training reaches; "
                "give a lower one"
            )
        object.__setattr__(self, "exits", tuple(written_exits(pairs)))

    def _check_clips(self):
        """Raise ValueError for options of clips that the model cannot be trained with."""
        makes, patch = makes_clips(self.network_class), self.patch_frames
        if makes != (self.frames is not None):
            raise ValueError(self._other_model(makes))
        if self.frames is None:
            for name, without in OF_CLIPS.items():
                if getattr(self, name) != without:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)}, which is about clips, and `frames` is "
                        f"not given; give it, or leave `{name}` out"
                    )
            return
        if self.frames % patch:
            raise ValueError(
                f"`frames` is {self.frames}, and a patch of `model` {self.model} has {patch} "
                f"frames; give a multiple of {patch}"
            )
        if self.given_frames and self.frames == patch:
            raise ValueError(
                f"`given_frames` is {self.given_frames}, and clips of `frames` {self.frames} are "
                "one patch long: nothing would be left to learn; leave `given_frames` out"
            )
        for name in ("aspect_buckets", "pack", "eval_every"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is for images, and `frames` asks for clips; leave `{name}` out"
                    + (", and score samples of clips with evaluate.py" * (name == "eval_every"))
                )

    def _other_model(self, makes):
        """The message for a model that makes clips, and no `frames`, or the other way round."""
        if makes:
            return (
                f"`model` {self.model} makes clips, and `frames` is not given; say how many frames "
                "a clip has, such as `frames=16`"
            )
        names = [name for name, made in MODELS.items() if makes_clips(made.func)]  # type: ignore
        kinds = sorted({name.partition("-")[0] for name in names})
        return (
            f"`frames` is {self.frames}, and `model` {self.model} makes images; leave `frames` "
            f"out, or choose a `model` whose name begins with {', '.join(kinds)}"
        )

    def _check_pairs(self):
        """Raise ValueError for options that exclude, or need, one another."""
        if self.init_from is not None and self.resume not in (None, "auto"):
            raise ValueError(
                "`init_from` and `resume` PATH both say what to start from; give one of them"
            )
        if self.init_labels != "keep" and self.init_from is None:
            raise ValueError(
                f"`init_labels` {self.init_labels} is about `init_from`, which is not given"
            )
        if (self.eval_every is None) != (self.eval_reference is None):
            raise ValueError("`eval_every` and `eval_reference` go together; give both, or neither")
        if self.latents is not None and self.vae == "none":
            raise ValueError(
                '`latents` with `vae="none"`: pixels have no latents to cache; '
                "give `data_path` alone"
            )
        self._check_shapes()

    def _check_shapes(self):
        """Raise ValueError for options that do not train on images of their own shape together."""
        if self.pack is None:
            return
        if self.aspect_buckets:
            raise ValueError(
                "`aspect_buckets` and `pack` both say how images of many shapes share a batch; "
                "give one of them"
            )
        if BLOCKS[self.block].condition is not summed:
            known = [name for name, design in BLOCKS.items() if design.condition is summed]
            raise ValueError(
                f"`block` {self.block} does not take packed images; choose from "
                f"{', '.join(known)}, or pass `aspect_buckets=True` instead of `pack`"
            )


def defaults() -> dict[str, Any]:
    """{option: its default}, in order, as TrainOptions.recorded has values."""
    return {field.name: _in_a_file(field.default) for field in fields(TrainOptions)}


def _plain(value):
    """The value of an option as it is kept: a path as text, a list as a tuple."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(value) if isinstance(value, list) else value


def _in_a_file(value):
    """The value of an option as files have it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value
