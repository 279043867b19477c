"""Classifier-free guidance (Ho & Salimans 2022)."""

from typing import Any

import torch
from torch import Tensor


def guided(
    network: Any, x: Tensor, t: Tensor, y: Any, cfg_scale: float, cfg_channels: int | str
) -> Tensor:
    """The output (2N, C_out, H, W) of a network, its noise guided: null + cfg_scale·(cond - null).

    The batch is doubled: y (2N,) holds N conditions and then the N to be guided against, t (2N,)
    the same N steps twice. Both halves are evaluated on the first half of x (2N, C, H, W). The
    first cfg_channels channels of the noise are guided, at most network.in_channels; "all" stands
    for these. Raises ValueError for an odd batch and other cfg_channels.
    """
    if len(x) % 2:
        wanted = "a doubled batch, an even number of samples"
        raise ValueError(f"guidance takes {wanted}; got {len(x)}")
    if cfg_channels != "all" and not (isinstance(cfg_channels, int) and cfg_channels > 0):
        wanted = "a number of channels, 1 or more, or 'all'"
        raise ValueError(f"cfg_channels is {cfg_channels!r}; give {wanted}")
    most, half = network.in_channels, len(x) // 2
    channels = most if cfg_channels == "all" else min(cfg_channels, most)
    out = network(torch.cat([x[:half], x[:half]]), t, y)
    cond, null = out[:, :channels].chunk(2)  # (N, channels, H, W) each
    noise = null + cfg_scale * (cond - null)
    return torch.cat([torch.cat([noise, noise]), out[:, channels:]], dim=1)  # (2N, C_out, H, W)
