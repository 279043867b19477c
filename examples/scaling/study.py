"""Train many small DiTs and score what they draw: the paper's claims about size, compute and block
design, on one machine.

    python examples/scaling/study.py --output scaling           # within 75 minutes on 2 cores
    python examples/scaling/study.py --output scaling-large --preset large          # for a GPU
    python examples/scaling/plot.py --results scaling --output scaling  # the figures

Every network is trained for the same number of steps on the same patches of photographs
(patches.py) and scored by the Fréchet distance of its samples to real patches. Each one that is
finished is a line of OUTPUT/points.jsonl; the same command goes on where it was stopped. On CPUs
each network has one thread, so that nothing depends on how many are trained at a time.
"""

from pathlib import Path
import sys

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from runtime.command_line import door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import time
from typing import NamedTuple

import torch

from models import BLOCKS, DiT
from patches import CLASSES
from records import Point
from sampling.sampler import Sampler
from studies import Study, parser_of, run_door
from training.cost import training_flops
from training.state import new_state
from trial import cost_of, judged, recipe_of, save_samples, train
from vae import load_vae

SEEDS = (0, 1)
# of DDIM; the others for the last weights of the first seed
DEFAULT_STEPS, OTHER_STEPS = 20, (5, 10, 40)


class Plan(NamedTuple):
    """A preset.

    Images are image_size pixels wide, of photographs reduced by a factor; `scored_at` are steps of
    training.

    The block designs are compared at the size and patch size `compared`.
    """

    image_size: int
    reduction: int
    sizes: dict  # name → (depth, width, heads)
    patch_sizes: tuple
    compared: tuple
    scored_at: tuple
    batch_size: int
    samples: int
    reference: int  # real patches that they are compared with
    classifier_steps: int
    lr: float = 1e-3
    ema_decay: float = 0.99
    bf16: bool = False


PRESETS = {
    "tiny": Plan(
        16, 2, {"S": (1, 32, 1), "M": (2, 32, 1)}, (4, 8), ("S", 8), (2, 4), 8, 20, 100, 5
    ),
    "small": Plan(
        16, 2, {"S": (3, 64, 2), "M": (4, 96, 3), "L": (6, 128, 4)}, (2, 4, 8), ("M", 2),
        (375, 750, 1500), 32, 1000, 10_000, 600,
    ),
    "large": Plan(
        32, 1, {"S": (6, 128, 2), "M": (9, 256, 4), "L": (12, 512, 8)}, (2, 4, 8), ("M", 2),
        (1250, 2500, 5000, 10000), 128, 5000, 50_000, 2000, lr=3e-4, ema_decay=0.999, bf16=True,
    ),
}  # fmt: skip


TOLD = (
    "tiny: a trial of seconds, whose numbers mean nothing; small: for 2 cores; large: for a GPU"
)


def config_of(plan, point):
    """DiT's arguments for a network of a plan."""
    depth, width, heads = plan.sizes[point.size]
    return dict(
        input_size=plan.image_size, patch_size=point.patch, in_channels=1, hidden_size=width,
        depth=depth, num_heads=heads, num_classes=CLASSES, block=point.block,
    )  # fmt: skip


def list_points(plan):
    """The Points of a plan, those that take long first."""
    points = [
        Point(size, patch, "adaln_zero", s)
        for s in SEEDS
        for size in plan.sizes
        for patch in plan.patch_sizes
    ]
    points += [
        Point(*plan.compared, block, s) for s in SEEDS for block in BLOCKS if block != "adaln_zero"
    ]
    return sorted(points, key=lambda point: -training_flops(config_of(plan, point)))


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
    begun, config = time.monotonic(), config_of(plan, point)
    torch.manual_seed(point.seed)
    state, curve = new_state(DiT(**config).to(device), recipe_of(plan)), []
    for mse in train(plan, state, point.seed, device):
        found = distance(plan, state.ema, judge, DEFAULT_STEPS)
        curve.append({"step": state.step, "mse": mse, "distance": found})
    by_steps = [{"steps": DEFAULT_STEPS, "distance": curve[-1]["distance"]}]
    if point.seed == SEEDS[0] and point.block == "adaln_zero":
        by_steps += [
            {"steps": n, "distance": distance(plan, state.ema, judge, n)} for n in OTHER_STEPS
        ]
        save_samples(
            lambda *which: draw_images(plan, state.ema, DEFAULT_STEPS, *which),
            folder / "samples" / f"{point.size}-{point.patch}.png", device,
        )  # fmt: skip
    return point._asdict() | cost_of(plan, config) | {
        "curve": curve, "by_sampling_steps": by_steps, "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


def distance(plan, network, judge, steps):
    """The Fréchet distance of samples, DDIM of so many steps without guidance."""
    device = next(network.parameters()).device
    return judged(
        judge, plan.samples, lambda *which: draw_images(plan, network, steps, *which), device
    )


def draw_images(plan, network, steps, indices, labels):
    """Images uint8 (n, 1, S, S) with these indices and labels (n,).

    Raises ValueError if they are not finite.
    """
    sampler = Sampler(
        network, load_vae("none"), None, steps, "ddim",
        mixed_precision="bf16" if plan.bf16 else "no",
    )  # fmt: skip
    return sampler.decode(sampler.numbered_latents(0, indices, labels)).permute(0, 3, 1, 2)


def this_study():
    return Study(__file__, PRESETS, TOLD, Point, list_points, run_point)


def build_parser():
    return parser_of(this_study(), __doc__)


@door("--workers", resumes=True)
def main(argv=None):
    run_door(this_study(), build_parser(), argv)


if __name__ == "__main__":
    main()
