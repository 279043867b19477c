"""Sample class-conditional images from a DiT into one labelled picture.

    python sample.py                                                     # the released XL/2, ImageNet at 256 pixels
    python sample.py --image-size 512 --seed 1 --class-labels 207 88
    python sample.py --ckpt results/000-DiT-XL-2 --vae ema --sampler ddim --num-sampling-steps 50
    python sample.py --ckpt examples/digits/dit.safetensors --vae examples/digits/vae --class-labels 3 1 4

A checkpoint of this project says itself how its network is built; for others --model, --image-size and --num-classes do.
"""

import argparse
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
import torch

from devices import choose_device, tf32
from sampling import check_writable, label_indices, load_sampler
from sampling_flags import NUM_CLASSES, add_sampling_flags, check_sampling_flags

IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]
PER_ROW = 4
LEAST_TILE = 96  # smaller images are enlarged in the picture by a whole factor, so that their labels can be read
MARGIN, FONT_SIZE = 4, 12


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    picture = parser.add_argument_group("picture")
    picture.add_argument(
        "--class-labels",
        nargs="+",
        metavar="LABEL",
        help="numbers, else names if the checkpoint knows them (default: eight classes)",
    )
    picture.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    picture.add_argument(
        "--output", default="sample.png", help="file to write, replaced if it exists (default: %(default)s)"
    )
    add_sampling_flags(parser, vae="mse", cfg_scale=4.0)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_sampling_flags(args)
        check_output(args.output)
        device = choose_device(args.device)
        sampler = load_sampler(args, device)
        labels = parse_labels(args.class_labels, sampler.network.num_classes, sampler.classes)
    except ValueError as error:
        parser.error(str(error))
    try:
        with tf32(args.tf32):
            images = sample(sampler, labels, args.seed, device)
    except ValueError as error:
        parser.exit(1, f"sample.py: error: {error}\n")
    picture(images, captions(labels, sampler.network.num_classes, sampler.classes)).save(args.output)
    print(f"wrote {args.output}: {len(images)} images of {images.shape[2]}x{images.shape[1]} pixels")


def check_output(path):
    """Raise ValueError unless a picture can be written at path, in the format that its ending names."""
    check_writable(path)
    ending = "." + path.rsplit(".", 1)[-1].lower() if "." in path else ""
    try:
        Image.new("RGB", (1, 1)).save(BytesIO(), format=Image.registered_extensions()[ending])
    except (KeyError, OSError):
        raise ValueError(f"--output {path}: {ending or 'no ending'} is not an image format; use .png")


def parse_labels(given, num_classes, classes):
    """The class indices for --class-labels, numbers or names, or the default ones.

    Raises ValueError for a label that the network does not have.
    """
    if num_classes == 0:
        if given:
            raise ValueError("--class-labels: the network was trained without classes; leave the flag out")
        return [0] * len(IMAGENET_LABELS)  # placeholders, one per image: the network is not given them
    if not given:
        return IMAGENET_LABELS if num_classes == NUM_CLASSES else list(range(min(num_classes, len(IMAGENET_LABELS))))
    try:
        return label_indices(given, num_classes, classes)
    except ValueError as error:
        raise ValueError(f"--class-labels {error}") from None


def sample(sampler, labels, seed, device):
    """Images, a uint8 array (N, H, W, 3), from torch's generator seeded with `seed` just before the first draw."""
    torch.manual_seed(seed)
    noise = torch.randn(len(labels), *sampler.latent, device=device)
    return sampler.images(torch.tensor(labels, device=device), noise, progress=True).cpu().numpy()


def captions(labels, num_classes, classes):
    """What to write under each image: the class name where it is known, else its number; nothing without classes."""
    if num_classes == 0:
        return [""] * len(labels)
    return [classes[i] if classes and i < len(classes) else str(i) for i in labels]


def picture(images, texts):
    """A PIL image of uint8 images (N, H, W, 3), four to a row, each with its text below."""
    height, width = images.shape[1:3]
    factor = -(-LEAST_TILE // width) if width < LEAST_TILE else 1
    height, width, strip = height * factor, width * factor, (FONT_SIZE + MARGIN if any(texts) else 0)
    columns, rows = min(PER_ROW, len(images)), -(-len(images) // PER_ROW)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + strip + MARGIN) + MARGIN)
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(FONT_SIZE)
    pen = ImageDraw.Draw(canvas)
    for i, (pixels, text) in enumerate(zip(np.asarray(images), texts)):
        left = MARGIN + i % PER_ROW * (width + MARGIN)
        top = MARGIN + i // PER_ROW * (height + strip + MARGIN)
        canvas.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top))
        while font.getlength(text) > width and len(text) > 1:
            text = text[:-2] + "…"
        text = " ".join(text.split())
        pen.text((left + width / 2, top + height + 1), text, fill="black", font=font, anchor="mt")
    return canvas


if __name__ == "__main__":
    main()
