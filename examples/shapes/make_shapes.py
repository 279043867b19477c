"""Write coloured shapes as a data set: a folder for each shape, and captions.

    python examples/shapes/make_shapes.py --output shapes

DIR/train and DIR/heldout get one folder for each of six shapes, with 64×64 PNGs on white, and
metadata.jsonl with captions: "a small red circle at the top left", "a red circle" and so on. Colour
× shape × size × place are all there, some places off by a few pixels; only six pairs of shape and
colour are in neither, so that a network can be asked for what it has not seen.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "shapes")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json
import random

from drawing import all_shapes, drawn
from runtime.disk import write_whole

METADATA = "metadata.jsonl"
SHIFT, LARGER = 0.04, 0.15  # at most: moved by a share of the side, enlarged or reduced
SEED = 0
HELD_OUT = 5  # every so manieth image


def write_images(folder, images):
    """Write [(name below the folder, image, captions)] and metadata.jsonl; files that are there
    already are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, image, captions in images:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines.append(json.dumps({"file_name": name, "text": captions}, ensure_ascii=False) + "\n")
        if not path.exists():
            write_whole(path, lambda temporary: image.save(temporary, format="png"))
    if not (folder / METADATA).exists():
        text = "".join(lines)
        write_whole(
            folder / METADATA, lambda temporary: temporary.write_text(text, encoding="utf-8")
        )


def shape_images(copies):
    """Every shape that may be trained on, so many times: (name, image, captions)."""
    chance = random.Random(SEED)
    for number, shape in enumerate(all_shapes() * copies):
        shift = (chance.uniform(-SHIFT, SHIFT), chance.uniform(-SHIFT, SHIFT))
        image = drawn(shape, shift, 1 + chance.uniform(-LARGER, LARGER))
        yield f"{shape.shape}/{shape.colour}-{number:04d}.png", image, shape.captions()


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("shapes"),
        help="folder to write (default: %(default)s)",
    )  # fmt: skip
    return parser


@door(resumes=True)
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    images = list(shape_images(copies=2))
    held_out = images[::HELD_OUT]
    train = [image for i, image in enumerate(images) if i % HELD_OUT]
    for part, chosen in (("train", train), ("heldout", held_out)):
        write_images(args.output / part, chosen)
        print(f"{len(chosen)} shapes in {args.output / part}")


if __name__ == "__main__":
    main()
