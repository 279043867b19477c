"""Train one network as a diffusion and as flows, and score what it draws by each of their solvers:
SiT's claims about processes, paths and solvers, on one machine.

    python examples/scaling/flow_study.py --output flows            # within 60 minutes on 2 cores
    python examples/scaling/flow_plot.py --results flows --output flows             # the figure

Network, patches, recipe, labels and score are those of study.py. Each network that is finished is a
line of OUTPUT/points.jsonl; the same command goes on where it was stopped. On CPUs each network has
one thread, so that nothing depends on how many are trained at a time.
"""

from pathlib import Path
import sys

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from runtime.command_line import door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from collections.abc import Mapping
from itertools import product
import time
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from flow.solvers import LAST_STEP_SIZE
from models import DiT
from patches import CLASSES
from processes.table import PROCESSES, process_of
from records import FlowPoint
from sampling.sampler import Sampler
from studies import Study, parser_of, run_door
from training.state import new_state
from trial import cost_of, judged, recipe_of, train
from vae import load_vae

SEEDS = (0, 1)

# What is learned: the name of a variant → what files say of its process
VARIANTS = {
    "noise": {"name": "gaussian"},
    "vp": {"name": "flow", "path": "vp"},
    "linear": {"name": "flow", "path": "linear"},
    "gvp": {"name": "flow", "path": "gvp"},
    "logit-normal": {"name": "flow", "path": "linear", "time_sampling": "logit-normal:0,1"},
}


class Way(NamedTuple):
    """From noise to data: a solver, how often each of its steps asks the network, its options."""

    solver: str
    calls: int = 1
    options: Mapping[str, Any] = MappingProxyType({})


# The first of each is also taken along the training. D of the SDE is half of the w in SiT's paper:
# sbdm is its w_KL, and for w = sigma and w = sin²(pi t) the norm is 0.5. On straight and circular
# paths w_KL is infinite at t = 0: it begins as far from noise as its last step does from data.
WAYS = {
    "gaussian": {"ddim": Way("ddim"), "dpm++": Way("dpm++"), "ddpm": Way("ddpm")},
    "flow": {
        "heun": Way("heun", 2),
        "euler": Way("euler"),
        "sde, w_KL": Way("sde", 1, {"diffusion_form": "sbdm", "sample_eps": LAST_STEP_SIZE}),
        "sde, w = 2 sigma": Way("sde", 1, {"diffusion_form": "sigma"}),
        "sde, w = sigma": Way("sde", 1, {"diffusion_form": "sigma", "diffusion_norm": 0.5}),
        "sde, w = sin²": Way(
            "sde", 1, {"diffusion_form": "increasing-decreasing", "diffusion_norm": 0.5}
        ),
    },
}


class FlowPlan(NamedTuple):
    """A preset: the fields of study.py's Plan, for one network of `size` (depth, width, heads).

    Samples are drawn with each number of `calls` of the network; with `curve_calls`, which is one
    of them, at each of the steps `scored_at`.
    """

    image_size: int
    reduction: int
    size: tuple
    patch: int
    calls: tuple
    curve_calls: int
    scored_at: tuple
    batch_size: int
    samples: int
    reference: int
    classifier_steps: int
    lr: float = 1e-3
    ema_decay: float = 0.99
    bf16: bool = False


PRESETS = {
    "tiny": FlowPlan(16, 2, (1, 32, 1), 8, (2, 4), 4, (2, 4), 8, 20, 100, 5),
    "small": FlowPlan(
        16, 2, (3, 64, 2), 4, (20, 50, 100), 50, (750, 1500, 3000), 32, 1000, 10_000, 600
    ),
}
TOLD = "tiny: a trial of seconds, whose numbers mean nothing; small: for 2 cores"


def list_points(plan):
    """The FlowPoints of a plan, the whole of a seed before the next."""
    return [FlowPoint(variant, seed) for seed, variant in product(SEEDS, VARIANTS)]


def config_of(plan, variant):
    """DiT's arguments for a network that learns a variant; a diffusion's has a learned variance."""
    depth, width, heads = plan.size
    return dict(
        input_size=plan.image_size, patch_size=plan.patch, in_channels=1, hidden_size=width,
        depth=depth, num_heads=heads, num_classes=CLASSES,
        learn_sigma=PROCESSES[VARIANTS[variant]["name"]].learns_sigma,
    )  # fmt: skip


def run_point(plan, point, judge, device, folder):
    """Train one network and score it along the way: the dict that is a line of points.jsonl.

    Raises ValueError, naming the point, if a loss or what it draws is not finite.
    """
    try:
        return train_and_score(plan, point, judge, device, folder)
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from None


def train_and_score(plan, point, judge, device, folder):
    """What run_point returns; its ValueErrors say what, but not where."""
    begun, config = time.monotonic(), config_of(plan, point.variant)
    torch.manual_seed(point.seed)
    network = DiT(**config).to(device)
    process = process_of(network, VARIANTS[point.variant])
    state, curve = new_state(network, recipe_of(plan), process=process), []

    def distance(name, calls):
        draw = drawing(plan, state.ema, process, WAYS[process.name][name], calls)
        return judged(judge, plan.samples, draw, device)

    usual = next(iter(WAYS[process.name])), plan.curve_calls
    others = [key for key in product(WAYS[process.name], plan.calls) if key != usual]
    for mse in train(plan, state, point.seed, device):
        curve.append({"step": state.step, "mse": mse, "distance": distance(*usual)})
    found = {usual: curve[-1]["distance"]} | {key: distance(*key) for key in others}
    return point._asdict() | cost_of(plan, config) | {
        "curve": curve,
        "by_way": [dict(way=way, calls=calls, distance=d) for (way, calls), d in found.items()],
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


def drawing(plan, network, process, way, calls):
    """A function (indices, labels (n,)) → images uint8 (n, 1, S, S), without guidance.

    It raises ValueError if they are not finite.
    """
    sampler = Sampler(
        network, load_vae("none"), None, calls // way.calls, way.solver, process=process,
        solver_options=way.options, mixed_precision="bf16" if plan.bf16 else "no",
    )  # fmt: skip

    def draw(indices, labels):
        return sampler.decode(sampler.numbered_latents(0, indices, labels)).permute(0, 3, 1, 2)

    return draw


def this_study():
    return Study(__file__, PRESETS, TOLD, FlowPoint, list_points, run_point)


def build_parser():
    return parser_of(this_study(), __doc__)


@door("--workers", resumes=True)
def main(argv=None):
    run_door(this_study(), build_parser(), argv)


if __name__ == "__main__":
    main()
