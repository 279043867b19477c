"""Paths from noise to data: x_t = alpha(t)·data + sigma(t)·noise, t from 0, noise, to 1, data.

After Ma et al. 2024 (SiT), section 2.3, with its t turned round.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import torch
from torch import Tensor

HALF_PI = math.pi / 2
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the variance-preserving path (Song et al. 2021, appendix C)


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives by t, of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def turn(self) -> Tensor:
        """alpha'·sigma - alpha·sigma', by which conversions between predictions divide.

        It is above 0 everywhere between the ends.
        """
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


def linear(t: Tensor) -> Coefficients:
    """Straight lines, as in rectified flow (Liu et al. 2023): alpha = t, sigma = 1 - t."""
    one = torch.ones_like(t)
    return Coefficients(t, 1 - t, one, -one)


def gvp(t: Tensor) -> Coefficients:
    """The generalised variance-preserving path: a quarter of a circle at an even pace."""
    # The cosine as a sine from the other end: exact to the last digit near data, and 0 there
    alpha, sigma = torch.sin(HALF_PI * t), torch.sin(HALF_PI * (1 - t))
    return Coefficients(alpha, sigma, HALF_PI * sigma, -HALF_PI * alpha)


def vp(t: Tensor) -> Coefficients:
    """The variance-preserving path of score-based diffusion, linear in beta (Song et al. 2021).

    sigma' is infinite at t = 1.
    """
    left, span = 1 - t, BETA_MAX - BETA_MIN
    log_alpha = -(left**2) * span / 4 - left * BETA_MIN / 2
    slope = left * span / 2 + BETA_MIN / 2  # of log_alpha
    alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
    return Coefficients(alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma)


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": linear, "gvp": gvp, "vp": vp}
