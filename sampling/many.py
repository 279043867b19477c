"""Many images in a folder, shared by processes and gone on with after a stop; then one .npz."""

import argparse
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
import glob
import hashlib
import json
import os
from pathlib import Path
import platform
import socket
import sys
import time
from typing import Any, BinaryIO
import zipfile

from PIL import Image
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints.network_config import LATER
from conditions.labels import label_index, label_names, random_labels
from runtime.devices import tf32
from runtime.disk import file_hash
from runtime.json_files import read_bounded, read_json
from runtime.npz import open_array, write_npz
from runtime.presence import Presence, lock
from runtime.surroundings import Place
from sampling.sampler import Sampler
from vae import vae_hashes

# Flags that change no image, or that the checkpoint answers for.
SAID_BY_CHECKPOINT = ("model", "image_size", "num_classes", "said")
INCIDENTAL = ("device", "sample_dir", "ckpt", *SAID_BY_CHECKPOINT)
# Flags that earlier versions lacked, at what these did
NEWER = {"cfg_interval": [0.0, 1.0], "compile": False}
POLL_SECONDS = 1
TELL_SECONDS = 60  # between lines on what is left, where no terminal shows a bar


def make_all(
    args: argparse.Namespace, sampler: Sampler, labels: Tensor, folder: Path, manifest: dict,
    device: torch.device, place: Place,
) -> None:  # fmt: skip
    """Sample this process's share; in the first process, also wait for the others and pack.

    Raises OSError where the disk refuses, ValueError for images that are not finite or damaged, and
    for a process that has ended without its share.
    """
    began, count = time.monotonic(), args.num_fid_samples
    missing = count - len(images_there(folder, count))
    if place.rank == 0:
        write_manifest(folder, manifest)
        print(f"{count - missing} of {count} images are in {folder}", flush=True)
    with Presence(folder, place) as presence:
        with tf32(args.tf32):
            sample_share(args, sampler, labels, folder, device, place)
        if place.rank == 0:
            wait_for_all(folder, count, presence, args.per_proc_batch_size)
            pack(folder, count, afresh=missing > 0)
            manifest["run"]["seconds"] = round(time.monotonic() - began, 1)
            write_manifest(folder, manifest)
            print(f"{count} images in {folder} and {folder}.npz")


def stamps(checkpoint: Path | None, vae: str) -> list[tuple[int, int, int]]:
    """What changes when the checkpoint (None: the released one), or a file of a local VAE, is
    replaced or written to.
    """
    paths = [Path(checkpoint)] if checkpoint else []
    found = [os.stat(path) for path in (*paths, *sorted(Path(vae).glob("*"))) if path.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def all_labels(args: argparse.Namespace, sampler: Sampler) -> Tensor:
    """The label of every image, int64 (N,), as --labels says.

    Raises ValueError for a file that does not fit.
    """
    count, classes = args.num_fid_samples, sampler.network.num_classes
    if args.labels == "random":
        return random_labels(args.global_seed, range(count), max(1, classes))
    if not classes:
        raise ValueError(
            f"--labels {args.labels}: the network was trained without classes; leave the flag out"
        )
    if args.labels == "balanced":
        return torch.arange(count) % classes
    try:
        lines = read_bounded(args.labels).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--labels {args.labels} cannot be read ({reason}); give random, balanced, or a file"
        ) from None
    if len(lines) < count:
        raise ValueError(
            f"--labels {args.labels} has {len(lines)} lines, --num-fid-samples is {count}; one line per image"
        )
    labels, names = [], label_names(sampler.classes)
    for number, line in enumerate(lines[:count], start=1):
        try:
            labels.append(label_index(line.strip(), classes, names))
        except ValueError as error:
            raise ValueError(f"--labels {args.labels}, line {number}: {error}") from None
    return torch.tensor(labels)


def open_folder(
    args: argparse.Namespace, sampler: Sampler, labels: Tensor, device: torch.device, place: Place
) -> tuple[Path, dict]:
    """(the folder for these options, what is to stand in its manifest.json).

    Raises ValueError if it cannot be made.

    The folder is the same in every process.
    """
    decides = {name: value for name, value in sorted(vars(args).items()) if name not in INCIDENTAL}
    # Folders of options and designs that there always were keep their names.
    decides = {
        name: value
        for name, value in decides.items()
        if NEWER.get(name) != value or name not in NEWER
    }
    if Path(args.vae).is_dir():
        decides["vae"] = "see vae_sha256"
    if args.labels not in ("random", "balanced"):
        decides["labels"] = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    checkpoint = sampler.checkpoint
    assert checkpoint is not None  # load_sampler says which
    decides |= {
        "device_type": device.type,
        "network": {
            key: value for key, value in sampler.network.config.items() if LATER.get(key) != value
        },
        "checkpoint_sha256": file_hash(checkpoint),
        "vae_sha256": vae_hashes(args.vae),
    }
    steps = f"{args.num_sampling_steps}-{args.sampler}"
    name = f"{checkpoint.stem[:80]}-cfg-{args.cfg_scale}-steps-{steps}-seed-{args.global_seed}-n-{args.num_fid_samples}"
    folder = (
        Path(args.sample_dir)
        / f"{name}-{hashlib.sha256(json.dumps(decides, indent=1).encode()).hexdigest()[:8]}"
    )
    options = {key: value for key, value in vars(args).items() if key not in SAID_BY_CHECKPOINT}
    run = {
        "started": datetime.now(UTC).isoformat(), "processes": place.world_size, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}, "seconds": None,
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".probe", lambda file: None)
        (folder / ".probe").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}); choose another --sample-dir"
        ) from None
    return folder, {"decides": decides, "options": options | {"ckpt": str(checkpoint)}, "run": run}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json, this start beside those before it, and say if they were made under other
    circumstances.
    """
    run, earlier = manifest["run"], []
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(folder / "manifest.json")["runs"]
        earlier = [one for one in found if one["started"] != run["started"]]
    if run["seconds"] is None:
        for name in ("threads", "device", "versions"):
            others = {json.dumps(one.get(name)) for one in earlier} - {json.dumps(run[name])}
            if others:
                print(
                    f"note: a start before had other {name} ({', '.join(sorted(others))}): images may round otherwise"
                )
    manifest = {**manifest, "runs": [*earlier, run]}
    del manifest["run"]
    write_whole(
        folder / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode())
    )


def image_path(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def images_there(folder: Path, count: int) -> set[int]:
    """The indices, of `count`, whose images are in the folder."""
    names = set(os.listdir(folder))
    return {i for i in range(count) if image_path(folder, i).name in names}


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call write(file) and give the file its name when it is complete; processes do not disturb
    each other.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()[:20]}-{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            with suppress(OSError):  # file systems without locks
                lock(file)
            write(file)
            file.flush()
            temporary.replace(path)  # still locked
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left half-written of this name; what is being written is locked
    by its process.
    """
    for path in folder.glob(f".{name}.*.partial"):
        with suppress(OSError), open(path, "r+b") as file:
            if lock(file):
                path.unlink()


def sample_share(
    args: argparse.Namespace, sampler: Sampler, labels: Tensor, folder: Path, device: torch.device,
    place: Place,
) -> None:  # fmt: skip
    """Sample and write the images that this process is to make and that are not there yet.

    The work is cut into chunks of consecutive images, dealt to the processes in turn; a chunk with
    an image missing is sampled whole, so that every image always comes from the same batch.
    """
    there, size, count = (
        images_there(folder, args.num_fid_samples), args.per_proc_batch_size, args.num_fid_samples,
    )  # fmt: skip
    todo = []
    for start in range(0, count, size)[place.rank :: place.world_size]:
        indices = range(start, min(start + size, count))
        missing = [i for i in indices if i not in there]
        if missing:
            todo.append((indices, missing))
    every = 0.1 if sys.stderr.isatty() else TELL_SECONDS
    with Finisher(sampler, folder, device) as finisher:
        for indices, missing in tqdm(
            todo, unit="batch", mininterval=every, maxinterval=every, disable=place.rank > 0
        ):
            chosen = labels[indices.start : indices.stop].to(device)
            finisher.take(
                sampler.numbered_latents(args.global_seed, indices, chosen), indices, missing
            )


class Finisher:
    """Makes PNG files of latents one chunk behind the sampling, in a thread of its own.

    On a GPU that thread decodes as well, in a stream of its own; on a CPU, whose cores the sampling
    takes, it encodes and writes only.
    """

    def __init__(self, sampler: Sampler, folder: Path, device: torch.device) -> None:
        self.sampler, self.folder = sampler, folder
        self.pending: Future | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> "Finisher":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        self.thread.shutdown()

    def take(self, latents: Tensor, indices: range, missing: list[int]) -> None:
        """Begin with a chunk of latents when the one before is done; of its images, write those
        that are missing.
        """
        if self.stream is None:
            latents = self.sampler.decode(latents)
        self.wait()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(latents.device))
            latents.record_stream(self.stream)  # whose memory must not be used anew before
        self.pending = self.thread.submit(self.finish, latents, indices, missing)

    def wait(self) -> None:
        """Return when nothing is being worked on; an error there is raised here."""
        if self.pending is not None:
            self.pending.result()

    def finish(self, latents: Tensor, indices: range, missing: list[int]) -> None:
        """Write the missing images of a chunk, from latents, or on a CPU from images."""
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            images = self.sampler.decode(latents) if self.stream else latents
            pixels = images.cpu().numpy()
        for i in missing:
            image = Image.fromarray(pixels[i - indices.start])
            write_whole(image_path(self.folder, i), partial(image.save, format="PNG"))


def wait_for_all(folder: Path, count: int, presence: Presence, size: int) -> None:
    """Return when every image is there, of which the processes make chunks of this size in turn.

    Raises ValueError if a process has ended without its share.
    """
    told = time.monotonic()
    while missing := set(range(count)) - images_there(folder, count):
        absent = presence.missed({i // size % presence.place.world_size for i in missing})
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"waiting for {len(missing)} images of other processes{absent}", flush=True)
        time.sleep(POLL_SECONDS)


def pack(folder: Path, count: int, afresh: bool) -> None:
    """Write the images, one at a time, to FOLDER.npz as ADM's evaluation suite reads them.

    One that is there already and whole is left alone, unless it is to be written afresh. Raises
    ValueError for a damaged image.
    """
    target = folder.with_name(folder.name + ".npz")
    remove_leftovers(folder)
    remove_leftovers(folder.parent, glob.escape(target.name))
    height, width, _ = shape = read_image(image_path(folder, 0)).shape
    if not afresh:
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            if open_array(target, "arr_0").shape == (count, *shape):
                return
    array = (
        (count, height, width, 3), np.uint8,
        (read_image(image_path(folder, i), shape) for i in range(count)),
    )  # fmt: skip

    def write(file):
        write_npz(file, {"arr_0": array})
        file.flush()
        os.fsync(file.fileno())

    write_whole(target, write)


def read_image(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The pixels (H, W, 3) of a PNG.

    Raises ValueError if it is damaged, or of another shape than this.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise ValueError(
            f"{path} cannot be read ({error}); remove it and give the same command again"
        ) from None
    if shape not in (None, pixels.shape):
        raise ValueError(
            f"{path} has the shape {pixels.shape}, others {shape}; remove it and give the same command again"
        )
    return pixels
