"""Train the small autoencoder of the digits example and write it as a diffusers folder.

    python examples/digits/train_vae.py --data-path digits/train --output digits-vae

32×32 images become latents of 4×4×4. The loss is the squared error of the reconstruction plus a
small KL to N(0, 1); the scale factor is then set so that latents have unit variance, as Stable
Diffusion's is. 6 minutes on 2 cores.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import torch
from diffusers import AutoencoderKL

from data.images import read_all
from data.listing import list_images
from checkpoints.publish import check_free, whole_folder
from runtime.limits import check_numbers
from vae import from_uint8

KL_WEIGHT = 0.001
ARCHITECTURE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[8, 16, 32, 64], layers_per_block=1, norm_num_groups=8, latent_channels=4,
    sample_size=32,
)  # fmt: skip


def loss_of(autoencoder, images):
    """(squared error, KL) of a batch, each summed over an image and averaged over the batch."""
    posterior = autoencoder.encode(images).latent_dist
    error = (
        (autoencoder.decode(posterior.sample()).sample - images).square().sum(dim=(1, 2, 3)).mean()
    )
    return error, posterior.kl().mean()


@torch.no_grad()
def set_scale(autoencoder, images):
    """Store 1 / standard deviation of the latents as the scale factor."""
    latents = torch.cat(
        [autoencoder.encode(part).latent_dist.sample() for part in images.split(256)]
    )
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def train(images, steps, batch_size, lr, seed):
    """A new AutoencoderKL, trained on images for so many steps.

    Raises ValueError if it comes to nothing.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL(**ARCHITECTURE)
    opt = torch.optim.AdamW(autoencoder.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(1, steps + 1):
        error, kl = loss_of(autoencoder, images[torch.randint(len(images), (batch_size,))])
        opt.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 10.0)
        opt.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            print(f"step {step}: squared error {error.item():.2f}, kl {kl.item():.1f}", flush=True)
            if not error.isfinite():
                raise ValueError(f"the error of step {step} is not finite; lower `lr` {lr}")
    set_scale(autoencoder.eval(), images)
    return autoencoder


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--data-path", required=True, help="folder of training digits")
    parser.add_argument(
        "--output", required=True, help="folder to write config.json and weights to"
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="training steps (default: %(default)s)"
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
        listing = list_images(args.data_path, num_classes=0)
        images = from_uint8(read_all(listing, ARCHITECTURE["sample_size"]))
        with whole_folder(args.output) as folder:
            autoencoder = train(images, args.steps, args.batch_size, args.lr, args.seed)
            autoencoder.save_pretrained(folder)
    print(f"{args.output}: scale factor {autoencoder.config.scaling_factor}")


if __name__ == "__main__":
    main()
