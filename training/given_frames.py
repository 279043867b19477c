"""The losses of clips of which some frames are given: of the others alone."""

from collections.abc import Callable

from torch import Tensor

from conditions.given import Given
from layers.clips import clips_of, frames_of
from processes.process import Process


def given_losses(
    process: Process, network: Callable[[Tensor, Tensor], Tensor], x_start: Tensor, t: Tensor,
    noise: Tensor, mask: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """{name: (N,)} for each part of a process's loss, as process.losses has them of clips without
    given frames: of each clip the mean over the frames that are left.

    Clips x_start and noise are (N, C, F, H, W), times t (N,); the frames in mask (N, F) are given,
    of each clip not all. network(x, t) takes clips and times (N, F).
    """
    frames, given = x_start.shape[2], Given(x_start, mask, process.clean)

    def of_frames(x, t):
        """What the network makes of frames x (N·F, C, H, W) at times t (N·F,), the given ones held
        clean.
        """
        x, t = given.held(clips_of(x, frames)), given.times(t.unflatten(0, (-1, frames)))
        return frames_of(network(x, t))  # (N·F, C_out, H, W)

    times = t.repeat_interleave(frames)  # (N·F,)
    losses = process.losses(of_frames, frames_of(x_start), times, frames_of(noise))
    return {name: mean_of_left(values, mask) for name, values in losses.items()}


def mean_of_left(values: Tensor, mask: Tensor) -> Tensor:
    """The means (N,) of values (N·F,) of frames over those that are not in mask (N, F)."""
    left = values.view_as(mask).masked_fill(mask, 0)  # (N, F)
    return left.sum(dim=1) / (~mask).sum(dim=1)
