"""What pictures that were drawn to a caption are worth: how often they are what was asked for, and
how far they are from real digits as a whole.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.svm import SVC
import torch

from conditions.text import pieces
from evaluation.features import Extractor, load_extractor
from evaluation.metrics import Moments, Statistics, frechet_distance
from make_dataset import enlarge, load_split, reduce
from words import Scale

CLASSIFIER = Path(__file__).resolve().parents[1] / "digits" / "classifier"
BATCH = 100


class Judge(NamedTuple):
    """What pictures are scored by: a classifier of digits of 8×8 pixels, the Scale of the words,
    and features with the Statistics of the training digits' features.
    """

    classifier: SVC
    scale: Scale
    features: Extractor
    reference: Statistics

    def digits(self, images):
        """Which digits (N,) pictures uint8 (N, 32, 32, 3) show."""
        return self.classifier.predict(reduce(images).reshape(len(images), -1))

    def met(self, images, asked):
        """{"digit" or measure: bool (N,)}: whether pictures uint8 (N, 32, 32, 3), drawn for N Said,
        are that. What a Said does not ask for is met.
        """
        digits = np.array([said.digit for said in asked])
        met = {"digit": self.digits(images) == digits}
        for name, levels in self.scale.levels(images.mean(axis=-1), digits).items():
            wanted = [said.levels.get(name, level) for said, level in zip(asked, levels)]
            met[name] = levels == wanted
        return met

    def distance(self, images):
        """The Fréchet distance of pictures uint8 (N, 32, 32, 3) from the training digits."""
        return frechet_distance(statistics(self.features, images), self.reference)


def statistics(features, images):
    """The Statistics of the features of pictures uint8 (N, 32, 32, 3)."""
    moments = Moments()
    for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH):
        moments.add(features(part).features)
    return moments.statistics()


def coloured(images):
    """Grey pictures (N, H, W) as (N, H, W, 3)."""
    return np.repeat(images[..., None], 3, axis=-1)


def load_judge(scale):
    """The Judge by the training digits."""
    pixels, digits, *_ = load_split()
    classifier = SVC(gamma=0.001, C=10).fit(pixels.reshape(len(pixels), -1), digits)
    features = load_extractor(str(CLASSIFIER), "cpu")
    return Judge(classifier, scale, features, statistics(features, coloured(enlarge(pixels))))


def draw(sampler, captions, seed):
    """Pictures uint8 (N, 32, 32, 3) that a Sampler draws to captions; picture i's noise is that of
    number i of a seed.
    """
    text = pieces(captions, sampler.network.text_length)
    images = []
    for start in range(0, len(text), BATCH):
        indices = range(start, min(start + BATCH, len(text)))
        part = text[indices.start : indices.stop]
        images.append(sampler.decode(sampler.numbered_latents(seed, indices, part)).numpy())
    return np.concatenate(images)
