"""Reading training data: images by our loader and by torchvision's, and cached latents.

    python -m benchmarks.loading                        # 512 files; a minute
    python -m benchmarks.loading --images 8192 --num-workers 8

Random JPEG files of 500×375 pixels (ImageNet's usual size), cropped and resized to 256, are read
also by ImageFolder. Random cached latents of 4×32×32 are memory-mapped from one file here, and have
an .npy file for each image there. Batches go nowhere. All sides take turns in one process.
"""

import argparse
import json
from pathlib import Path
import tempfile

import numpy as np
from PIL import Image
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Lambda, Normalize, RandomHorizontalFlip, ToTensor

from benchmarks.sides import RATIO, alternate, ratios, table, write
from data.batches import StepBatches
from data.cache import CachedLatents
from data.images import ImageDataset, center_crop_arr
from data.listing import list_images
from data.loader import make_loader

SIZE, BATCH = 256, 64
MOMENTS = (2, 4, 32, 32)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    return parser


def make_files(folder, count):
    """Random JPEG files in two class folders, and random moments in one file and in a file each."""
    source = np.random.default_rng(0)
    (folder / "apart").mkdir()
    moments = make_cache(folder, source, count)
    for i in range(count):
        path = folder / "images" / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 375)).save(path, quality=90)
        np.save(folder / "apart" / f"{i:05d}.npy", moments[i])


def make_cache(folder, source, count, dtype=np.float32):
    """Random cached latents in the folder, as CachedLatents reads them: their moments (count, 2, 2,
    C, h, w).
    """
    moments = source.standard_normal((count, 2, *MOMENTS), dtype=np.float32).astype(
        dtype, copy=False
    )
    np.save(folder / "moments.npy", moments)
    np.save(folder / "labels.npy", np.zeros(count, dtype=np.int64))
    channels, side = moments.shape[3], moments.shape[4]
    manifest = {
        "images": count, "flip": True, "shape": [2, channels, side, side], "image_size": side,
        "channels": channels, "ratio": 1, "scale": 1.0, "shift": 0.0, "vae": "none",
        "vae_sha256": {}, "files_sha256": "", "classes": None,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return moments


class Apart(Dataset):
    """Moments by (index, flip), each image's in a file of its own."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, key):
        index, flip = key
        return torch.from_numpy(np.load(self.folder / f"{index:05d}.npy")[int(flip)]), 0, []


def main(argv=None):
    args = build_parser().parse_args(argv)
    batch = min(BATCH, args.images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_files(folder, args.images)
        as_usual = Compose([
            Lambda(lambda image: center_crop_arr(image, SIZE)), RandomHorizontalFlip(), ToTensor(),
            Normalize(0.5, 0.5),
        ])  # fmt: skip
        theirs = DataLoader(
            ImageFolder(folder / "images", as_usual), batch, shuffle=True,
            num_workers=args.num_workers, drop_last=True,
        )  # fmt: skip
        keys = StepBatches(args.images, batch, seed=0, start=0, stop=args.images // batch)
        ours = make_loader(
            ImageDataset(list_images(folder / "images", 2), SIZE), keys, args.num_workers
        )
        mapped, apart = (
            make_loader(dataset, keys, args.num_workers)
            for dataset in (CachedLatents(folder), Apart(folder / "apart"))
        )
        sides = {
            "images, ImageFolder": theirs, "images, ours": ours, "latents, a file each": apart,
            "latents, ours": mapped,
        }  # fmt: skip
        for loader in sides.values():
            list(loader)  # files are in the system's memory from here on
        seconds = alternate(
            {name: lambda loader=loader: list(loader) for name, loader in sides.items()},
            args.rounds,
        )
    found = ratios(seconds, "images, ImageFolder")
    table({name: [values] for name, values in found.items()}, ("ratio to ImageFolder, quartiles",))
    within = ratios(
        {name: seconds[name] for name in ("latents, ours", "latents, a file each")}, "latents, ours"
    )
    table({name: [values] for name, values in within.items()}, ("ratio to ours, quartiles",))
    write(
        "loading",
        {
            "settings": vars(args) | {"batch": batch},
            RATIO: found,
            "the same, of latents alone": within,
        },
    )


if __name__ == "__main__":
    main()
