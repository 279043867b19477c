"""A step of a flow's SDE, the network asked once for each drift, against the same step with the
network asked twice: for the velocity, and for the score.

    python -m benchmarks.flow

Both follow from one output. The sides take turns, and give the same x.
"""

import argparse
from functools import partial

import torch

from benchmarks.networks import NETWORKS, random_network
from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from flow import create_flow
from flow.solvers import SDE_STEPS, sde

FORM, TIMES = "sigma", (0.48, 0.5)
TWICE = "asked twice"


def one_step(flow, network, y, x, noise, method):
    """The step as sampling takes it."""
    steps = sde(
        flow.said, lambda x, t, step: network(x, t, y), x, TIMES, method, FORM, 1.0, None,
        lambda x: noise,
    )  # fmt: skip
    return next(steps).sample


def twice_asked(flow, network, y, x, noise, method):
    """The same by two calls for each drift."""
    dt = TIMES[1] - TIMES[0]

    def drift(x, t):
        t = torch.full((len(x),), t, device=x.device)
        score = flow.score(network, x, t, dict(y=y))
        return flow.velocity(network, x, t, dict(y=y)) + d(x, t) * score

    def d(x, t):
        return flow.diffusion_coefficient(x, t, FORM)

    kick = noise * torch.sqrt(2 * dt * d(x, torch.full((len(x),), TIMES[0], device=x.device)))
    if method == "euler":
        return x + dt * drift(x, TIMES[0]) + kick
    x = x + kick
    slope = drift(x, TIMES[0])
    return x + dt / 2 * (slope + drift(x + dt * slope, TIMES[1]))


SIDES = {"asked once": one_step, TWICE: twice_asked}


def compared(name, batch_size, rounds):
    """{method: what asking once takes, as a ratio} of a network."""
    flow, network, found = create_flow(), random_network(name), {}
    x, noise = torch.randn(2, batch_size, *network.latent_shape, device=device())
    y = torch.arange(batch_size, device=device())
    for method in SDE_STEPS:
        sides = {
            side: partial(step, flow, network, y, x, noise, method) for side, step in SIDES.items()
        }
        with torch.no_grad():
            one, other = (step() for step in sides.values())  # and both are warm
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            seconds = alternate(sides, rounds)
        found[method] = ratios(seconds, TWICE)["asked once"]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, help="(default: %(default)s)")
    add("--models", nargs="+", choices=NETWORKS, default=["DiT-S/8", "DiT-B/8"])
    add("--batch-size", type=int, default=4)
    add("--rounds", type=int, default=31)
    args = parser.parse_args(argv)
    results = {name: compared(name, args.batch_size, args.rounds) for name in args.models}
    for name, found in results.items():
        print(name)
        table({method: [ratio] for method, ratio in found.items()}, ("ratio, quartiles",))
    write(f"flow-{device().type}", {"settings": vars(args), RATIO: results})


if __name__ == "__main__":
    main()
