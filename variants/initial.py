"""How the parameters of a variant begin."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def fill_as_vit(network: Any) -> None:
    """Fill Linears, norms, and the embedders of patches and of t, as in a ViT; a variant sets to
    zero what begins at zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.reset_parameters()
    nn.init.xavier_uniform_(network.x_embedder.proj.weight.flatten(1))  # as a Linear (D, C·P·P)
    nn.init.zeros_(network.x_embedder.proj.bias)
    for linear in (network.t_embedder.mlp[0], network.t_embedder.mlp[2]):
        nn.init.normal_(linear.weight, std=0.02)


def set_to_zero(network: nn.Module, parts: Sequence[str]) -> None:
    """Fill with zero the parameters whose names contain one of the parts."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if any(part in name for part in parts):
                parameter.zero_()
