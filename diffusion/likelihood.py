"""Gaussian algebra for the variational bound, elementwise and in nats.

After Ho et al. 2020, sections 2 and 3.3.
"""

import math

import torch
from torch import Tensor

HALF_BIN = 1 / 255  # half the distance between two of the 256 grey levels on [-1, 1]
LEAST_PROBABILITY = 1e-12
EDGE = 0.999  # beyond it lies only the outermost bin


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)), broadcast over tensors.

    Each argument is a tensor or a number. Raises ValueError if all four are numbers.
    """
    mean1, logvar1, mean2, logvar2 = as_tensors(mean1, logvar1, mean2, logvar2)
    log_ratio = logvar2 - logvar1
    return (log_ratio + torch.exp(-log_ratio) + (mean1 - mean2) ** 2 * torch.exp(-logvar2) - 1) / 2


def as_tensors(*values: Tensor | float) -> list[Tensor]:
    """The values, with numbers made 0-d tensors on the CPU: these mix with any device, uncopied.

    Raises ValueError if all values are numbers.
    """
    if not any(torch.is_tensor(v) for v in values):
        raise ValueError("give at least one tensor; all arguments are numbers")
    dtype = next(v.dtype for v in values if torch.is_tensor(v))
    return [v if torch.is_tensor(v) else torch.tensor(float(v), dtype=dtype) for v in values]


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function, off by less than 3e-4 (the one in tanh-GELU)."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of each grey level in x under a Gaussian cut into 256 bins on [-1, 1].

    The outermost bins are open-ended. x, means and log_scales (logs of standard deviations) have
    one shape, and so has the result.
    """
    inverse_std = torch.exp(-log_scales)
    up_to_upper = approx_standard_normal_cdf((x - means + HALF_BIN) * inverse_std)
    up_to_lower = approx_standard_normal_cdf((x - means - HALF_BIN) * inverse_std)
    above_lowest = torch.where(x > EDGE, 1 - up_to_lower, up_to_upper - up_to_lower)
    mass = torch.where(x < -EDGE, up_to_upper, above_lowest)
    return mass.clamp(min=LEAST_PROBABILITY).log()
