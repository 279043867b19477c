"""Train the classifier of groups whose features samples of emoji are scored by, and write it as
timm writes models.

    python examples/emoji/train_emoji_classifier.py --data-path emoji --output emoji-classifier

For judge_emoji.py and `evaluate.py --features`: a ResNet of 465,000 parameters with 128 features,
trained on DIR/train, each drawing moved by a few pixels and mirrored at random; its accuracy on
DIR/heldout is printed. Weights are kept in half precision.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "emoji")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from typing import NamedTuple

import timm
from timm.models import save_for_hf
import torch
import torch.nn.functional as F

from checkpoints.publish import check_free, whole_folder
from data.images import read_all
from data.listing import Listing, list_images
from layers.sizes import MOST_CLASSES
from runtime.limits import check_numbers
from sources import GROUPS, SIDE
from vae import from_uint8

CLASSES = sorted(GROUPS)
ARCHITECTURE = dict(stem_width=16, stem_type="", channels=[24, 48, 96, 128])  # of timm's resnet10t
MOST_SHIFT = 4  # pixels that a drawing is moved by at most, in training
BATCH, LR, WEIGHT_DECAY, SMOOTHING = 64, 3e-3, 0.05, 0.1


class Labelled(NamedTuple):
    """Drawings uint8 (N, 3, 64, 64), the numbers (N,) of their groups in CLASSES, and their
    Listing.
    """

    images: torch.Tensor
    labels: torch.Tensor
    listing: Listing


def load_labelled(folder):
    """The Labelled of a folder with one folder for each of the groups, or for some.

    Raises ValueError if another folder is there, or a file cannot be read.
    """
    listing = list_images(folder, MOST_CLASSES)
    if others := sorted(set(listing.classes) - set(CLASSES)):
        raise ValueError(
            f"`data_path`: {folder} has a folder {others[0]}, which is no group of emoji; give the "
            "folder that make_emoji.py wrote"
        )
    numbers = [CLASSES.index(listing.classes[label]) for label in listing.labels]
    return Labelled(read_all(listing, SIDE), torch.tensor(numbers), listing)


def varied(images):
    """Each of images float32 (N, 3, 64, 64) in [-1, 1] moved by its own few pixels, white coming
    in, and half of them mirrored.
    """
    padded = F.pad(images, [MOST_SHIFT] * 4, value=1.0)
    places = torch.randint(2 * MOST_SHIFT + 1, (len(images), 2)).tolist()
    moved = torch.stack(
        [image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(padded, places)]
    )
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, moved.flip(-1), moved)


def train(images, labels, epochs, seed):
    """A new timm model, trained for so many epochs on images uint8 (N, 3, 64, 64), for evaluation,
    with what timm writes of it; its weights are numbers of half precision.
    """
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=len(CLASSES), **ARCHITECTURE)
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, LR, total_steps=epochs * -(-len(images) // BATCH), pct_start=0.15
    )
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            logits = model(varied(from_uint8(images[batch])))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=SMOOTHING)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    model.pretrained_cfg = dict(
        architecture="resnet10t", input_size=(3, SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3,
        num_classes=len(CLASSES),
    )  # fmt: skip
    return model.half().float().eval()


@torch.no_grad()
def accuracy(model, drawings):
    """The share of Labelled drawings whose group a model names."""
    parts = drawings.images.split(256)
    named = torch.cat([model(from_uint8(part)).argmax(dim=1) for part in parts])
    return (named == drawings.labels).float().mean().item()


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--data-path", required=True, type=Path, help="the folder that make_emoji.py wrote"
    )
    parser.add_argument(
        "--output", required=True, help="folder to write config.json and weights to"
    )
    parser.add_argument("--epochs", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


@door()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args)
        check_free(args.output)
        drawings, heldout = (load_labelled(args.data_path / part) for part in ("train", "heldout"))
        with whole_folder(args.output) as folder:
            model = train(drawings.images, drawings.labels, args.epochs, args.seed)
            right = accuracy(model, heldout)
            save_for_hf(model.half(), folder, model_args=ARCHITECTURE, safe_serialization=True)
    print(f"{args.output}: the group of {right:.1%} of the held-out drawings is named")


if __name__ == "__main__":
    main()
