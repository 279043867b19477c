"""The likelihood of data under a flow: the ODE from data back to noise, and what it stretches."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor


if TYPE_CHECKING:
    from .flow import Flow


def log_likelihood(
    self: "Flow", model: Callable[..., Tensor], x: Tensor, *, probe: Tensor | None = None,
    exact: bool = False, atol: float = 1e-5, rtol: float = 1e-5,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    raise NotImplementedError
