"""Train the classifier that reads the moving digits' frames, and write it as timm writes models.

    python examples/moving_digits/train_frames_classifier.py --output moving-classifier

For judge_clips.py and `evaluate.py --per-frame --features`: a ResNet of 176,000 parameters with 64
features. Each step draws its frames anew: training digits, anywhere in the field. The share of
held-out digits that are read right is printed. Weights are kept in half precision.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "digits"), str(EXAMPLES / "moving_digits")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import numpy as np
import timm
from timm.models import save_for_hf
import torch
import torch.nn.functional as F

from checkpoints.publish import check_free, whole_folder
from make_dataset import load_split
from moving import FIELD, as_batch, enlarge, random_frames
from runtime.limits import check_numbers

CLASSES = 10
ARCHITECTURE = dict(stem_width=16, stem_type="", channels=[16, 32, 64, 64])  # of timm's resnet10t
BATCH, LR, WEIGHT_DECAY, SMOOTHING = 64, 3e-3, 0.05, 0.1
TRIES = 10  # places that each held-out digit is read at


def train(digits, labels, steps, seed):
    """A new timm model, trained for so many steps on digits (M, 14, 14) wherever they lie, for
    evaluation, with what timm writes of it; its weights are numbers of half precision.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = timm.create_model("resnet10t", num_classes=CLASSES, **ARCHITECTURE)
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps, pct_start=0.15)
    for step in range(1, steps + 1):
        chosen = generator.integers(len(digits), size=BATCH)
        logits = model(as_batch(random_frames(digits[chosen], generator)))
        loss = F.cross_entropy(logits, torch.tensor(labels[chosen]), label_smoothing=SMOOTHING)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.pretrained_cfg = dict(
        architecture="resnet10t", input_size=(3, FIELD, FIELD), mean=(0.5,) * 3, std=(0.5,) * 3,
        num_classes=CLASSES,
    )  # fmt: skip
    return model.half().float().eval()


@torch.no_grad()
def accuracy(model, digits, labels, seed):
    """The share of digits (M, 14, 14), each at TRIES places, that a model reads right."""
    generator = np.random.default_rng(seed)
    right = [
        model(as_batch(random_frames(digits, generator))).argmax(dim=1).numpy() == labels
        for _ in range(TRIES)
    ]
    return float(np.mean(right))


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--output", required=True, help="folder to write config.json and weights to"
    )
    parser.add_argument(
        "--steps", type=int, default=3000, help="training steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


@door()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args)
        check_free(args.output)
        train_digits, train_labels, heldout, heldout_labels = load_split()
        with whole_folder(args.output) as folder:
            model = train(enlarge(train_digits), train_labels, args.steps, args.seed)
            right = accuracy(model, enlarge(heldout), heldout_labels, args.seed)
            save_for_hf(model.half(), folder, model_args=ARCHITECTURE, safe_serialization=True)
    print(f"{args.output}: {right:.2%} of frames of held-out digits are read right")


if __name__ == "__main__":
    main()
