"""Networks that do less at some steps, compiled and as they come.

    python -m benchmarks.compiled                        # the digits network
    python -m benchmarks.compiled --model DiT-S/2 --images 2 --steps 12

Each side draws the same images of the same noise by guided ddim. Networks other than the plain one
are made of it without training, as time is all that is measured: an exit has a copy of the last
layer, routers and the pair's second network have random weights. Of the dynamic network, which
--compile refuses, two ways of compiling are tried: what is left at a step, and all of it at every
step. Times are those that this process computes, in turn.
"""

import argparse
from copy import deepcopy
import time

import torch

from benchmarks.exits import begun
from benchmarks.networks import random_network
from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from benchmarks.solvers import load
from checkpoints.networks import DynamicDiT
from models import DiT
from sampling.sampler import Sampler
from sampling.speed import compiled_block, prepare
from vae import PixelSpace

GUIDANCE, CACHE, HIGH_FROM, EXIT_FROM = 1.5, "taylor:3,2", 0.6, 0.6
AS_IT_IS, COMPILED, COMPLETE = "", ", compiled", ", complete and compiled"


def second_network(network):
    """One of patches twice as large, with random weights."""
    torch.manual_seed(0)
    found = DiT(**network.config | {"patch_size": 2 * network.patch_size})
    for parameter in found.parameters():
        if parameter is not found.pos_embed:
            torch.nn.init.normal_(parameter, std=0.05)
    return found.to(device()).eval().requires_grad_(False)


def with_routers(network):
    """The network's weights in a DynamicDiT, whose routers leave out about half."""
    torch.manual_seed(0)
    config = {name: value for name, value in network.config.items() if name != "block"}
    found = DynamicDiT(**config)
    found.load_state_dict(network.state_dict(), strict=False)
    for name, parameter in found.named_parameters():
        if ".router_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return found.to(device()).eval().requires_grad_(False)


def kinds(network):
    """{kind: (its network, other arguments of its Sampler)}."""
    exits = ((len(network.blocks) // 3, EXIT_FROM),)
    return {
        "plain": (network, {}), "exits": (begun(network, exits), {}),
        "pair": (network, dict(high=second_network(network), high_from=HIGH_FROM)),
        "cache": (network, dict(cache=CACHE)), "dynamic": (with_routers(network), {}),
    }  # fmt: skip


def sides_of(network, steps):
    """{side: its Sampler}, each with networks of its own."""
    found = {}
    for kind, (one, others) in kinds(network).items():
        for way in (AS_IT_IS, COMPILED, *([COMPLETE] if kind == "dynamic" else [])):
            own, arguments = deepcopy(one), deepcopy(others)
            compile_as(way, own, arguments)
            found[f"{kind}{way}"] = Sampler(
                own, PixelSpace(), None, steps, "ddim", cfg_scale=GUIDANCE, **arguments
            )
    return found


def compile_as(way, network, arguments):
    """Compile what a Sampler asks; of a dynamic block what a step leaves of it, or all of it."""
    if way == AS_IT_IS:
        return
    if not isinstance(network, DynamicDiT):
        for one in filter(None, (network, arguments.get("high"))):
            prepare(one, compile=True, by_blocks="cache" in arguments)
        return
    for block in network.blocks:
        if way == COMPILED:
            block.computed = torch.compile(block.computed, dynamic=True, fullgraph=True)
        else:
            block.forward = compiled_block(block.forward, device())
    if way == COMPLETE:
        network.expect = lambda step: None


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="one with random weights (default: that of the digits)")
    parser.add_argument("--images", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of times (default: %(default)s)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    samplers = sides_of(random_network(args.model) if args.model else load()[0], args.steps)
    labels = (torch.arange(args.images) % 10).to(device())
    sides = {
        name: lambda one=one: one.numbered_latents(0, range(args.images), labels)
        for name, one in samplers.items()
    }
    counts, drawn, graphs = torch._dynamo.utils.counters["stats"], {}, {}
    # A GPU's graphs for the numbers of tokens, which vary, as on a CPU
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for name, side in sides.items():
            before = counts["unique_graphs"]
            drawn[name], graphs[name] = side(), counts["unique_graphs"] - before
            print(name, graphs[name], flush=True)
        seconds = alternate(sides, args.rounds, time.process_time)
    moved = {}
    for name, latents in drawn.items():
        plain = drawn[name.partition(",")[0]]
        moved[name] = f"{(latents - plain).abs().max() / plain.abs().max():.1e}"
    shares = {
        name: ratios({one: seconds[one] for one in (kind, name)}, kind)[name]
        for name in sides if (kind := name.partition(",")[0]) != name
    }  # fmt: skip
    times = ratios(seconds, "plain")
    table({name: (times[name], shares.get(name), graphs[name], moved[name]) for name in sides},
          ("of plain", "of its own as it is", "graphs", "farthest"))  # fmt: skip
    write("compiled", {
        "settings": vars(args), f"of the plain network, {RATIO}": times,
        "of its own as it is": shares, "graphs": graphs, "farthest, of the largest": moved,
    })  # fmt: skip


if __name__ == "__main__":
    main()
