"""Write scikit-learn's handwritten digits as folders of images: DIR/train/0 … 9 and DIR/heldout/0 …
9.

    python examples/digits/make_dataset.py --output digits

1,797 real digits of 8×8 pixels, enlarged to 32×32 RGB. A fifth, stratified by class and the same on
every machine, is held out: the VAE, the DiT and the classifier that judges them never see it in
training.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from runtime.disk import write_whole

IMAGE_SIZE = 32
SIDE, LEVELS = 8, 16  # of the digits as they come
SPLIT_SEED = 0


def load_split():
    """(train pixels (1437, 8, 8), train labels, held-out pixels (360, 8, 8), held-out labels),
    pixels 0 to 16.
    """
    digits = load_digits()
    train, heldout, train_labels, heldout_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, random_state=SPLIT_SEED, stratify=digits.target
    )
    return train, train_labels, heldout, heldout_labels


def enlarge(pixels):
    """Digits (N, 8, 8) in 0 to 16 → uint8 (N, 32, 32), smooth, and such that `reduce` gives the
    digits back.

    Bicubic enlarging alone would blur them; so what is lost of each block's mean is added again, a
    few times over.
    """
    images = np.zeros((len(pixels), IMAGE_SIZE, IMAGE_SIZE))
    for _ in range(8):
        missing = (pixels - block_means(images)).astype(np.float32)
        tiles = (
            Image.fromarray(m).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            for m in missing
        )
        images = np.clip(images + np.stack([np.asarray(tile) for tile in tiles]), 0, LEVELS)
    return np.uint8(images * 255 / LEVELS + 0.5)


def block_means(images):
    """Images (N, 32, 32) → (N, 8, 8), the mean of each block of 4×4 pixels."""
    block = IMAGE_SIZE // SIDE
    return images.reshape(-1, SIDE, block, SIDE, block).mean(axis=(2, 4))


def reduce(images):
    """Images uint8 (N, 32, 32, 3) → digits (N, 8, 8) in 0 to 16."""
    return block_means(images.mean(axis=-1)) * LEVELS / 255


def write_folder(folder, pixels, labels):
    """Write digits as folder/LABEL/NNNN.png; files already there are left alone."""
    for i, (image, label) in enumerate(zip(enlarge(pixels), labels)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            picture = Image.fromarray(image).convert("RGB")
            write_whole(path, lambda temporary: picture.save(temporary, format="png"))


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("digits"), help="folder to write (default: %(default)s)"
    )
    return parser


@door(resumes=True)
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    train, train_labels, heldout, heldout_labels = load_split()
    write_folder(args.output / "train", train, train_labels)
    write_folder(args.output / "heldout", heldout, heldout_labels)
    print(
        f"{len(train)} digits in {args.output / 'train'}, {len(heldout)} held out in "
        f"{args.output / 'heldout'}"
    )


if __name__ == "__main__":
    main()
