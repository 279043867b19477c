"""One training step, and the state that lasts from step to step.

Every random number of a step is drawn for the whole global batch from a generator seeded with (seed, step); each process
takes its share. So a step's randomness depends on neither the number of processes nor on how the run got there.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

METRICS = ("loss", "mse", "vb", "gradient norm")  # of one step, in the order that train_step returns them


@dataclass
class TrainState:
    """What a step changes: the network, its moving average, the optimizer, and the number of steps done.

    `model` is the network as it is called in training, wrapped for several processes and mixed precision.
    """

    network: torch.nn.Module
    model: torch.nn.Module
    ema: torch.nn.Module
    opt: torch.optim.Optimizer
    step: int = 0

    def to_checkpoint(self, args, classes):
        """The dict that a checkpoint file holds (checkpoints.py says what is in it)."""
        return {
            "model": self.network.state_dict(), "ema": self.ema.state_dict(), "opt": self.opt.state_dict(),
            "args": args, "step": self.step, "config": self.network.config, "classes": classes,
            "rng": {"seed": args["global_seed"]},
        }  # fmt: skip

    def load_checkpoint(self, contents):
        """Take up network, moving average, optimizer and step from such a dict; the learning rate stays as it is.

        Raises ValueError if the optimizer's part is not of this network.
        """
        rates = [group["lr"] for group in self.opt.param_groups]
        self.network.load_state_dict(contents["model"])
        self.ema.load_state_dict(contents["ema"])
        try:
            self.opt.load_state_dict(contents["opt"])
        except KeyError as error:
            raise ValueError(f"the optimizer's state lacks {error}") from None
        for group, rate in zip(self.opt.param_groups, rates, strict=True):
            group["lr"] = rate
        self.step = contents["step"]


def new_state(network, wrap, lr):
    """A TrainState at step 0: AdamW at a constant rate without weight decay, and the average equal to the network.

    wrap(network) returns the model to call in training.
    """
    ema = requires_grad(deepcopy(network).eval(), False)
    opt = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=lr, weight_decay=0)
    return TrainState(network, wrap(network.train()), ema, opt)


class Draws(NamedTuple):
    """The random numbers of one process's share of a step, n samples: t (n,), drop (n,), and two noises (n, C, h, w)."""

    t: torch.Tensor
    drop: torch.Tensor
    vae_noise: torch.Tensor
    noise: torch.Tensor


def draw(seed, step, global_batch_size, latent, dropout_prob, num_timesteps, device, rank=0, world_size=1):
    """The Draws of process `rank` at a step; latent is the shape (C, h, w) of one sample.

    Drawn from one generator for the global batch, in the order drop, t, vae_noise, noise. A device's generator is its
    own: CPU and GPU give different numbers.
    """
    word = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    generator = torch.Generator(device).manual_seed(word)
    on = dict(generator=generator, device=device)
    drop = (torch.rand(global_batch_size, **on) < dropout_prob).long()
    t = torch.randint(num_timesteps, (global_batch_size,), **on)
    vae_noise = torch.randn(global_batch_size, *latent, **on)
    noise = torch.randn(global_batch_size, *latent, **on)
    share = global_batch_size // world_size
    return Draws(*(values[rank * share : (rank + 1) * share] for values in (t, drop, vae_noise, noise)))


def train_step(state, diffusion, latents, labels, draws, ema_decay):
    """One step of AdamW on latents (n, C, h, w) and labels (n,), and one of the moving average.

    Returns this process's METRICS, float32 (4,), on the device. Nothing is read back from it.
    """
    condition = {}
    if state.network.num_classes:
        condition["y"] = labels
    if state.network.null_label is not None:
        condition["force_drop_ids"] = draws.drop
    losses = diffusion.training_losses(state.model, latents, draws.t, condition, noise=draws.noise)
    loss, mse, vb = (losses[key].mean() for key in ("loss", "mse", "vb"))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.network.parameters() if p.grad is not None])
    state.opt.step()
    state.opt.zero_grad(set_to_none=True)
    update_ema(state.ema, state.network, ema_decay)
    state.step += 1
    return torch.stack([loss.detach(), mse.detach(), vb.detach(), norm])


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    """ema = decay·ema + (1 - decay)·model for every trained parameter, in bulk; buffers are copied, frozen tables left."""
    pairs = [(e, p) for e, p in zip(ema_model.parameters(), model.parameters(), strict=True) if p.requires_grad]
    averages, values = (list(column) for column in zip(*pairs))
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in zip(ema_model.buffers(), model.buffers(), strict=True):
        average.copy_(value)


def requires_grad(model, flag=True):
    """The model, each of its parameters now taking gradients or not."""
    return model.requires_grad_(flag)
