"""All that a run works with, put together from its options before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
import hashlib
import math
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
import torch

from checkpoints.files import read_checkpoint
from checkpoints.fitting import (
    adapt, check_design, check_fits, check_same_size, note_of_process, read_label_map,
)  # fmt: skip
from checkpoints.loading import outlined
from checkpoints.network_config import Tensors
from checkpoints.networks import Network, arguments_of
from checkpoints.process_marks import check_process
from checkpoints.sd3_format import STEPS
from checkpoints.weights import Weights, averages, clean_names, is_state_dict, load_weights
from conditions.text import TextCondition
from data.batches import steps_per_epoch
from data.buckets import ClipBatches, bucket_steps, in_buckets
from data.captioned import Captioned, Texts
from data.listing import check_outside
from data.opening import open_source
from data.options import DataOptions
from data.shapes import SQUARE
from data.source import Source
from evaluation.features import load_extractor
from layers.positions import POSITIONS, check_grid
from layers.sizes import sides
from processes.flow import FlowProcess
from processes.table import WORDS, process_of
from runtime.limits import check_memory
from runtime.surroundings import Place, check_accelerate, is_installed, own_place
from runtime.team import Team, make_accelerator, once
from training.cost import flops_per_image
from training.dynamic import PASSES, Target
from training.folder_lock import FolderLock
from training.options import TrainOptions
from training.packed import check_room
from training.run_folder import Start, find_start, new_folder
from training.run_log import RunEnded, RunLog
from training.run_record import Data, run_id
from training.scores import Judge, load_judge
from training.sharding import shard_network
from training.state import Recipe, TrainState, new_state
from vae import LatentShape, LatentSpace, Space, latent_shape, load_vae


@dataclass
class Job:
    """All that a run works with, the same in every process; only the main one writes the log."""

    options: TrainOptions
    accelerator: Accelerator
    state: TrainState
    space: Space
    dataset: Source
    last_step: int
    why: str  # for the log: where the run starts, and for what reason
    folder: Path
    lock: FolderLock
    flops: float  # of training on one image, on average
    resumed: dict  # what the checkpoint says of the processes that wrote it; empty for none
    judge: Judge | None  # of eval_every
    log: RunLog

    def end(self, message: str, told: bool = False) -> NoReturn:
        """Log the message, and raise RunEnded with it."""
        self.log(message)
        raise RunEnded(message, told)


def assemble(options: TrainOptions, lock: FolderLock, worded: Callable[[str], str] = str) -> Job:
    """The Job that the options ask for, its folder held by the lock; worded as RunLog has it.

    Raises ValueError for whatever is wrong with them; then nothing was written.
    """
    accelerator = join_processes(options)
    dataset, data = load_data(options, accelerator)
    data = with_label_map(data, options)
    check_lengths(options, dataset)
    last_step = last_step_of(options, dataset)
    space = load_space(options, accelerator, dataset)
    check_shapes(options, dataset, space)
    start: Start = once(accelerator, find_start, options, data, lock)
    fresh = start.checkpoint is None
    state = build_state(options, space, accelerator, dataset, fresh)
    resumed = take_up(state, start.checkpoint) if start.checkpoint else {}
    judge = prepare_judge(options, accelerator) if options.eval_every else None
    folder = start.folder
    if folder is None:
        check_left(options, state.step, last_step)
        folder = once(accelerator, new_folder, options, data, lock, start.checkpoint)
    if start.checkpoint and start.checkpoint.parent.parent != folder:
        state.bad_in_a_row = 0  # a new run's own, whatever it begins from
        state.begin_window()
    log = RunLog(folder, accelerator.is_main_process, state.step, last_step, worded)
    if options.log_with:
        start_tracker(options, accelerator, folder, state.step)
    flops = flops_per_image(state.network.config, dataset.sizes, space.shape)
    flops *= 1 if options.dynamic is None else PASSES
    return Job(
        options, accelerator, state, space, dataset, last_step, start.why, folder, lock, flops,
        resumed, judge, log,
    )  # fmt: skip


def join_processes(options: TrainOptions) -> Accelerator:
    """This process's Accelerator, which now knows the other processes.

    Raises ValueError if a device or a tracker is not there, sizes do not fit, or the processes
    cannot share the work.
    """
    check_surroundings(options)
    if options.latents is None:
        latent_shape(options.vae).size(options.image_size, options.patch_size)
    check_accelerate(mixed_precision=options.mixed_precision, grad_accum=options.grad_accum)
    place = own_place()
    accelerator = make_accelerator(
        options.device, mixed_precision="no", log_with=options.log_with,
        project_dir=options.results_dir,
    )  # fmt: skip
    check_shares(options, place, accelerator.num_processes)
    if options.data_path is not None:
        check_outside(options.data_path, "results_dir", options.results_dir)
    return accelerator


def check_surroundings(options: TrainOptions) -> None:
    """Raise ValueError for a device or a tracker that is not there."""
    devices = {
        "cuda": ("CUDA device", torch.cuda.is_available()),
        "mps": ("Apple GPU", torch.backends.mps.is_available()),
    }
    kind, there = devices.get(options.device or "", ("", True))
    if not there:
        raise ValueError(
            f"`device` {options.device}: PyTorch sees no {kind} here; "
            'leave the argument out or pass `device="cpu"`'
        )
    if options.log_with and not is_installed(options.log_with):
        raise ValueError(
            f"`log_with` {options.log_with}: it is not installed; pip install {options.log_with}"
        )


def check_shares(options: TrainOptions, place: Place, processes: int) -> None:
    """Raise ValueError unless so many processes are what was started, and can share the work."""
    if processes != place.world_size:
        raise ValueError(
            f"WORLD_SIZE tells of {place.world_size} processes and accelerate of {processes}; "
            "start them with torchrun, which sets LOCAL_RANK, MASTER_ADDR and MASTER_PORT too"
        )
    unit = processes * options.grad_accum
    if options.global_batch_size % unit:
        raise ValueError(
            f"`global_batch_size` {options.global_batch_size} cannot be shared equally by "
            f"{processes} process(es) in {options.grad_accum} part(s) each; "
            f"use a multiple of {unit}"
        )
    if options.latents is None:
        check_memory(
            options.global_batch_size // processes * (options.frames or 1), options.image_size,
            "`global_batch_size` or `image_size`" if options.frames is None
            else "`global_batch_size`, `frames` or `image_size`",
        )  # fmt: skip
    if options.fsdp and processes == 1:
        raise ValueError(
            "`fsdp` splits a network over processes and there is one; start several with torchrun"
        )


def load_data(options: TrainOptions, accelerator: Accelerator) -> tuple[Source, Data]:
    """(the data set, what tells it from others).

    Raises ValueError if data_path or latents do not fit the options.
    """
    chosen = {field.name: getattr(options, field.name) for field in fields(DataOptions)}
    source = open_source(DataOptions(**chosen), partial(once, accelerator))
    if options.sizes != SQUARE and source.sizes is None:
        flag = "aspect_buckets" if options.aspect_buckets else "pack"
        raise ValueError(
            f"`{flag}` is for images of many sizes, and those here all have one; leave `{flag}` out"
        )
    return source, Data(source.hash, source.sample_hash)


def with_label_map(data: Data, options: TrainOptions) -> Data:
    """The Data; if init_labels is a file, they tell it from other files, too."""
    path = Path(options.init_labels)
    if not path.is_file():
        return data
    return data._replace(names=f"{data.names} {hashlib.sha256(path.read_bytes()).hexdigest()}")


def last_step_of(options: TrainOptions, source: Source) -> int:
    """The number of steps after which a run on a source ends."""
    if options.aspect_buckets:
        counts = [len(images) for images in in_buckets(source.sizes or []).values()]
        epoch = bucket_steps(counts, options.global_batch_size)
    elif options.frames is not None:
        lengths, size = source.lengths or [], options.global_batch_size
        epoch = ClipBatches(lengths, size, options.global_seed, 0, 0).steps_per_epoch
    else:
        epoch = steps_per_epoch(len(source), options.global_batch_size)
    return min(options.epochs * epoch, options.max_steps or options.epochs * epoch)


def check_shapes(options: TrainOptions, source: Source, space: Space) -> None:
    """Raise ValueError for images of sizes of their own that the options cannot train on."""
    if options.sizes == SQUARE:
        return
    unit = space.shape.ratio * options.patch_size
    trained = sides(options.image_size)
    for height, width in set(source.sizes or ()):
        if height % unit or width % unit or height * width > math.prod(trained):
            raise ValueError(
                f"an image of {height}x{width} is not made of whole tokens of {unit}x{unit} "
                f"pixels, or larger than `image_size` {options.image_size} squared; "
                "choose another `model` or `image_size`"
            )
        known = trained[0] // unit, trained[1] // unit
        extrapolation = options.extrapolation or POSITIONS[options.positions].extrapolation
        if "extrapolation" in options.network_arguments:  # others take any grid
            check_grid(extrapolation, (height // unit, width // unit), known)
    if options.pack is not None:
        check_room(source.sizes or (), unit, options.pack)


def check_lengths(options: TrainOptions, source: Source) -> None:
    """Raise ValueError for images among clips that patches of several frames cannot cut."""
    images = (source.lengths or []).count(1)
    if images and options.patch_frames > 1:
        raise ValueError(
            f"{images:,} of {len(source):,} clips have one frame, and a patch of `model` "
            f"{options.model} has {options.patch_frames}; take these away, or choose a `model` "
            "whose patches have one"
        )


def check_left(options: TrainOptions, step: int, last_step: int) -> None:
    """Raise ValueError if a new run begins at its last step, or beyond."""
    if step >= last_step:
        raise ValueError(
            f"`resume` {options.resume} is at step {step}, the last would be {last_step}; raise it"
        )


def load_space(options: TrainOptions, accelerator: Accelerator, source: Source) -> Space:
    """Pixels ↔ latents, on this process's device.

    The autoencoder is not loaded where latents are cached and never decoded.
    """
    if options.latents is not None and options.sample_every is None and options.eval_every is None:
        latents = source.source if isinstance(source, Captioned) else source
        manifest = latents.manifest  # type: ignore[attr-defined]  # theirs are CachedLatents
        return LatentSpace(
            LatentShape(manifest["channels"], manifest["ratio"]), manifest["scale"],
            manifest["shift"],
        )  # fmt: skip
    # One process of each machine fetches it if that is needed
    with accelerator.local_main_process_first():
        return load_vae(options.vae, accelerator.device)


def prepare_judge(options: TrainOptions, accelerator: Accelerator) -> Judge:
    """The Judge that eval_reference and the like ask for. Raises ValueError if none can be."""
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    batch_size = options.global_batch_size // team.world_size // options.grad_accum
    assert options.eval_reference is not None  # TrainOptions wants one with eval_every
    with accelerator.local_main_process_first():
        extractor = load_extractor(
            options.eval_features, accelerator.device, argument="eval_features"
        )
    return load_judge(
        options.eval_reference, extractor, options.image_size, options.eval_samples, batch_size,
        accelerator.device, team, options.num_workers,
    )  # fmt: skip


def build_state(
    options: TrainOptions, space: Space, accelerator: Accelerator, source: Source, fresh: bool
) -> TrainState:
    """A TrainState at step 0, the same in every process, for learning from a source.

    A fresh one starts from init_from; others take up a checkpoint, and need no such weights.
    Raises ValueError if sizes, or init_from, do not fit.
    """
    torch.manual_seed(options.global_seed)
    size = space.shape.size(options.image_size, options.patch_size)
    texts = texts_of(source)
    network = options.sized_network(
        input_size=size, in_channels=space.shape.channels, **options.network_arguments,
        **({} if texts is None else text_arguments(texts, options)),
    )  # fmt: skip
    condition = None if texts is None else TextCondition(texts.null, texts.shares)
    process, note = process_of(network, options.process_said), None
    if options.init_from is not None and fresh:
        weights = load_weights(options.init_from)
        note = note_of_process(weights, network, process, f"`init_from` {options.init_from}")
        network.load_state_dict(initial_tensors(weights, options, network, source.classes))
    network.grad_checkpointing = options.grad_checkpointing
    recipe = Recipe(
        options.lr, options.warmup_steps, options.weight_decay, options.ema_decay,
        options.grad_clip, options.grad_accum, options.mixed_precision == "bf16", options.pack,
        None if options.dynamic is None else Target(options.dynamic, options.max_steps),
    )  # fmt: skip
    if options.fsdp:
        shard = partial(
            shard_network, device_type=accelerator.device.type, processes=accelerator.num_processes
        )
        state = new_state(network, recipe, shard=shard, process=process, condition=condition)
    else:
        network = network.to(accelerator.device)
        wrap = accelerator.prepare_model
        state = new_state(network, recipe, wrap=wrap, process=process, condition=condition)
    state.note = note
    if options.compile:
        for block in state.network.blocks:
            block.compile()
    return state


def texts_of(source: Source) -> Texts | None:
    """What gives the captions of a source's images; None for a source with labels."""
    return source.texts if isinstance(source, Captioned) else None


def text_arguments(texts: Texts, options: TrainOptions) -> dict[str, Any]:
    """What a network is built with to read such Texts. Where encoders outside of a network gave
    them, one that learns a flow is told the noise level as Stable Diffusion 3 is.

    Raises ValueError if encoders give no vector of the whole caption, and the network takes one.
    """
    (width, pooled), known = texts.widths, arguments_of(options.network_class.__name__)
    if width is not None and pooled is None and "pooled_width" in known:
        raise ValueError(
            f"`model` {options.model} takes a vector of each caption, which the encoders of "
            "`text_encoder` do not give; name one that does beside them, such as CLIP's"
        )
    found = {"text_width": width, "pooled_width": pooled, "text_length": texts.length}
    if width is not None and WORDS[options.process] is FlowProcess:
        # So that a run can begin with its weights, and can be exported as such
        found["noise_steps"] = STEPS
    return {name: value for name, value in found.items() if name in known} | {"text": texts.says}


def initial_tensors(
    weights: Weights, options: TrainOptions, network: Network, classes: list[str] | None
) -> Tensors:
    """The tensors of init_from's weights, made to fit a network for data of these classes.

    Raises ValueError if they do not.
    """
    labels: str | dict[int, int] = options.init_labels
    if labels == "keep":
        check_same_classes(options, classes, weights)
    elif labels != "drop":
        labels = read_label_map(options.init_labels, (classes, options.num_classes), weights)
    origin = f"`init_from` {options.init_from}"
    tensors = adapt(weights, network, labels, origin)
    if weights.config is not None:
        outlined(weights.config, weights.tensors, origin)
    return tensors


def check_same_classes(options: TrainOptions, classes: list[str] | None, weights: Weights) -> None:
    """Raise ValueError if weights know their classes, and the data has others."""
    known = weights.classes
    if classes and known and classes != known[: len(classes)]:
        raise ValueError(
            f"`init_from` {options.init_from} knows other classes ({', '.join(known[:5])} ...) "
            f"than the data ({', '.join(classes[:5])} ...); "
            'pass `init_labels="drop"`, or a file that maps them'
        )


def take_up(state: TrainState, checkpoint: Path) -> dict:
    """Load a training checkpoint into the state; what it says of the processes that wrote it.

    Raises ValueError if it is no training checkpoint, or of another process or network.
    """
    contents, origin = read_checkpoint(checkpoint, mmap=True), f"`resume` {checkpoint}"
    check_whole_run(contents, origin)
    try:
        state.check_learned(contents.get("config"))
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    contents["emas"] = {
        decay: clean_names(tensors) for decay, tensors in averages(contents).items()
    }
    for part in ("model", "ema"):
        contents[part] = clean_names(contents[part])
    check_same_size(state.network, contents.get("config"), origin)
    check_design(state.network, contents["model"], origin, contents.get("config"))
    for tensors in (contents["model"], contents["ema"], *contents["emas"].values()):
        check_fits(state.network, tensors, checkpoint)
    if isinstance(contents.get("config"), dict):  # of a version that may be newer
        outlined(contents["config"], contents["model"], origin)
    try:
        state.load_checkpoint(contents)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return contents["rng"] if isinstance(contents.get("rng"), dict) else {}


def check_whole_run(contents: dict, origin: str) -> None:
    """Raise ValueError unless a checkpoint has all parts that a run goes on from.

    The checkpoint must have learned the process that this code trains.
    """
    kinds = {"model": dict, "ema": dict, "opt": dict, "step": int}
    lacking = [key for key, kind in kinds.items() if not isinstance(contents.get(key), kind)]
    if lacking or isinstance(contents["step"], bool) or contents["step"] < 0:
        raise ValueError(
            f"{origin}: its {', '.join(lacking) or 'step'} is no checkpoint's of train.py; "
            "a new run starts from such weights with `init_from`"
        )
    check_process({name: contents.get(name) for name in ("args", "config", "process")}, origin)
    weights = (contents["model"], contents["ema"], *averages(contents).values())
    if not all(map(is_state_dict, weights)):
        raise ValueError(
            f"{origin}: its weights, or an average of them, are no state dict; it is damaged"
        )


def start_tracker(options: TrainOptions, accelerator: Accelerator, folder: Path, step: int) -> None:
    """Start the tracker, or continue its record of the run; entries after `step` are discarded.

    Raises ValueError if it cannot start.
    """
    accelerator.project_configuration.logging_dir = str(folder)
    run = {"id": run_id(folder), "name": folder.name, "resume": "allow", "dir": str(folder)}
    try:
        accelerator.init_trackers(
            "tensorboard" if options.log_with == "tensorboard" else "dit",
            config={name: str(value) for name, value in options.recorded().items()}
            if options.log_with == "wandb"
            else None,
            init_kwargs={"tensorboard": {"purge_step": step + 1}, "wandb": run},
        )
        if accelerator.is_main_process and not accelerator.trackers:
            raise ValueError("accelerate does not find it")
    except Exception as error:  # each tracker raises kinds of its own
        raise ValueError(
            f"`log_with` {options.log_with} cannot start ({error}); "
            "log in to it, or leave the argument out"
        ) from error
