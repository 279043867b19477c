"""A network of twelve blocks that has learned patches of photographs, to try on it what saves work.

    python -m benchmarks.deep_patches deep_patches.pt    # minutes on a CPU core

Patches and training are those of examples/scaling: 16×16 pixels, grey, of 12 classes, 64 tokens.
"""

import argparse
from pathlib import Path
import sys

import torch

from benchmarks.sides import ROOT, device
from models import DiT
from runtime.disk import write_whole
from training.state import new_state

sys.path[:0] = [str(ROOT / "examples" / "scaling")]

from patches import CLASSES  # noqa: E402
from study import Plan  # noqa: E402
from trial import recipe_of, train  # noqa: E402

SIZE = dict(input_size=16, patch_size=2, in_channels=1, hidden_size=128, depth=12, num_heads=4)
TOLD_AT = (200, 400, 600)  # the last is where training ends
# Sizes and patch sizes are for studies of several networks, and not looked at here
PLAN = Plan(
    16, 2, {}, (), (), TOLD_AT, batch_size=32, samples=1000, reference=10_000, classifier_steps=600,
    ema_decay=0.995,
)  # fmt: skip
SEED = 0


def deep_network(path):
    """The DiT whose weights are in a file, for sampling alone, on the device; where the file is not
    there yet the network is trained first, and written there.
    """
    network = DiT(**SIZE, num_classes=CLASSES).to(device())
    if path.exists():
        network.load_state_dict(torch.load(path, map_location=device(), weights_only=True))
    else:
        network = trained(network)
        write_whole(path, lambda temporary: torch.save(network.state_dict(), temporary))
    return network.eval().requires_grad_(False)


def trained(network):
    """A moving average of a new network in training."""
    state = new_state(network, recipe_of(PLAN))
    for mse in train(PLAN, state, SEED, device()):
        print(f"step {state.step}: mse {mse:.4f}", flush=True)
    return state.ema


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="file for the weights")
    torch.manual_seed(SEED)
    deep_network(parser.parse_args(argv).weights)


if __name__ == "__main__":
    main()
