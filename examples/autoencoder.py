"""How examples train an autoencoder of diffusers: the loss, the steps, and the latents' scale."""

import json

from diffusers import AutoencoderKL
import torch

ABSOLUTE, KL = 0.5, 0.03  # weights in the loss, beside 1 for the squared error
WARMUP, GRAD_CLIP = 100, 100.0
LOG_EVERY = 100
AT_ONCE = 64  # images that are encoded together for the scale


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
    """Store the latents' mean and 1 / standard deviation, as Stable Diffusion 3's are, of images
    (N, 3, H, W).
    """
    parts = [autoencoder.encode(part).latent_dist.sample() for part in images.split(AT_ONCE)]
    latents = torch.cat(parts)
    autoencoder.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 5),
        shift_factor=round(latents.mean().item(), 5),
    )


def train(architecture, draw, sample, steps, lr, seed):
    """A new AutoencoderKL of an architecture, trained for so many steps on the batches (N, 3, H, W)
    that draw() gives; its scale is that of the images of sample().

    Raises ValueError if it comes to nothing.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL(**architecture)
    opt = torch.optim.AdamW(autoencoder.parameters(), lr=lr, betas=(0.9, 0.99))
    warm = torch.optim.lr_scheduler.LinearLR(opt, 1 / WARMUP, total_iters=WARMUP)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(1, steps + 1):
        loss, parts = loss_of(autoencoder, draw())
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
    set_scale(autoencoder.eval(), sample())
    return autoencoder
