"""Noise schedules: a name and a number of steps → the betas, float64."""

from collections.abc import Callable
import math

import numpy as np


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of a named schedule, a float64 array (num_diffusion_timesteps,).

    "linear": from 1e-4 to 0.02 over 1,000 steps (Ho et al. 2020, section 4). For another number of
    steps both ends are scaled by 1000/steps: the noise at the end stays about the same.
    "squaredcos_cap_v2": the cosine schedule (Nichol & Dhariwal 2021, eq. 17).

    Raises ValueError for another name, and for so few steps that a linear beta would reach 1.
    """
    steps = num_diffusion_timesteps
    if steps < 1:
        raise ValueError(f"the number of diffusion steps is {steps}; it must be at least 1")
    if schedule_name == "linear":
        stretch = 1000 / steps
        if 0.02 * stretch >= 1:
            raise ValueError(
                f"a linear schedule of {steps} steps would reach beta = 1; take 21 or more"
            )
        return np.linspace(1e-4 * stretch, 0.02 * stretch, steps, dtype=np.float64)
    if schedule_name == "squaredcos_cap_v2":
        return betas_for_alpha_bar(
            steps, lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise ValueError(
        f"unknown noise schedule {schedule_name!r}; known are 'linear' and 'squaredcos_cap_v2'"
    )


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """The betas (num_diffusion_timesteps,) for alpha_bar, a function on [0, 1].

    The products of 1 - beta follow it. No beta exceeds max_beta. This keeps the end of the schedule
    from becoming singular.
    """
    steps = num_diffusion_timesteps
    levels = np.array([alpha_bar(i / steps) for i in range(steps + 1)])
    return np.minimum(1 - levels[1:] / levels[:-1], max_beta)
