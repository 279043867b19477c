"""Train the autoencoder of the moving digits' frames and write it as a diffusers folder.

    python examples/moving_digits/train_frames_autoencoder.py --output moving-vae

32×32 frames become latents of 4×8×8. Each step draws its frames anew: training digits, anywhere in
the field. The loss is the squared and the absolute error of the reconstruction, and a small KL to
N(0, 1). The scale and shift factors are then set so that latents have mean 0 and unit variance.
Weights are kept in half precision.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
HERE, DIGITS = EXAMPLES / "moving_digits", EXAMPLES / "digits"
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES), str(DIGITS), str(HERE)]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from functools import partial

import numpy as np

from autoencoder import train
from checkpoints.publish import check_free, whole_folder
from make_dataset import load_split
from moving import FIELD, as_batch, enlarge, random_frames
from runtime.limits import check_numbers

ARCHITECTURE = dict(
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8, latent_channels=4,
    sample_size=FIELD,
)  # fmt: skip
FOR_SCALE = 1000  # frames that tell the latents' scale


def draw_batch(digits, count, generator):
    """Frames (N, 3, 32, 32) in [-1, 1] of so many of digits (M, 14, 14), anywhere in the field."""
    chosen = generator.integers(len(digits), size=count)
    return as_batch(random_frames(digits[chosen], generator))  # (N, 3, 32, 32)


def train_on(digits, steps, batch_size, lr, seed):
    """An autoencoder of frames with digits (M, 14, 14) wherever they lie. Raises ValueError if it
    comes to nothing.
    """
    generator = np.random.default_rng(seed)
    draw, sample = (partial(draw_batch, digits, n, generator) for n in (batch_size, FOR_SCALE))
    return train(ARCHITECTURE, draw, sample, steps, lr, seed)


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--output", required=True, help="folder to write config.json and weights to"
    )
    parser.add_argument(
        "--steps", type=int, default=6000, help="training steps (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument(
        "--lr", type=float, default=2e-3,
        help="peak learning rate, cosine decay (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


@door("--batch-size")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args)
        check_free(args.output)
        digits = enlarge(load_split()[0])
        with whole_folder(args.output) as folder:
            autoencoder = train_on(digits, args.steps, args.batch_size, args.lr, args.seed)
            autoencoder.half().save_pretrained(folder)
    print(f"{args.output}: scale factor {autoencoder.config.scaling_factor}")


if __name__ == "__main__":
    main()
