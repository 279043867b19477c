"""Train the emoji's autoencoder and write it as a diffusers folder.

    python examples/emoji/train_autoencoder.py --data-path emoji/words --output emoji-vae

64×64 images become latents of 4×16×16. The loss is the squared and the absolute error of the
reconstruction, and a small KL to N(0, 1). The scale and shift factors are then set so that latents
have mean 0 and unit variance. Images are mirrored at random. Weights are kept in half precision.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "emoji")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json

from diffusers import AutoencoderKL
import torch

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
ABSOLUTE, KL = 0.5, 0.03  # weights in the loss, beside 1 for the squared error
WARMUP, GRAD_CLIP = 100, 100.0
LOG_EVERY = 100


def loss_of(autoencoder, images):
    """(loss, {its parts}) of images (N, 3, H, W), summed over an image, averaged over the batch."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
    off = decoded.float() - images  # (N, 3, H, W)
    squared, absolute = (part.sum(dim=(1, 2, 3)).mean() for part in (off.square(), off.abs()))
    kl = posterior.kl().mean()
    parts = {"squared": squared.item(), "absolute": absolute.item(), "kl": kl.item()}
    return squared + ABSOLUTE * absolute + KL * kl, parts


@torch.no_grad()
def set_scale(autoencoder, images):
    """Store the latents' mean and 1 / standard deviation, as Stable Diffusion 3's are."""
    latents = torch.cat(
        [autoencoder.encode(from_uint8(part)).latent_dist.sample() for part in images.split(64)]
    )
    autoencoder.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 5),
        shift_factor=round(latents.mean().item(), 5),
    )


def train(images, steps, batch_size, lr, seed):
    """A new AutoencoderKL, trained on images uint8 (N, 3, 64, 64) for so many steps.

    Raises ValueError if it comes to nothing.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL(**ARCHITECTURE)
    opt = torch.optim.AdamW(autoencoder.parameters(), lr=lr, betas=(0.9, 0.99))
    warm = torch.optim.lr_scheduler.LinearLR(opt, 1 / WARMUP, total_iters=WARMUP)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(1, steps + 1):
        batch = from_uint8(images[torch.randint(len(images), (batch_size,))])
        mirrored = torch.rand(batch_size, 1, 1, 1) < 0.5
        loss, parts = loss_of(autoencoder, torch.where(mirrored, batch.flip(-1), batch))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), GRAD_CLIP)
        opt.step()
        warm.step()
        down.step()
        if step % LOG_EVERY == 0 or step == steps:
            rounded = {name: round(part, 1) for name, part in parts.items()}
            print(json.dumps({"step": step} | rounded), flush=True)
            if not loss.isfinite():
                raise ValueError(f"the loss of step {step} is not finite; lower `lr` {lr}")
    autoencoder.half().float()  # what is written, so that the scale is that of what is read
    set_scale(autoencoder.eval(), images[:: len(images) // 1000 or 1])
    return autoencoder


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
            autoencoder = train(images, args.steps, args.batch_size, args.lr, args.seed)
            autoencoder.half().save_pretrained(folder)
    print(f"{args.output}: scale factor {autoencoder.config.scaling_factor}")


if __name__ == "__main__":
    main()
