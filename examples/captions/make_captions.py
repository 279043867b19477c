"""Write scikit-learn's handwritten digits with captions, as Hugging Face's image folders have them.

    python examples/captions/make_captions.py --output captioned

DIR/train, DIR/left-out and DIR/heldout each get NNNN.png, as examples/digits/make_dataset.py
enlarges them, and metadata.jsonl, with several captions for each: "a thin narrow seven leaning
left", "a thin seven", "a seven leaning left" and so on. `left-out` has the training digits of 12
combinations of digit, thickness and slant that no network sees in training.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(EXAMPLES.parent), *(str(EXAMPLES / name) for name in ("digits", "captions", "shapes"))
]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from PIL import Image

from make_shapes import write_images
from words import combination, load_captioned


def captioned_images(digits):
    """(name, image, captions) of each of Digits."""
    for i, (image, captions) in enumerate(zip(digits.images, digits.captions())):
        yield f"{i:04d}.png", Image.fromarray(image).convert("RGB"), captions


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("captioned"),
        help="folder to write (default: %(default)s)",
    )  # fmt: skip
    return parser


@door(resumes=True)
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    parts, _, left = load_captioned()
    for name, digits in parts.items():
        write_images(args.output / name, captioned_images(digits))
        print(f"{len(digits.digits)} digits in {args.output / name}")
    print(f"left out of training: {'; '.join(combination(n).caption for n in left)}")


if __name__ == "__main__":
    main()
