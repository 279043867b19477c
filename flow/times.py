"""Which times a flow is trained at, and how the times of sampling are spread.

After Esser et al. 2024 (Stable Diffusion 3), section 3.1 and equation 23. Theirs count the other
way, 1 being noise: their t is 1 - t here.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _uniform(count, on):
    return torch.rand(count, **on)


def _logit_normal(count, on, mean, std):
    return torch.sigmoid(mean + std * torch.randn(count, **on))


def _mode(count, on, scale):
    u = torch.rand(count, **on)
    return u + scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _cosmap(count, on):
    # tan reaches neither end's 0 / 0: u is below 1
    return 1 / (torch.tan(math.pi / 2 * torch.rand(count, **on)) + 1)


class Law(NamedTuple):
    """How times are drawn; its numbers unless told otherwise, and the least and most of each."""

    draw: Callable[..., Tensor]  # (count, generator and device, *numbers) → t (count,)
    numbers: tuple[float, ...] = ()
    bounds: tuple[tuple[float, float], ...] = ()


# A logit-normal mean above 0 leans to data; in SD3's direction its sign turns. The other laws are
# the same in both directions. Beyond its bounds, mode's map of [0, 1] would turn back.
LAWS = {
    "uniform": Law(_uniform),
    "logit-normal": Law(_logit_normal, (0.0, 1.0), ((-100.0, 100.0), (1e-3, 100.0))),
    "mode": Law(_mode, (1.29,), ((-1.0, 2 / (math.pi - 2)),)),
    "cosmap": Law(_cosmap),
}


class TimeSampling(NamedTuple):
    """A law of LAWS with its numbers.

    Written as NAME or NAME:NUMBER,...: "uniform", "logit-normal:0,1" (mean and standard deviation
    of log(t / (1 - t))), "mode:1.29" (how much more of the middle; below 0, of the ends), "cosmap".
    """

    law: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: object) -> "TimeSampling":
        """The law that a text names. Raises ValueError if there is none."""
        name, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
        if name not in LAWS:
            raise ValueError(
                f"`time_sampling` is {text!r:.60}; give one of {', '.join(LAWS)}, "
                "with its numbers, if any, as in logit-normal:0,1"
            )
        law = LAWS[name]
        if not colon:
            return cls(name, law.numbers)
        try:
            numbers = tuple(map(float, rest.split(",")))
        except ValueError:
            numbers = ()
        if not numbers or len(numbers) != len(law.numbers):
            raise ValueError(
                f"`time_sampling` is {text:.60}; {name} takes {len(law.numbers)} number(s)"
                + (f", as in {cls(name, law.numbers)}" if law.numbers else "")
            )
        for number, (least, most) in zip(numbers, law.bounds, strict=True):
            if not least <= number <= most:
                raise ValueError(
                    f"`time_sampling` is {text:.60}; that number of {name} must be "
                    f"from {least:g} to {most:.4g}"
                )
        return cls(name, numbers)

    def __str__(self) -> str:
        # All digits, for files say a law so
        numbers = ",".join(repr(number).removesuffix(".0") for number in self.numbers)
        return f"{self.law}:{numbers}" if numbers else self.law

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Times (count,) from 0 to 1, float32, drawn from a generator on its device."""
        on: dict[str, Any] = dict(generator=generator, device=generator.device)
        return LAWS[self.law].draw(count, on, *self.numbers)


def shifted(t: Any, shift: float) -> Any:
    """t, a number or tensor from 0 to 1, moved towards noise by a shift above 1, else towards data.

    This is t / (shift + (1 - shift)·t). In SD3's direction it is shift·t / (1 + (shift - 1)·t) with
    the same shift: √(m/n) for m pixels where n need none, 3 at 1024² there. LightningDiT's
    timestep_shift is 1/shift.
    """
    return t / (shift + (1 - shift) * t)
