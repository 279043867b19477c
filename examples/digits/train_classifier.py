"""Train the small classifier whose features samples of digits are scored by, and write it as timm
writes models.

    python examples/digits/train_classifier.py --data-path digits --output digits-classifier

For `evaluate.py --features`: Inception, made for photographs, says little of digits. A ResNet of
173,000 parameters with 64 features, trained on DIR/train; its accuracy on DIR/heldout is printed.
Half a minute on 2 cores.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import timm
from timm.models import save_for_hf
import torch
import torch.nn.functional as F

from data.images import read_all
from data.listing import list_images
from checkpoints.publish import check_free, whole_folder
from runtime.limits import check_numbers
from vae import from_uint8

SIZE, CLASSES = 32, 10
ARCHITECTURE = dict(stem_width=16, stem_type="", channels=[16, 32, 64, 64])  # of timm's resnet10t
MOST_SHIFT = 2  # pixels that a digit is moved by at most, in training


def load_images(folder):
    """(images float32 (N, 3, 32, 32) in [-1, 1], labels (N,)) of a folder with one folder per
    class.

    Raises ValueError if one cannot be read.
    """
    listing = list_images(folder, CLASSES)
    return from_uint8(read_all(listing, SIZE)), torch.tensor(listing.labels)


def shifted(images):
    """Each image moved by its own few pixels, black coming in."""
    padded = F.pad(images, [MOST_SHIFT] * 4, value=-1.0)
    places = torch.randint(2 * MOST_SHIFT + 1, (len(images), 2)).tolist()
    return torch.stack(
        [image[:, y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, places)]
    )


def train(images, labels, epochs, seed):
    """A new timm model, trained for so many epochs, for evaluation, with what timm writes of it."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=CLASSES, **ARCHITECTURE)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(
                model(shifted(images[batch])), labels[batch], label_smoothing=0.1
            )
            opt.zero_grad()
            loss.backward()
            opt.step()
        schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    model.pretrained_cfg = dict(
        architecture="resnet10t", input_size=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3,
        num_classes=CLASSES,
    )  # fmt: skip
    return model.eval()


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--data-path", required=True, type=Path, help="the folder that make_dataset.py wrote"
    )
    parser.add_argument(
        "--output", required=True, help="folder to write config.json and weights to"
    )
    parser.add_argument("--epochs", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


@door()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args)
        check_free(args.output)
        (images, labels), heldout = (
            load_images(args.data_path / part) for part in ("train", "heldout")
        )
        with whole_folder(args.output) as folder:
            model = train(images, labels, args.epochs, args.seed)
            save_for_hf(model, folder, model_args=ARCHITECTURE, safe_serialization=True)
    with torch.no_grad():
        right = (model(heldout[0]).argmax(dim=1) == heldout[1]).float().mean().item()
    print(f"{args.output}: {right:.1%} of the held-out digits are right")


if __name__ == "__main__":
    main()
