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
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "digits"), str(EXAMPLES / "moving_digits")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json

from diffusers import AutoencoderKL
import numpy as np
import torch

from checkpoints.publish import check_free, whole_folder
from make_dataset import load_split
from moving import FIELD, as_batch, enlarge, random_frames
from runtime.limits import check_numbers

ARCHITECTURE = dict(
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8, latent_channels=4,
    sample_size=FIELD,
)  # fmt: skip
ABSOLUTE, KL = 0.5, 0.03  # weights in the loss, beside 1 for the squared error
WARMUP, GRAD_CLIP = 100, 100.0
LOG_EVERY = 200


def draw_batch(digits, count, generator):
    """Frames (N, 3, 32, 32) in [-1, 1] of so many of digits (M, 14, 14), anywhere in the field."""
    chosen = generator.integers(len(digits), size=count)
    return as_batch(random_frames(digits[chosen], generator))  # (N, 3, 32, 32)


def loss_of(autoencoder, frames):
    """(loss, {its parts}) of frames (N, 3, H, W), summed over a frame, averaged over the batch."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = autoencoder.encode(frames).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
    off = decoded.float() - frames  # (N, 3, H, W)
    squared, absolute = (part.sum(dim=(1, 2, 3)).mean() for part in (off.square(), off.abs()))
    kl = posterior.kl().mean()
    parts = {"squared": squared.item(), "absolute": absolute.item(), "kl": kl.item()}
    return squared + ABSOLUTE * absolute + KL * kl, parts


@torch.no_grad()
def set_scale(autoencoder, frames):
    """Store the latents' mean and 1 / standard deviation, as Stable Diffusion 3's are."""
    latents = autoencoder.encode(frames).latent_dist.sample()
    autoencoder.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 5),
        shift_factor=round(latents.mean().item(), 5),
    )


def train(digits, steps, batch_size, lr, seed):
    """A new AutoencoderKL, trained for so many steps on digits (M, 14, 14) wherever they lie.

    Raises ValueError if it comes to nothing.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    autoencoder = AutoencoderKL(**ARCHITECTURE)
    opt = torch.optim.AdamW(autoencoder.parameters(), lr=lr, betas=(0.9, 0.99))
    warm = torch.optim.lr_scheduler.LinearLR(opt, 1 / WARMUP, total_iters=WARMUP)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(1, steps + 1):
        loss, parts = loss_of(autoencoder, draw_batch(digits, batch_size, generator))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), GRAD_CLIP)
        opt.step()
        warm.step()
        down.step()
        if step % LOG_EVERY == 0 or step == steps:
            rounded = {name: round(part, 2) for name, part in parts.items()}
            print(json.dumps({"step": step} | rounded), flush=True)
            if not loss.isfinite():
                raise ValueError(f"the loss of step {step} is not finite; lower `lr` {lr}")
    autoencoder.half().float()  # what is written, so that the scale is that of what is read
    set_scale(autoencoder.eval(), draw_batch(digits, 1000, generator))
    return autoencoder


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
            autoencoder = train(digits, args.steps, args.batch_size, args.lr, args.seed)
            autoencoder.half().save_pretrained(folder)
    print(f"{args.output}: scale factor {autoencoder.config.scaling_factor}")


if __name__ == "__main__":
    main()
