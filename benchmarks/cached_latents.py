"""Training from cached latents against training from images, with the VAE in the loop.

    python -m benchmarks.cached_latents        # DiT-S/2 at 256 pixels; minutes on a CPU
    python -m benchmarks.cached_latents --model DiT-XL/2 --batch-size 64 --mixed-precision bf16

Measured are images per second, end to end. The program caches latents and runs train.py itself, on
random JPEG files, with Stable Diffusion's autoencoder architecture (its weights random). The two
kinds of training take turns in one process; rates are those of their metrics.jsonl, the first steps
of each run left out.
"""

import argparse
import json
from pathlib import Path
import tempfile

from diffusers import AutoencoderKL
import numpy as np
from PIL import Image
import torch

from benchmarks.sides import RATIO, ratios, write
from data.cache_writer import cache_latents
from data.options import CacheOptions
import train

ARCHITECTURE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, sample_size=256,
    scaling_factor=0.18215,
)  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-S/2", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=16, help="random files to make (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=4,
        help="per run, of which half are measured (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)"
    )
    parser.add_argument("--num-workers", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--mixed-precision", default="no", help="(default: %(default)s)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_images(folder / "images", args.images)
        torch.manual_seed(0)
        AutoencoderKL(**ARCHITECTURE).save_pretrained(folder / "vae")
        common = [
            "--num-classes", "2", "--no-flip", "--vae", str(folder / "vae"), "--num-workers",
            str(args.num_workers),
        ]  # fmt: skip
        cache_latents(CacheOptions(
            folder / "images", folder / "latents", num_classes=2, flip=False,
            vae=str(folder / "vae"), num_workers=args.num_workers,
        ))  # fmt: skip
        training = [
            *common, "--model", args.model, "--global-batch-size", str(args.batch_size),
            "--max-steps", str(args.steps), "--log-every", "1", "--results-dir",
            str(folder / "results"), "--mixed-precision", args.mixed_precision,
        ]  # fmt: skip
        seconds = {"images and VAE": [], "cached latents": []}
        for _ in range(args.rounds):
            for name, data in zip(
                seconds, (["--data-path", folder / "images"], ["--latents", folder / "latents"])
            ):
                train.main([*map(str, data), *training])
                seconds[name].append(seconds_per_image(folder / "results", args.steps // 2))
    found = ratios(seconds, "cached latents")
    print(
        f"images and VAE take {found['images and VAE'][0]} times as long as cached latents "
        f"({found})"
    )
    write(
        f"cached-latents-{args.model.replace('/', '-')}",
        {"settings": vars(args), RATIO: found},
    )


def make_images(folder, count):
    """Random JPEG files of 256×288 pixels in two class folders."""
    source = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (36, 32, 3), dtype=np.uint8)).resize(
            (256, 288)
        ).save(path)


def seconds_per_image(results, skip):
    """The mean over the steps of the newest run, the first `skip` left out."""
    newest = sorted(results.glob("*-*"))[-1]
    rows = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    return float(np.mean([1 / row["images_per_second"] for row in rows[skip:]]))


if __name__ == "__main__":
    main()
