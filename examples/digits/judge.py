"""Judge digits sampled from a checkpoint against the real ones.

    python examples/digits/judge.py --ckpt examples/digits/dit.safetensors \\
      --vae examples/digits/vae --num-sampling-steps 50 --cfg-scale 1.5

Everything is measured on digits of 8×8 pixels, 0 to 16, as scikit-learn has them: how often a
classifier trained on real digits sees the class that was asked for; how much the digits of a class
vary; k = 3 precision and recall against the held-out digits (Kynkäänniemi et al. 2019), on pixels;
and how near samples come to training digits, lest they be copies. Beside each figure stands that of
real digits. Sampling flags are those of sample.py.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.svm import SVC
import torch

from make_dataset import IMAGE_SIZE, load_split, reduce
from runtime.devices import choose_device
from runtime.limits import Range, check_numbers
from checkpoints.loading import find_files
from sampling.flags import (
    add_sampling_flags, check_flags, network_choice, sampling_options,
)  # fmt: skip
from sampling.loading import VAE, build_sampler

SAMPLES = Range(1, 10**5)
BATCH = 100
CLASSES = 10
NEIGHBOURS = 3
# Nearer than this to a training digit is a copy; held-out digits are some 16 away
COPY_DISTANCE = 2.0


def check_digits(sampler):
    """Raise ValueError unless what is sampled are digits, as far as sizes tell."""
    side, classes = (
        sampler.network.input_size * sampler.space.shape.ratio,
        sampler.network.num_classes,
    )
    if (side, classes) != (IMAGE_SIZE, CLASSES):
        raise ValueError(
            f"{sampler.checkpoint} makes images of {side}x{side} pixels in {classes} classes; "
            f"digits have {IMAGE_SIZE}x"
            f"{IMAGE_SIZE} and {CLASSES}: give a network that was trained on them"
        )


def sample_digits(sampler, count, seed, device):
    """`count` digits (count, 8, 8), 0 to 16, image i of class i mod 10, and their classes."""
    labels = np.arange(count) % sampler.network.num_classes
    digits = []
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        chunk = torch.from_numpy(labels[indices.start : indices.stop]).to(device)
        digits.append(
            reduce(sampler.decode(sampler.numbered_latents(seed, indices, chunk)).cpu().numpy())
        )
    return np.concatenate(digits), labels


def within_class_variance(digits, labels):
    """The variance of a pixel among digits of one class, averaged over pixels and classes."""
    return float(np.mean([digits[labels == c].var(axis=0).mean() for c in np.unique(labels)]))


def share_inside(points, manifold):
    """The share of points (N, D) that lie within the distance of some manifold point (M, D) to its
    third neighbour.
    """
    # column 0 is the point itself
    radii = np.sort(cdist(manifold, manifold), axis=1)[:, NEIGHBOURS]
    return float((cdist(points, manifold) <= radii).any(axis=1).mean())


def judge(digits, labels):
    """The figures for digits (N, 8, 8) asked for as labels (N,), each beside that of real digits,
    as a dict.
    """
    train, train_labels, heldout, heldout_labels = load_split()
    chosen = np.random.default_rng(0).permutation(len(train))[: len(digits)]
    real, real_labels = train[chosen], train_labels[chosen]
    classifier = SVC(gamma=0.001, C=10).fit(train.reshape(len(train), -1), train_labels)
    flat, flat_train, flat_heldout, flat_real = (
        d.reshape(len(d), -1) for d in (digits, train, heldout, real)
    )
    nearest, heldout_nearest = (
        cdist(flat, flat_train).min(axis=1),
        cdist(flat_heldout, flat_train).min(axis=1),
    )
    return {
        "samples": len(digits),
        "agreement with the asked-for class": float((classifier.predict(flat) == labels).mean()),
        "accuracy of the classifier on held-out digits": classifier.score(
            flat_heldout, heldout_labels
        ),
        "within-class variance": within_class_variance(digits, labels),
        "within-class variance of real digits": within_class_variance(real, real_labels),
        "precision": share_inside(flat, flat_heldout),
        "precision of as many real training digits": share_inside(flat_real, flat_heldout),
        "recall": share_inside(flat_heldout, flat),
        "recall of as many real training digits": share_inside(flat_heldout, flat_real),
        f"share nearer than {COPY_DISTANCE} to a training digit": float(
            (nearest < COPY_DISTANCE).mean()
        ),
        "distance to the nearest training digit (1st, 50th, 99th percentile)": np.percentile(
            nearest, [1, 50, 99]
        ).tolist(),
        "the same of held-out digits": np.percentile(heldout_nearest, [1, 50, 99]).tolist(),
    }


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--num-samples", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_sampling_flags(parser, VAE, cfg_scale=4.0)
    return parser


@door("--num-samples")
def main(argv=None):
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    with parser.refusing():
        check_numbers(args, num_samples=SAMPLES)
        check_flags(args)
        choice, options = network_choice(args, given), sampling_options(args, given)
        device = choose_device(args.device)
        sampler = build_sampler(choice, find_files(choice, VAE), options, device)
        check_digits(sampler)
    print(json.dumps(judge(*sample_digits(sampler, args.num_samples, args.seed, device)), indent=1))


if __name__ == "__main__":
    main()
