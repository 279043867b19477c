"""Patches of the two photographs that scikit-learn carries, and the small classifier in whose
features samples are scored.

A class is a photograph and a region of it: 2 photographs × 2 rows × 3 columns = 12 classes. Shapes:
patches uint8 (N, 1, S, S), grey; labels (N,).
"""

from functools import lru_cache

import numpy as np
from PIL import Image
import torch
from torch import nn
import torch.nn.functional as F

from layers.sizes import sides
from vae import from_uint8

ROWS, COLUMNS = 2, 3  # of regions in a photograph
CLASSES = 2 * ROWS * COLUMNS
FEATURES = 64
TRAINING, CLASSIFIER, CHECK, REFERENCE, REAL = range(
    5
)  # what patches are drawn for: each has random numbers of its own


@lru_cache
def photographs(reduction):
    """Both photographs (2, H, W) uint8, grey, each side reduced by this factor: a temple in China,
    and a flower.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return torch.from_numpy(
        np.stack([Image.fromarray(photo).convert("L").reduce(reduction) for photo in photos])
    )


def draw_patches(count, size, reduction, *seed):
    """(patches, labels), on the CPU: classes drawn uniformly, then the place of each within its
    region.

    size: a side, or (height, width). seed: numbers that decide them, the first of which says what
    they are for.
    """
    tall, wide = sides(size)
    word = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(word)
    photos = photographs(reduction)  # (2, H, W)
    height, width = photos.shape[1] // ROWS, photos.shape[2] // COLUMNS
    labels = torch.randint(CLASSES, (count,), generator=generator)
    photo, region = labels // (ROWS * COLUMNS), labels % (ROWS * COLUMNS)
    top = region // COLUMNS * height + torch.randint(
        height - tall + 1, (count,), generator=generator
    )
    left = region % COLUMNS * width + torch.randint(width - wide + 1, (count,), generator=generator)
    rows, columns = top[:, None] + torch.arange(tall), left[:, None] + torch.arange(wide)
    patches = photos[photo[:, None, None], rows[:, :, None], columns[:, None, :]]  # (N, H, W)
    return patches.unsqueeze(1), labels  # (N, 1, H, W)


class Classifier(nn.Module):
    """Patches uint8 (N, 1, S, S) → (features (N, 64), logits (N, 12))."""

    def __init__(self):
        super().__init__()
        widths = (1, 32, 64, FEATURES)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip(widths, widths[1:])
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, patches):
        x = from_uint8(patches)
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)  # (N, C, S, S), then half of S each time
        features = x.mean(dim=(2, 3))  # (N, 64)
        return features, self.head(features)


def train_classifier(size, reduction, steps, device):
    """(a Classifier for evaluation, the share of 2,000 patches, drawn anew, whose class it finds);
    on CPUs always the same.
    """
    torch.manual_seed(0)
    model = Classifier().to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(steps):
        patches, labels = (
            x.to(device) for x in draw_patches(128, size, reduction, CLASSIFIER, step)
        )
        loss = F.cross_entropy(model(patches)[1], labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    model.eval().requires_grad_(False)
    patches, labels = (x.to(device) for x in draw_patches(2000, size, reduction, CHECK))
    return model, (model(patches)[1].argmax(dim=1) == labels).float().mean().item()
