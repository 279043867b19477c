"""Cache the latents of a folder of images, so that training neither reads images nor runs the VAE.

    python extract_latents.py --data-path imagenet/train --output latents
    torchrun --nproc_per_node=8 extract_latents.py --data-path imagenet/train --output latents
    python extract_latents.py --data-path captioned --output latents \\
        --text-encoder sd3/text_encoder sd3/text_encoder_2 sd3/text_encoder_3
    python extract_latents.py --data-path clips --output latents --clips --frame-rate 8
    python extract_latents.py --verify latents

What is cached is the mean and standard deviation of the VAE's posterior, of each image and its
mirror image: training draws afresh from it each time. moments.npy is one array (images, 1 or 2
flips, 2, C, h, w), labels.npy one of (images,); manifest.json says what they are, with a checksum
per chunk of images, and appears when all is done. Where images have captions (NAME.txt beside one,
or metadata.jsonl), captions.jsonl has them. With --sizes images keep their shape: moments.npy is
then one row of numbers, and shapes.npy (images, 2) has h and w of each. The same command goes on
where it stopped; the result is the same on any number of processes.
With --clips the images are all frames of videos, GIFs and folders of frames, end to end, and
clips.npy has a row for each clip: its first frame, how many it has, its label and its rate.
With --text-encoder the folder text/ beside them has what encoders made of the images' captions.
"""

from runtime.command_line import Parser, check_alone, door, end_at_interrupt, read_size

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from data.cache import find_damage
from data.cache_format import DTYPES
from data.cache_writer import fill_cache, plan_cache
from data.options import CacheOptions, TextCacheOptions
from data.shapes import SIZES, SQUARE
from data.text_cache import TEXT_MANIFEST, find_text_damage
from data.text_writer import cache_text, prepare_text, told


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    data = parser.add_argument_group("data").add_argument
    data(
        "--data-path",
        help="folder with one folder of images per class, or of captioned images in any folders",
    )  # fmt: skip
    data("--output", metavar="DIR", help="folder to write; for train.py --latents")
    data(
        "--verify", metavar="DIR",
        help="instead, compare the checksums of such a folder, and report",
    )  # fmt: skip
    data(
        "--image-size", type=read_size, default=CacheOptions.image_size,
        help="pixels along each side, or HEIGHTxWIDTH, after the crop (default: %(default)s)",
    )  # fmt: skip
    data(
        "--sizes", choices=(SQUARE, *SIZES), default=CacheOptions.sizes,
        help="what images are brought to: squares; the bucket nearest to their shape, for train.py "
        "--aspect-buckets; or a size of their own, for train.py --pack. All have at most "
        "--image-size squared pixels (default: %(default)s)",
    )  # fmt: skip
    data(
        "--patch-size", type=int, default=CacheOptions.patch_size, metavar="P",
        help="of the networks to train: sides of buckets and of own sizes are multiples of P "
        "latents (default: %(default)s)",
    )  # fmt: skip
    data(
        "--num-classes", type=int, default=CacheOptions.num_classes,
        help="0: none, all images below --data-path, as for captions (default: %(default)s)",
    )  # fmt: skip
    data(
        "--flip", action=argparse.BooleanOptionalAction, default=CacheOptions.flip,
        help="also the mirror images (default: on)",
    )  # fmt: skip
    skipping = "put the next image in place of an unreadable one and list it, instead of stopping"
    data("--skip-bad-images", action="store_true", help=skipping)
    add_clip_flags(parser)
    run = parser.add_argument_group("run").add_argument
    vae = "ema, mse, a hub id, or a local folder (default: %(default)s)"
    run("--vae", default=CacheOptions.vae, help=vae)
    add_text_flags(parser)
    run(
        "--latents-dtype", choices=DTYPES, default=CacheOptions.latents_dtype,
        help="how they are stored; float16 halves the size and is off by about 0.05%% "
        "(default: %(default)s)",
    )  # fmt: skip
    tf32_help = "TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)"
    run(
        "--tf32", action=argparse.BooleanOptionalAction, default=CacheOptions.tf32, help=tf32_help
    )
    run(
        "--num-workers", type=int, default=CacheOptions.num_workers,
        help="loader processes per process (default: %(default)s)",
    )  # fmt: skip
    run(
        "--device",
        help="such as cpu or cuda:1 (default: the GPU of the process's rank, if there is one)",
    )
    return parser


def add_clip_flags(parser: Parser) -> None:
    """Add the flags for clips."""
    add = parser.add_argument_group("clips").add_argument
    add(
        "--clips", action="store_true",
        help="--data-path holds clips (videos, GIFs, folders of frames), for train.py --frames",
    )  # fmt: skip
    rate = "bring clips to so many frames per second (default: as they are)"
    add("--frame-rate", type=float, metavar="R", help=rate)


def add_text_flags(parser: Parser) -> None:
    """Add the flags that say which encoders read the images' captions."""
    add = parser.add_argument_group("captions").add_argument
    encoders = (
        "also cache what these make of the images' captions, for networks that read text: T5 and "
        "CLIP, each a local folder or a hub id; several are joined as in Stable Diffusion 3"
    )
    add("--text-encoder", nargs="+", metavar="NAME", help=encoders)
    length = "tokens that a T5 reads; CLIP reads as many as it can (default: %(default)s)"
    add("--text-length", type=int, default=TextCacheOptions.text_length, metavar="N", help=length)


@door("--image-size", resumes=True)
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        if args.verify is not None:
            check_alone("verify", parser.given(argv), "looks at what is there")
            return verify(parser, args.verify)
        if args.text_encoder is None and "text_length" in parser.given(argv):
            raise ValueError("`text_length` is for `text_encoder`; give that too, or neither")
        if args.text_encoder is not None and args.clips:
            raise ValueError(
                "`text_encoder` reads the captions of images; leave it out with `clips`, and train "
                "a network that has an encoder of its own"
            )
        planned = plan_cache(chosen(args))
        text = None if args.text_encoder is None else prepare_text(chosen(args, TextCacheOptions))
    try:
        for note in planned.notes if planned.place.rank == 0 else ():
            print(f"note: {note}", flush=True)
        fill_cache(planned)
        if planned.place.rank == 0:
            print(f"{told_of(planned.plan)} in {planned.folder}")
        if text is not None:
            report(cache_text(text), planned.place.rank)
    except BrokenPipeError:  # of the output, which `door` answers
        raise
    except OSError as error:
        where = f"{error.filename or planned.folder}: {error.strerror or error}"
        parser.fail(f"{where}; when that is mended, the same command goes on")
    except ValueError as error:
        parser.fail(str(error))


def told_of(plan: dict) -> str:
    """How much a plan is of."""
    if "clips" in plan:
        return f"{plan['clips']} clips, {plan['images']} frames,"
    return f"{plan['images']} images"


def report(text: dict, rank: int) -> None:
    """Print, in the first process, what was read."""
    for sentence in told(text) if rank == 0 else ():
        print(sentence)


def chosen(args: argparse.Namespace, kind: type = CacheOptions) -> Any:
    """The options that the flags give. Raises ValueError if one is missing."""
    for name in ("data_path", "output"):
        if getattr(args, name) is None:
            raise ValueError(
                f"`{name}` is missing; give `data_path` and `output`, or `verify`"
            )
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def verify(parser: Parser, folder: str) -> None:
    """Print that a cache is whole, or leave the program saying what is damaged."""
    damaged = find_damage(folder, "verify")
    if (Path(folder) / TEXT_MANIFEST).exists():
        damaged += find_text_damage(folder)
    if damaged:
        parser.fail(f"{'; '.join(damaged)}; remove the folder and make it again")
    print(f"{folder}: every checksum is right")


if __name__ == "__main__":
    main()
