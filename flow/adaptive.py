"""dopri5: Dormand and Prince's method of order 5, with steps of each sample's own length.

The steps are torchode's. A step is as long as the error of that sample allows, so that a sample
does not depend on the others in its batch; all samples are asked together.
"""

from collections.abc import Callable, Sequence
import math

import torch
from torch import Tensor

from .checks import check_number
from .prediction import Prediction
from .solvers import Network

ATOL, RTOL = 1e-6, 1e-3
MOST_STEPS = 2_000  # of one sample: some tens are usual
# A step is at most so much longer than the one before. The first steps are short, their error is
# hardly above rounding, and it would decide what is longer: rounding differs from batch to batch.
MOST_GROWTH = 3.0


def solve(
    slope: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: Sequence[float], atol: float,
    rtol: float, norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """y at times, (T, N, D) from y (N, D) at the first of them, of dy/dt = slope(t (N,), y (N, D)).

    Times rise or fall. norm: (N, D) → (N,), of an error in units of what is tolerated; None for the
    root mean square. Raises ValueError for tolerances that are not above 0, if torchode is
    missing, and if the steps become too small or too many.
    """
    check_tolerances(atol, rtol)
    try:
        import torchode  # here, since it takes a while
    except ImportError:
        raise ValueError("dopri5 needs torchode; pip install torchode") from None
    at = torch.tensor(times, dtype=y.dtype, device=y.device).expand(len(y), -1)  # (N, T)
    term = torchode.ODETerm(slope)
    own = {} if norm is None else {"norm": norm}
    controller = torchode.IntegralController(
        atol=atol, rtol=rtol, term=term, factor_max=MOST_GROWTH, **own
    )
    solver = torchode.AutoDiffAdjoint(
        torchode.Dopri5(term=term), controller, max_steps=MOST_STEPS
    ).to(y.device)
    found = solver.solve(
        torchode.InitialValueProblem(y0=y, t_start=at[:, 0], t_end=at[:, -1], t_eval=at)
    )
    status = found.status.max()
    if status == torchode.Status.REACHED_MAX_STEPS.value:
        raise ValueError(
            f"dopri5 is not at the end after {MOST_STEPS} steps with `atol={atol:g}` and "
            f"`rtol={rtol:g}`, its values being too large or changing too fast; take larger "
            "tolerances, less guidance, or heun"
        )
    if status:
        raise ValueError(
            "dopri5 met a number that is not finite; see whether the noise and what the network "
            "returns are"
        )
    return found.ys.transpose(0, 1)


def check_tolerances(atol: float, rtol: float) -> None:
    """Raise ValueError unless both are above 0, and finite."""
    for name, tolerance in {"atol": atol, "rtol": rtol}.items():
        check_number(name, tolerance, "above 0, and finite", lambda number: 0 < number < math.inf)


def adaptive_ode(
    said: Prediction, network: Network, x: Tensor, times: Sequence[float], atol: float, rtol: float,
    step: int = 0,
) -> Tensor:  # fmt: skip
    """x at each of the times, (T, N, C, *space), from x (N, C, *space) at the first of them.

    The network is told one number of a step throughout.
    """

    def slope(t, y):
        x_t = y.reshape(x.shape)
        column = t.reshape(-1, *[1] * (x.dim() - 1))  # (N, 1, ...)
        out = network(x_t, t, step)[:, : x.shape[1]]
        return said.velocity(out, x_t, said.coefficients(column)).flatten(1)

    with torch.no_grad():
        return solve(slope, x.flatten(1), times, atol, rtol).reshape(len(times), *x.shape)
