"""Diffusion coefficients D(t) that an SDE of the same marginals may have (SiT, section 2.4).

Each is half of the w in SiT's paper, whose noise is √w dW: here it is √(2 D) dW.
"""

from collections.abc import Callable
import math
from typing import Any

import torch
from torch import Tensor

from .checks import check_names
from .paths import Coefficients


def _sbdm(t: Tensor, at: Coefficients, norm: float) -> Tensor:
    """That of score-based diffusion: norm·sigma·(alpha'·sigma - alpha·sigma') / alpha."""
    return norm * at.sigma * at.turn / at.alpha


FORMS: dict[str, Callable[[Tensor, Coefficients, float], Any]] = {
    "constant": lambda t, at, norm: norm * torch.ones_like(t),
    "sbdm": _sbdm,
    "sigma": lambda t, at, norm: norm * at.sigma,
    "linear": lambda t, at, norm: norm * (1 - t),
    "decreasing": lambda t, at, norm: (norm * torch.cos(math.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda t, at, norm: norm * torch.sin(math.pi * t) ** 2,
}


def check_form(form: str) -> None:
    """Raise ValueError unless there is such a form."""
    check_names(diffusion_form=(form, FORMS))
