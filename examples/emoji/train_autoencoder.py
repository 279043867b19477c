"""Train the emoji's autoencoder and write it as a diffusers folder.

    python examples/emoji/train_autoencoder.py --data-path emoji/words --output emoji-vae

64×64 images become latents of 4×16×16. The loss is the squared and the absolute error of the
reconstruction, and a small KL to N(0, 1). The scale and shift factors are then set so that latents
have mean 0 and unit variance. Images are mirrored at random. Weights are kept in half precision.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES), str(EXAMPLES / "emoji")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from functools import partial

import torch

from autoencoder import train
from checkpoints.publish import check_free, whole_folder
from data.images import read_all
from data.listing import list_images
from runtime.limits import check_numbers
from sources import SIDE
from vae import from_uint8

ARCHITECTURE = dict(
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    block_out_channels=[16, 48, 96], layers_per_block=1, norm_num_groups=8, latent_channels=4,
    sample_size=SIDE,
)  # fmt: skip


def draw_batch(images, count):
    """Images (N, 3, 64, 64) in [-1, 1]: so many of images uint8 (M, 3, 64, 64), half of them
    mirrored.
    """
    batch = from_uint8(images[torch.randint(len(images), (count,))])
    mirrored = torch.rand(count, 1, 1, 1) < 0.5
    return torch.where(mirrored, batch.flip(-1), batch)


def train_on(images, steps, batch_size, lr, seed):
    """An autoencoder of images uint8 (N, 3, 64, 64). Raises ValueError if it comes to nothing."""
    some = images[:: len(images) // 1000 or 1]
    draw, sample = partial(draw_batch, images, batch_size), partial(from_uint8, some)
    return train(ARCHITECTURE, draw, sample, steps, lr, seed)


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--data-path", required=True, help="folder of images")
    parser.add_argument(
        "--output", required=True, help="folder to write config.json and weights to"
    )
    parser.add_argument(
        "--steps", type=int, default=5000, help="training steps (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
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
        images = read_all(list_images(args.data_path, num_classes=0), SIDE)
        with whole_folder(args.output) as folder:
            autoencoder = train_on(images, args.steps, args.batch_size, args.lr, args.seed)
            autoencoder.half().save_pretrained(folder)
    print(f"{args.output}: scale factor {autoencoder.config.scaling_factor}")


if __name__ == "__main__":
    main()
