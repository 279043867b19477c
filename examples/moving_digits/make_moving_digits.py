"""Write scikit-learn's handwritten digits as clips in which they bounce: DIR/train/0 … 9 and
DIR/heldout/0 … 9.

    python examples/moving_digits/make_moving_digits.py --output moving-digits

A clip is a GIF of 16 frames of 32×32 grey pixels, without loss. One digit of 14×14 pixels moves
through it at a steady speed, 0.8 to 2 pixels a frame, and turns at the borders; its class is the
digit. The held-out clips show digits that no training clip shows, the fifth that
examples/digits/make_dataset.py holds out. A clip depends on the seed and on its number alone. With
--images, single frames of training digits anywhere in the field lie among the clips of train/.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "digits"), str(EXAMPLES / "moving_digits")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json

import numpy as np
from PIL import Image

from make_dataset import load_split
from moving import draw_motion, enlarge, places, random_frames, render
from runtime.clip_files import write_gif
from runtime.disk import write_whole
from runtime.json_files import read_json
from runtime.limits import Range, check_numbers

RATE = 10  # frames a second
MADE_FROM = "made_from.json"
COUNT, IMAGES, LENGTH = Range(1, 10**6), Range(0, 10**6), Range(2, 1000)


def make_clip(digit, frames, seed):
    """Frames uint8 (F, 32, 32) of a digit (14, 14) that starts and moves as `seed`, a list of
    whole numbers, has it.
    """
    starts, velocities = draw_motion(1, np.random.default_rng(seed))
    return render(digit[None], places(starts, velocities, frames))[0]  # (F, 32, 32)


def write_part(folder, digits, labels, count, frames, seed):
    """Write `count` clips as folder/LABEL/NNNNN.gif, which show the digits (N, 14, 14) in turns;
    files already there are left alone.
    """
    for number in range(count):
        chosen = number % len(digits)
        path = folder / str(labels[chosen]) / f"{number:05d}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            clip = make_clip(digits[chosen], frames, [*seed, number])
            write_gif(path, np.repeat(clip[..., None], 3, axis=-1), RATE)  # (F, 32, 32, 3)


def write_images(folder, digits, labels, count, seed):
    """Write `count` frames as folder/LABEL/NNNNN.png, as write_part writes clips."""
    for number in range(count):
        chosen = number % len(digits)
        path = folder / str(labels[chosen]) / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            generator = np.random.default_rng([*seed, number])
            (frame,) = random_frames(digits[chosen : chosen + 1], generator)  # (32, 32)
            image = Image.fromarray(frame).convert("RGB")
            write_whole(path, lambda temporary: image.save(temporary, format="png"))


def check_made_from(folder, frames, seed):
    """Note in a folder what its clips are made of. Raises ValueError if it has others."""
    wanted, file = {"frames": frames, "seed": seed}, folder / MADE_FROM
    if file.exists():
        if (there := read_json(file)) != wanted:
            raise ValueError(
                f"`output` {folder} has clips of {there}, wanted are those of {wanted}; give "
                "another folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(wanted) + "\n"
    write_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def build_parser():
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("moving-digits"),
        help="folder to write (default: %(default)s)")  # fmt: skip
    add("--clips", type=int, default=5748, help="to train on; 5,748 show each digit four times "
        "(default: %(default)s)")  # fmt: skip
    add("--heldout", type=int, default=720, help="clips of held-out digits (default: %(default)s)")
    add("--images", type=int, default=0, help="single frames to train on beside the clips "
        "(default: %(default)s)")  # fmt: skip
    add("--frames", type=int, default=16, help="of a clip (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


@door(resumes=True)
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args, clips=COUNT, heldout=COUNT, images=IMAGES, frames=LENGTH)
        check_made_from(args.output, args.frames, args.seed)
    train, train_labels, heldout, heldout_labels = load_split()
    parts = [("train", train, train_labels, args.clips),
             ("heldout", heldout, heldout_labels, args.heldout)]  # fmt: skip
    for number, (part, digits, labels, count) in enumerate(parts):
        seed = [args.seed, number]
        write_part(args.output / part, enlarge(digits), labels, count, args.frames, seed)
        print(f"{count} clips in {args.output / part}")
    if args.images:
        seed = [args.seed, len(parts)]
        write_images(args.output / "train", enlarge(train), train_labels, args.images, seed)
        print(f"{args.images} images in {args.output / 'train'}")


if __name__ == "__main__":
    main()
