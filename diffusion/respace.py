"""Sampling in fewer steps than the network was trained on (IDDPM section 4)."""

from collections.abc import Iterable, Sequence
import operator
from typing import Any

import numpy as np
import torch

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(
    num_timesteps: int, section_counts: str | int | Sequence[int] | None
) -> set[int]:
    """The original steps to keep, a set of integers below num_timesteps.

    section_counts says how many to keep in each of equally long sections, as a list, a
    comma-separated string or one number. None or "" keeps every step. "ddimN" keeps N steps at one
    whole-number stride, as the DDIM paper does.

    Raises ValueError for a text of another form, for a section asked for fewer than 1 or more steps
    than it has, and for an N that no stride gives.
    """
    if section_counts is None or section_counts == "":
        return set(range(num_timesteps))
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _even_stride(num_timesteps, section_counts)
    counts = _parse_counts(section_counts)
    length, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = length + (i < longer)
        if not 1 <= count <= size:
            raise ValueError(
                f"{count} of {size} steps asked for (respacing {section_counts!r} of "
                f"{num_timesteps}); give a number from 1 to {size}"
            )
        kept.update(start + step for step in _spread(size, count))
        start += size
    return kept


def _parse_counts(section_counts):
    try:
        if isinstance(section_counts, str):
            return [int(part) for part in section_counts.split(",")]
        counts = [operator.index(part) for part in np.atleast_1d(np.asarray(section_counts))]
        if counts:
            return counts
        raise ValueError("no sections")
    except (TypeError, ValueError):
        raise ValueError(
            f"respacing {section_counts!r} is not understood; give '250', '10,15,20' or 'ddim50'"
        ) from None


def _spread(size, count):
    """`count` of the steps 0 to size-1, first and last included; one step is the first.

    The position is a running sum: multiplying would round to other steps for many counts.
    """
    stride = (size - 1) / (count - 1) if count > 1 else 0
    position = 0.0
    for _ in range(count):
        yield round(position)
        position += stride


def _even_stride(num_timesteps, text):
    digits = text.removeprefix("ddim")
    if not digits.isdecimal():
        raise ValueError(
            f"respacing {text!r} is not understood; write 'ddim' and a number of steps, as in "
            "'ddim50'"
        )
    by_count = {}
    for stride in range(num_timesteps, 0, -1):  # downwards: the smallest stride of a count stays
        by_count[len(range(0, num_timesteps, stride))] = stride
    wanted = int(digits)
    if wanted not in by_count:
        nearest = min(by_count, key=lambda count: abs(count - wanted))
        raise ValueError(
            f"no whole-number stride keeps {wanted} of {num_timesteps} steps; the nearest is "
            f"'ddim{nearest}'"
        )
    return set(range(0, num_timesteps, by_count[wanted]))


class SpacedDiffusion(GaussianDiffusion):
    """A process over some steps of another: alpha_bar at kept steps is the same, betas follow.

    `timestep_map` lists the kept steps in order; the network and cond_fn are given those original
    numbers. The other arguments are GaussianDiffusion's, for the original process. Raises
    ValueError for no steps, and for steps that the original lacks.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        original = np.array(kwargs.pop("betas"), dtype=np.float64)
        self.use_timesteps, self.original_num_steps = set(use_timesteps), len(original)
        self.timestep_map = sorted(self.use_timesteps)
        steps, last = self.timestep_map, len(original) - 1
        if not steps or not 0 <= steps[0] <= steps[-1] <= last:
            raise ValueError(f"steps to keep must be some of 0 to {last}; got {steps}")
        kept = np.cumprod(1 - original)[steps]
        super().__init__(betas=1 - kept / np.concatenate([[1.0], kept[:-1]]), **kwargs)
        self._maps: dict[torch.device, torch.Tensor] = {}  # device → timestep_map as a tensor (T,)

    def _model_steps(self, t):
        if t.device not in self._maps:
            self._maps[t.device] = torch.tensor(self.timestep_map, device=t.device)
        return self._maps[t.device].index_select(0, t)
