"""Train the small autoencoder of the digits example and write it as a diffusers folder.

    python examples/digits/train_vae.py --data-path digits/train --output digits-vae

32×32 images become latents of 4×4×4. The loss is the squared error of the reconstruction plus a small KL to N(0, 1);
the scale factor is then set so that latents have unit variance, as Stable Diffusion's is. 6 minutes on 2 cores.
"""

import argparse
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors import SafetensorError
import torch
from diffusers import AutoencoderKL

from data import ImageDataset, list_images
from vae import from_uint8

KL_WEIGHT = 0.001
ARCHITECTURE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[8, 16, 32, 64], layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=32,
)  # fmt: skip


def load_images(folder):
    """Every image below the folder, float32 (N, 3, 32, 32) in [-1, 1]."""
    dataset = ImageDataset(list_images(folder, num_classes=0), ARCHITECTURE["sample_size"])
    return from_uint8(torch.stack([dataset[i, False][0] for i in range(len(dataset))]))


def loss_of(autoencoder, images):
    """(squared error, KL) of a batch, each summed over an image and averaged over the batch."""
    posterior = autoencoder.encode(images).latent_dist
    error = (autoencoder.decode(posterior.sample()).sample - images).square().sum(dim=(1, 2, 3)).mean()
    return error, posterior.kl().mean()


@torch.no_grad()
def set_scale(autoencoder, images):
    """Store 1 / standard deviation of the latents as the scale factor."""
    latents = torch.cat([autoencoder.encode(part).latent_dist.sample() for part in images.split(256)])
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, help="folder of training digits")
    parser.add_argument("--output", required=True, help="folder to write config.json and weights to")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate, cosine decay (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)

    if Path(args.output).exists():
        parser.error(f"--output {args.output} exists already; give the name of a folder to make")
    try:
        images = load_images(args.data_path)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    autoencoder = AutoencoderKL(**ARCHITECTURE)
    opt = torch.optim.AdamW(autoencoder.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    for step in range(1, args.steps + 1):
        error, kl = loss_of(autoencoder, images[torch.randint(len(images), (args.batch_size,))])
        opt.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 10.0)
        opt.step()
        schedule.step()
        if step % 500 == 0 or step == args.steps:
            print(f"step {step}: squared error {error.item():.2f}, kl {kl.item():.1f}", flush=True)
    set_scale(autoencoder.eval(), images)
    try:
        autoencoder.save_pretrained(args.output)
    except (OSError, SafetensorError) as error:
        parser.exit(1, f"{parser.prog}: error: cannot write {args.output} ({error}); make room, delete it, and try again\n")
    print(f"{args.output}: scale factor {autoencoder.config.scaling_factor}")


if __name__ == "__main__":
    main()
