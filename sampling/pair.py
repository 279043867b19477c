"""Two networks that are asked as one: one for noisy steps, which may be shallow, and one for the
others (DuoDiff, 2410.09633; two experts in networks of clips).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from checkpoints.fitting import MEANING
from checkpoints.networks import Network, makes_clips, reads_text, said_of
from conditions.encoders import check_encoders
from layers.schedule import Scheduled
from processes.process import Process
from processes.table import process_of
from runtime.limits import RANGES, check_range

# What a network's configuration says of the captions that it takes
OF_TEXT = ("text_width", "pooled_width", "text_length")


class Pair:
    """Two networks as one, for a Sampler: `high` is asked from a noise level on, 0 clean and 1
    noise, `low` below it. Of a clip with given frames the noisiest frame decides.

    It is a layers.schedule.Scheduled. Where it expects a step, the network of that step is asked.
    Otherwise each sample goes to its own.
    """

    def __init__(self, low: Network, high: Network, level: float, process: Process) -> None:
        self.low, self.high, self.level = low, high, level
        self.first = process.clean + level * (process.noisy - process.clean)  # high's first t
        self.rising = process.noisy > process.clean
        self.planned: list[bool] = []
        self.expected: bool | None = None

    def schedule(self, times: Sequence[float]) -> None:
        """As layers.schedule.Scheduled."""
        self.planned = self.is_high(torch.tensor(times)).tolist()
        for network in (self.low, self.high):
            if isinstance(network, Scheduled):
                network.schedule(times)

    def expect(self, step: int | None) -> None:
        """As layers.schedule.Scheduled."""
        self.expected = None if step is None else self.planned[step]
        for network in (self.low, self.high):
            if isinstance(network, Scheduled):
                network.expect(step)

    def is_high(self, t: Tensor) -> Tensor:
        """Whether times t (N,), or (N, F) of frames, are high's, bool (N,)."""
        high = t >= self.first if self.rising else t <= self.first
        return high if high.dim() == 1 else high.any(dim=1)  # (N,)

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """What the networks make of x (N, C, *space) at times t, as a network's `forward`."""
        return self.asked(lambda network: network, x, t, condition)

    def forward_with_cfg(self, x: Tensor, t: Tensor, **others: Any) -> Tensor:
        """The same of a doubled batch, guided, as a network's `forward_with_cfg`."""
        return self.asked(lambda network: network.forward_with_cfg, x, t, others)

    def asked(
        self, way: Callable[[Network], Callable[..., Tensor]], x: Tensor, t: Tensor,
        others: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """What a way of asking a network gives: of one network, or of both, each for its samples.
        Of a doubled batch both halves of a sample have its time, and so one network.
        """
        if self.expected is not None:
            return way(self.high if self.expected else self.low)(x, t, **others)
        high = self.is_high(t)  # (N,)
        if not high.any() or high.all():
            return way(self.high if high.any() else self.low)(x, t, **others)
        numbers = [(~high).nonzero().squeeze(1), high.nonzero().squeeze(1)]
        parts = [
            way(network)(x[which], t[which], **{
                name: value[which] if name == "y" else value for name, value in others.items()
            })
            for network, which in zip((self.low, self.high), numbers, strict=True)
        ]  # fmt: skip
        return torch.cat(parts)[torch.cat(numbers).argsort()]  # (N, C_out, *space)


def check_high(high: object, level: float | None) -> None:
    """Raise ValueError unless a second network and the noise level from which on it is asked are
    both given, or neither, and the level is one.
    """
    if (high is None) != (level is None):
        raise ValueError(
            "`ckpt_high` and `high_from`, the noise level from which on it is asked, go together; "
            "give both, or neither"
        )
    if level is not None:
        check_range("high_from", level, RANGES["high_from"])


def check_pair(low: Network, high: Network, process: Process) -> None:
    """Raise ValueError unless two networks can draw the same samples together; `process` is what
    the first has learned.
    """
    for name, of in FACTS.items():
        ours, theirs = of(low), of(high)
        if ours != theirs:
            raise ValueError(
                f"`ckpt_high` is a network with {name} {theirs}, and that of `ckpt` has {ours}; "
                "the two must agree, so choose another `ckpt_high`"
            )
    wanted, given = said_of(low), said_of(high)
    if wanted and given:
        check_encoders(wanted, given, "`ckpt`")
    ours, theirs = (
        {name: config[name] for name in MEANING if name in config}
        for config in (process.config, process_of(high).config)
    )
    if ours != theirs:
        raise ValueError(
            f"`ckpt_high` is a network that has learned {worded(theirs)}, and that of `ckpt` "
            f"{worded(ours)}; the two must agree, so choose another `ckpt_high`"
        )


def idle_notes(pair: Pair, times: Sequence[float]) -> list[str]:
    """A sentence if steps that begin at these times ask one network of a Pair alone."""
    high = pair.is_high(torch.tensor(times)).tolist()
    if any(high) and not all(high):
        return []
    where, others = ("at or above", "lower") if high[0] else ("below", "higher")
    return [
        f"all {len(high)} steps are {where} the noise level {pair.level:g}, so the network for "
        f"{others} ones is not asked"
    ]


def worded(config: dict[str, Any]) -> str:
    """What decides a process, in words."""
    return ", ".join(f"{name} {value}" for name, value in config.items())


# What two networks must have in common, in words, and where it is found
FACTS: dict[str, Callable[[Network], Any]] = {
    "samples that are": lambda network: "clips" if makes_clips(network) else "images",
    "conditions that are": lambda network: "captions" if reads_text(network) else "labels",
    "latents of the shape": lambda network: tuple(network.latent_shape),
    "a number of classes of": lambda network: network.num_classes,
    "the null label": lambda network: None if reads_text(network) else network.null_label,
    "learn_sigma": lambda network: network.learn_sigma,
    "captions read by": lambda network: {name: network.config.get(name) for name in OF_TEXT},
}
