"""The likelihood of data under a flow: the ODE from data back to noise, and what it stretches.

After Chen et al. 2018, section 4 (the change of variables), and Grathwohl et al. 2019 (FFJORD: the
trace of a Jacobian from one random probe, the same throughout a solution).
"""

from collections.abc import Callable, Mapping
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adaptive import solve

if TYPE_CHECKING:
    from .flow import Flow

ATOL, RTOL = 3e-6, 3e-6
MOST_EXACT = 4096  # dimensions: each costs one pass back through the network


def bits_per_dim(log_p: Tensor, dims: int) -> Tensor:
    """-log2 of densities per dimension, of log_p in nats and of so many dimensions."""
    return -log_p / (dims * math.log(2))


@torch.no_grad()
def log_likelihood(
    self: "Flow", model: Callable[..., Tensor], x: Tensor, *, probe: Tensor | None = None,
    exact: bool = False, atol: float = ATOL, rtol: float = RTOL,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """log p(x) (N,) in nats of data x (N, C, *space): the density of all its dimensions together.

    This is log N(z; 0, I) - ∫ div velocity dt, z being the noise to which the ODE takes x (Chen et
    al. 2018). dopri5 chooses the steps of each sample by atol and rtol, for x and for the integral
    per dimension. The divergence is an unbiased estimate by the `probe`, of x's shape with entries
    of mean 0 and variance 1 (Hutchinson), the same throughout; ±1 are drawn where none is given.
    exact: the trace itself instead, C·space passes back for each call of the network.

    x is taken to be at the end of `interval`, and noise at its beginning. Where these are not 1 and
    0 the density is that of data with noise of the end's sigma. On the vp path, and after a start
    at eps, noise is N(0, I) but nearly.

    Raises ValueError for a probe that does not fit, tolerances that are not above 0, and `exact`
    with more than MOST_EXACT dimensions.
    """
    dims = x[0].numel()
    _check(x, probe, exact)
    if probe is None and not exact:
        probe = torch.randint_like(x, 2) * 2 - 1
    divergence = _trace if probe is None else _estimate

    def slope(t, y):
        with torch.enable_grad():
            x_t = y[:, :-1].reshape(x.shape).requires_grad_()
            out = self.velocity(model, x_t, t, model_kwargs).flatten(1)  # (N, D)
            stretch = divergence(out, x_t, probe) / dims  # (N,)
        return torch.cat([out.detach(), stretch[:, None]], dim=1)

    start, end = self.interval()
    y = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)  # (N, D + 1)
    y = solve(slope, y, [end, start], atol, rtol, norm=_larger)[-1]
    noise, stretched = y[:, :-1], -y[:, -1] * dims  # the integral from start to end
    return -(noise**2).sum(dim=1) / 2 - dims / 2 * math.log(2 * math.pi) - stretched


def check_exact(dims: int) -> None:
    """Raise ValueError for more dimensions than an exact trace is for."""
    if dims > MOST_EXACT:
        raise ValueError(
            f"`exact` takes one pass back for each of {dims:,} dimensions at every step, and is "
            f"for {MOST_EXACT:,} at most; leave it out for an estimate"
        )


def _check(x, probe, exact):
    if exact:
        check_exact(x[0].numel())
    if exact and probe is not None:
        raise ValueError("`probe` is for an estimate, and `exact=True` takes none; leave one out")
    if probe is not None and probe.shape != x.shape:
        raise ValueError(
            f"`probe` is {tuple(probe.shape)}, and x {tuple(x.shape)}; give one of x's shape"
        )


def _larger(error):
    """The size (N,) of the error of x and the integral (N, D + 1) in units of what is tolerated.

    The integral is one number among many: within their mean it would hardly count.
    """
    return torch.maximum((error[:, :-1] ** 2).mean(dim=1).sqrt(), error[:, -1].abs())


def _estimate(out, x, probe):
    """probe·J·probe (N,), J being the Jacobian of out (N, D) by x."""
    probe = probe.to(out).flatten(1)
    (row,) = torch.autograd.grad(out, x, probe)
    return (row.flatten(1) * probe).sum(dim=1)


def _trace(out, x, _):
    """The trace (N,) of the Jacobian of out (N, D) by x."""
    count = out.shape[1]
    rows = (
        torch.autograd.grad(out[:, i].sum(), x, retain_graph=i + 1 < count)[0].flatten(1)[:, i]
        for i in range(count)
    )
    return sum(rows)
