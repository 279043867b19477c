"""Measure a digit in a picture: how thick its stroke is, how far it leans, and how wide it is.

All is measured on grey levels, without a threshold, so that a blurred digit and a sampled one can
be measured too.
"""

import numpy as np


def thickness(images):
    """The stroke's thickness in pixels, (N,), of pictures (N, H, W), bright on black.

    Twice the ink over the length of its edge, which is the sum over the picture of the gradient's
    length: so it holds for soft edges, and for any brightness. 0 for a picture without ink.
    """
    ink = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1)))
    # From differences of neighbours: further apart, the edges of a thin stroke would cancel
    down, right = (_middles(np.diff(ink, axis=axis), 3 - axis) for axis in (1, 2))
    return _ratio(2 * ink.sum(axis=(1, 2)), np.hypot(down, right).sum(axis=(1, 2)))


def slant(images):
    """How far strokes lean, (N,): steps to the right for each step up; below 0 they lean left.

    The slope of the line that predicts a pixel's column from its row, ink being the weight.
    """
    (rows, _), mixed = _spread(images)
    return -_ratio(mixed, rows)


def width(images):
    """Width over height, (N,): the ink's standard deviation across the digit, once it is set
    upright, over that along it.
    """
    (rows, columns), mixed = _spread(images)
    across = columns - _ratio(mixed**2, rows)
    return _ratio(np.sqrt(np.maximum(across, 0)), np.sqrt(rows))


def _spread(images):
    """((variance of rows, of columns), their covariance), (N,) each, of the ink."""
    ink = images.astype(float)
    rows, columns = np.indices(ink.shape[1:])
    total = ink.sum(axis=(1, 2))

    def mean(values):
        return _ratio((ink * values).sum(axis=(1, 2)), total)

    y, x = mean(rows), mean(columns)
    return (mean(rows**2) - y**2, mean(columns**2) - x**2), mean(rows * columns) - y * x


def _middles(values, axis):
    """The means of neighbours along an axis."""
    return (np.delete(values, 0, axis) + np.delete(values, -1, axis)) / 2


def _ratio(above, below):
    """above / below, 0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 1e-9)
