"""Make the files of this folder with an earlier version: python make.py CHECKOUT, in an empty
folder.

CHECKOUT is a worktree of the commit that README.md names. All paths given to its doors are
relative, so that none of this machine gets into a file.
"""

from contextlib import suppress
from functools import partial
import json
import os
from pathlib import Path
import shutil
import signal
import sys
import time
from unittest import mock

import numpy as np
from PIL import Image
import torch

sys.path.insert(0, sys.argv[1])

from checkpoints import Weights, save_weights
from diffusers import AutoencoderKL
import evaluate
import export
import extract_latents
from models import DiT, DiT_models
import sample_ddp
from safetensors.torch import save_file
import sampling
import train

COMMANDS = json.loads(Path(__file__).with_name("commands.json").read_text(encoding="utf-8"))
TRAIN, MANY, EXTRACT, SCORE = (
    COMMANDS[door].split() for door in ("train", "sample_ddp", "extract_latents", "evaluate")
)
STOP_AT = 3


def make_images():
    """A folder of three classes with four images each."""
    source = np.random.default_rng(0)
    for i in range(12):
        path = Path("images", ["ape", "bee", "cat"][i % 3], f"{i:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (16, 21, 3), dtype=np.uint8)).save(path)


def make_vae():
    """A folder with an autoencoder of ratio 2 and random weights."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, latent_channels=4,
        sample_size=8,
    ).save_pretrained("vae")  # fmt: skip


def save_network(path, channels, side):
    """A file of random weights with configuration and class names."""
    network = DiT(side, 2, channels, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    source = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=source) * 0.05
    save_weights(Path(path), Weights(network.state_dict(), network.config, ["ape", "bee", "cat"]))


def make_run():
    """results/: a run that a signal ended after STOP_AT steps; finished.safetensors: the weights
    with which an undisturbed one ends.
    """
    tiny = partial(DiT, patch_size=8, hidden_size=16, depth=1, num_heads=2)
    with mock.patch.dict(DiT_models, {"DiT-Ti/8": tiny}):
        train.main([*TRAIN, "--results-dir", "undisturbed"])
        step, count = train.train_step, iter(range(1, 100))

        def stopped(*args, **options):
            if next(count) == STOP_AT:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **options)

        with mock.patch("train.train_step", stopped):
            train.main(TRAIN)
    [lock] = Path("results").glob("*/lock")
    lock.write_bytes(b"")  # it named the process and the machine
    [file] = Path("undisturbed").glob("*/checkpoints/0000008.pt")
    contents = torch.load(file, weights_only=True)
    tensors = {f"model.{k}": v for k, v in contents["model"].items()}
    tensors |= {f"ema.{k}": v for k, v in contents["ema"].items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, "finished.safetensors")
    shutil.copy(file.parents[1] / "metrics.jsonl", "finished.jsonl")
    shutil.rmtree("undisturbed")


def make_samples():
    """samples/: a folder of sample_ddp.py that was interrupted after its first batch, and what an
    undisturbed one packs, finished.npz.
    """
    save_network("dit.safetensors", channels=3, side=8)
    sample_ddp.main([*MANY, "--sample-dir", "undisturbed"])
    [packed] = Path("undisturbed").glob("*.npz")
    packed.rename("finished.npz")
    shutil.rmtree("undisturbed")
    sample, calls = sampling.Sampler.numbered_latents, iter(range(100))

    def interrupted(*args):
        if next(calls) == 1:
            while len(list(Path("samples").glob("*/[0-9]*.png"))) < 3:
                time.sleep(0.1)
            raise KeyboardInterrupt
        return sample(*args)

    with mock.patch.object(sampling.Sampler, "numbered_latents", interrupted):
        with suppress(SystemExit):
            sample_ddp.main(MANY)


def make_latents_and_exports():
    """latents/: a cache; pretrained/ and pipeline/: a network behind the autoencoder in vae/, for
    the hub and for diffusers.
    """
    make_vae()
    extract_latents.main(EXTRACT)
    save_network("latent.safetensors", channels=4, side=8)
    network = ["--ckpt", "latent.safetensors", "--vae", "vae"]
    export.main([*network, "--output", "pretrained"])
    export.main([*network, "--format", "diffusers", "--output", "pipeline"])


def make_reference():
    """reference.npz, and scores.json of a few images against it."""
    reference = ["--make-reference", "images", "--image-size", "4", "--output", "reference.npz"]
    evaluate.main([*reference, "--features", "pixels", "--device", "cpu", "--num-workers", "0"])
    source = np.random.default_rng(1)
    np.savez("small.npz", arr_0=source.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8))
    evaluate.main([*SCORE, "--output", "scores.json"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_images()
    make_run()
    make_samples()
    make_latents_and_exports()
    make_reference()
