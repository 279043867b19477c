"""Train a DiT on a folder of images.

    python train.py --data-path imagenet/train                               # one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py --data-path imagenet/train          # eight; the global batch stays 256
    python train.py --data-path digits/train --num-classes 10 --model DiT-Ti/1 --image-size 32 --vae examples/digits/vae --no-flip

Each run gets a folder results/NNN-MODEL with log.txt and checkpoints/SSSSSSS.pt. The same seed gives the same run on
any number of processes and workers, up to float rounding.
"""

import argparse
from pathlib import Path
import sys
import time
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from checkpoints import (
    check_fits,
    checkpoint_path,
    clean_names,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from data import ImageDataset, StepBatches, center_crop_arr, list_images, make_loader, steps_per_epoch
from diffusion import create_diffusion
from models import DiT_models
from training import METRICS, draw, new_state, requires_grad, train_step, update_ema
from vae import from_uint8, latent_shape, load_vae

# main, and what others import from here
__all__ = ["center_crop_arr", "main", "requires_grad", "update_ema"]

# Arguments that decide what a run learns; --resume auto takes up a run whose own are equal.
DECIDING = (
    "data_path", "model", "image_size", "num_classes", "global_batch_size", "global_seed", "vae", "lr", "ema_decay",
    "mixed_precision", "flip", "skip_bad_images",
)  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_learning_flags(parser)
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_learning_flags(parser):
    """The flags that decide what is learnt."""
    data = parser.add_argument_group("data").add_argument
    data("--data-path", required=True, help="folder with one folder of images per class")
    data("--image-size", type=int, default=256, help="pixels along each side, after the crop (default: %(default)s)")
    data("--num-classes", type=int, default=1000, help="0: none, all images below --data-path (default: %(default)s)")
    data("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images (default: on)")
    skipping = "put the next image in place of an unreadable one and list it, instead of stopping"
    data("--skip-bad-images", action="store_true", help=skipping)
    network = parser.add_argument_group("network").add_argument
    names = ", ".join(DiT_models)
    network("--model", choices=DiT_models, default="DiT-XL/2", metavar="MODEL", help=f"{names} (default: %(default)s)")
    network(
        "--vae", default="ema", help="ema, mse, a hub id, a local folder, or none for pixels (default: %(default)s)"
    )
    recipe = parser.add_argument_group("recipe").add_argument
    recipe("--epochs", type=int, default=1400, help="passes over the data (default: %(default)s)")
    recipe("--max-steps", type=int, help="stop after this many steps, if that comes before --epochs")
    recipe("--global-batch-size", type=int, default=256, help="samples per step, all processes (default: %(default)s)")
    recipe("--lr", type=float, default=1e-4, help="AdamW's constant learning rate (default: %(default)s)")
    recipe("--ema-decay", type=float, default=0.9999, help="of the weights' moving average (default: %(default)s)")
    recipe("--global-seed", type=int, default=0, help="decides every random number (default: %(default)s)")
    bf16 = "bf16: autocast, with float32 weights and losses (default: %(default)s)"
    recipe("--mixed-precision", choices=["no", "bf16"], default="no", help=bf16)


def add_run_flags(group):
    """The flags that decide how and where it is done."""
    add = group.add_argument
    add("--results-dir", default="results", help="where run folders are made (default: %(default)s)")
    resuming = "auto: the newest run with equal arguments, else a new one; or a checkpoint or run folder"
    add("--resume", metavar="{auto,PATH}", help=resuming)
    add("--log-every", type=int, default=100, help="steps between log lines (default: %(default)s)")
    saving = "steps between checkpoints; the last step always is one (default: %(default)s)"
    add("--ckpt-every", type=int, default=50000, help=saving)
    add("--num-workers", type=int, default=4, help="loader processes per training process (default: %(default)s)")
    add("--device", choices=["cpu", "cuda", "mps"], help="default: the GPU if there is one")


def check_arguments(args):
    """Raise ValueError for numbers out of range and sizes that do not fit, before anything is loaded."""
    for name in ("image_size", "epochs", "max_steps", "global_batch_size", "log_every", "ckpt_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    for name in ("num_classes", "num_workers", "global_seed"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 0")
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr is {args.lr}; it must be a number above 0")
    if args.global_seed >= 2**63:
        raise ValueError(f"--global-seed is {args.global_seed}; it must be below 2**63")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema-decay is {args.ema_decay}; it must be at least 0 and below 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; leave the flag out or pass --device cpu")
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch sees no Apple GPU here; leave the flag out or pass --device cpu")
    patch_size = DiT_models[args.model].keywords["patch_size"]
    latent_shape(args.vae).side(args.image_size, patch_size)


def once(accelerator, function, *args):
    """What function(*args) returns in the main process, in every process; its ValueError is raised in every process."""
    result = [None]
    if accelerator.is_main_process:
        try:
            result = [function(*args)]
        except ValueError as error:
            result = [error]
        except OSError as error:
            result = [ValueError(f"{error.filename or ''}: {error.strerror}; check that it exists and is allowed")]
    result = broadcast_object_list(result)[0]
    if isinstance(result, ValueError):
        raise result
    return result


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
        if args.global_batch_size % accelerator.num_processes:
            raise ValueError(
                f"--global-batch-size {args.global_batch_size} cannot be shared equally by {accelerator.num_processes} "
                "processes; use a multiple"
            )
        listing = once(accelerator, list_images, args.data_path, args.num_classes)
        last_step = args.epochs * steps_per_epoch(len(listing.paths), args.global_batch_size)
        last_step = min(last_step, args.max_steps or last_step)
        space = load_vae_in_turn(accelerator, args.vae)
        state = build_state(args, space, accelerator)
        source = once(accelerator, find_checkpoint, args)
        if source.checkpoint:
            take_up(state, source.checkpoint)
        folder = Path(once(accelerator, open_run_folder, args, source))
        log = RunLog(folder, accelerator.is_main_process, state.step, last_step)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    log(f"{source.why}; folder {folder}")
    log(f"arguments: {vars(args)}")
    classes = f" in {len(listing.classes)} of {args.num_classes} classes" if args.num_classes else ""
    described = (
        f"{sum(p.numel() for p in state.network.parameters()):,} parameters, {len(listing.paths):,} images{classes}"
    )
    log(
        f"{args.model}: {described}, {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"steps {state.step} to {last_step}"
    )
    if len(listing.classes or ()) < args.num_classes:
        log("note: there are fewer class folders than --num-classes; labels without a folder stay untrained")
    if state.step >= last_step:
        log(f"step {state.step}: the run is at its last step already; raise --epochs or --max-steps to go on")
    try:
        train(args, accelerator, state, space, listing, last_step, folder, log)
    except KeyboardInterrupt:
        log(
            f"interrupted after step {state.step}; what is saved is in {folder / 'checkpoints'}, go on with --resume auto"
        )
        sys.exit(130)
    log("done")
    log.close()
    accelerator.end_training()


def load_vae_in_turn(accelerator, name):
    """The VAE on this process's device; one process of each machine fetches it if that is needed."""
    with accelerator.local_main_process_first():
        return load_vae(name, accelerator.device)


def build_state(args, space, accelerator):
    """A TrainState at step 0, the same in every process."""
    torch.manual_seed(args.global_seed)
    patch_size = DiT_models[args.model].keywords["patch_size"]
    side = space.shape.side(args.image_size, patch_size)
    network = DiT_models[args.model](input_size=side, in_channels=space.shape.channels, num_classes=args.num_classes)
    return new_state(network.to(accelerator.device), accelerator.prepare_model, args.lr)


class Source(NamedTuple):
    """Where a run starts: the checkpoint to take up and the run folder to go on in, None for new ones, and why."""

    why: str
    checkpoint: Path | None = None
    folder: Path | None = None


def find_checkpoint(args):
    """The Source that --resume asks for. Raises ValueError if a path is given that leads to no checkpoint."""
    if args.resume is None:
        return Source("a new run")
    if args.resume == "auto":
        return newest_equal_run(args)
    path = Path(args.resume).absolute()
    checkpoint = newest_checkpoint(path) if path.is_dir() else path
    if not checkpoint.is_file():
        raise ValueError(f"--resume {args.resume}: there is no such checkpoint; give a .pt file, a run folder, or auto")
    folder = checkpoint.parent.parent
    if list_checkpoints(folder)[-1:] != [checkpoint]:
        return Source(f"a new run from {checkpoint}, which is not the newest of a run folder", checkpoint)
    others = different_arguments(args, read_checkpoint(checkpoint))
    if others:
        return Source(f"a new run from {checkpoint}, which was made with other {others}", checkpoint)
    return Source(f"going on from {checkpoint}", checkpoint, folder)


def newest_equal_run(args):
    """The newest run in --results-dir with equal deciding arguments and a checkpoint that can be read, else a new run."""
    seen = []
    for _, folder in sorted(run_folders(args.results_dir), reverse=True):
        if not list_checkpoints(folder):
            seen.append(f"{folder.name} has no checkpoint")
            continue
        checkpoint = newest_checkpoint(folder)
        try:
            others = different_arguments(args, read_checkpoint(checkpoint))
        except ValueError as error:
            seen.append(str(error))
            continue
        if not others:
            return Source(f"going on from {checkpoint}", checkpoint, folder)
        seen.append(f"{folder.name} has other {others}")
    return Source(
        f"a new run: no run in {args.results_dir} has equal arguments ({'; '.join(seen[:3]) or 'there is none'})"
    )


def different_arguments(args, contents):
    """The flags among DECIDING, comma-separated, in which a checkpoint's run differs from this one; "" if none does."""
    theirs = contents.get("args")
    if not isinstance(theirs, dict):
        return "arguments, which this train.py did not write"

    def comparable(name, value):
        is_path = name in ("data_path", "vae") and value is not None and Path(value).is_dir()
        return str(Path(value).resolve()) if is_path else value

    same = {name: comparable(name, theirs.get(name)) == comparable(name, getattr(args, name)) for name in DECIDING}
    return ", ".join(f"--{name.replace('_', '-')}" for name in DECIDING if not same[name])


def take_up(state, checkpoint):
    """Load a training checkpoint into the state. Raises ValueError if it is none, or of another network."""
    contents = read_checkpoint(checkpoint)
    kinds = {"model": dict, "ema": dict, "opt": dict, "step": int}
    lacking = [key for key, kind in kinds.items() if not isinstance(contents.get(key), kind)]
    if lacking or contents["step"] < 0:
        raise ValueError(f"--resume {checkpoint}: its {', '.join(lacking) or 'step'} is no checkpoint's of train.py")
    for part in ("model", "ema"):
        contents[part] = clean_names(contents[part])
        check_fits(state.network, contents[part], checkpoint)
    try:
        state.load_checkpoint(contents)
    except ValueError as error:
        raise ValueError(f"--resume {checkpoint}: {error}") from None


def run_folders(results_dir):
    """(number, folder) for each folder in results_dir that is named as runs are."""
    folders = [p for p in Path(results_dir).glob("*-*") if p.is_dir() and p.name.split("-")[0].isdecimal()]
    return [(int(p.name.split("-")[0]), p) for p in folders]


def open_run_folder(args, source):
    """The run's folder with its checkpoints folder: that of the run that goes on, else a new one, numbered from 000."""
    if source.folder:
        return source.folder
    number = max((number for number, _ in run_folders(args.results_dir)), default=-1) + 1
    while True:
        folder = Path(args.results_dir) / f"{number:03d}-{args.model.replace('/', '-')}"
        try:
            folder.mkdir(parents=True)
            (folder / "checkpoints").mkdir()
            return folder
        except FileExistsError:  # another run that starts just now has taken it
            number += 1
        except OSError as error:
            raise ValueError(
                f"cannot make the run folder {folder} ({error.strerror}); choose another --results-dir"
            ) from None


class RunLog:
    """Lines for log.txt and the console, and a progress bar where the console is a terminal. Main process only."""

    def __init__(self, folder, is_main, step, last_step):
        self.file = open(folder / "log.txt", "a", buffering=1, encoding="utf-8") if is_main else None
        self.bar = tqdm(total=last_step, initial=step, unit="step", disable=None if is_main else True)

    def __call__(self, line):
        if self.file:
            line = line.encode(errors="backslashreplace").decode()  # names of files may be no valid text
            stamped = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}"
            self.file.write(stamped + "\n")
            self.bar.write(stamped, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()


def train(args, accelerator, state, space, listing, last_step, folder, log):
    """The loop, from state.step to last_step: steps, log lines, checkpoints."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    diffusion = create_diffusion(timestep_respacing="")
    latent = (space.shape.channels, state.network.input_size, state.network.input_size)
    dropout = state.network.config["class_dropout_prob"]
    batches = StepBatches(
        len(listing.paths), args.global_batch_size, args.global_seed, state.step, last_step, rank, world, args.flip
    )
    dataset = ImageDataset(listing, args.image_size, args.skip_bad_images)
    skipped, window, started = Skipped(log), [], time.monotonic()
    for images, labels, bad in make_loader(dataset, batches, args.num_workers, pin_memory=device.type == "cuda"):
        if images is None or (bad and not args.skip_bad_images):
            sys.exit(
                f"train.py: error: cannot read {bad[0].path} ({bad[0].reason}); mend it, or pass --skip-bad-images"
            )
        skipped.here.update(bad)
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        draws = draw(
            args.global_seed,
            state.step,
            args.global_batch_size,
            latent,
            dropout,
            diffusion.num_timesteps,
            device,
            rank,
            world,
        )
        latents = space.encode(from_uint8(images), draws.vae_noise)  # (n, C, h, w)
        window.append(train_step(state, diffusion, latents, labels, draws, args.ema_decay))
        log.bar.update()
        if state.step % args.log_every == 0 or state.step == last_step:
            log(
                describe(window, accelerator, state.step, last_step, args.global_batch_size, time.monotonic() - started)
            )
            if args.skip_bad_images:
                skipped.report()
            window, started = [], time.monotonic()
        if state.step % args.ckpt_every == 0 or state.step == last_step:
            save(args, accelerator, state, listing.classes, folder, log)


def describe(window, accelerator, step, last_step, batch_size, seconds):
    """A log line: the METRICS averaged over the steps of the window and over all processes, and images per second."""
    means = accelerator.reduce(torch.stack(window).mean(dim=0), reduction="mean").tolist()  # the window's only read
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in zip(METRICS, means))
    return f"step {step:07d} of {last_step}: {metrics}, {len(window) * batch_size / seconds:.1f} images/s"


class Skipped:
    """The unreadable images that were skipped: those met `here`, by this process, and those reported so far, by any."""

    def __init__(self, log):
        self.here, self.reported, self.log = set(), set(), log

    def report(self):
        """Log those that are new since the last report, counted, from all processes, each of which calls this."""
        for path, reason in sorted(set(gather_object(list(self.here))) - self.reported):
            self.reported.add((path, reason))
            self.log(f"skipped unreadable image {path} ({reason}), {len(self.reported)} so far")
        self.here.clear()


def save(args, accelerator, state, classes, folder, log):
    """Write the checkpoint of the current step, in the main process, while the others wait."""
    if accelerator.is_main_process:
        path = checkpoint_path(folder, state.step)
        save_checkpoint(path, state.to_checkpoint(vars(args), classes))
        log(f"saved {path}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
