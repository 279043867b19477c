"""Copies of digits, leaning, thicker and wider by a little, so that words have more examples."""

import numpy as np
from scipy import ndimage

LEAN, THICKEN, WIDEN = 0.15, 0.5, 0.09  # at most, to either side


def warped(images, seed=0):
    """Pictures uint8 (N, 32, 32), each warped by numbers of its own that the seed draws.

    It is mixed with what a dilation by a pixel makes of it, or an erosion; then columns are shifted
    in proportion to their row, and stretched.
    """
    generator, found = np.random.default_rng(seed), []
    for image in images.astype(float):
        thicker, lean, wider = generator.uniform(-1, 1, 3) * (THICKEN, LEAN, WIDEN)
        morph = ndimage.grey_dilation if thicker > 0 else ndimage.grey_erosion
        image = image + (morph(image, size=3) - image) * abs(thicker)
        matrix = np.array([[1, 0], [lean, 1 / (1 + wider)]])
        middle = (np.array(image.shape) - 1) / 2
        offset = middle - matrix @ middle
        found.append(ndimage.affine_transform(image, matrix, offset=offset, order=1))
    return np.clip(np.rint(np.stack(found)), 0, 255).astype(np.uint8)
