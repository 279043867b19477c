"""What pictures of emoji are worth, from pixels and features alone: how true colours and shapes
are, which colour a picture has, how near it is to others, and which of many names it goes with.

Pictures are uint8 (N, H, W, 3) on white, features float (N, D).
"""

import numpy as np
import torch

from colours import BACKGROUND, main_colour, name_of

PERCENTILES = (1, 50, 99)
ROWS_AT_ONCE = 256  # of a matrix of distances


def psnr(pictures, others):
    """10 log10 of 1 over the mean squared difference of each pair, (N,) in dB, of values that run
    from 0 to 1; infinite where two pictures are the same.
    """
    off = (pictures.astype(np.float32) - others) / 255  # (N, H, W, 3)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(off).mean(axis=(1, 2, 3), dtype=np.float64))


def colour_difference(pictures, others):
    """How far the mean colour of what pictures show is from that of the same pixels of others, (N,)
    of 255: absolute, averaged over channels; 0 for what shows nothing.
    """
    shown = (pictures < BACKGROUND).any(axis=-1)  # (N, H, W)
    off = (pictures.astype(np.float64) - others) * shown[..., None]  # (N, H, W, 3)
    count = np.maximum(shown.sum(axis=(1, 2)), 1)  # (N,)
    return np.abs(off.sum(axis=(1, 2)) / count[:, None]).mean(axis=-1)


def colour_names(pictures):
    """The name of each picture's main colour, N of one of nine or None."""
    found = (main_colour(picture) for picture in pictures)
    return [None if colour is None else name_of(colour) for colour in found]


def share(met):
    """How many of N are true, as a share; None of none."""
    met = list(met)
    return sum(map(bool, met)) / len(met) if met else None


def share_of_colour(pictures, colours):
    """The share of N pictures whose main colour has the name that was asked for."""
    return share(found == colour for found, colour in zip(colour_names(pictures), colours))


def nearest(pictures, others):
    """The distance of each picture to the nearest of M others, (N,): the root of the mean squared
    difference of pixels, of 255.
    """
    # From white, which most pixels are, rounding is smallest
    points, targets = (
        255 - torch.from_numpy(side).flatten(1).float() for side in (pictures, others)
    )  # (N, H·W·3), (M, H·W·3)
    squares = targets.square().sum(dim=1)  # (M,)
    found = [
        (squares + rows.square().sum(dim=1, keepdim=True)).addmm_(rows, targets.T, alpha=-2).amin(1)
        for rows in points.split(ROWS_AT_ONCE)
    ]
    return (torch.cat(found).clamp(min=0) / points.shape[1]).sqrt().numpy()


def compared(distances, usual):
    """What distances (N,) are, and how many are shorter than all but a hundredth of usual ones."""
    return {
        "percentiles": list(PERCENTILES),
        "samples": np.percentile(distances, PERCENTILES).tolist(),
        "held-out": np.percentile(usual, PERCENTILES).tolist(),
        "share nearer than held-out's 1st percentile": float(
            (distances < np.percentile(usual, PERCENTILES[0])).mean()
        ),
    }


def own_first(features, own, known, names, left_out=False):
    """Whether the name own[i] of a picture is the one that the picture goes with best, bool (N,).

    How well a picture with features (N, D) goes with one of K names is the cosine of these with the
    mean of that name's among `known` (M, D), called `names` (M,), numbers from 0 to K - 1.
    left_out: the pictures are the known ones, and each is left out of its own name's mean.
    """
    names = np.asarray(names)
    counts = np.bincount(names)  # (K,)
    sums = np.stack([known[names == name].sum(axis=0) for name in range(len(counts))])  # (K, D)
    found = []
    for one, name in zip(features, own):
        means = sums / counts[:, None]  # (K, D)
        if left_out:
            means[name] = (sums[name] - one) / (counts[name] - 1)
        cosines = means @ one / np.maximum(np.linalg.norm(means, axis=1), 1e-12)
        found.append(cosines.argmax() == name)
    return np.array(found)
