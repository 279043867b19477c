"""Train networks that take captions in by three ways, and score what they draw: Stable Diffusion
3's comparison, on captioned digits.

    python examples/captions/caption_study.py --output captions        # half an hour of a core
    python examples/captions/caption_plot.py --results captions --output captions      # the figure

MM-DiT has weights of their own for image and text, cross-attention is PixArt's, and in context text
goes through the image's own weights. All have as many parameters, within 5%, and see the same
batches, captions, times and noise. Each network that is finished is a line of OUTPUT/points.jsonl;
the same command goes on where it was stopped. On CPUs each network has one thread, so that nothing
depends on how many are trained at a time.
"""

from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "examples" / n) for n in ("digits", "scaling", "captions"))]

from runtime.command_line import door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from itertools import product
import time
from typing import NamedTuple

import torch

from judge_captions import repeated, shares
from learning import VAE, captioned, heldout_loss, learn
from processes.table import process_of
from records import CaptionPoint
from sampling.sampler import Sampler
from scores import coloured, draw, load_judge
from studies import Study, parser_of, run_door
from training.state import Recipe, new_state
from vae import load_vae
from variants.mmdit import MMDiT
from variants.pixart import PixArt
from words import Said, combination, load_captioned

SEEDS = (0, 1)
PROCESS = {"name": "flow", "path": "linear", "time_sampling": "logit-normal:0,1"}
# Network → its class, the arguments that are its own, and how much wider it is than the first
NETWORKS = {
    "MM-DiT": (MMDiT, dict(streams=2), 1.0),
    "cross-attention": (PixArt, dict(learn_sigma=False), 1.25),
    "in context": (MMDiT, dict(streams=1), 1.25),
}


class CaptionPlan(NamedTuple):
    """A preset: depth, heads and width of MM-DiT; how networks are trained; where they are scored,
    by so many samples of so many steps, guided.
    """

    depth: int
    heads: int
    width: int
    scored_at: tuple
    batch_size: int
    samples: int
    sampling_steps: int
    cfg_scale: float = 2.5
    lr: float = 1.5e-3
    ema_decay: float = 0.998
    warmup_steps: int = 100
    text_length: int = 8


PRESETS = {
    "tiny": CaptionPlan(1, 1, 32, (1, 2), 4, 80, 2),
    "small": CaptionPlan(4, 2, 64, (1000, 2000, 3000), 64, 360, 10),
}
TOLD = "tiny: a trial of seconds, whose numbers mean nothing; small: for 2 cores"


def list_points(plan):
    """The CaptionPoints of a plan, the whole of a seed before the next."""
    return [CaptionPoint(network, seed) for seed, network in product(SEEDS, NETWORKS)]


def network_of(plan, name, **others):
    """A new network of NETWORKS."""
    kind, own, wider = NETWORKS[name]
    return kind(
        input_size=4, patch_size=1, in_channels=4, hidden_size=int(plan.width * wider),
        depth=plan.depth, num_heads=plan.heads, text_length=plan.text_length, **own, **others,
    )  # fmt: skip


def run_point(plan, point, judge, device, folder):
    """Train one network and score it along the way: the dict that is a line of points.jsonl.

    Raises ValueError, naming the point, if a loss or what it draws is not finite.
    """
    try:
        return train_and_score(plan, point)
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from None


def train_and_score(plan, point):
    """What run_point returns; its ValueErrors say what, but not where."""
    begun = time.monotonic()
    parts, scale, left = load_captioned()
    space, judge = load_vae(str(VAE)), load_judge(scale)
    train, heldout = (captioned(parts[name], space) for name in ("train", "heldout"))
    torch.manual_seed(point.seed)
    network = network_of(plan, point.network)
    recipe = Recipe(lr=plan.lr, ema_decay=(plan.ema_decay,), warmup_steps=plan.warmup_steps)
    state = new_state(network, recipe, process=process_of(network, PROCESS))
    asked, curve = as_heldout(parts["heldout"], plan.samples), []
    for steps in plan.scored_at:
        learn(state, train, space, point.seed, plan.batch_size, steps)
        curve.append({
            "step": steps, "train_mse": state.window.means(plan.batch_size)["mse"],
            "heldout_mse": heldout_loss(state.ema, state.process, heldout, space),
            **scored(plan, judge, state, space, asked),
        })  # fmt: skip
        state.begin_window()
    unseen = repeated([combination(number) for number in left], plan.samples)
    return point._asdict() | {
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "curve": curve, "left_out": scored(plan, judge, state, space, unseen),
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


def as_heldout(digits, count):
    """Said for so many of the held-out Digits, evenly spread: all that is true of each."""
    said = [
        Said(int(digit), {name: int(levels[i]) for name, levels in digits.levels.items()})
        for i, digit in enumerate(digits.digits)
    ]
    return repeated(said, count)


def scored(plan, judge, state, space, asked):
    """{"distance": from real digits, and the `shares`} of pictures drawn for N Said."""
    sampler = Sampler(
        state.ema, space, None, plan.sampling_steps, "heun", cfg_scale=plan.cfg_scale,
        cfg_channels="all", process=state.process,
    )  # fmt: skip
    images = draw(sampler, [said.caption for said in asked], seed=0)
    return {"distance": judge.distance(images), **shares(judge.met(images, asked), asked)}


def begin_judge(plan, device, folder):
    """(nothing that is kept, as each network's process loads the judge; what real digits have)."""
    parts, scale, _ = load_captioned()
    images = coloured(parts["heldout"].images)
    return None, {"distance_of_real_digits": load_judge(scale).distance(images)}


def this_study():
    return Study(
        __file__, PRESETS, TOLD, CaptionPoint, list_points, run_point, begin_judge=begin_judge,
        load_judge=lambda folder, device: None,
    )  # fmt: skip


def build_parser():
    return parser_of(this_study(), __doc__)


@door("--workers", resumes=True)
def main(argv=None):
    run_door(this_study(), build_parser(), argv)


if __name__ == "__main__":
    main()
