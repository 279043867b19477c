"""A small network that reads text, for tests of what is drawn of prompts."""

from checkpoints.weights import Weights, save_weights
from conftest import fill_randomly
from processes.flow import FlowProcess
from variants.mmdit import MMDiT

PROMPTS = ["a thick three", "", "a thin seven leaning left"]
SIZES = dict(
    input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=1, num_heads=2, text_length=8
)
LONG = "one two three four five six seven eight nine"  # of more pieces than text_length
READ = "one two three four five six seven"
FLOW = FlowProcess()


def reader(seed=0, **changes):
    """A network of random weights whose output depends on its text."""
    return fill_randomly(MMDiT(**{**SIZES, **changes}), seed, std=0.3).eval().requires_grad_(False)


def saved(path, network, process=FLOW):
    """The path of a file with the network, which has learned this process."""
    said = None if process is None else process.config
    save_weights(path, Weights(network.state_dict(), network.config, None, process=said))
    return str(path)
