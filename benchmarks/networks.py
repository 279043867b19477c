"""Networks with random weights: they cost what trained ones cost. Nothing here needs diffusers."""

from functools import partial

import torch

from benchmarks.sides import device
from models import DiT, DiT_models

TINY = "tiny"  # for dry runs
NETWORKS = DiT_models | {TINY: partial(DiT, patch_size=8, hidden_size=64, depth=1, num_heads=2)}


def random_network(name):
    """The network with normal weights of standard deviation 0.05, that samples only, on the device.
    """
    torch.manual_seed(0)
    with device():
        network = NETWORKS[name]().eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter is not network.pos_embed:
                torch.nn.init.normal_(parameter, std=0.05)
    return network


def twin_of(network):
    """Another network of the same class that shares the tensors."""
    with torch.device("meta"):
        twin = DiT(**network.config)
    twin.load_state_dict(network.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def trained(network):
    """The network with gradients for all but its position table."""
    network.requires_grad_(True).pos_embed.requires_grad_(False)
    return network
