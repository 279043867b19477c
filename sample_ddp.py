"""Sample many images for an evaluation, as PNG files and as one .npz, on any number of processes.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000
    python sample_ddp.py --ckpt examples/digits/dit.safetensors --vae examples/digits/vae --num-fid-samples 100

Image i, its label included, depends on --global-seed and i alone, however the work is shared. Images go to
SAMPLE_DIR/NAME/NNNNNN.png and then to SAMPLE_DIR/NAME.npz (uint8 `arr_0`, (N, H, W, 3)), where NAME tells the options and
ends in a hash of all that decides the content; NAME/manifest.json lists it. The same command goes on where it stopped.
"""

import argparse
from functools import partial
import hashlib
import json
import os
from pathlib import Path
import sys
import time
import zipfile

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from sampling import (
    ImageNoise, add_sampling_flags, check_sampling_flags, load_sampler, process_device, random_labels, tf32,
)  # fmt: skip
from vae import vae_hashes

# Flags that change no image, or only its rounding, or that the checkpoint answers for.
INCIDENTAL = (
    "device",
    "sample_dir",
    "per_proc_batch_size",
    "tf32",
    "ckpt",
    "model",
    "image_size",
    "num_classes",
    "said",
)
POLL_SECONDS = 1
# torchrun tells each process its place. They share work by it and speak through files only, so none can time out.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run = parser.add_argument_group("run")
    run.add_argument("--num-fid-samples", type=int, default=50000, help="images in all (default: %(default)s)")
    run.add_argument(
        "--per-proc-batch-size", type=int, default=32, help="images at a time in each process (default: %(default)s)"
    )
    run.add_argument("--sample-dir", default="samples", help="where folder and .npz go (default: %(default)s)")
    run.add_argument("--global-seed", type=int, default=0, help="(default: %(default)s)")
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
        folder = open_folder(args, sampler)
    except ValueError as error:
        parser.error(str(error))
    with tf32(args.tf32):
        sample_share(args, sampler, folder, device)
    if RANK == 0:
        wait_for_all(folder, args.num_fid_samples)
        pack(folder, args.num_fid_samples)
        print(f"{args.num_fid_samples} images in {folder} and {folder}.npz")


def open_folder(args, sampler):
    """The folder for these options, with its manifest; the same in every process. Raises ValueError if it cannot be made."""
    decides = {name: value for name, value in sorted(vars(args).items()) if name not in INCIDENTAL}
    decides |= {
        "network": sampler.network.config,
        "checkpoint_sha256": file_hash(sampler.checkpoint),
        "vae_sha256": vae_hashes(args.vae),
    }
    text = json.dumps(decides, indent=1)
    steps = f"{args.num_sampling_steps}-{args.sampler}"
    name = (
        f"{sampler.checkpoint.stem}-cfg-{args.cfg_scale}-steps-{steps}-seed-{args.global_seed}-n-{args.num_fid_samples}"
    )
    folder = Path(args.sample_dir) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "manifest.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --sample-dir") from None
    return folder


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_path(folder, i):
    return folder / f"{i:06d}.png"


def write_whole(path, write):
    """Call write(file) and give the file its name when it is complete; processes do not disturb each other."""
    temporary = path.with_name(f".{path.name}.{RANK}-{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sample_share(args, sampler, folder, device):
    """Sample and write the images that this process is to make and that are not there yet.

    The work is cut into chunks of consecutive images, dealt to the processes in turn; a chunk with an image missing is
    sampled whole, so that every image always comes from the same batch.
    """
    chunks = range(0, args.num_fid_samples, args.per_proc_batch_size)[RANK::WORLD_SIZE]
    for start in tqdm(chunks, unit="batch", disable=None if RANK == 0 else True):
        indices = range(start, min(start + args.per_proc_batch_size, args.num_fid_samples))
        missing = [i for i in indices if not image_path(folder, i).exists()]
        if not missing:
            continue
        labels = random_labels(args.global_seed, indices, max(1, sampler.network.num_classes)).to(device)
        noise_fn = ImageNoise(args.global_seed, indices, device)
        noise = noise_fn(torch.empty(len(indices), *sampler.latent, device=device))
        images = sampler.images(labels, noise, noise_fn).cpu().numpy()
        for i in missing:
            write_whole(image_path(folder, i), partial(Image.fromarray(images[i - start]).save, format="PNG"))


def wait_for_all(folder, count):
    """Return when every image is there."""
    wanted = {image_path(folder, i).name for i in range(count)}
    while not wanted <= set(os.listdir(folder)):
        time.sleep(POLL_SECONDS)


def pack(folder, count):
    """Write the images, one at a time, to FOLDER.npz as ADM's evaluation suite reads them; an .npz there is left alone."""
    target = folder.with_name(folder.name + ".npz")
    if target.exists():
        return
    width, height = Image.open(image_path(folder, 0)).size
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}

    def write(file):
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(
                zipfile.ZipInfo("arr_0.npy"),
                "w",
                force_zip64=True,  # without a time: equal images make equal files
            ) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for i in range(count):
                try:
                    array.write(np.asarray(Image.open(image_path(folder, i)).convert("RGB")).tobytes())
                except OSError:
                    damaged = f"{image_path(folder, i)} cannot be read; remove it and run the same command again"
                    sys.exit(f"sample_ddp.py: error: {damaged}")

    write_whole(target, write)


if __name__ == "__main__":
    main()
