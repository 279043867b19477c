"""The parts of judging emoji: pictures are drawn, and measured beside real drawings."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image
import torch

from colours import TURNED
from data.captions import read_captions
from data.listing import list_images
from drawing import UNSEEN, all_shapes, with_article
from emoji_scores import (
    colour_difference, colour_names, compared, nearest, own_first, psnr, share, share_of_colour,
)  # fmt: skip
from evaluation.features import Extractor
from evaluation.metrics import Moments, frechet_distance
from make_emoji import PAIRS, is_left_out
from make_shapes import HELD_OUT, shape_images
from sampling.sampler import Sampler
from sources import SIDE
from train_emoji_classifier import CLASSES, load_labelled
from vae import Space, from_uint8, to_uint8

NAMES = 100  # that a picture's own name is looked for among
BATCH = 100


class Drawings(NamedTuple):
    """Real drawings uint8 (N, 64, 64, 3), the numbers (N,) of their groups in CLASSES, and what is
    said of each, its name first.
    """

    pictures: np.ndarray
    labels: np.ndarray
    captions: list[list[str]]


@dataclass
class Judge:
    """What pictures are judged with: the set of make_emoji.py, an autoencoder, the features and
    names of groups of a classifier, how many samples of which seed, and the Samplers to be judged.
    """

    folder: Path
    space: Space
    features: Extractor
    count: int
    seed: int
    by_group: Sampler | None = None
    by_words: Sampler | None = None

    @cached_property
    def train(self):
        return self._drawings("train")

    @cached_property
    def heldout(self):
        return self._drawings("heldout")

    @cached_property
    def rows_of_train(self):
        return self.rows(self.train.pictures)

    @cached_property
    def real_shapes(self):
        """Every drawing (N, H, W, 3) of a heart, circle or square, and its colour by its name."""
        found = [
            (picture, PAIRS[captions[0]][1])
            for part in (self.train, self.heldout)
            for picture, captions in zip(part.pictures, part.captions) if captions[0] in PAIRS
        ]  # fmt: skip
        self._check(found, "heart, circle or square")
        pictures, colours = zip(*found)
        return np.stack(pictures), colours

    @cached_property
    def names(self):
        """The name of each of train's drawings, and those names, sorted, that several have."""
        said = np.array([captions[0] for captions in self.train.captions])
        names, counts = np.unique(said, return_counts=True)
        self._check(several := names[counts > 1].tolist(), "name in train with two drawings")
        return said, several

    @cached_property
    def things(self):
        """{(colour, thing): a drawing's file} of what was turned to a colour, and [(colour, thing)]
        of what was left out of it.
        """
        listing = list_images(self.folder / "words", 0)
        captions = list(read_captions(listing, self.folder / "words"))
        pairs = map(turned_pair, captions)
        made = {pair: path for path, pair in zip(listing.paths, pairs) if pair is not None}
        every = {caption for text in captions for caption in text}
        left = [
            (colour, thing)
            for thing in sorted({thing for _, thing in made}) for colour in TURNED
            if is_left_out(thing, colour) and with_article(f"{colour} {thing}") not in every
        ]  # fmt: skip
        self._check(made, "drawing in words that was put in another colour")
        self._check(left, "thing in words that was left out in a colour")
        return made, left

    def _check(self, found, what):
        """Raise ValueError, saying what the set has none of, unless something was found."""
        if not found:
            raise ValueError(
                f"`data_path` {self.folder} has no {what}; give the folder that make_emoji.py wrote"
            )

    def _drawings(self, part):
        found = load_labelled(self.folder / part)
        captions = list(read_captions(found.listing, self.folder / part))
        if [] in captions:
            raise ValueError(
                f"`data_path`: nothing is said of {found.listing.paths[captions.index([])]}; give "
                "the folder that make_emoji.py wrote"
            )
        pictures = found.images.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
        return Drawings(pictures, found.labels.numpy(), captions)

    def rows(self, pictures):
        """Features (N, D) and logits (N, K) of pictures uint8 (N, H, W, 3)."""
        parts = [self.features(part) for part in channels_first(pictures).split(BATCH)]
        return torch.cat([part.features for part in parts]), torch.cat([p.logits for p in parts])

    def given_back(self, pictures):
        """What the autoencoder makes of pictures uint8 (N, H, W, 3)."""
        found = []
        for part in channels_first(pictures).split(BATCH):
            no_noise = torch.zeros(len(part), *self.space.shape.latent(SIDE, SIDE))  # (n, C, h, w)
            latents = self.space.encode(from_uint8(part), no_noise)
            found.append(to_uint8(self.space.decode(latents)).numpy())
        return np.concatenate(found)

    def drawn(self, sampler, asked, kind):
        """Pictures uint8 (N, H, W, 3) for N labels or prompts; picture i's noise is that of number
        i of the seed.
        """
        values, found = sampler.conditions(asked), []
        for start in range(0, len(asked), BATCH):
            indices = range(start, min(start + BATCH, len(asked)))
            latents = sampler.numbered_latents(self.seed, indices, values[start : indices.stop])
            found.append(sampler.decode(latents).numpy())
            print(f"{kind}: {indices.stop} of {len(asked)} drawn", file=sys.stderr, flush=True)
        return np.concatenate(found)


def channels_first(pictures):
    """Pictures (N, H, W, 3) as a tensor (N, 3, H, W)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def spread(asked, count):
    """`count` of the things that are asked for, each as often, evenly from all if there are more.
    """
    few = count < len(asked)
    return [asked[i * len(asked) // count if few else i % len(asked)] for i in range(count)]


# ---- the autoencoder ----


def judge_autoencoder(judge):
    """How near held-out emoji, and shapes, come back to what they were."""
    # The first copy of each shape is in DIR/words, which autoencoders are trained on
    shapes = list(shape_images(copies=2))[len(all_shapes()) :: HELD_OUT]
    sets = {
        "held-out emoji": judge.heldout.pictures,
        "held-out shapes": np.stack([np.asarray(image) for _, image, _ in shapes]),
    }
    found = {}
    for name, pictures in sets.items():
        back = judge.given_back(pictures)
        found[name] = {
            "images": len(pictures),
            "PSNR in dB": float(psnr(pictures, back).mean()),
            "difference of colour, of 255": float(colour_difference(pictures, back).mean()),
        }
    return found


# ---- by group ----


def judge_classes(judge):
    """Whether pictures are of the group that was asked for; how far they are from real drawings as
    a whole, and how near the nearest one is.
    """
    train, heldout = judge.train, judge.heldout
    labels = np.arange(judge.count) % len(CLASSES)
    pictures = judge.drawn(judge.by_group, labels, "classes")
    sets = {
        "samples": pictures, "held-out": heldout.pictures,
        "train given back": judge.given_back(train.pictures),
        "held-out given back": judge.given_back(heldout.pictures),
    }  # fmt: skip
    rows = {name: judge.rows(each) for name, each in sets.items()} | {"train": judge.rows_of_train}
    named = {name: logits.argmax(dim=1).numpy() for name, (_, logits) in rows.items()}
    met, real = named["samples"] == labels, heldout.labels
    back = sets["train given back"]
    return {
        "samples": len(pictures),
        "group named": share(met),
        "group named, held-out": share(named["held-out"] == real),
        "group named, held-out given back": share(named["held-out given back"] == real),
        "group named, train given back": share(named["train given back"] == train.labels),
        "group named, by group": {
            name: share(met[labels == label]) for label, name in enumerate(CLASSES)
        },
        "Fréchet distance": distances({name: each for name, (each, _) in rows.items()}),
        "nearest of train, of 255, all given back": compared(
            nearest(pictures, back), nearest(sets["held-out given back"], back)
        ),
    }


def distances(features):
    """The Fréchet distances between sets' features {name: (N, D)} that say something together."""
    moments = {}
    for name, rows in features.items():
        moments[name] = Moments()
        moments[name].add(rows)
    pairs = [
        ("samples", "held-out"), ("train", "held-out"), ("train given back", "held-out"),
        ("samples", "train"),
    ]  # fmt: skip
    known = {name: each.statistics() for name, each in moments.items()}
    return {f"{a} to {b}": frechet_distance(known[a], known[b]) for a, b in pairs}


# ---- by words ----


def judge_words(judge):
    """How often hearts, circles and squares have the colour that was asked for, for pairs that were
    in training and for those left out; with real ones, as drawn and as given back.
    """
    pairs = list(dict.fromkeys(PAIRS.values()))
    asked = spread(pairs, max(1, judge.count // 4 // len(pairs)) * len(pairs))
    prompts = [f"{colour} {shape}" for shape, colour in asked]
    names = colour_names(judge.drawn(judge.by_words, prompts, "words"))
    met = [name == colour for name, (_, colour) in zip(names, asked)]
    real, colours = judge.real_shapes
    return {
        "samples": len(asked),
        "seen pairs": share(m for m, pair in zip(met, asked) if pair not in UNSEEN),
        "unseen pairs": share(m for m, pair in zip(met, asked) if pair in UNSEEN),
        "each pair": {
            f"{colour} {shape}": share(m for m, pair in zip(met, asked) if pair == (shape, colour))
            for shape, colour in pairs
        },
        "real drawings": share_of_colour(real, colours),
        "real drawings given back": share_of_colour(judge.given_back(real), colours),
    }  # fmt: skip


def judge_retrieval(judge):
    """How often a picture goes with its own name best, among so many names of train; with the same
    of real drawings, each left out of its name's mean.
    """
    said, several = judge.names
    chance = np.random.default_rng(judge.seed)
    chosen = chance.choice(several, min(NAMES, len(several)), replace=False)
    ours = np.isin(said, chosen)
    number = {name: i for i, name in enumerate(chosen)}
    known = [number[name] for name in said[ours]]
    asked = spread(list(range(len(chosen))), max(1, judge.count // 10))
    pictures = judge.drawn(judge.by_words, [str(chosen[i]) for i in asked], "retrieval")
    every = judge.rows_of_train[0]  # (M, D)
    samples, real = (
        (each - every.mean(dim=0)).double().numpy()
        for each in (judge.rows(pictures)[0], every[torch.from_numpy(ours)])
    )
    return {
        "samples": len(pictures),
        "own name is first": share(own_first(samples, asked, real, known)),
        "own name is first, real drawings": share(own_first(real, known, real, known, True)),
        "by chance": 1 / len(chosen),
    }


def judge_things(judge):
    """How often things have the colour that was asked for, for pairs of thing and colour that
    drawings were made of, and for those left out; with the drawings that were made.
    """
    made, left = judge.things
    found, count = {}, max(1, judge.count // 10)
    for name, pairs in {"seen pairs": sorted(made), "unseen pairs": left}.items():
        asked = spread(np.random.default_rng(judge.seed).permutation(pairs).tolist(), count)
        prompts = [with_article(f"{colour} {thing}") for colour, thing in asked]
        pictures = judge.drawn(judge.by_words, prompts, f"things, {name}")
        found[name] = share_of_colour(pictures, [colour for colour, _ in asked])
        if name == "seen pairs":
            real = np.stack([read(made[colour, thing]) for colour, thing in asked])
            found["real drawings"] = share_of_colour(real, [colour for colour, _ in asked])
    return {"samples of each": count, **found}


def turned_pair(captions):
    """(colour, thing) of a drawing that was turned to another colour; None for another one."""
    words = captions[1].partition(" ")[::2] if len(captions) == 3 else ("", "")
    is_turned = words[0] in TURNED and captions[2].startswith(f"{captions[1]}, ")
    return words if is_turned else None


def read(path):
    """The RGB image in a file, uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


PARTS = {
    "autoencoder": judge_autoencoder, "classes": judge_classes, "words": judge_words,
    "retrieval": judge_retrieval, "things": judge_things,
}  # fmt: skip


# Part → what of the set it takes: attributes of a Judge
TAKEN = {
    "autoencoder": ("heldout",), "classes": ("train", "heldout"), "words": ("real_shapes",),
    "retrieval": ("names",), "things": ("things",),
}  # fmt: skip


def judged(judge, parts):
    """{part: its figures} of the parts that are asked for, keys of PARTS.

    Raises ValueError, before anything is drawn, if the set lacks what a part takes.
    """
    for taken in (name for part in parts for name in TAKEN[part]):
        getattr(judge, taken)
    return {name: PARTS[name](judge) for name in PARTS if name in parts}
