"""Frames of a clip that a network is given rather than asked for: to animate a picture, to go on
with a clip, or to fill in between.

They are clean, and have the time of clean data, while the others have the process's.
"""

from collections.abc import Callable, Sequence
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor


PLACES = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", re.ASCII)  # 3, -1, 0-3


class Given(NamedTuple):
    """Clips (N, C, F, H, W) of latents, of which the frames in mask (N, F), bool, are given; and
    the time t of clean data in the process (processes.process.Process.clean). One clip is for all
    samples, whatever their number.
    """

    clips: Tensor
    mask: Tensor
    clean: float

    def on(self, device: torch.device | str) -> "Given":
        """The same, on a device."""
        return Given(self.clips.to(device), self.mask.to(device), self.clean)

    def held(self, x: Tensor) -> Tensor:
        """x (N, C, F, H, W) with the given frames in their places."""
        return torch.where(self.mask[:, None, :, None, None], self.clips.to(x.dtype), x)

    def times(self, t: Tensor) -> Tensor:
        """Times (N, F) of the frames, where the others have t (N,), or (N, F)."""
        t = t.unsqueeze(1) if t.dim() == 1 else t  # (N, 1 or F)
        return torch.where(self.mask, torch.full_like(t, self.clean), t)  # (N, F)

    def asked(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The network (x (N, C, F, H, W), t, ...), asked with the given frames held. What it says
        of these is 0.
        """

        def ask(x: Tensor, t: Tensor, *others: Any) -> Tensor:
            out = network(self.held(x), self.times(t), *others)
            return out.masked_fill(self.mask[:, None, :, None, None], 0)  # (N, C_out, F, H, W)

        return ask


def draw_masks(count: int, frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Which frames of `count` clips are given in training, bool (N, F), on the generator's device.

    A clip has given frames with a probability of `share`. Then they are, each as often: the first
    ones, 1 to F - 1 of them; the first and the last one; or any, each by a chance of a half, which
    may be none. At least one is left.
    """
    device = generator.device
    chance = torch.rand(count, 3 + frames, generator=generator, device=device)
    chosen, kind, length, each = chance.split((1, 1, 1, frames), dim=1)  # (N, 1), ..., (N, F)
    place = torch.arange(frames, device=device)
    first = place < 1 + (length * (frames - 1)).floor()  # (N, F)
    ends = (place == 0) | (place == frames - 1)
    some = each < 0.5
    mask = torch.where(kind < 1 / 3, first, torch.where(kind < 2 / 3, ends, some))
    left = place == each.argmax(dim=1, keepdim=True)  # (N, F)
    # Of one or two frames these would be all
    full = mask.all(dim=1, keepdim=True)
    return mask & ~(full & left) & (chosen < share)


def places_in(text: str, frames: int, argument: str = "given_frames") -> list[int]:
    """The numbers of frames, counted from 0, in texts such as "0", "0-3", "0,15" and "-1", the last
    frame, of a clip of so many frames, in the order of the text.

    Raises ValueError, naming the argument, for another text, for a frame that the clip does not
    have or that is named twice, and where all are named.
    """
    found: list[int] = []
    for part in text.split(","):
        match = PLACES.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"`{argument}` {text[:60]!r} names no frames; give their numbers, such as 0, 0-3, "
                "0,15 or -1"
            )
        first, last = (
            _place(number, frames, argument) for number in (match[1], match[2] or match[1])
        )
        if last < first:
            raise ValueError(
                f"`{argument}` {text[:60]}: {part.strip()} ends before it begins; give the lower "
                "number first"
            )
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"`{argument}` {text[:60]} names a frame twice; name each once")
    if len(found) == frames:
        raise ValueError(
            f"`{argument}` {text[:60]} names all {frames} frames, so that none is left to draw; "
            "name fewer, or draw more frames"
        )
    return found


def _place(number, frames, argument):
    """The number of a frame, counted from 0. Raises ValueError if the clip does not have it."""
    place = int(number)
    if not -frames <= place < frames:
        raise ValueError(
            f"`{argument}` names frame {number}, and the clip has {frames}: give numbers from 0 to "
            f"{frames - 1}, or from -1, the last, down to {-frames}"
        )
    return place % frames


def check_given(given: Given, shape: Sequence[int], patch_frames: int | None) -> None:
    """Raise ValueError unless frames can be given to a network that draws latents of a shape
    (N, C, F, H, W), whose patches have so many frames: None for a network of images.
    """
    if patch_frames is None:
        raise ValueError("`given` is for networks that make clips, and this one makes images")
    count, _, frames, *_ = shape
    for name, got, rest in (
        ("clips", given.clips.shape, tuple(shape[1:])), ("mask", given.mask.shape, (frames,)),
    ):  # fmt: skip
        if tuple(got) not in ((1, *rest), (count, *rest)):
            raise ValueError(
                f"`given` has {name} of shape {tuple(got)}; what is drawn wants {(count, *rest)}, "
                "or 1 in front"
            )
    tubes = given.mask.unflatten(1, (-1, patch_frames))  # (N, S, P_F)
    if (tubes.any(dim=2) & ~tubes.all(dim=2)).any():
        raise ValueError(
            f"`given` has some frames of a patch and not others; the network's patches have "
            f"{patch_frames} frames: give frames 0-{patch_frames - 1}, or other whole patches"
        )
