"""adaLN: tokens scaled and shifted by what a condition says (Peebles & Xie 2023, section 3.2)."""

from torch import Tensor, nn


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) times 1 + scale, plus shift; both are (N, 1, D), or (N, T, D): a token's own."""
    return x * (1 + scale) + shift


class Modulation(nn.Sequential):
    """adaLN's regression: c (N, D) → so many vectors side by side (N, vectors·D), zero at first."""

    def __init__(self, hidden_size: int, vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, vectors * hidden_size))
