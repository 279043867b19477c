"""What a network is conditioned on besides the time: how it is handed over, dropped and doubled.

A training step and a sampler know a Condition alone: values, with one entry for each of N samples,
become keywords of the network's forward pass. Values are labels, a tensor (N,), or captions, a
Text.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from conditions.text import TextCondition, pieces
from layers.text import Text

Values = Any  # Tensor or Text: it has a length, and slices and moves to a device
Keywords = dict[str, Any]  # of the network's forward pass


class Condition(Protocol):
    """How values of N samples condition a network. `has_null`: the network knows a value that means
    "no condition", so that values can be dropped and samples be guided. `drops` is the shape of
    what says of one sample which parts of its value are dropped: () where it has one part.
    """

    @property
    def drops(self) -> tuple[int, ...]: ...

    @property
    def has_null(self) -> bool: ...

    def blank(self, count: int, device: torch.device | str) -> Values:
        """Values of so many samples that the network takes, for when it does not matter which."""

    def keywords(self, values: Values) -> Keywords:
        """Keywords of forward for N samples with these values."""

    def dropped(self, values: Values, drop: Tensor) -> Keywords:
        """Keywords of forward in a training step: as `keywords`, but parts of values whose entry in
        drop (N, *drops) is 1 count as "no condition", where there is such a value.
        """

    def doubled(self, values: Values) -> Keywords:
        """Keywords of forward_with_cfg, for 2N samples: these values, then N times "no condition".

        Raises ValueError without such a value.
        """


class Labelled(Protocol):
    """What is looked at in a network that takes labels."""

    num_classes: int

    @property
    def null_label(self) -> int | None: ...


class LabelCondition(NamedTuple):
    """Class labels (N,), int64, as a Condition; num_classes=0: the network takes none.

    `null_label` is the label of "no class", None if the network has none.
    """

    num_classes: int
    null_label: int | None

    @property
    def drops(self) -> tuple[int, ...]:
        """A label has one part."""
        return ()

    @property
    def has_null(self) -> bool:
        """Whether the network knows "no class"."""
        return self.null_label is not None

    def blank(self, count: int, device: torch.device | str) -> Tensor:
        """The first label, count times: (count,)."""
        return torch.zeros(count, dtype=torch.int64, device=device)

    def keywords(self, values: Tensor) -> Keywords:
        """{"y": labels (N,)}, or nothing for a network without classes."""
        return {"y": values} if self.num_classes else {}

    def dropped(self, values: Tensor, drop: Tensor) -> Keywords:
        """As `keywords`, and which labels the network is to drop."""
        return self.keywords(values) | ({"force_drop_ids": drop} if self.has_null else {})

    def doubled(self, values: Tensor) -> Keywords:
        """{"y": labels (2N,)}, the labels and then N null labels.

        Raises ValueError without a null label.
        """
        if self.null_label is None:
            raise ValueError(
                "guidance needs a null label and the network has none; sample it with `cfg_scale=1`"
            )
        return {"y": torch.cat([values, torch.full_like(values, self.null_label)])}  # (2N,)


def condition_of(network: Labelled, null: Text | None = None) -> Condition:
    """What a network is conditioned on. `null` is what stands for "no text" where encoders outside
    of the network read captions.
    """
    length = getattr(network, "text_length", None)
    if length is None:
        return LabelCondition(network.num_classes, network.null_label)
    return TextCondition(pieces([""], length) if null is None else null)
