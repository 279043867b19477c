"""Which parts a block is made of: rows that name torch's and timm's."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

from timm.layers import Mlp
from timm.layers.mlp import SwiGLUPacked
from torch import nn

from layers.positions import EXTRAPOLATIONS, POSITIONS

EPS = 1e-6  # in the norms


class Norm(NamedTuple):
    """A class of norm; and whether it has weights also where adaLN scales what it returns."""

    layer: Callable[..., nn.Module]
    always_weighted: bool


def gelu_mlp(width: int, hidden: int) -> nn.Module:
    """Two Linears with a GELU between them."""
    return Mlp(width, hidden, act_layer=partial(nn.GELU, approximate="tanh"))


def swiglu_mlp(width: int, hidden: int) -> nn.Module:
    """Two Linears with a gated SiLU between them (Shazeer 2020), narrower by a third than `hidden`:
    so it has about as many parameters as the other.
    """
    return SwiGLUPacked(width, 2 * (hidden * 2 // 3))


# RMSNorm (Zhang & Sennrich 2019) has its weights always, as in LightningDiT
NORMS = {
    "layer": Norm(partial(nn.LayerNorm, eps=EPS), always_weighted=False),
    "rms": Norm(partial(nn.RMSNorm, eps=EPS), always_weighted=True),
}
MLPS: dict[str, Callable[[int, int], nn.Module]] = {"gelu": gelu_mlp, "swiglu": swiglu_mlp}


class Parts(NamedTuple):
    """The parts of a network's blocks: names of rows of POSITIONS, NORMS and MLPS, and whether
    queries and keys are normalised in each head (Henry et al. 2020).
    """

    positions: str = "table"
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False

    def make_norm(self, width: int, own_weights: bool = True) -> nn.Module:
        """A norm over so many numbers."""
        kind = NORMS[self.norm]
        return kind.layer(width, elementwise_affine=own_weights or kind.always_weighted)

    def make_attention(self, width: int, heads: int) -> nn.Module:
        """Attention of tokens of so many numbers."""
        attention = POSITIONS[self.positions].attention
        return attention(
            width, heads, qkv_bias=True, qk_norm=self.qk_norm, norm_layer=NORMS[self.norm].layer
        )

    def make_mlp(self, width: int, hidden: int) -> nn.Module:
        """An MLP of tokens of so many numbers."""
        return MLPS[self.mlp](width, hidden)


# What an argument of DiT that names a part may be
NAMES: dict[str, Collection[str]] = {
    "positions": POSITIONS, "norm": NORMS, "mlp": MLPS, "extrapolation": EXTRAPOLATIONS,
}  # fmt: skip
PAPERS = Parts()  # those of Peebles & Xie
# What those are, and qk_norm, in a network that does not say
DEFAULTS: dict[str, Any] = {**PAPERS._asdict(), "extrapolation": None}  # None: the positions' own
