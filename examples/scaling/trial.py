"""One network of a study: trained on patches, and scored by what it draws.

A plan, as the studies' presets are, says how wide images are, by what factor photographs are
reduced, and the rest of what is read from it here. Patches are uint8 (N, 1, S, S).
"""

from typing import NamedTuple

from PIL import Image
import torch

from checkpoints.files import read_checkpoint
from conditions.labels import random_labels
from evaluation.metrics import Moments, Statistics, frechet_distance
from models import DiT
from patches import CLASSES, REAL, REFERENCE, TRAINING, Classifier, draw_patches, train_classifier
from runtime.disk import write_whole
from training.cost import training_flops
from training.state import Recipe
from training.step import draw, train_step
from vae import from_uint8


class Judge(NamedTuple):
    """What samples are scored by."""

    classifier: Classifier
    reference: Statistics


def make_judge(plan, device):
    """(a Judge, what is to be told of it: how many classes it finds, and how far as many real
    patches are).
    """
    size, reduction = plan.image_size, plan.reduction
    classifier, accuracy = train_classifier(size, reduction, plan.classifier_steps, device)
    reference = statistics(
        classifier, draw_patches(plan.reference, size, reduction, REFERENCE)[0].to(device)
    )
    real = statistics(classifier, draw_patches(plan.samples, size, reduction, REAL)[0].to(device))
    told = {
        "classifier_accuracy": accuracy,
        "distance_of_real_patches": frechet_distance(real, reference),
    }
    return Judge(classifier, reference), told


def save_judge(judge, path):
    """Write a Judge to a file, so that a study that goes on scores as it did before."""
    contents = {
        "classifier": judge.classifier.state_dict(),
        **{k: torch.from_numpy(v) for k, v in judge.reference._asdict().items()},
    }
    write_whole(path, lambda temporary: torch.save(contents, temporary))


def load_judge(path, device):
    """The Judge in a file. Raises ValueError if it cannot be read."""
    if not path.exists():
        raise ValueError(
            f"{path} is missing, which scored the networks so far; begin again in another --output"
        )
    contents, classifier = read_checkpoint(path), Classifier()
    try:
        classifier.load_state_dict(contents["classifier"])
        reference = Statistics(contents["mean"].numpy(), contents["covariance"].numpy())
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(
            f"{path} is no judge that a study wrote; begin again in another --output"
        ) from None
    return Judge(classifier.to(device).eval().requires_grad_(False), reference)


@torch.no_grad()
def statistics(classifier, patches):
    """The Statistics of the classifier's features of patches uint8 (N, 1, S, S)."""
    moments = Moments()
    for part in patches.split(500):
        moments.add(classifier(part)[0])
    return moments.statistics()


def recipe_of(plan):
    """How the networks of a plan learn."""
    return Recipe(lr=plan.lr, ema_decay=(plan.ema_decay,), bf16=plan.bf16)


def train(plan, state, seed, device, encode=from_uint8):
    """Train a new TrainState on its device, on what `encode` makes of patches; yields, after each
    of the steps to be scored at, the mean squared error over the steps since the last of them.

    Raises ValueError if a loss or gradient is not finite.
    """
    network = state.network
    dropout_prob = network.config["class_dropout_prob"]
    while state.step < plan.scored_at[-1]:
        drawn = draw_patches(
            plan.batch_size, plan.image_size, plan.reduction, TRAINING, seed, state.step
        )
        patches, labels = (x.to(device) for x in drawn)
        draws = draw(
            seed, state.step, plan.batch_size, network.latent_shape, dropout_prob,
            state.process, device,
        )  # fmt: skip
        if train_step(state, encode(patches), labels, draws)["bad"]:
            raise ValueError(
                f"the loss or gradient of step {state.step} is not finite; lower the plan's lr"
            )
        if state.step in plan.scored_at:
            yield state.window.means(plan.batch_size)["mse"]
            state.begin_window()


def judged(judge, samples, draw_images, device):
    """The Fréchet distance of so many samples; noise and labels are the same each time.

    draw_images(indices, labels (n,)) returns the images with these indices, uint8 (n, 1, S, S).
    """
    images = []
    for indices in torch.arange(samples).split(250):
        labels = random_labels(0, indices.tolist(), CLASSES).to(device)
        images.append(draw_images(indices.tolist(), labels))
    return frechet_distance(statistics(judge.classifier, torch.cat(images)), judge.reference)


def cost_of(plan, config):
    """What a line of points.jsonl says of the size of a network with these arguments."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiT(**config).parameters())
    flops = training_flops(config)
    return {
        "parameters": parameters, "macs": flops // 6, "training_flops": flops,
        "batch_size": plan.batch_size,
    }  # fmt: skip


def save_samples(draw_images, path, device):
    """Write one sample of each class, side by side."""
    labels = torch.arange(CLASSES, device=device)
    save_strip(draw_images(range(CLASSES), labels), path)


def save_real(plan, path):
    """Write one real patch of each class, side by side."""
    patches, labels = draw_patches(plan.reference, plan.image_size, plan.reduction, REFERENCE)
    save_strip(torch.stack([patches[labels == label][0] for label in range(CLASSES)]), path)


def save_strip(images, path):
    """Write images uint8 (n, 1, S, S) side by side."""
    strip = images.permute(1, 2, 0, 3).flatten(2)[0]  # (S, n·S)
    path.parent.mkdir(exist_ok=True)
    write_whole(
        path, lambda temporary: Image.fromarray(strip.cpu().numpy()).save(temporary, format="png")
    )
