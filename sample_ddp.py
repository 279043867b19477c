"""Sample many images for an evaluation, as PNG files and as one .npz, on any number of processes.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000
    python sample_ddp.py --ckpt examples/digits/dit.safetensors --vae examples/digits/vae --num-fid-samples 100

Image i, its label included, depends on --global-seed and i alone, however the work is shared. Images go to
SAMPLE_DIR/NAME/NNNNNN.png and then to SAMPLE_DIR/NAME.npz (uint8 `arr_0`, (N, H, W, 3)), where NAME tells the options and
ends in a hash of all that decides the content; NAME/manifest.json lists it. The same command goes on where it stopped.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
import fcntl
from functools import partial
import hashlib
import json
import os
from pathlib import Path
import platform
import sys
import time

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from devices import process_device, tf32
from features import file_hash
from image_sets import write_npz
from sampling import add_sampling_flags, check_sampling_flags, label_indices, load_sampler, random_labels
from vae import vae_hashes

# Flags that change no image, or that the checkpoint answers for.
INCIDENTAL = ("device", "sample_dir", "ckpt", "model", "image_size", "num_classes", "said")
POLL_SECONDS = 1
TELL_SECONDS = 60  # between lines on what is left, where no terminal shows a bar
# torchrun tells each process its place. They share work by it and speak through files only, so none can time out.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run = parser.add_argument_group("run")
    run.add_argument("--num-fid-samples", type=int, default=50000, help="images in all (default: %(default)s)")
    batching = "images at a time in each process; another number rounds otherwise (default: %(default)s)"
    run.add_argument("--per-proc-batch-size", type=int, default=32, help=batching)
    run.add_argument("--sample-dir", default="samples", help="where folder and .npz go (default: %(default)s)")
    run.add_argument("--global-seed", type=int, default=0, help="(default: %(default)s)")
    policies = (
        "random: drawn for each image; balanced: image i is of class i modulo their number; or a file with a number or name "
        "in each line (default: %(default)s)"
    )
    run.add_argument("--labels", default="random", metavar="{random,balanced,FILE}", help=policies)
    add_sampling_flags(parser, vae="ema", cfg_scale=1.5)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_sampling_flags(args)
        for name in ("num_fid_samples", "per_proc_batch_size"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
        device = process_device(args.device)
        sampler = load_sampler(args, device)
        labels = all_labels(args, sampler)
        folder, manifest = open_folder(args, sampler, labels, device)
    except ValueError as error:
        parser.error(str(error))
    began = time.monotonic()
    try:
        with tf32(args.tf32):
            sample_share(args, sampler, labels, folder, device)
        if RANK == 0:
            wait_for_all(folder, args.num_fid_samples)
            pack(folder, args.num_fid_samples)
            manifest["runs"][-1]["seconds"] = round(time.monotonic() - began, 1)
            write_manifest(folder, manifest)
            print(f"{args.num_fid_samples} images in {folder} and {folder}.npz")
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        parser.exit(1, f"sample_ddp.py: error: {reason}; when that is mended, the same command goes on\n")


def all_labels(args, sampler):
    """The label of every image, int64 (N,), as --labels says. Raises ValueError for a file that does not fit."""
    count, classes = args.num_fid_samples, sampler.network.num_classes
    if args.labels == "random":
        return random_labels(args.global_seed, range(count), max(1, classes))
    if not classes:
        raise ValueError(f"--labels {args.labels}: the network was trained without classes; leave the flag out")
    if args.labels == "balanced":
        return torch.arange(count) % classes
    try:
        lines = Path(args.labels).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--labels {args.labels} cannot be read ({reason}); give random, balanced, or a file") from None
    if len(lines) < count:
        raise ValueError(f"--labels {args.labels} has {len(lines)} lines, --num-fid-samples is {count}; one line per image")
    try:
        return torch.tensor(label_indices([line.strip() for line in lines[:count]], classes, sampler.classes))
    except ValueError as error:
        raise ValueError(f"--labels {args.labels}: {error}") from None


def open_folder(args, sampler, labels, device):
    """(the folder for these options, what its manifest.json says). Raises ValueError if it cannot be made.

    The folder is the same in every process; the first writes the manifest.
    """
    decides = {name: value for name, value in sorted(vars(args).items()) if name not in INCIDENTAL}
    decides |= {
        "labels": args.labels if args.labels in ("random", "balanced") else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "device_type": device.type,
        "network": sampler.network.config,
        "checkpoint_sha256": file_hash(sampler.checkpoint),
        "vae_sha256": vae_hashes(args.vae),
    }
    steps = f"{args.num_sampling_steps}-{args.sampler}"
    name = (
        f"{sampler.checkpoint.stem}-cfg-{args.cfg_scale}-steps-{steps}-seed-{args.global_seed}-n-{args.num_fid_samples}"
    )
    folder = Path(args.sample_dir) / f"{name}-{hashlib.sha256(json.dumps(decides, indent=1).encode()).hexdigest()[:8]}"
    options = {key: value for key, value in vars(args).items() if key != "said"} | {"ckpt": str(sampler.checkpoint)}
    manifest = {"decides": decides, "options": options, "runs": earlier_runs(folder)}
    manifest["runs"].append({
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "processes": WORLD_SIZE,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}, "seconds": None,
    })  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --sample-dir") from None
    return folder, manifest


def earlier_runs(folder):
    """What the folder's manifest says of the starts before this one; nothing if it has none."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["runs"]
    return []


def write_manifest(folder, manifest):
    """Write manifest.json, in the first process."""
    if RANK == 0:
        write_whole(folder / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))


def image_path(folder, i):
    return folder / f"{i:06d}.png"


def write_whole(path, write):
    """Call write(file) and give the file its name when it is complete; processes do not disturb each other."""
    temporary = path.with_name(f".{path.name}.{RANK}-{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder, name="*"):
    """Remove what killed processes left half-written; a file that is being written is locked by its process."""
    for path in folder.glob(f".{name}.partial"):
        with suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def sample_share(args, sampler, labels, folder, device):
    """Sample and write the images that this process is to make and that are not there yet.

    The work is cut into chunks of consecutive images, dealt to the processes in turn; a chunk with an image missing is
    sampled whole, so that every image always comes from the same batch.
    """
    there, size, count = set(os.listdir(folder)), args.per_proc_batch_size, args.num_fid_samples
    todo = []
    for start in range(0, count, size)[RANK::WORLD_SIZE]:
        indices = range(start, min(start + size, count))
        missing = [i for i in indices if image_path(folder, i).name not in there]
        if missing:
            todo.append((indices, missing))
    every = 0.1 if sys.stderr.isatty() else TELL_SECONDS
    with Finisher(sampler, folder, device) as finisher:
        for indices, missing in tqdm(todo, unit="batch", mininterval=every, maxinterval=every, disable=RANK > 0):
            chosen = labels[indices.start : indices.stop].to(device)
            finisher.take(sampler.numbered_latents(args.global_seed, indices, chosen), indices, missing)


class Finisher:
    """Makes PNG files of latents one chunk behind the sampling, in a thread of its own.

    On a GPU that thread decodes as well, in a stream of its own; on a CPU, whose cores the sampling takes, it encodes and
    writes only.
    """

    def __init__(self, sampler, folder, device):
        self.sampler, self.folder, self.pending = sampler, folder, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.wait()
        self.thread.shutdown()

    def take(self, latents, indices, missing):
        """Begin with a chunk of latents when the one before is done; of its images, write those that are missing."""
        if self.stream is None:
            latents = self.sampler.decode(latents)
        self.wait()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(latents.device))
            latents.record_stream(self.stream)  # whose memory must not be used anew before
        self.pending = self.thread.submit(self.finish, latents, indices, missing)

    def wait(self):
        """Return when nothing is being worked on; an error there is raised here."""
        if self.pending is not None:
            self.pending.result()

    def finish(self, latents, indices, missing):
        """Write the missing images of a chunk, from latents, or on a CPU from images."""
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            images = self.sampler.decode(latents) if self.stream else latents
            images = images.cpu().numpy()
        for i in missing:
            image = Image.fromarray(images[i - indices.start])
            write_whole(image_path(self.folder, i), partial(image.save, format="PNG"))


def wait_for_all(folder, count):
    """Return when every image is there."""
    wanted, told = {image_path(folder, i).name for i in range(count)}, time.monotonic()
    while missing := len(wanted - set(os.listdir(folder))):
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"waiting for {missing} images of other processes", flush=True)
        time.sleep(POLL_SECONDS)


def pack(folder, count):
    """Write the images, one at a time, to FOLDER.npz as ADM's evaluation suite reads them; an .npz there is left alone."""
    target = folder.with_name(folder.name + ".npz")
    remove_leftovers(folder)
    remove_leftovers(folder.parent, f"{target.name}.*")
    if target.exists():
        return
    width, height = Image.open(image_path(folder, 0)).size
    array = ((count, height, width, 3), np.uint8, (read_image(image_path(folder, i)) for i in range(count)))
    write_whole(target, lambda file: write_npz(file, {"arr_0": array}))


def read_image(path):
    """The pixels (H, W, 3) of a PNG; leaves the program if it is damaged."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError:
        damaged = f"{path} cannot be read; remove it and run the same command again"
        sys.exit(f"sample_ddp.py: error: {damaged}")


if __name__ == "__main__":
    main()
