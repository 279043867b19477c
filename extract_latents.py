"""Cache the latents of a folder of images, so that training neither reads images nor runs the VAE.

    python extract_latents.py --data-path imagenet/train --output imagenet-latents
    torchrun --nproc_per_node=8 extract_latents.py --data-path imagenet/train --output imagenet-latents
    python extract_latents.py --verify imagenet-latents

What is cached is the mean and standard deviation of the VAE's posterior, of each image and its mirror image: training
draws afresh from it each time. moments.npy is one array (images, 1 or 2 flips, 2, C, h, w), labels.npy one of (images,);
manifest.json says what they are, with a checksum per chunk of images, and appears when all is done. The same command goes
on where it stopped; the result is the same on any number of processes.
"""

from command_line import Parser, door, end_at_interrupt, reason

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from contextlib import closing
import errno
from io import BytesIO
import json
import os
from pathlib import Path
import time
import zlib

import numpy as np
import torch
from tqdm.auto import tqdm

from checkpoints import read_json, write_whole
from data import ImageDataset, Listing, check_outside, list_images, make_loader, open_cache, read, unreadable
from devices import process_device, tf32
from limits import check_memory, check_numbers
from presence import Presence
from surroundings import Place, check_accelerate, own_place
from vae import LatentSpace, from_uint8, latent_shape, load_vae, vae_hashes

CHUNK = 64  # images that are encoded, written and checksummed together
POLL_SECONDS = 1
TELL_SECONDS = 60  # between lines on what is waited for


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    data = parser.add_argument_group("data").add_argument
    data("--data-path", help="folder with one folder of images per class")
    data("--output", metavar="DIR", help="folder to write; for train.py --latents")
    data("--verify", metavar="DIR", help="instead, compare the checksums of such a folder, and report")
    data("--image-size", type=int, default=256, help="pixels along each side, after the crop (default: %(default)s)")
    data("--num-classes", type=int, default=1000, help="0: none, all images below --data-path (default: %(default)s)")
    data("--flip", action=argparse.BooleanOptionalAction, default=True, help="also the mirror images (default: on)")
    skipping = "put the next image in place of an unreadable one and list it, instead of stopping"
    data("--skip-bad-images", action="store_true", help=skipping)
    run = parser.add_argument_group("run").add_argument
    run("--vae", default="ema", help="ema, mse, a hub id, or a local folder (default: %(default)s)")
    dtypes = "how they are stored; float16 halves the size and is off by about 0.05%% (default: %(default)s)"
    run("--latents-dtype", choices=["float16", "float32"], default="float16", help=dtypes)
    tf32_help = "TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)"
    run("--tf32", action=argparse.BooleanOptionalAction, default=True, help=tf32_help)
    run("--num-workers", type=int, default=4, help="loader processes per process (default: %(default)s)")
    run("--device", help="such as cpu or cuda:1 (default: the GPU of the process's rank, if there is one)")
    return parser


@door("--image-size", resumes=True)
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.verify is not None:
            damaged = verify(Path(args.verify))
            if damaged:
                parser.fail(f"{'; '.join(damaged)}; remove the folder and make it again")
            print(f"{args.verify}: every checksum is right")
            return
        check_accelerate()
        place = own_place()
        check_arguments(args)
        device = process_device(args.device)
        listing = list_images(args.data_path, args.num_classes)
        space = load_vae(args.vae, device)
        assert isinstance(space, LatentSpace)  # check_arguments refuses pixels
        folder = Path(args.output)
        if folder.resolve() != Path(args.data_path).resolve():  # which open_folder refuses, as what holds something else
            check_outside(args.data_path, "--output", folder)
        plan = describe(args, listing, space)
        open_folder(folder, plan, place)
    except (ValueError, OSError) as error:
        parser.error(reason(error))
    try:
        for note in listing.notes if place.rank == 0 else ():
            print(f"note: {note}", flush=True)
        with Presence(folder, place, only=True) as presence:
            with tf32(args.tf32):
                encode_share(args, listing, space, folder, plan, device, place)
            if place.rank == 0:
                finish(folder, plan, presence)
                print(f"{plan['images']} images in {folder}")
    except BrokenPipeError:  # of the output, which `door` answers
        raise
    except OSError as error:
        parser.fail(f"{error.filename or folder}: {error.strerror or error}; when that is mended, the same command goes on")
    except ValueError as error:
        parser.fail(str(error))


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for missing flags and for sizes that do not fit."""
    for name in ("data_path", "output"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing; give --data-path and --output, or --verify")
    check_numbers(args)
    check_memory(CHUNK * (1 + args.flip), args.image_size, "--image-size")
    if args.vae == "none":
        raise ValueError("--vae none: pixels have no latents to cache; train on the images themselves")
    latent_shape(args.vae).side(args.image_size)


def describe(args: argparse.Namespace, listing: Listing, space: LatentSpace) -> dict:
    """What decides the content of the cache, as manifest.json and, until it is there, plan.json have it."""
    side = space.shape.side(args.image_size)
    return {
        "images": len(listing.paths), "flip": args.flip, "shape": [2, space.shape.channels, side, side],
        "dtype": args.latents_dtype, "image_size": args.image_size, "vae": args.vae,
        "vae_sha256": vae_hashes(args.vae), "channels": space.shape.channels,
        "ratio": space.shape.ratio, "scale": space.scale, "shift": space.shift, "classes": listing.classes,
        "skip_bad_images": args.skip_bad_images, "files_sha256": listing.hash(args.data_path), "chunk": CHUNK,
    }  # fmt: skip


def open_folder(folder: Path, plan: dict, place: Place) -> None:
    """Make the folder with its plan and an array to fill, in the first process while the others wait for it.

    Raises ValueError if it holds latents of another plan, or cannot be made.
    """
    wanted, told = json.loads(json.dumps(plan)), time.monotonic()
    while not (folder / "plan.json").exists():
        if place.rank:
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                print(f"process {place.rank} is waiting for process 0 to make {folder}; start that one too", flush=True)
            time.sleep(POLL_SECONDS)
            continue
        if folder.exists() and any(folder.iterdir()) and not (folder / "chunks").exists():
            raise ValueError(f"--output {folder} holds something else; give a new folder")
        try:
            (folder / "chunks").mkdir(parents=True, exist_ok=True)
            make_array(folder / "moments.npy", plan)
            write_json(folder / "plan.json", plan)
        except OSError as error:
            raise ValueError(f"cannot write --output {folder} ({error.strerror}); choose another folder") from None
    found = read_json(folder / "plan.json")
    others = [
        name for name in wanted if found.get(name) != wanted[name] and not (name == "vae" and wanted["vae_sha256"])
    ]
    if others:
        raise ValueError(f"--output {folder} holds latents with other {', '.join(others)}; give a new folder")
    if not (folder / "moments.npy").exists() or (folder / "moments.npy").stat().st_size != array_layout(plan)[1]:
        raise ValueError(f"{folder / 'moments.npy'} has lost its length; remove the folder and make it again")


def write_json(path: Path, contents: dict, indent: int | None = 1) -> None:
    """Write a dict as JSON, whole or not at all. Raises OSError if the disk refuses."""
    text = json.dumps(contents, indent=indent)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def array_layout(plan: dict) -> tuple[bytes, int, int]:
    """(header, size of the file, bytes of an image) of moments.npy."""
    shape, dtype = (plan["images"], 1 + plan["flip"], *plan["shape"]), np.dtype(plan["dtype"])
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    row = int(np.prod(shape[1:])) * dtype.itemsize
    return header.getvalue(), len(header.getvalue()) + plan["images"] * row, row


def make_array(path: Path, plan: dict) -> None:
    """Write an .npy file of the right size, empty as yet; its disk space is taken at once where the system can do that."""
    header, size, _ = array_layout(plan)
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
        file.truncate(size)


def chunk_path(folder: Path, number: int) -> Path:
    return folder / "chunks" / f"{number:07d}.json"


def encode_share(
    args: argparse.Namespace, listing: Listing, space: LatentSpace, folder: Path, plan: dict, device: torch.device,
    place: Place,
) -> None:  # fmt: skip
    """Encode and write the chunks that this process is to do and that are not there yet. Raises ValueError, OSError."""
    count = plan["images"]
    starts = [s for s in range(0, count, CHUNK)[place.rank :: place.world_size] if not chunk_path(folder, s // CHUNK).exists()]
    keys = [[(i, bool(f)) for i in range(s, min(s + CHUNK, count)) for f in range(1 + plan["flip"])] for s in starts]
    dataset = ImageDataset(listing, args.image_size, args.skip_bad_images)
    loader = make_loader(dataset, keys, args.num_workers, pin_memory=device.type == "cuda")
    header, _, row = array_layout(plan)
    progress = tqdm(starts, unit="chunk", disable=None if place.rank == 0 else True)
    with open(folder / "moments.npy", "r+b") as file, closing(read(loader)) as loaded:
        for start, (images, labels, bad) in zip(progress, loaded):
            if images is None or (bad and not args.skip_bad_images):
                raise ValueError(unreadable(bad, args.skip_bad_images))
            moments = torch.stack(space.moments(from_uint8(images.to(device))), dim=1)  # (n·flips, 2, C, h, w)
            stored = moments.cpu().numpy().astype(plan["dtype"])
            if not np.isfinite(stored).all():
                raise ValueError(
                    f"images {start} and following have latents beyond {plan['dtype']}; pass --latents-dtype float32"
                )
            content = stored.tobytes()
            file.seek(len(header) + start * row)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            done = {"crc32": zlib.crc32(content), "labels": labels[:: 1 + plan["flip"]].tolist()}
            done["bad_images"] = sorted({f"{path} ({reason})" for path, reason in bad})
            write_json(chunk_path(folder, start // CHUNK), done, indent=None)


def finish(folder: Path, plan: dict, presence: Presence) -> None:
    """Wait for every chunk, then write labels.npy and, last, manifest.json.

    Raises ValueError if a process has ended without its share, or a chunk's note is damaged.
    """
    wanted = [chunk_path(folder, number) for number in range(-(-plan["images"] // CHUNK))]
    told = time.monotonic()
    while missing := {path.name for path in wanted} - set(os.listdir(folder / "chunks")):
        ranks = {int(Path(name).stem) % presence.place.world_size for name in missing}
        absent = presence.missed(ranks)
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"waiting for {len(missing)} chunks of other processes{absent}", flush=True)
        time.sleep(POLL_SECONDS)
    if (folder / "manifest.json").exists():
        return
    chunks = [read_chunk(path, min(CHUNK, plan["images"] - number * CHUNK)) for number, path in enumerate(wanted)]
    bad = sorted({image for chunk in chunks for image in chunk["bad_images"]})
    for image in bad:
        print(f"skipped unreadable image {image}")
    labels = np.array([label for chunk in chunks for label in chunk["labels"]])

    def write_labels(temporary):
        with open(temporary, "wb") as file:
            np.save(file, labels)

    write_whole(folder / "labels.npy", write_labels)
    manifest = plan | {"bad_images": bad, "labels_crc32": zlib.crc32(labels.tobytes())}
    manifest["crc32"] = [chunk["crc32"] for chunk in chunks]
    write_json(folder / "manifest.json", manifest)


def read_chunk(path: Path, images: int) -> dict:
    """What the note of a chunk of so many images says: crc32, labels, bad_images. Raises ValueError if it is damaged."""
    chunk = read_json(path)
    labels, bad = chunk.get("labels"), chunk.get("bad_images")
    labels = labels if isinstance(labels, list) else []
    right = len(labels) == images and all(type(label) is int and 0 <= label < 2**31 for label in labels)
    if not (right and isinstance(bad, list) and all(isinstance(one, str) for one in bad) and type(chunk.get("crc32")) is int):
        raise ValueError(f"{path} is damaged; remove it and give the same command again")
    return chunk


def verify(folder: Path) -> list[str]:
    """What is wrong with a finished folder, a list of sentences. Raises ValueError if it is not finished."""
    try:
        manifest, moments, labels = open_cache(folder)
    except ValueError as error:
        raise ValueError(f"--verify {folder} holds no finished latents ({error}); give a folder that --output made") from None
    sums, chunk = manifest.get("crc32"), manifest.get("chunk")
    if not (isinstance(sums, list) and type(chunk) is int and 0 < chunk and len(sums) == -(-len(moments) // chunk)):
        raise ValueError(f"--verify {folder}: manifest.json has no checksums; give a folder that --output made")
    wrong = []
    for number, crc32 in enumerate(tqdm(sums, unit="chunk", disable=None)):
        first = number * chunk
        if zlib.crc32(moments[first : first + chunk].tobytes()) != crc32:
            wrong.append(f"moments.npy is damaged in images {first} to {min(first + chunk, len(moments)) - 1}")
    if zlib.crc32(labels.tobytes()) != manifest.get("labels_crc32"):
        wrong.append("labels.npy is damaged")
    return wrong


if __name__ == "__main__":
    main()
