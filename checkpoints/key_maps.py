"""Which tensors of another project's network are which of ours."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.network_config import Tensors, arguments_in, check_kind, shown
from checkpoints.networks import CLASS

KINDS = ("weight", "bias")


def same(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def swapped(tensor: Tensor) -> Tensor:
    """Its second half (D, ...) of (2·D, ...) before its first: of a scale and a shift the other
    order.
    """
    return torch.cat(tensor.chunk(2)[::-1])  # (2·D, ...)


class Link(NamedTuple):
    """A tensor of ours, and those of theirs that it is made of, one after another along the first
    axis. `change` makes theirs of ours and ours of theirs.
    """

    ours: str
    theirs: tuple[str, ...]
    change: Callable[[Tensor], Tensor] = same


def linked(ours: str, *theirs: str, change: Callable[[Tensor], Tensor] = same) -> list[Link]:
    """The Links of a Linear's weight and bias."""
    return [Link(f"{ours}.{kind}", tuple(f"{n}.{kind}" for n in theirs), change) for kind in KINDS]


def to_ours(tensors: Tensors, links: Iterable[Link], beside: Iterable[str] = ()) -> Tensors:
    """Our state dict for theirs; what lies `beside` is known and left out.

    Raises ValueError, naming tensors, if some are missing or left over.
    """
    ours, left = {}, tensors.keys() - set(beside)
    for link in links:
        if missing := [name for name in link.theirs if name not in tensors]:
            raise ValueError(f"the weights of diffusers' network lack {missing[0]}")
        parts = [tensors[name] for name in link.theirs]
        ours[link.ours] = link.change(parts[0] if len(parts) == 1 else torch.cat(parts))
        left -= set(link.theirs)
    if left:
        raise ValueError(
            "the weights of diffusers' network have more than its configuration: "
            f"{', '.join(sorted(left)[:4])}"
        )
    return ours


def to_theirs(tensors: Tensors, links: Iterable[Link]) -> Tensors:
    """Their state dict for ours."""
    return {
        name: part
        for link in links
        for name, part in zip(
            link.theirs, link.change(tensors[link.ours]).chunk(len(link.theirs)), strict=True
        )
    }


class Entry(NamedTuple):
    """An entry of a configuration of diffusers': its kind, and what it is where it is not said. It
    may also be None if `optional`.
    """

    kind: type
    default: Any
    optional: bool = False


def check_entries(
    config: dict, entries: dict[str, Entry], fixed: dict[str, Any]
) -> dict[str, Any]:
    """{entry: its value} of a configuration of diffusers'.

    Raises ValueError, naming the entry, for one of another kind, and for one that is another than
    the `fixed` ones.
    """
    found = {key: config.get(key, entry.default) for key, entry in entries.items()}
    for key, entry in entries.items():
        if found[key] is not None or not entry.optional:
            check_kind(key, found[key], entry.kind)
    differing = [
        f"{key} {shown(config[key])}"
        for key, value in fixed.items()
        if key in config and config[key] != value
    ]
    if differing:
        raise ValueError(f"this network of diffusers' has no like here: {', '.join(differing)}")
    return found


def learns_variance(channels: int, out_channels: int | None) -> bool:
    """Whether a network with so many channels has those of a variance.

    Raises ValueError for others than as many, or twice as many.
    """
    out = out_channels or channels
    if out not in (channels, 2 * channels):
        raise ValueError(f"this network has out_channels {out} for {channels} in_channels")
    return out == 2 * channels


def checked_own(own: object, read: dict[str, Any], free: Iterable[str]) -> dict[str, Any]:
    """Our own arguments, kept in a configuration of diffusers', in place of those that are `read`
    from the rest of it; they may differ in the `free` ones.

    Raises ValueError for those of another network.
    """
    if own is None:
        return read
    if not isinstance(own, dict) or own.get(CLASS) != read[CLASS]:
        raise ValueError("our arguments in it are not what they should be; take them out")
    own = arguments_in(own)
    contradicted = [key for key in read if key not in free and own.get(key) != read[key]]
    if contradicted:
        raise ValueError(f"the configuration contradicts itself: {', '.join(contradicted)}")
    return own


def refuse(reasons: dict[str, bool], name: str) -> None:
    """Raise ValueError with the first reason that holds why a network cannot be diffusers'."""
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"diffusers' {name} cannot be this network: {reason}")


def check_table_is(
    found: Tensor, side: int, width: int, made: Callable[[], Tensor], name: str
) -> None:
    """Raise ValueError, naming it, unless a position table (1, side², width) has the numbers of the
    one that is `made`, which is made if the shape is right.
    """
    fits = found.shape == (1, side**2, width) and found.is_floating_point()
    if fits:
        close = max(1e-4, torch.finfo(found.dtype).eps)  # of numbers up to 1
        fits = torch.allclose(found.double(), made().double(), rtol=0, atol=close)
    if not fits:
        raise ValueError(
            f"{name} is not the table of sines and cosines (1, {side**2}, {width}) of its "
            "configuration, and no other is known here"
        )
