"""Many images in a folder, shared by processes and gone on with after a stop; then one .npz."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
import glob
import os
from pathlib import Path
import sys
import time
from typing import Any
import zipfile

from PIL import Image
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints.choice import NetworkChoice
from checkpoints.files import list_checkpoints
from checkpoints.loading import NetworkFiles, find_files
from checkpoints.names import weights_file
from conditions.labels import label_index, label_names, random_labels
from runtime.devices import process_device, tf32
from runtime.json_files import read_bounded
from runtime.npz import open_array, write_npz
from runtime.presence import Presence
from runtime.surroundings import Place, check_accelerate, own_place
from sampling.loading import build_sampler
from sampling.many_folder import (
    CAPTIONS, Wishes, caption_lines, circumstances, deciding, folder_of, image_path, images_there,
    make_folder, recorded_options, remove_leftovers, write_locked, write_manifest,
)  # fmt: skip
from sampling.options import ManyOptions, SamplingOptions
from sampling.sampler import Sampler

VAE = "ema"  # for images to be scored, where nobody names the autoencoder
POLL_SECONDS = 1
TELL_SECONDS = 60  # between lines on what is left, where no terminal shows a bar


@dataclass(frozen=True)
class ManyJob:
    """All that is settled before the first image of a job is sampled.

    labels: of every image, int64 (N,), or its prompt, a list of N texts; manifest: what
    manifest.json has but for its runs; run: what it tells of this start; place: this process among
    those that share the job.
    """

    sampler: Sampler
    options: ManyOptions
    labels: Wishes
    folder: Path
    manifest: dict[str, Any]
    run: dict[str, Any]
    device: torch.device
    place: Place
    tf32: bool

    @property
    def samples(self) -> str:
        """What its samples are called."""
        return "clips" if self.sampler.makes_clips else "images"


def sample_many(
    choice: NetworkChoice, options: SamplingOptions, many: ManyOptions, *,
    device: str | None = None, tf32: bool = True,
) -> Path:  # fmt: skip
    """Sample many images, as sample_ddp.py does: PNG files in a folder, then an .npz beside it.
    The path of the .npz (uint8 `arr_0`, (N, H, W, 3)) comes back. Of prompts, both have a file with
    a line for each image beside them: captions.txt in the folder, NAME.captions.txt. Of a network
    that makes clips, a PNG file has a clip's frames side by side, and `arr_0` is (N, F, H, W, 3).

    A call with the same arguments goes on where an earlier one stopped. Under torchrun each process
    makes its share; the first one waits for the others and writes the .npz. device: None for the
    GPU if there is one. tf32: whether NVIDIA GPUs may use it.

    Raises ValueError for arguments that do not fit together, for images that are not finite or are
    damaged, and if another process ends without its share; OSError if the disk refuses.
    """
    job = open_job(choice, options, many, device=device, tf32=tf32)
    return make_all(job)


def open_job(
    choice: NetworkChoice, options: SamplingOptions, many: ManyOptions, *,
    device: str | None = None, tf32: bool = True,
) -> ManyJob:  # fmt: skip
    """The job of sample_many, its network loaded and its folder made, before any sampling.

    Raises ValueError for arguments that do not fit together, and for a folder that cannot be made.
    """
    check_accelerate(mixed_precision=options.mixed_precision)
    place, own_device = own_place(), process_device(device)
    _check_checkpoint(choice, place)
    files = find_files(choice, VAE)
    before = stamps(files)
    sampler = build_sampler(choice, files, options, own_device)
    labels = all_labels(many, sampler)
    recorded = recorded_options(files, choice, options, sampler, many, device, tf32)
    decides = deciding(recorded, files, sampler.network, labels, own_device.type)
    folder = folder_of(recorded, decides)
    make_folder(folder)
    if stamps(files) != before:
        beside = "" if files.high is None else f", {choice.ckpt_high}"
        raise ValueError(
            f"{choice.ckpt or files.checkpoint}{beside} or {files.vae} changed while it was read; "
            "give the same command again"
        )
    manifest, run = {"decides": decides, "options": recorded}, circumstances(own_device, place)
    return ManyJob(sampler, many, labels, folder, manifest, run, own_device, place, tf32)


def _check_checkpoint(choice, place):
    """Raise ValueError if several processes could find different checkpoints."""
    for name in ("ckpt", "ckpt_high"):
        path = getattr(choice, name)
        if place.world_size > 1 and path is not None and list_checkpoints(path):
            raise ValueError(
                f"`{name}` {path} is a run folder, whose newest checkpoint may change while "
                f"processes start; give the checkpoint itself, {weights_file(path)}"
            )


def make_all(job: ManyJob) -> Path:
    """Sample this process's share; in the first process, also wait for the others and pack. The
    path of the .npz comes back; other processes do not wait until it is there.

    Raises OSError where the disk refuses, ValueError for images that are not finite or damaged, and
    for a process that has ended without its share.
    """
    began, folder, count = time.monotonic(), job.folder, job.options.num_fid_samples
    missing = count - len(images_there(folder, count))
    if job.place.rank == 0:
        write_manifest(folder, job.manifest, job.run)
        write_captions(job)
        print(f"{count - missing} of {count} {job.samples} are in {folder}", flush=True)
    with Presence(folder, job.place) as presence:
        with tf32(job.tf32):
            sample_share(job)
        if job.place.rank == 0:
            wait_for_all(folder, count, presence, job.options.per_proc_batch_size)
            pack(folder, count, afresh=missing > 0, frames=job.sampler.frames)
            seconds = round(time.monotonic() - began, 1)
            write_manifest(folder, job.manifest, job.run | {"seconds": seconds})
            print(f"{count} {job.samples} in {folder} and {folder}.npz")
    return npz_of(folder)


def npz_of(folder: Path) -> Path:
    """The .npz of a folder of images."""
    return folder.with_name(f"{folder.name}.npz")


def write_captions(job: ManyJob) -> None:
    """Write the images' prompts, if they have any, in their folder and beside its .npz; print notes
    on those that are too long.
    """
    if isinstance(job.labels, Tensor):
        return
    lines = caption_lines(job.labels)
    for path in (job.folder / CAPTIONS, job.folder.with_name(f"{job.folder.name}.{CAPTIONS}")):
        write_locked(path, lambda file: file.write(lines))
    for note in job.sampler.notes(job.labels):
        print(f"note: {note}", flush=True)


def stamps(files: NetworkFiles) -> list[tuple[int, int, int]]:
    """What changes when a checkpoint, or a file of a local autoencoder, is replaced.

    Writing to such a file changes it, too.
    """
    checkpoints = filter(None, (files.checkpoint, files.high))
    paths = [*checkpoints, *sorted(Path(files.vae).glob("*"))]
    found = [os.stat(path) for path in paths if path.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def all_labels(many: ManyOptions, sampler: Sampler) -> Wishes:
    """The label of every image, int64 (N,), as the option `labels` says; where the network reads
    text, the prompt of every image, as `prompts` says.

    Raises ValueError for a file that does not fit, and for the option that is not the network's.
    """
    count, classes = many.num_fid_samples, sampler.network.num_classes
    if sampler.reads_text:
        return _all_prompts(many)
    if many.prompts is not None:
        raise ValueError(
            f"`prompts` {many.prompts}: the network does not read text; leave the argument out"
        )
    if many.labels == "random":
        return random_labels(many.global_seed, range(count), max(1, classes))
    if not classes:
        raise ValueError(
            f"`labels` {many.labels}: the network was trained without classes; leave the argument "
            "out"
        )
    if many.labels == "balanced":
        return torch.arange(count) % classes
    return torch.tensor(_labels_in(many.labels, count, sampler))


def _all_prompts(many):
    """The prompt of every image, a list of texts."""
    if many.labels != ManyOptions.labels:
        raise ValueError(f"`labels` {many.labels}: the network reads text; give `prompts` instead")
    if many.prompts is None:
        raise ValueError(
            "the network reads text; say with `prompts` what it is to draw, a file with a prompt "
            "in each line"
        )
    text = _text_in(many.prompts, "prompts", "a file of text in UTF-8")
    if not text:
        raise ValueError(f"`prompts` {many.prompts} has no line; write a prompt in each")
    # Not splitlines: a prompt may have what other scripts and old files call ends of lines
    prompts = [line.strip() for line in text.removesuffix("\n").split("\n")]
    return [prompts[i % len(prompts)] for i in range(many.num_fid_samples)]


def _text_in(path, name, wanted):
    """What stands in a file that an argument names."""
    try:
        return read_bounded(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`{name}` {path} cannot be read ({reason}); give {wanted}") from None


def _labels_in(path, count, sampler):
    """The first `count` labels in a file."""
    lines = _text_in(path, "labels", "random, balanced, or a file").splitlines()
    if len(lines) < count:
        raise ValueError(
            f"`labels` {path} has {len(lines)} lines, `num_fid_samples` is {count}; one line per "
            "image"
        )
    labels, names = [], label_names(sampler.classes)
    for number, line in enumerate(lines[:count], start=1):
        try:
            labels.append(label_index(line.strip(), sampler.network.num_classes, names))
        except ValueError as error:
            raise ValueError(f"`labels` {path}, line {number}: {error}") from None
    return labels


def sample_share(job: ManyJob) -> None:
    """Sample and write the images that this process is to make and that are not there yet.

    The work is cut into chunks of consecutive images, dealt to the processes in turn; a chunk with
    an image missing is sampled whole, so that every image always comes from the same batch.
    """
    sampler, seed = job.sampler, job.options.global_seed
    every = 0.1 if sys.stderr.isatty() else TELL_SECONDS
    bar = dict(unit="batch", mininterval=every, maxinterval=every, disable=job.place.rank > 0)
    with Finisher(sampler, job.folder, job.device) as finisher:
        for indices, missing in tqdm(_own_chunks(job), **bar):
            labels = sampler.conditions(job.labels[indices.start : indices.stop])
            finisher.take(sampler.numbered_latents(seed, indices, labels), indices, missing)


def _own_chunks(job):
    """[(the indices of a chunk, those of its images that are missing)] of this process."""
    size, count = job.options.per_proc_batch_size, job.options.num_fid_samples
    there, found = images_there(job.folder, count), []
    for start in range(0, count, size)[job.place.rank :: job.place.world_size]:
        indices = range(start, min(start + size, count))
        if missing := [i for i in indices if i not in there]:
            found.append((indices, missing))
    return found


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
        """Begin with a chunk of latents when the one before is done.

        Of its images, write those that are missing.
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
            found = pixels[i - indices.start]
            image = Image.fromarray(side_by_side(found) if self.sampler.makes_clips else found)
            write_locked(image_path(self.folder, i), partial(image.save, format="PNG"))


def wait_for_all(folder: Path, count: int, presence: Presence, size: int) -> None:
    """Return when every image is there. The processes make chunks of this size in turn.

    Raises ValueError if a process has ended without its share.
    """
    told = time.monotonic()
    while missing := set(range(count)) - images_there(folder, count):
        absent = presence.missed({i // size % presence.place.world_size for i in missing})
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"waiting for {len(missing)} images of other processes{absent}", flush=True)
        time.sleep(POLL_SECONDS)


def pack(folder: Path, count: int, afresh: bool, frames: int | None = None) -> None:
    """Write the images, one at a time, to FOLDER.npz as ADM's evaluation suite reads them; of
    clips, so many frames of each.

    One that is there already and whole is left alone, unless it is to be written afresh. Raises
    ValueError for a damaged image.
    """
    target = npz_of(folder)
    remove_leftovers(folder)
    remove_leftovers(folder.parent, glob.escape(target.name))
    shape = read_image(image_path(folder, 0)).shape
    sample = shape if frames is None else (frames, shape[0], shape[1] // frames, 3)
    if not afresh:
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            if open_array(target, "arr_0").shape == (count, *sample):
                return
    images = (read_image(image_path(folder, i), shape) for i in range(count))
    if frames is not None:
        images = (apart(image, frames) for image in images)
    array = ((count, *sample), np.uint8, images)

    def write(file):
        write_npz(file, {"arr_0": array})
        file.flush()
        os.fsync(file.fileno())

    write_locked(target, write)


def side_by_side(clip: np.ndarray) -> np.ndarray:
    """The frames of a clip (F, H, W, 3) as an image (H, F·W, 3)."""
    return np.concatenate(clip, axis=1)  # (H, F·W, 3)


def apart(image: np.ndarray, frames: int) -> np.ndarray:
    """The clip (F, H, W, 3) of so many frames in an image (H, F·W, 3): side_by_side backwards."""
    return np.stack(np.split(image, frames, axis=1))  # (F, H, W, 3)


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
            f"{path} has the shape {pixels.shape}, others {shape}; remove it and give the same "
            "command again"
        )
    return pixels
