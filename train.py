"""Train a DiT on a folder of images, or on latents that extract_latents.py cached.

    python train.py --data-path imagenet/train                               # one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py --data-path imagenet/train          # eight; the global batch stays 256
    torchrun --nproc_per_node=8 train.py --latents imagenet-latents --mixed-precision bf16 --compile --resume auto
    python train.py --data-path digits/train --num-classes 10 --no-flip --model DiT-Ti/1 --image-size 32 \
      --vae examples/digits/vae

Each run gets a folder results/NNN-MODEL with log.txt, metrics.jsonl and checkpoints/SSSSSSS.pt. The same seed gives the
same run on any number of processes and workers, up to float rounding; with --resume auto the same command goes on where a
run stopped, however it stopped. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint first.
"""

from command_line import door, end_at_interrupt, reason, why_lost

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
import hashlib
from pathlib import Path
import signal
import sys
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor
from torchvision.utils import make_grid, save_image

from checkpoints import (
    adapt,
    averages,
    check_design,
    check_fits,
    checkpoint_path,
    clean_names,
    is_state_dict,
    list_checkpoints,
    load_weights,
    prune_checkpoints,
    read_checkpoint,
    read_label_map,
    save_checkpoint,
    write_whole,
)
from data import (
    BadImage, CachedLatents, ImageDataset, LoaderFailed, StepBatches, center_crop_arr, check_outside, explained, list_images,
    make_loader, read, sample_hash, say_waiting, steps_per_epoch, unreadable,
)  # fmt: skip
from devices import tf32
from diffusion import create_diffusion
from features import Team, load_extractor
from limits import check_memory
from models import DiT, DiT_models
from process_marks import check_process
from runs import (
    Data, FolderLock, Meter, RunLog, Start, StopSignals, comparable, disk_space, find_start, has_row, new_folder, run_id,
)  # fmt: skip
from sampling import preview
from scoring import Judge, Stopped, load_judge, score_samples
from surroundings import check_accelerate, lone_task_note, own_place
from training import (
    Recipe, TrainState, Window, draw, new_state, requires_grad, shard_network, train_step, training_flops, unsharded,
    update_ema, warm_up,
)  # fmt: skip
from train_flags import build_parser, check_arguments
from vae import LatentShape, LatentSpace, Space, from_uint8, load_vae, vae_hashes

# main, and what others import from here
__all__ = ["center_crop_arr", "main", "requires_grad", "update_ema"]

METRICS = ("loss", "mse", "vb", "gradient_norm")  # of a log line; metrics.jsonl has more
STOP_PATIENCE = 15  # seconds for which several processes, told to stop, still wait for a batch of one of them
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # others wait this long while one downloads a VAE or writes a checkpoint


def once(accelerator: Accelerator, function: Callable, *args: Any) -> Any:
    """What function(*args) returns in the main process, in every process; its ValueError is raised in every process."""
    result: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            result = [function(*args)]
        except ValueError as error:
            result = [error]
        except OSError as error:
            result = [ValueError(f"{reason(error)}; look whether it exists, may be written, and has room")]
    answer = broadcast_object_list(result)[0]
    if isinstance(answer, ValueError):
        raise answer
    return answer


@dataclass
class Job:
    """All that a run works with; the same in every process, but for the log, which only the main one writes.

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


@door("--global-batch-size, or raise --grad-accum")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    args = parser.parse_args(argv)
    with FolderLock() as lock, tf32(args.tf32):
        with parser.refusing():
            job = prepare(args, lock)
        introduce(job, lock)
        try:
            with StopSignals() as signals:
                train(job, signals)
        except (LoaderFailed, RuntimeError) as error:  # torch tells of a lost worker wherever the program is
            failure = explained(error) if type(error) is RuntimeError else error
            if not isinstance(failure, LoaderFailed):
                first = (str(error).splitlines() or [""])[0]
                job.log(f"stopped after step {job.state.step} by an error: {why_lost(error) or first}")
                raise
            leave(job, f"{failure}; --resume auto goes on from the last checkpoint")
        except KeyboardInterrupt:
            job.log(
                f"interrupted after step {job.state.step}, not saved; --resume auto goes on from the last checkpoint"
            )
            sys.exit(128 + signal.SIGINT)
        finally:
            job.log.close()
        job.accelerator.end_training()
        if signals.received == signal.SIGINT:
            sys.exit(128 + signal.SIGINT)


def prepare(args: argparse.Namespace, lock: FolderLock) -> Job:
    """The Job that the arguments ask for. Raises ValueError for whatever is wrong with them; then nothing was written."""
    check_arguments(args)
    check_accelerate(mixed_precision=args.mixed_precision, grad_accum=args.grad_accum)
    place = own_place()
    no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(  # which, left to find out itself, makes of torchrun's processes without a GPU runs of their own
        cpu=args.device == "cpu" or no_gpu, mixed_precision="no", log_with=args.log_with, project_dir=args.results_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )  # fmt: skip
    processes = accelerator.num_processes
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
        check_memory(args.global_batch_size // processes, args.image_size, "--global-batch-size or --image-size")
    if args.fsdp and processes == 1:
        raise ValueError("--fsdp splits a network over processes and there is one; start several with torchrun")
    if args.data_path is not None:
        check_outside(args.data_path, "--results-dir", args.results_dir)
    dataset, data = load_data(args, accelerator)
    if Path(args.init_labels).is_file():
        data = data._replace(names=f"{data.names} {hashlib.sha256(Path(args.init_labels).read_bytes()).hexdigest()}")
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
            raise ValueError(f"--resume {args.resume} is at step {state.step}, the last would be {last_step}; raise it")
        folder = once(accelerator, new_folder, args, data, lock, start.checkpoint)
    if start.checkpoint and start.checkpoint.parent.parent != folder:
        state.bad_in_a_row, state.window = 0, Window()  # a new run's own, whatever it begins from
    log = RunLog(folder, accelerator.is_main_process, state.step, last_step)
    if args.log_with:
        start_tracker(args, accelerator, folder, state.step)
    flops = training_flops(state.network.config)
    return Job(args, accelerator, state, space, dataset, last_step, start.why, folder, flops, resumed, judge, log)


def load_data(args: argparse.Namespace, accelerator: Accelerator) -> tuple[ImageDataset | CachedLatents, Data]:
    """(the data set, what tells it from others). Raises ValueError if --data-path or --latents do not fit the arguments."""
    listing = once(accelerator, list_images, args.data_path, args.num_classes) if args.data_path is not None else None
    if args.latents is None:
        assert listing is not None  # check_arguments refuses a run without either
        data = Data(listing.hash(args.data_path), once(accelerator, sample_hash, listing.paths))
        return ImageDataset(listing, args.image_size, args.skip_bad_images), data
    cached = CachedLatents(args.latents)
    manifest, wrong = cached.manifest, []
    if args.image_size != manifest["image_size"]:
        wrong.append(f"--image-size is {args.image_size}, the latents' {manifest['image_size']}")
    same_place = comparable("vae", args.vae) == comparable("vae", manifest["vae"])
    if not same_place and (not manifest["vae_sha256"] or vae_hashes(args.vae) != manifest["vae_sha256"]):
        wrong.append(f"--vae is {args.vae}, the latents' {manifest['vae']}")
    if args.num_classes and cached.classes is None:
        wrong.append(f"--num-classes is {args.num_classes}, the latents were made without classes (--num-classes 0)")
    if args.flip and not cached.manifest["flip"]:
        wrong.append("--flip is on, the latents have no mirrored images (--no-flip)")
    if len(cached.classes or ()) > args.num_classes > 0:
        wrong.append(f"--num-classes is {args.num_classes}, the latents have {len(cached.classes)} classes")
    if listing and listing.hash(args.data_path) != cached.manifest["files_sha256"]:
        wrong.append(f"--data-path {args.data_path} holds other files than the latents were made from")
    if wrong:
        raise ValueError(f"--latents {args.latents} do not fit: {'; '.join(wrong)}")
    return cached, Data(cached.hash)


def load_space(args: argparse.Namespace, accelerator: Accelerator, dataset: ImageDataset | CachedLatents) -> Space:
    """Pixels ↔ latents, on this process's device; without the autoencoder where latents are cached and never decoded."""
    if args.latents is not None and args.sample_every is None and args.eval_every is None:
        manifest = dataset.manifest  # type: ignore[union-attr]  # with --latents it is CachedLatents
        return LatentSpace(LatentShape(manifest["channels"], manifest["ratio"]), manifest["scale"], manifest["shift"])
    with accelerator.local_main_process_first():  # one process of each machine fetches it if that is needed
        return load_vae(args.vae, accelerator.device)


def prepare_judge(args: argparse.Namespace, accelerator: Accelerator) -> Judge:
    """The Judge that --eval-reference and its like ask for. Raises ValueError if there can be none."""
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    batch_size = args.global_batch_size // team.world_size // args.grad_accum
    try:
        with accelerator.local_main_process_first():
            extractor = load_extractor(args.eval_features, accelerator.device)
        return load_judge(
            args.eval_reference, extractor, args.image_size, args.eval_samples, batch_size, accelerator.device, team,
            args.num_workers,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(str(error).replace("--features", "--eval-features")) from None


def build_state(
    args: argparse.Namespace, space: Space, accelerator: Accelerator, classes: list[str] | None, fresh: bool
) -> TrainState:
    """A TrainState at step 0, the same in every process; if it is to stay at that (fresh), from --init-from.

    Raises ValueError if sizes, or --init-from, do not fit.
    """
    torch.manual_seed(args.global_seed)
    side = space.shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
    network = DiT_models[args.model](
        input_size=side, in_channels=space.shape.channels, num_classes=args.num_classes, block=args.block
    )
    if args.init_from is not None and fresh:
        weights, labels = load_weights(args.init_from), args.init_labels
        if labels not in ("keep", "drop"):
            labels = read_label_map(labels, (classes, args.num_classes), weights)
        elif labels == "keep" and classes and weights.classes and classes != weights.classes[: len(classes)]:
            raise ValueError(
                f"--init-from {args.init_from} knows other classes ({', '.join(weights.classes[:5])} ...) than the data "
                f"({', '.join(classes[:5])} ...); pass --init-labels drop, or a file that maps them"
            )
        network.load_state_dict(adapt(weights, network, labels, f"--init-from {args.init_from}"))
    network.grad_checkpointing = args.grad_checkpointing
    recipe = Recipe(
        args.lr, args.warmup_steps, args.weight_decay, tuple(args.ema_decay), args.grad_clip, args.grad_accum,
        args.mixed_precision == "bf16",
    )  # fmt: skip
    if args.fsdp:
        shard = partial(shard_network, device_type=accelerator.device.type, processes=accelerator.num_processes)
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
        raise ValueError(f"--resume {checkpoint}: its {', '.join(lacking) or 'step'} is no checkpoint's of train.py")
    check_process({name: contents.get(name) for name in ("args", "config", "process")}, f"--resume {checkpoint}")
    emas = averages(contents)
    if not all(map(is_state_dict, (contents["model"], contents["ema"], *emas.values()))):
        raise ValueError(f"--resume {checkpoint}: its weights, or an average of them, are no state dict; it is damaged")
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


def start_tracker(args: argparse.Namespace, accelerator: Accelerator, folder: Path, step: int) -> None:
    """Begin or go on with the tracker's own record of the run; what it holds beyond `step` is passed over.

    Raises ValueError if it cannot start.
    """
    accelerator.project_configuration.logging_dir = str(folder)
    run = {"id": run_id(folder), "name": folder.name, "resume": "allow", "dir": str(folder)}
    try:
        accelerator.init_trackers(
            "tensorboard" if args.log_with == "tensorboard" else "dit",
            config={name: str(value) for name, value in vars(args).items()} if args.log_with == "wandb" else None,
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
    classes = f" in {len(job.dataset.classes or ())} of {args.num_classes} classes" if args.num_classes else ""
    size = sum(p.numel() for p in state.network.parameters())
    where = f"{processes} process(es) on {job.accelerator.device.type}"
    job.log(
        f"{args.model}, {args.block}: {size:,} parameters, {len(job.dataset):,} images{classes}, {where}, "
        f"steps {state.step} to {job.last_step}"
    )
    if args.num_classes > len(job.dataset.classes or ()):
        some = f" ({', '.join((job.dataset.classes or [])[:5])}{', …' if len(job.dataset.classes or ()) > 5 else ''})"
        job.log(f"note: fewer class folders{some} than --num-classes {args.num_classes}; other labels stay untrained")
    before, device = job.resumed, job.accelerator.device.type
    if before and (before.get("processes"), before.get("device")) != (processes, device):
        same = "the same samples and noise per step, but other rounding"
        job.log(
            f"note: the checkpoint was written by {before.get('processes')} process(es) on {before.get('device')}; "
            f"{same if before.get('device') == device else 'the same samples per step, but other noise'}"
        )
    if args.eval_every and args.eval_every > job.last_step:
        job.log(f"note: --eval-every {args.eval_every} is beyond the last step {job.last_step}: nothing will be scored")
    if state.step >= job.last_step:
        job.log(f"step {state.step}: the run is at its last step already; raise --epochs or --max-steps to go on")


def train(job: Job, signals: StopSignals) -> None:
    """The loop, from state.step to last_step: steps, log lines, checkpoints, previews."""
    args, accelerator, state, log = job.args, job.accelerator, job.state, job.log
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    diffusion = create_diffusion(timestep_respacing="")
    drawn = dict(
        latent=(job.space.shape.channels, state.network.input_size, state.network.input_size),
        dropout_prob=state.network.config["class_dropout_prob"], num_timesteps=diffusion.num_timesteps, device=device,
        rank=rank, world_size=world,
    )  # fmt: skip
    batches = StepBatches(
        len(job.dataset), args.global_batch_size, args.global_seed, state.step, job.last_step, rank, world, args.flip
    )
    skipped, meter = Skipped(log), Meter()
    reduce = partial(accelerator.reduce, reduction="sum")
    if world > 1:
        share = args.global_batch_size // world // args.grad_accum
        warm_up(state, diffusion, torch.zeros(share, *drawn["latent"], device=device))
    if evaluation_due(job) and not once(accelerator, has_row, job.folder, state.step, "eval_samples"):
        with meter.paused():
            if not save_scores(job, signals):  # for which the run was stopped the last time
                return log("stopped while scoring; nothing is lost")
    loader = make_loader(job.dataset, batches, args.num_workers, pin_memory=device.type == "cuda")
    with closing(read(loader, partial(wait_on, job, signals))) as loaded:
        for batch, labels, bad in loaded:
            check_readable(job, batch, bad)
            skipped.here.update(bad)
            batch, labels = (x.to(device, non_blocking=True) for x in (batch, labels))
            draws = draw(args.global_seed, state.step, args.global_batch_size, **drawn)
            latents = to_latents(job.space, batch, draws.vae_noise)  # (n, C, h, w)
            old = args.ckpt_minutes is not None and time.monotonic() - meter.saved > 60 * args.ckpt_minutes
            report = train_step(state, diffusion, latents, labels, draws, reduce, bool(signals.received), old)
            meter.steps += 1
            log.bar.update()
            if report["bad"]:
                guard(job, batches.indices(state.step - 1))
            with meter.paused():
                stop = keep_records(job, report, signals, meter, skipped)
            if stop:
                name = signals.received.name if signals.received else "a signal to another process"
                return log(f"stopped by {name} after step {state.step}; the same command with --resume auto goes on from there")
    conclude(job)


def wait_on(job: Job, signals: StopSignals, seconds: float) -> None:
    """Say now and then that a batch has not come for so long; leave the program if it was told to stop meanwhile."""
    alone = job.accelerator.num_processes == 1
    if signals.received and (alone or seconds > STOP_PATIENCE):
        if alone:
            save(job, must=True)
        kept = f"saved at step {job.state.step}" if alone else "not saved"
        leave(job, f"stopped by {signals.received.name} while waiting for images, {kept}; --resume auto goes on from there")
    say_waiting(seconds, job.log)


def leave(job: Job, message: str) -> None:
    """Leave the program with a message, which the log has too."""
    job.log(message)
    sys.exit(f"train.py: error: {message}")


def conclude(job: Job) -> None:
    """Say that the run is done; leave the program with an error if its last steps, or its weights, are not finite."""
    state = job.state
    if is_sound(job):
        return job.log("done")
    why = f"its last {state.bad_in_a_row} step(s) were skipped" if state.bad_in_a_row else "it has weights that are not finite"
    leave(
        job,
        f"the run ended badly: {why}, loss or gradient not being finite. Look at log.txt, and begin a new run with --resume "
        "CHECKPOINT, an earlier one, and a lower --lr or a --grad-clip",
    )


def is_sound(job: Job) -> bool:
    """Whether the last step was good, and weights and averages are finite in every process, each of which calls this."""
    bad = torch.tensor(float(not job.state.is_finite()), device=job.accelerator.device)
    return not job.state.bad_in_a_row and not job.accelerator.reduce(bad, reduction="sum") > 0


def keep_records(job: Job, report: dict[str, float], signals: StopSignals, meter: Meter, skipped: "Skipped") -> bool:
    """What is due after a step with this report: log line, checkpoint, preview, scores. Whether to stop then."""
    args, step = job.args, job.state.step
    stop, last = bool(report["stop"]), step == job.last_step
    if step % args.log_every == 0 or last:
        log_window(job, meter)
        if args.skip_bad_images:
            skipped.report()
    saving = stop or report["save"] or last or step % args.ckpt_every == 0
    if saving:
        save(job, must=stop or last)
        meter.saved = time.monotonic()
    if args.sample_every and step % args.sample_every == 0:
        save_preview(job)
    if not stop and evaluation_due(job) and not save_scores(job, signals):
        stop = True
        if not saving:
            save(job, must=True)
    return stop


def check_readable(job: Job, batch: Tensor | None, bad: list[BadImage]) -> None:
    """Leave the program, naming the file, if an image could not be read and none may stand in for it."""
    if batch is None or (bad and not job.args.skip_bad_images):
        leave(job, unreadable(bad, job.args.skip_bad_images))


def to_latents(space: Space, batch: Tensor, noise: Tensor) -> Tensor:
    """Scaled latents (n, C, h, w), drawn with noise, from images uint8 (n, 3, S, S) or moments (n, 2, C, h, w)."""
    if batch.dtype == torch.uint8:
        return space.encode(from_uint8(batch), noise)
    assert isinstance(space, LatentSpace)  # check_arguments refuses pixels with --latents
    mean, std = batch.float().unbind(dim=1)
    return space.draw(mean, std, noise)


def guard(job: Job, indices: np.ndarray) -> None:
    """Log a step that was skipped, with its samples; leave the program, saving nothing, after --max-bad-steps in a row."""
    state = job.state
    job.log(
        f"step {state.step:07d}: loss or gradient is not finite, step skipped ({state.bad_in_a_row} in a row, "
        f"{state.bad_steps} in all); samples {indices.tolist()}"
    )
    if state.bad_in_a_row >= job.args.max_bad_steps:
        job.log(
            f"stopped after {state.bad_in_a_row} such steps in a row, no checkpoint saved: look at these samples, or begin "
            f"a new run with --resume {job.folder} and a lower --lr or a --grad-clip"
        )
        sys.exit(1)


def log_window(job: Job, meter: Meter) -> None:
    """Write the means over the window since the last log line, and begin a new one."""
    args, state = job.args, job.state
    means = state.window.means(args.global_batch_size)
    row = {
        "step": state.step,
        **means,
        "learning_rate": state.recipe.rate(state.step - 1),
        "bad_steps": state.bad_steps,
    }
    images = meter.steps_per_second() * args.global_batch_size
    rates = {"images_per_second": images, "model_flops_per_second": images * job.flops}
    job.log.row(row | rates | {"time": time.time()})
    track(job, row | rates)
    metrics = ", ".join(f"{name.replace('_', ' ')} {as_text(means[name])}" for name in METRICS)
    job.log(f"step {state.step:07d} of {job.last_step}: {metrics}, {images:.1f} images/s")
    state.window = Window()


def track(job: Job, values: dict[str, float | None]) -> None:
    """Send what values there are, but the step, to the tracker, if there is one."""
    if job.args.log_with:
        known = {name: value for name, value in values.items() if value is not None and name != "step"}
        try:
            job.accelerator.log(known, step=job.state.step)
        except OSError as error:
            job.log(f"--log-with {job.args.log_with} did not take the metrics ({error.strerror})")


def show(job: Job, images: Tensor) -> None:
    """Send preview images uint8 (N, 3, H, W) to the tracker, if there is one; in the main process."""
    for tracker in job.accelerator.trackers:
        tensors = images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"previews": tensors}, step=job.state.step, **layout)


def as_text(value: float | None) -> str:
    """A number with four digits, or that there is none: every step of the window was skipped."""
    return "none" if value is None else f"{value:.4f}"


class Skipped:
    """The unreadable images that were skipped: those met `here`, by this process, and those reported so far, by any."""

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self.here: set[BadImage] = set()
        self.reported: set[BadImage] = set()

    def report(self) -> None:
        """Log those that are new since the last report, counted, from all processes, each of which calls this."""
        for path, why in sorted(set(gather_object(list(self.here))) - self.reported):
            self.reported.add(BadImage(path, why))
            self.log(f"skipped unreadable image {path} ({why}), {len(self.reported)} so far")
        self.here.clear()


def save(job: Job, must: bool) -> None:
    """Write the checkpoint of the current step, in the main process, while the others wait.

    Where that fails, leave the program or go on, as --on-save-error says; leave it if the run `must` have this one.
    """
    args, accelerator, folder = job.args, job.accelerator, job.folder
    contents: dict = {}
    failure = None
    sound = is_sound(job)
    if accelerator.is_main_process or args.fsdp:
        keep = accelerator.is_main_process
        contents = job.state.to_checkpoint(vars(args), job.dataset.classes, accelerator.num_processes, keep)
    if accelerator.is_main_process:
        path = checkpoint_path(folder, job.state.step)
        try:
            job.log.sync()
            save_checkpoint(path, contents)
            job.log(f"saved {path}")
        except (OSError, RuntimeError) as error:
            failure = f"{path} was not written ({getattr(error, 'strerror', None) or error}; {disk_space(folder)})"
    failure = broadcast_object_list([failure])[0]
    if failure:
        good = [str(path) for path in list_checkpoints(folder)[-1:]] or ["none"]
        stopping = must or args.on_save_error == "stop"
        then = "stopping; make room, and --resume auto goes on from there" if stopping else "going on without"
        job.log(f"{failure}; the last good checkpoint is {good[0]}; {then}")
        if stopping:
            sys.exit(1)
    elif args.keep_last and not sound:
        job.log("note: the last step or the weights are not finite, so no older checkpoint was deleted")
    elif args.keep_last and accelerator.is_main_process:
        try:
            prune_checkpoints(folder, args.keep_last)
        except OSError as error:
            job.log(f"could not delete {error.filename} ({error.strerror})")


def whole_average(job: Job) -> DiT:
    """The network with the main average's weights, whole in every process."""
    state = job.state
    if not job.args.fsdp:
        return state.ema
    tensors = unsharded(state.ema.state_dict())
    network = DiT(**state.network.config).to(job.accelerator.device).eval().requires_grad_(False)
    network.load_state_dict(tensors)
    return network


def evaluation_due(job: Job) -> bool:
    """Whether scores are to be taken at this step."""
    return job.judge is not None and job.state.step > 0 and job.state.step % job.args.eval_every == 0


def save_scores(job: Job, signals: StopSignals) -> bool:
    """Score samples of the main average and write the scores to log, metrics and tracker.

    False if a signal in any process broke it off: then the next start takes them.
    """
    args, accelerator, step, began = job.args, job.accelerator, job.state.step, time.monotonic()

    def any_process(flag=None):
        flag = torch.as_tensor(signals.received is not None if flag is None else flag, device=accelerator.device)
        return bool(accelerator.reduce(flag.float(), reduction="sum") > 0)

    assert job.judge is not None  # evaluation_due looks at that
    try:
        network = whole_average(job)
        scores, notes = score_samples(job.judge, network, job.space, args.global_seed, accelerator.device, any_process)
    except Stopped:
        return False
    except ValueError as error:
        scores = None
        job.log(f"step {step:07d}: not scored ({error})")
    if scores:
        row = {f"eval_{name}": value for name, value in scores.items()} | {"eval_samples": args.eval_samples}
        against = {"eval_reference": args.eval_reference, "eval_features": args.eval_features}
        job.log.row({"step": step} | row | against | {"time": time.time()})
        track(job, row)
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items() if value is not None)
        job.log(f"step {step:07d}: {told}; {args.eval_samples} samples, {time.monotonic() - began:.0f} s")
        for note in (notes or []) if step == args.eval_every else []:
            job.log(f"note: {note}")
    accelerator.wait_for_everyone()
    return True


def save_preview(job: Job) -> None:
    """Write previews/SSSSSSS.png from the main average, for noise and labels that are the same each time."""
    state, network = job.state, whole_average(job)
    if job.accelerator.is_main_process:
        path = job.folder / "previews" / f"{state.step:07d}.png"
        try:
            images = preview(network, job.space, job.args.global_seed, job.accelerator.device).permute(0, 3, 1, 2)
            grid = make_grid(images.cpu().float() / 255, nrow=4)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, lambda temporary: save_image(grid, temporary, format="png"))
            show(job, images)
        except ValueError as error:
            job.log(f"{path} was not written ({error})")
        except OSError as error:
            job.log(f"{path} was not written ({error.strerror}; {disk_space(job.folder)}); going on without")
    job.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
