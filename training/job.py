"""All that a run works with, put together from its arguments before anything is written."""

import argparse
from dataclasses import dataclass, fields
from functools import partial
import hashlib
from pathlib import Path

from accelerate import Accelerator
import torch

from checkpoints.files import read_checkpoint
from checkpoints.fitting import adapt, check_design, check_fits, read_label_map
from checkpoints.process_marks import check_process
from checkpoints.weights import averages, clean_names, is_state_dict, load_weights
from data.batches import steps_per_epoch
from data.cache import CachedLatents
from data.images import ImageDataset
from data.listing import check_outside
from data.opening import open_source
from data.options import DataOptions
from evaluation.features import load_extractor
from models import DiT_models
from runtime.limits import check_memory
from runtime.surroundings import Place, check_accelerate, lone_task_note, own_place
from runtime.team import Team, make_accelerator, once
from training.cost import training_flops
from training.flags import check_arguments
from training.folder_lock import FolderLock
from training.run_folder import Data, Start, find_start, new_folder, run_id
from training.run_log import RunLog
from training.scores import Judge, load_judge
from training.sharding import shard_network
from training.state import Recipe, TrainState, Window, new_state
from vae import LatentShape, LatentSpace, Space, load_vae


@dataclass
class Job:
    """All that a run works with; the same in every process, but for the log, which only the main
    one writes.

    `flops` is what training on one image takes.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    state: TrainState
    space: Space
    dataset: ImageDataset | CachedLatents
    last_step: int
    why: str  # the run starts where it does
    folder: Path
    flops: int
    resumed: dict  # what the checkpoint says of the processes that wrote it; empty for none
    judge: Judge | None  # of --eval-every
    log: RunLog


def prepare(args: argparse.Namespace, lock: FolderLock) -> Job:
    """The Job that the arguments ask for.

    Raises ValueError for whatever is wrong with them; then nothing was written.
    """
    check_arguments(args)
    check_accelerate(mixed_precision=args.mixed_precision, grad_accum=args.grad_accum)
    place = own_place()
    accelerator = make_accelerator(
        args.device, mixed_precision="no", log_with=args.log_with, project_dir=args.results_dir
    )
    check_shares(args, place, accelerator.num_processes)
    if args.data_path is not None:
        check_outside(args.data_path, "results_dir", args.results_dir)
    dataset, data = load_data(args, accelerator)
    if Path(args.init_labels).is_file():
        data = data._replace(
            names=f"{data.names} {hashlib.sha256(Path(args.init_labels).read_bytes()).hexdigest()}"
        )
    last_step = args.epochs * steps_per_epoch(len(dataset), args.global_batch_size)
    last_step = min(last_step, args.max_steps or last_step)
    space = load_space(args, accelerator, dataset)
    start: Start = once(accelerator, find_start, args, data, lock)
    state = build_state(args, space, accelerator, dataset.classes, fresh=start.checkpoint is None)
    resumed = take_up(state, start.checkpoint) if start.checkpoint else {}
    judge = prepare_judge(args, accelerator) if args.eval_every else None
    folder = start.folder
    if folder is None:
        if state.step >= last_step:
            raise ValueError(
                f"--resume {args.resume} is at step {state.step}, the last would be {last_step}; raise it"
            )
        folder = once(accelerator, new_folder, args, data, lock, start.checkpoint)
    if start.checkpoint and start.checkpoint.parent.parent != folder:
        state.bad_in_a_row, state.window = 0, Window()  # a new run's own, whatever it begins from
    log = RunLog(folder, accelerator.is_main_process, state.step, last_step)
    if args.log_with:
        start_tracker(args, accelerator, folder, state.step)
    flops = training_flops(state.network.config)
    return Job(
        args, accelerator, state, space, dataset, last_step, start.why, folder, flops, resumed,
        judge, log,
    )  # fmt: skip


def check_shares(args: argparse.Namespace, place: Place, processes: int) -> None:
    """Raise ValueError unless so many processes are what was started, and can share the work."""
    if processes != place.world_size:
        raise ValueError(
            f"WORLD_SIZE tells of {place.world_size} processes and accelerate of {processes}; start them with torchrun, which "
            "sets LOCAL_RANK, MASTER_ADDR and MASTER_PORT too"
        )
    if args.global_batch_size % (processes * args.grad_accum):
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} cannot be shared equally by {processes} process(es) in "
            f"{args.grad_accum} part(s) each; use a multiple of {processes * args.grad_accum}"
        )
    if args.latents is None:
        check_memory(
            args.global_batch_size // processes, args.image_size,
            "`global_batch_size` or `image_size`",
        )  # fmt: skip
    if args.fsdp and processes == 1:
        raise ValueError(
            "--fsdp splits a network over processes and there is one; start several with torchrun"
        )


def load_data(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[ImageDataset | CachedLatents, Data]:
    """(the data set, what tells it from others).

    Raises ValueError if --data-path or --latents do not fit the arguments.
    """
    chosen = {field.name: getattr(args, field.name) for field in fields(DataOptions)}
    source = open_source(DataOptions(**chosen), partial(once, accelerator))
    return source, Data(source.hash, source.sample_hash)  # type: ignore[return-value]


def load_space(
    args: argparse.Namespace, accelerator: Accelerator, dataset: ImageDataset | CachedLatents
) -> Space:
    """Pixels ↔ latents, on this process's device; without the autoencoder where latents are cached
    and never decoded.
    """
    if args.latents is not None and args.sample_every is None and args.eval_every is None:
        manifest = dataset.manifest  # type: ignore[union-attr]  # with --latents it is CachedLatents
        return LatentSpace(
            LatentShape(manifest["channels"], manifest["ratio"]), manifest["scale"],
            manifest["shift"],
        )  # fmt: skip
    # One process of each machine fetches it if that is needed
    with accelerator.local_main_process_first():
        return load_vae(args.vae, accelerator.device)


def prepare_judge(args: argparse.Namespace, accelerator: Accelerator) -> Judge:
    """The Judge that --eval-reference and its like ask for. Raises ValueError if there can be none.
    """
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    batch_size = args.global_batch_size // team.world_size // args.grad_accum
    with accelerator.local_main_process_first():
        extractor = load_extractor(
            args.eval_features, accelerator.device, argument="eval_features"
        )
    return load_judge(
        args.eval_reference, extractor, args.image_size, args.eval_samples, batch_size,
        accelerator.device, team, args.num_workers,
    )  # fmt: skip


def build_state(
    args: argparse.Namespace, space: Space, accelerator: Accelerator, classes: list[str] | None,
    fresh: bool,
) -> TrainState:  # fmt: skip
    """A TrainState at step 0, the same in every process; if it is to stay at that (fresh), from
    --init-from.

    Raises ValueError if sizes, or --init-from, do not fit.
    """
    torch.manual_seed(args.global_seed)
    side = space.shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
    network = DiT_models[args.model](
        input_size=side, in_channels=space.shape.channels, num_classes=args.num_classes,
        block=args.block,
    )  # fmt: skip
    if args.init_from is not None and fresh:
        weights, labels = load_weights(args.init_from), args.init_labels
        if labels not in ("keep", "drop"):
            labels = read_label_map(labels, (classes, args.num_classes), weights)
        elif (
            labels == "keep"
            and classes
            and weights.classes
            and classes != weights.classes[: len(classes)]
        ):
            raise ValueError(
                f"--init-from {args.init_from} knows other classes ({', '.join(weights.classes[:5])} ...) than the data "
                f"({', '.join(classes[:5])} ...); pass --init-labels drop, or a file that maps them"
            )
        network.load_state_dict(adapt(weights, network, labels, f"--init-from {args.init_from}"))
    network.grad_checkpointing = args.grad_checkpointing
    recipe = Recipe(
        args.lr, args.warmup_steps, args.weight_decay, tuple(args.ema_decay), args.grad_clip,
        args.grad_accum, args.mixed_precision == "bf16",
    )  # fmt: skip
    if args.fsdp:
        shard = partial(
            shard_network, device_type=accelerator.device.type, processes=accelerator.num_processes
        )
        state = new_state(network, recipe, shard=shard)
    else:
        state = new_state(network.to(accelerator.device), recipe, wrap=accelerator.prepare_model)
    if args.compile:
        for block in state.network.blocks:
            block.compile()
    return state


def take_up(state: TrainState, checkpoint: Path) -> dict:
    """Load a training checkpoint into the state; what it says of the processes that wrote it.

    Raises ValueError if it is no training checkpoint, or of another network.
    """
    contents = read_checkpoint(checkpoint, mmap=True)
    kinds = {"model": dict, "ema": dict, "opt": dict, "step": int}
    lacking = [key for key, kind in kinds.items() if not isinstance(contents.get(key), kind)]
    if lacking or isinstance(contents["step"], bool) or contents["step"] < 0:
        raise ValueError(
            f"--resume {checkpoint}: its {', '.join(lacking) or 'step'} is no checkpoint's of train.py"
        )
    check_process(
        {name: contents.get(name) for name in ("args", "config", "process")},
        f"--resume {checkpoint}",
    )
    emas = averages(contents)
    if not all(map(is_state_dict, (contents["model"], contents["ema"], *emas.values()))):
        raise ValueError(
            f"--resume {checkpoint}: its weights, or an average of them, are no state dict; it is damaged"
        )
    contents["emas"] = {decay: clean_names(tensors) for decay, tensors in emas.items()}
    for part in ("model", "ema"):
        contents[part] = clean_names(contents[part])
    check_design(state.network, contents["model"], f"--resume {checkpoint}")
    for tensors in (contents["model"], contents["ema"], *contents["emas"].values()):
        check_fits(state.network, tensors, checkpoint)
    try:
        state.load_checkpoint(contents)
    except ValueError as error:
        raise ValueError(f"--resume {checkpoint}: {error}") from None
    return contents["rng"] if isinstance(contents.get("rng"), dict) else {}


def start_tracker(
    args: argparse.Namespace, accelerator: Accelerator, folder: Path, step: int
) -> None:
    """Begin or go on with the tracker's own record of the run; what it holds beyond `step` is
    passed over.

    Raises ValueError if it cannot start.
    """
    accelerator.project_configuration.logging_dir = str(folder)
    run = {"id": run_id(folder), "name": folder.name, "resume": "allow", "dir": str(folder)}
    try:
        accelerator.init_trackers(
            "tensorboard" if args.log_with == "tensorboard" else "dit",
            config={name: str(value) for name, value in vars(args).items()}
            if args.log_with == "wandb"
            else None,
            init_kwargs={"tensorboard": {"purge_step": step + 1}, "wandb": run},
        )
        if accelerator.is_main_process and not accelerator.trackers:
            raise ValueError("accelerate does not find it")
    except Exception as error:  # each tracker raises kinds of its own
        raise ValueError(
            f"--log-with {args.log_with} cannot start ({error}); log in to it, or leave the flag out"
        ) from error


def introduce(job: Job, lock: FolderLock) -> None:
    """Log what is about to be done."""
    args, state, processes = job.args, job.state, job.accelerator.num_processes
    job.log(f"{job.why}; folder {job.folder}")
    for note in (lock.note, lone_task_note(), *job.dataset.notes):
        if note:
            job.log(f"note: {note}")
    job.log(f"arguments: {vars(args)}")
    classes = (
        f" in {len(job.dataset.classes or ())} of {args.num_classes} classes"
        if args.num_classes
        else ""
    )
    size = sum(p.numel() for p in state.network.parameters())
    where = f"{processes} process(es) on {job.accelerator.device.type}"
    job.log(
        f"{args.model}, {args.block}: {size:,} parameters, {len(job.dataset):,} images{classes}, {where}, "
        f"steps {state.step} to {job.last_step}"
    )
    if args.num_classes > len(job.dataset.classes or ()):
        some = f" ({', '.join((job.dataset.classes or [])[:5])}{', …' if len(job.dataset.classes or ()) > 5 else ''})"
        job.log(
            f"note: fewer class folders{some} than --num-classes {args.num_classes}; other labels stay untrained"
        )
    before, device = job.resumed, job.accelerator.device.type
    if before and (before.get("processes"), before.get("device")) != (processes, device):
        same = "the same samples and noise per step, but other rounding"
        job.log(
            f"note: the checkpoint was written by {before.get('processes')} process(es) on {before.get('device')}; "
            f"{same if before.get('device') == device else 'the same samples per step, but other noise'}"
        )
    if args.eval_every and args.eval_every > job.last_step:
        job.log(
            f"note: --eval-every {args.eval_every} is beyond the last step {job.last_step}: nothing will be scored"
        )
    if state.step >= job.last_step:
        job.log(
            f"step {state.step}: the run is at its last step already; raise --epochs or --max-steps to go on"
        )
