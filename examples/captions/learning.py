"""Training on captioned digits as train.py does it: the same batches, captions and noise."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conditions.text import pieces
from data.batches import StepBatches
from training.step import draw, train_step
from vae import from_uint8

VAE = Path(__file__).resolve().parents[1] / "digits" / "vae"
CHANCES = 2  # which of a seed's streams of numbers chooses among captions


class Captioned(NamedTuple):
    """N digits as the autoencoder sees them: mean and deviation of latents (N, C, H, W), and the
    captions of each, a list.
    """

    mean: Tensor
    std: Tensor
    captions: list


@torch.no_grad()
def captioned(digits, space):
    """The Captioned of Digits, behind an autoencoder."""
    images = torch.from_numpy(digits.images)[:, None].expand(-1, 3, -1, -1)  # (N, 3, H, W)
    return Captioned(*space.moments(from_uint8(images)), list(digits.captions()))


def learn(state, data, space, seed, batch, steps):
    """Train a TrainState up to so many steps.

    Raises ValueError if a loss or gradient is not finite.
    """
    network = state.network
    batches = StepBatches(len(data.captions), batch, seed, state.step, steps, flip=False)
    while state.step < steps:
        indices = batches.indices(state.step)
        chances = np.random.default_rng([seed, CHANCES, state.step]).random(batch)
        several = [data.captions[i] for i in indices]
        text = pieces(
            [some[int(chance * len(some))] for some, chance in zip(several, chances)],
            network.text_length,
        )
        draws = draw(
            seed, state.step, batch, network.latent_shape, network.config["class_dropout_prob"],
            state.process, "cpu", drops=state.condition.drops,
        )  # fmt: skip
        latents = space.draw(data.mean[indices], data.std[indices], draws.vae_noise)
        if train_step(state, latents, text, draws)["bad"]:
            raise ValueError(f"the loss or gradient of step {state.step} is not finite")


@torch.no_grad()
def heldout_loss(network, process, data, space, levels=8):
    """The mean squared error on Captioned digits, each with its fullest caption, at so many times
    (the middles of equal parts) and with noise that is the same each time.
    """
    generator = torch.Generator().manual_seed(0)
    x = space.draw(data.mean, data.std, torch.zeros_like(data.mean))  # (N, C, H, W)
    text = pieces([several[0] for several in data.captions], network.text_length)
    losses = []
    for level in range(levels):
        t = torch.full((len(x),), (level + 0.5) / levels)
        noise = torch.randn(x.shape, generator=generator)
        predict = lambda x, t: network(x, t, y=text)  # noqa: E731
        losses.append(process.losses(predict, x, t, noise)["mse"].mean())
    return torch.stack(losses).mean().item()
