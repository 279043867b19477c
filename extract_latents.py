"""Cache the latents of a folder of images, so that training neither reads images nor runs the VAE.

    python extract_latents.py --data-path imagenet/train --output imagenet-latents
    torchrun --nproc_per_node=8 extract_latents.py --data-path imagenet/train --output imagenet-latents
    python extract_latents.py --verify imagenet-latents

What is cached is the mean and standard deviation of the VAE's posterior, of each image and its
mirror image: training draws afresh from it each time. moments.npy is one array (images, 1 or 2
flips, 2, C, h, w), labels.npy one of (images,); manifest.json says what they are, with a checksum
per chunk of images, and appears when all is done. The same command goes on where it stopped; the
result is the same on any number of processes.
"""

from runtime.command_line import Parser, door, end_at_interrupt, reason

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from pathlib import Path

from data.cache import CHUNK, describe, encode_share, finish, open_folder, verify
from data.listing import check_outside, list_images
from runtime.devices import process_device, tf32
from runtime.limits import check_memory, check_numbers
from runtime.presence import Presence
from runtime.surroundings import check_accelerate, own_place
from vae import LatentSpace, latent_shape, load_vae


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    data = parser.add_argument_group("data").add_argument
    data("--data-path", help="folder with one folder of images per class")
    data("--output", metavar="DIR", help="folder to write; for train.py --latents")
    data(
        "--verify", metavar="DIR",
        help="instead, compare the checksums of such a folder, and report",
    )  # fmt: skip
    data(
        "--image-size", type=int, default=256,
        help="pixels along each side, after the crop (default: %(default)s)",
    )  # fmt: skip
    data(
        "--num-classes", type=int, default=1000,
        help="0: none, all images below --data-path (default: %(default)s)",
    )  # fmt: skip
    data(
        "--flip", action=argparse.BooleanOptionalAction, default=True,
        help="also the mirror images (default: on)",
    )  # fmt: skip
    skipping = "put the next image in place of an unreadable one and list it, instead of stopping"
    data("--skip-bad-images", action="store_true", help=skipping)
    run = parser.add_argument_group("run").add_argument
    run("--vae", default="ema", help="ema, mse, a hub id, or a local folder (default: %(default)s)")
    dtypes = "how they are stored; float16 halves the size and is off by about 0.05%% (default: %(default)s)"
    run("--latents-dtype", choices=["float16", "float32"], default="float16", help=dtypes)
    tf32_help = "TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)"
    run("--tf32", action=argparse.BooleanOptionalAction, default=True, help=tf32_help)
    run(
        "--num-workers", type=int, default=4,
        help="loader processes per process (default: %(default)s)",
    )  # fmt: skip
    run(
        "--device",
        help="such as cpu or cuda:1 (default: the GPU of the process's rank, if there is one)",
    )
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
        # Which open_folder refuses, as what holds something else
        if folder.resolve() != Path(args.data_path).resolve():
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
        parser.fail(
            f"{error.filename or folder}: {error.strerror or error}; when that is mended, the same command goes on"
        )
    except ValueError as error:
        parser.fail(str(error))


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for missing flags and for sizes that do not fit."""
    for name in ("data_path", "output"):
        if getattr(args, name) is None:
            raise ValueError(
                f"--{name.replace('_', '-')} is missing; give --data-path and --output, or --verify"
            )
    check_numbers(args)
    check_memory(CHUNK * (1 + args.flip), args.image_size, "--image-size")
    if args.vae == "none":
        raise ValueError(
            "--vae none: pixels have no latents to cache; train on the images themselves"
        )
    latent_shape(args.vae).side(args.image_size)


if __name__ == "__main__":
    main()
