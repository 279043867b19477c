"""Make LightningDiT's changes to DiT one after another, and sample at sizes that a network has not
seen: what each change brings, on one machine.

    python examples/scaling/ladder_study.py --output ladder         # within 60 minutes on 2 cores
    python examples/scaling/ladder_plot.py --results ladder --output ladder         # the figure

Patches, labels and score are those of study.py. The networks see a square of 2×2 pixels as one
place with 4 channels: the direction of a velocity is over channels, and grey pixels have but one.
Each network that is finished is a line of OUTPUT/points.jsonl; the same command goes on where it
was stopped. On CPUs each network has one thread, so that nothing depends on how many are trained
at a time.
"""

from pathlib import Path
import sys

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from runtime.command_line import door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from collections.abc import Mapping
import time
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from evaluation.metrics import frechet_distance
from flow_study import WAYS
from models import DiT
from patches import CLASSES, REAL, REFERENCE, draw_patches
from processes.noise import ImageNoise
from processes.table import PROCESSES, process_of
from records import LadderPoint
from sampling.sampler import Sampler
from studies import Study, parser_of, run_door
from training.state import new_state
from trial import Judge, judged, recipe_of, statistics, train
from vae import LatentShape, from_uint8

SEEDS = (0, 1)
NOISE = 5  # what the noise of held losses is drawn for, beside the uses in patches.py


class Rung(NamedTuple):
    """What is trained: what files say of its process, DiT's arguments, the patch in places of 2×2
    pixels; AdamW's second beta; how many times the plan's batch, learning rate and steps it has.
    """

    process: Mapping[str, Any]
    parts: Mapping[str, Any] = MappingProxyType({})
    patch: int = 2
    beta2: float = 0.999
    batch: int = 1
    lr: int = 1
    steps: float = 1.0


LINEAR = {"name": "flow", "path": "linear"}
MIDDLE = LINEAR | {"time_sampling": "logit-normal:0,1"}
TURNED = MIDDLE | {"cosine_loss": True}
# Table 1 of LightningDiT (Yao et al. 2025), but for its last row, another autoencoder. The larger
# batch is beside the ladder: there steps and images cannot both be equal. Later rungs leave it out.
LADDER = {
    "DiT": Rung({"name": "gaussian"}),
    "rectified flow": Rung(LINEAR),
    "batch x4, equal images": Rung(LINEAR, batch=4, lr=2, steps=0.25),
    "batch x4, equal steps": Rung(LINEAR, batch=4, lr=2),
    "beta2 0.95": Rung(LINEAR, beta2=0.95),
    "logit-normal t": Rung(MIDDLE, beta2=0.95),
    "velocity direction": Rung(TURNED, beta2=0.95),
    "SwiGLU": Rung(TURNED, {"mlp": "swiglu"}, beta2=0.95),
    "RMSNorm": Rung(TURNED, {"mlp": "swiglu", "norm": "rms"}, beta2=0.95),
    "RoPE": Rung(
        TURNED, {"mlp": "swiglu", "norm": "rms", "positions": "table+rope"}, beta2=0.95
    ),
}  # fmt: skip
# Smaller patches, so that there are more places to know; and how their tokens are placed elsewhere
ELSEWHERE = {
    "table": ("interpolate", "extend"), "rope": ("interpolate", "extend", "ntk"),
}  # fmt: skip
RUNGS = LADDER | {
    f"other grids, {positions}": Rung(
        TURNED, {"mlp": "swiglu", "norm": "rms", "positions": positions}, patch=1, beta2=0.95
    )
    for positions in ELSEWHERE
}  # fmt: skip
SCORED_BY = {"gaussian": ("ddim", "ddpm"), "flow": ("euler", "sde, w = sigma")}


class LadderPlan(NamedTuple):
    """A preset: the fields of study.py's Plan, for networks of `size` (depth, width, heads).

    Samples are drawn with so many `calls` of the network, those of the other sizes `grids`, each
    (height, width), with grid_calls.
    """

    image_size: int
    reduction: int
    size: tuple
    calls: int
    grids: tuple
    grid_calls: int
    scored_at: tuple
    batch_size: int
    samples: int
    reference: int
    classifier_steps: int
    lr: float = 1e-3
    ema_decay: float = 0.99
    bf16: bool = False


PRESETS = {
    "tiny": LadderPlan(16, 2, (1, 32, 1), 2, ((16, 24),), 2, (4, 8), 8, 20, 100, 5),
    "small": LadderPlan(
        16, 2, (3, 64, 2), 50, ((16, 24), (24, 24)), 25, (1500, 3000), 32, 1000, 10_000, 600
    ),
}
TOLD = "tiny: a trial of seconds, whose numbers mean nothing; small: for 2 cores"


class Squares:
    """Grey images (N, 1, H, W) as latents of 2×2 pixels, (N, 4, H/2, W/2)."""

    shape = LatentShape(channels=4, ratio=2)
    clip_denoised = True  # as pixels, in [-1, 1]

    def encode(self, images, noise=None):
        return F.pixel_unshuffle(images, self.shape.ratio)  # (N, 4, H/2, W/2)

    def decode(self, latents):
        return F.pixel_shuffle(latents, self.shape.ratio)  # (N, 1, H, W)


def encode(patches):
    """Patches uint8 (N, 1, H, W) → latents (N, 4, H/2, W/2) in [-1, 1]."""
    return Squares().encode(from_uint8(patches))


def list_points(plan):
    """The LadderPoints of a plan, the ladder before the other grids, the whole of a seed before the
    next.
    """
    rest = [name for name in RUNGS if name not in LADDER]
    return [LadderPoint(rung, seed) for part in (LADDER, rest) for seed in SEEDS for rung in part]


def config_of(plan, rung):
    """DiT's arguments for a Rung; a diffusion's network has a learned variance."""
    depth, width, heads = plan.size
    channels, ratio = Squares.shape
    return dict(
        input_size=plan.image_size // ratio, patch_size=rung.patch, in_channels=channels,
        hidden_size=width, depth=depth, num_heads=heads, num_classes=CLASSES,
        learn_sigma=PROCESSES[rung.process["name"]].learns_sigma, **rung.parts,
    )  # fmt: skip


def plan_of(plan, rung):
    """The plan as a Rung has it: its own batch, learning rate and steps."""
    return plan._replace(
        batch_size=plan.batch_size * rung.batch, lr=plan.lr * rung.lr,
        scored_at=tuple(round(step * rung.steps) for step in plan.scored_at),
    )  # fmt: skip


def run_point(plan, point, judge, device, folder):
    """Train one network and score it along the way: the dict that is a line of points.jsonl.

    Raises ValueError, naming the point, if a loss or what it draws is not finite.
    """
    try:
        return train_and_score(plan, point, judge, device)
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from None


def train_and_score(plan, point, judge, device):
    """What run_point returns; its ValueErrors say what, but not where.

    A "step" of the curve is one of the plan, whatever steps the rung has itself.
    """
    begun, worked, rung = time.monotonic(), time.process_time(), RUNGS[point.rung]
    state, own, curve = state_of(plan, rung, point.seed, device), plan_of(plan, rung), []

    def distance(name):
        drawn_by = drawing(state.ema, state.process, name, plan.calls, plan.image_size)
        return judged(judge, plan.samples, drawn_by, device)

    usual, *others = SCORED_BY[state.process.name]
    for step, mse in zip(plan.scored_at, train(own, state, point.seed, device, encode)):
        curve.append({"step": step, "mse": mse, "distance": distance(usual)})
    found = {usual: curve[-1]["distance"]} | {name: distance(name) for name in others}
    return point._asdict() | {
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "images": own.batch_size * state.step, "curve": curve,
        "by_way": [dict(way=way, distance=d) for way, d in found.items()],
        "held_mse": held_mse(plan, state.ema, state.process, plan.image_size),
        "by_grid": elsewhere(plan, state, judge) if point.rung not in LADDER else [],
        "seconds": round(time.monotonic() - begun),
        "cpu_seconds": round(time.process_time() - worked),
    }  # fmt: skip


def state_of(plan, rung, seed, device):
    """The TrainState of a Rung at step 0."""
    torch.manual_seed(seed)
    network = DiT(**config_of(plan, rung)).to(device)
    process = process_of(network, rung.process)
    state = new_state(network, recipe_of(plan_of(plan, rung)), process=process)
    for group in state.opt.param_groups:  # no option of train.py: it changes nothing there or here
        group["betas"] = group["betas"][0], rung.beta2
    return state


def drawing(network, process, name, calls, size):
    """A function (indices, labels (n,)) → images uint8 (n, 1, H, W) of this size, a side or
    (height, width), by one of WAYS with so many calls, without guidance.

    It raises ValueError if they are not finite.
    """
    way, space = WAYS[process.name][name], Squares()
    sampler = Sampler(
        network, space, None, calls // way.calls, way.solver, process=process,
        solver_options=way.options,
    )  # fmt: skip
    latent = space.encode(torch.empty(1, 1, *pair(size))).shape[1:]

    def draw(indices, labels):
        noise_fn = ImageNoise(0, indices, labels.device)
        noise = noise_fn(torch.empty(len(indices), *latent, device=labels.device))
        images = sampler.decode(sampler.latents(labels, noise, noise_fn))  # (n, H, W, 1)
        return images.permute(0, 3, 1, 2)

    return draw


def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def held_mse(plan, network, process, size):
    """The mean squared error of the velocity of real patches of a size, at times spread evenly;
    equal noise for every network. None for a diffusion.
    """
    if process.name != "flow":
        return None
    patches, labels = draw_patches(plan.samples, size, plan.reduction, REAL)
    device, found = next(network.parameters()).device, []
    x, generator = encode(patches), torch.Generator().manual_seed(NOISE)
    t, noise = (torch.arange(len(x)) + 0.5) / len(x), torch.randn(x.shape, generator=generator)
    for part in zip(*(values.to(device).split(250) for values in (x, t, labels, noise))):
        start, times, y, z = part
        found.append(process.flow.training_losses(network, start, times, {"y": y}, z)["mse"])
    return torch.cat(found).mean().item()


# ---- other grids ----


def judge_of(plan, judge, size, device):
    """The same classifier, which averages over any number of pixels, with the reference of a size.
    """
    real = draw_patches(plan.reference, size, plan.reduction, REFERENCE)[0].to(device)
    return Judge(judge.classifier, statistics(judge.classifier, real))


def elsewhere(plan, state, judge):
    """Rows of distance and held_mse: of the size that a network was trained at, and of each other
    size by each extrapolation. All distances are by Euler with grid_calls.
    """
    network, process = state.ema, state.process
    device, rows = next(network.parameters()).device, []
    positions = network.config.get("positions", "table")
    for size in (pair(plan.image_size), *map(pair, plan.grids)):
        here = judge_of(plan, judge, size, device)
        for name in ELSEWHERE[positions] if size != pair(plan.image_size) else (None,):
            network.extrapolation = name or network.extrapolation
            draw = drawing(network, process, "euler", plan.grid_calls, size)
            rows.append({
                "size": size, "extrapolation": name,
                "distance": judged(here, plan.samples, draw, device),
                "held_mse": held_mse(plan, network, process, size),
            })  # fmt: skip
    return rows


def tell(plan, judge, device):
    """How far, at each of the other sizes, as many real patches are, and real ones of the trained
    size that are enlarged to it.
    """
    real = draw_patches(plan.samples, plan.image_size, plan.reduction, REAL)[0].to(device)
    rows = []
    for size in plan.grids:
        here = judge_of(plan, judge, size, device)
        as_many = draw_patches(plan.samples, size, plan.reduction, REAL)[0].to(device)
        larger = F.interpolate(real.float(), size, mode="bilinear", antialias=True)
        both = {"real": as_many, "enlarged": larger.round().to(torch.uint8)}
        found = {
            name: frechet_distance(statistics(here.classifier, patches), here.reference)
            for name, patches in both.items()
        }
        rows.append({"size": size} | found)
    return {"grids": rows}


def this_study():
    return Study(__file__, PRESETS, TOLD, LadderPoint, list_points, run_point, tell)


def build_parser():
    return parser_of(this_study(), __doc__)


@door("--workers", resumes=True)
def main(argv=None):
    run_door(this_study(), build_parser(), argv)


if __name__ == "__main__":
    main()
