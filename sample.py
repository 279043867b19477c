"""Sample images of classes, or of prompts, into one labelled picture.

    python sample.py                             # the released XL/2, ImageNet at 256 pixels
    python sample.py --image-size 512 --seed 1 --class-labels 207 88
    python sample.py --ckpt results/000-DiT-XL-2 --vae ema --sampler ddim --num-sampling-steps 50
    python sample.py --ckpt examples/digits/dit.safetensors --vae examples/digits/vae \\
      --class-labels 3 1 4 --trajectory 314.gif
    python sample.py --ckpt results/000-MMDiT-Ti-1 --prompt "a thick three" "a thin seven"

A checkpoint of this project says itself how its network is built; for others --model and
--num-classes do. --image-size 384 or 256x384, HEIGHTxWIDTH, asks for other pictures than the
network was trained on.
"""

from runtime.command_line import Parser, door, end_at_interrupt, reason

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from collections.abc import Collection
from pathlib import Path
import sys

import numpy as np

from checkpoints.choice import NUM_CLASSES
from checkpoints.loading import find_files
from conditions.labels import label_indices, readable
from conditions.reading import checked_prompts
from runtime.devices import choose_device, tf32
from runtime.disk import check_writable
from sampling.pictures import (
    GIF_MOMENTS, STRIP_MOMENTS, captions, ending, moments, picture, save, save_trajectory,
)  # fmt: skip
from sampling.flags import (
    add_sampling_flags, check_flags, network_choice, sampling_options,
)  # fmt: skip
from sampling.loading import VAE, build_sampler
from sampling.sampler import Sampler

IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    group = parser.add_argument_group("picture")
    group.add_argument(
        "--class-labels", nargs="+", metavar="LABEL",
        help="numbers, or names if the checkpoint knows them; index:3 or name:3 where 3 is both "
        "(default: eight classes)",
    )  # fmt: skip
    group.add_argument(
        "--prompt", nargs="+", metavar="TEXT",
        help="for a network that reads text: what to draw, a text for each image; ' ' is the empty "
        "prompt",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument(
        "--output", default="sample.png",
        help="file to write, replaced if it exists (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--trajectory",
        metavar="FILE",
        help="also write how the images came about, as what the network takes for the clean image "
        f"at up to {GIF_MOMENTS} steps: FILE.gif is an animation, another ending a strip of "
        f"{STRIP_MOMENTS}; replaced if it exists",
    )
    add_sampling_flags(parser, VAE, cfg_scale=4.0)
    return parser


@door("--image-size or the number of --class-labels, or of prompts")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    with parser.refusing():
        check_flags(args)
        choice, options = network_choice(args, given), sampling_options(args, given)
        check_output("--output", args.output)
        if args.trajectory:
            check_output("--trajectory", args.trajectory)
            if Path(args.trajectory).resolve() == Path(args.output).resolve():
                raise ValueError(
                    f"--trajectory and --output are both {args.output}; give two files"
                )
        device = choose_device(args.device)
        files = find_files(choice, VAE)
        sampler = build_sampler(choice, files, options, device)
        asked = parse_asked(args.class_labels, args.prompt, sampler)
    for note in sampler.notes(asked):
        print(f"note: {note}", file=sys.stderr)
    shown = moments(len(sampler.steps()), args.trajectory) if args.trajectory else ()
    used = options.settled(sampler.process, text=sampler.reads_text) | {
        "vae": files.vae, "prompt" if sampler.reads_text else "class_labels": asked,
        "image_size": sampler.image_size,
    }  # fmt: skip
    try:
        with tf32(args.tf32):
            images, frames = sample(sampler, asked, args.seed, shown)
        texts = captions(asked, sampler.network.num_classes, readable(sampler.classes))
        save(picture(images, texts), args.output, vars(args) | used)
        size = f"{images.shape[1]}x{images.shape[2]}"  # height x width, as --image-size
        print(f"wrote {args.output}: {len(images)} images of {size} pixels")
        if args.trajectory:
            save_trajectory([*frames[:-1], (None, images)], args.trajectory, texts)
            print(
                f"wrote {args.trajectory}: the images as predicted at {len(frames)} of "
                f"{len(sampler.steps())} steps"
            )
    except (ValueError, OSError) as error:  # Pillow's, too, of a picture too large for its format
        parser.fail(reason(error))


def check_output(flag: str, path: str) -> None:
    """Raise ValueError unless a picture can be written at path, in the format of its ending."""
    try:
        check_writable(path)
        ending(path)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def parse_asked(
    labels: list[str] | None, prompts: list[str] | None, sampler: Sampler
) -> list[int] | list[str]:
    """What --class-labels or --prompt ask a network for: class indices, or prompts where it reads
    text.

    Raises ValueError for the flag that the network does not have, for labels that it does not have,
    and without prompts.
    """
    if not sampler.reads_text:
        if prompts:
            raise ValueError(
                "--prompt: the network does not read text; leave the flag out"
                + (", and give --class-labels" if sampler.network.num_classes else "")
            )
        return parse_labels(labels, sampler.network.num_classes, sampler.classes)
    if labels:
        raise ValueError("--class-labels: the network reads text; give --prompt instead")
    if not prompts:
        raise ValueError(
            'the network reads text; say with --prompt what it is to draw, such as --prompt "a '
            'thick three" "a thin seven"; " " is the empty prompt'
        )
    return checked_prompts(prompts, "prompt")


def parse_labels(given: list[str] | None, num_classes: int, classes: list[str] | None) -> list[int]:
    """The class indices for --class-labels, numbers or names, or the default ones.

    Raises ValueError for a label that the network does not have.
    """
    if num_classes == 0:
        if given:
            raise ValueError(
                "--class-labels: the network was trained without classes; leave the flag out"
            )
        # placeholders, one per image: the network is not given them
        return [0] * len(IMAGENET_LABELS)
    if not given:
        return (
            IMAGENET_LABELS
            if num_classes == NUM_CLASSES
            else list(range(min(num_classes, len(IMAGENET_LABELS))))
        )
    try:
        return label_indices(given, num_classes, classes)
    except ValueError as error:
        raise ValueError(f"--class-labels {error}") from None


def sample(
    sampler: Sampler, asked: list[int] | list[str], seed: int, shown: Collection[int] = ()
) -> tuple[np.ndarray, list[tuple[float, np.ndarray]]]:
    """Images (N, H, W, 3) of labels or prompts, a uint8 array, and [(t, images as predicted at step
    t)] for the steps with the indices in `shown`.

    From torch's generator, seeded with `seed` just before the first draw.
    """
    frames = []
    for i, out in enumerate(sampler.seeded_trajectory(asked, seed, progress=True)):
        if i in shown:
            frames.append((out["t"], sampler.decode(out["pred_xstart"]).cpu().numpy()))
    return sampler.decode(out["sample"]).cpu().numpy(), frames


if __name__ == "__main__":
    main()
