"""Parts of benchmarks.gpu: the autoencoder; the loader with training steps; DDP and FSDP2 in one
process.
"""

from functools import partial
from pathlib import Path
import statistics
import tempfile

from diffusers import AutoencoderKL
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cached_latents import ARCHITECTURE
from benchmarks.gpu_training import STEPS, Steps
from benchmarks.gpu_worker import attempt, take_turns
from benchmarks.loading import make_cache
from benchmarks.networks import random_network, trained
from benchmarks.sides import device, ratios
from data.batches import StepBatches
from data.cache import CachedLatents
from data.loader import make_loader
from runtime.devices import tf32
from training.loop import to_latents
from training.sharding import shard_network
from training.state import Recipe, new_state
from vae import LatentShape, LatentSpace

SPACE = LatentShape(
    ARCHITECTURE["latent_channels"], 2 ** (len(ARCHITECTURE["block_out_channels"]) - 1)
)


def latent_space(autoencoder=None):
    """Stable Diffusion's latent space; with an autoencoder it also encodes and decodes."""
    return LatentSpace(SPACE, ARCHITECTURE["scaling_factor"], 0.0, autoencoder)


def autoencoder(report, batch, image_size, rounds):
    """Encoding and decoding by Stable Diffusion's autoencoder, its weights random, as
    extract_latents.py and sampling do it.
    """
    torch.manual_seed(0)
    space = latent_space(AutoencoderKL(**ARCHITECTURE).to(device()).eval().requires_grad_(False))
    images = torch.rand(batch, 3, image_size, image_size, device=device()) * 2 - 1
    side = image_size // SPACE.ratio
    latents = torch.randn(batch, SPACE.channels, side, side, device=device())
    calls = {
        "encode": partial(space.encode, images, latents),
        "decode": partial(space.decode, latents),
    }

    def show(seconds):
        rates = {
            name: round(batch / statistics.median(times), 2) for name, times in seconds.items()
        }
        report.set(image_size=image_size, images_per_second=rates)

    with tf32(True), torch.no_grad():
        for call in calls.values():
            call()
        take_turns(report, calls, rounds, show)
    report.add(**report.found)


# ---- the loader ----


class Epoch:
    """Training steps from cached latents, as train.py's loop has them; calling it does so many."""

    def __init__(self, side, cache, workers, steps):
        self.side, self.steps, self.workers, self.space = side, steps, workers, latent_space()
        keys = StepBatches(len(cache), side.batch, seed=0, start=0, stop=10**6)
        self.batches = iter(make_loader(cache, keys, workers, pin_memory=device().type == "cuda"))

    def ready(self):
        """Use up what the workers have ready, so that none of it is for nothing; and do a step."""
        for _ in range(2 * self.workers):
            next(self.batches)
        self.side.ready()

    def load(self):
        """The next batch's latents and labels, on the device."""
        moments, labels, _ = next(self.batches)
        moments, labels = (x.to(device(), non_blocking=True) for x in (moments, labels))
        return to_latents(self.space, moments, self.side.draws.vae_noise), labels

    def __call__(self):
        for _ in range(self.steps):
            self.side.latents, self.side.labels = self.load()
            self.side.step()


def loading(report, model, batch, images, steps, workers, rounds):
    """Cached latents, of random numbers, to training steps end to end; against the steps and the
    loader alone.
    """
    with tempfile.TemporaryDirectory() as temporary, tf32(True):
        make_cache(Path(temporary), np.random.default_rng(0), images, np.float16)
        side = Steps(new_state(trained(random_network(model)), Recipe(bf16=True)))
        side.resize(batch)
        epoch = Epoch(side, CachedLatents(temporary), workers, steps)

        def alone():
            for _ in range(steps):
                side.step()

        def loader():
            for _ in range(steps):
                epoch.load()

        def show(seconds):
            rates = {
                name: round(batch * steps / statistics.median(times), 1)
                for name, times in seconds.items()
            }
            report.set(model=model, batch=batch, workers=workers, images_per_second=rates)

        calls = {"steps alone": alone, "loader alone": loader, "loader and steps": epoch}
        take_turns(report, calls, rounds, show, ready=lambda name: epoch.ready())
        report.add(**report.found)


# ---- one process of several ----


def one_process(report, model, batch, rounds):
    """A training step under DistributedDataParallel and FSDP2, in a group of one process: time as a
    ratio to a bare one.
    """
    kind = device().type
    with tempfile.TemporaryDirectory() as temporary, tf32(True):
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", init_method=f"file://{temporary}/store", rank=0,
            world_size=1,
        )  # fmt: skip
        wrappers = {
            "bare": {}, "DDP": {"wrap": DistributedDataParallel},
            "FSDP2": {"shard": partial(shard_network, device_type=kind, processes=1)},
        }  # fmt: skip
        sides, losses = {}, {}

        def begin(options):
            side = Steps(new_state(trained(random_network(model)), Recipe(bf16=True), **options))
            side.resize(batch)
            return side, side.ready()["loss"] / batch

        for name, options in wrappers.items():
            if begun := attempt(report, name, begin, options):
                sides[name], losses[name] = begun

        def show(seconds):
            rates = {
                name: round(batch * STEPS / statistics.median(times), 1)
                for name, times in seconds.items()
            }
            found = {"images_per_second": rates, "loss_of_the_first_step": losses}
            if "bare" in seconds:
                found["time_as_a_ratio_with_quartiles"] = ratios(seconds, "bare")
            report.set(model=model, batch=batch, **found)

        take_turns(report, sides, rounds, show, ready=lambda name: sides[name].ready())
        report.add(**report.found)
        dist.destroy_process_group()
