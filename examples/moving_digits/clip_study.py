"""Train small networks of clips in four ways, and compare them on held-out clips: attention along
space and frames in turns or over all at once, and clips alone or images beside them.

    python examples/moving_digits/clip_study.py --latents moving-latents --mixed mixed-latents \\
        --heldout heldout-latents --output clip-study

The first two learn from the same clips with as many operations, the third from as many batches of
clips as the first and from batches of single frames between them, the fourth so with as many
operations as the first. Each has two seeds. A network that is finished is OUTPUT/ARM-seed-S.json;
the same command goes on where it was stopped. Each network has one thread, so that nothing depends
on the machine's cores.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "moving_digits")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from dataclasses import fields
from itertools import count, product
import json
import time
from typing import NamedTuple

import numpy as np
import torch

from checkpoints.networks import MODELS
from data.buckets import ClipBatches
from data.opening import open_source
from data.options import DataOptions
from evaluation.features import load_extractor
from judge_clips import HERE
from layers.clips import clips_of, frames_of
from moving_judge import DIGITS, Clips, judged
from runtime.disk import check_writable, write_whole
from runtime.json_files import read_json
from runtime.limits import Range, check_numbers
from sampling.loading import load_sampler
from training.cost import training_flops
from training.options import TrainOptions
from training.run import run_training
from training.run_log import RunEnded

SEEDS = (0, 1)
FRAMES = 16
AT_ONCE = 20  # clips in a network that is measured
MEASURED = ("plan", "parameters", "heldout_loss", "samples", "seconds")  # entries of a .json


class Arm(NamedTuple):
    """A way to train: a network, the flag that names its latents, and what it has as much of as
    the first arm, "clips" or "operations".
    """

    model: str
    latents: str
    same: str


ARMS = {
    "alternating": Arm("Latte-Ti/4", "latents", "operations"),
    "full": Arm("SpaceTime-Ti/4", "latents", "operations"),
    "with-images": Arm("Latte-Ti/4", "mixed", "clips"),
    "with-images-equal": Arm("Latte-Ti/4", "mixed", "operations"),
}


class Plan(NamedTuple):
    """What a run is: its arm and seed, batches of clips and of images, operations in all, and what
    tells its data and the held-out clips from others.
    """

    arm: str
    seed: int
    clip_steps: int
    image_steps: int
    operations: int
    data: str
    heldout: str
    samples: int


# ---- what is trained ----


def options_of(args, arm, seed, steps=1):
    """The TrainOptions of a run of so many steps."""
    return TrainOptions(
        latents=getattr(args, ARMS[arm].latents), model=ARMS[arm].model, frames=FRAMES,
        num_classes=DIGITS, image_size=32, vae=str(args.vae), flip=False, process="flow",
        time_sampling="logit-normal", qk_norm=True, mixed_precision="bf16",
        global_batch_size=args.batch_size, lr=1e-3, warmup_steps=100, ema_decay=(0.99,),
        global_seed=seed, max_steps=steps, num_workers=0, device="cpu", resume="auto", keep_last=1,
        ckpt_minutes=2.0, results_dir=args.output / "runs" / f"{arm}-seed-{seed}",
    )  # fmt: skip


def opened(options, **others):
    """The cached clips that a run learns from; others replace options."""
    chosen = {field.name: getattr(options, field.name) for field in fields(DataOptions)}
    return open_source(DataOptions(**chosen | others))


def operations_of(options, latent):
    """(of a batch of images, of a batch of clips): operations that training takes, behind an
    autoencoder with latents (C, h, w).
    """
    channels, *size = latent
    with torch.device("meta"):
        network = MODELS[options.model](
            input_size=size, in_channels=channels, **options.network_arguments
        )
    each = (training_flops(network.config, (frames, *size)) for frames in (1, options.frames))
    return tuple(options.global_batch_size * flops for flops in each)


def steps_within(options, lengths, prices, budget):
    """(batches of clips, batches of images) in the order of a run, as many as a budget pays;
    `prices` are those of a batch of images and of one of clips.
    """
    batches = ClipBatches(lengths, options.global_batch_size, options.global_seed, 0, 0)
    taken, spent = [0, 0], 0  # images, clips
    for step in count():
        of_clips = int(lengths[batches.indices(step)[0]] > 1)
        spent += prices[of_clips]
        if spent > budget:
            return taken[1], taken[0]
        taken[of_clips] += 1


def plan_of(args, arm, seed):
    """The Plan of a run. Raises ValueError for latents that do not fit."""
    first, options = options_of(args, next(iter(ARMS)), seed), options_of(args, arm, seed)
    heldout = opened(options, latents=args.heldout)
    source = opened(options)
    check_kinds(source, heldout, args, arm)
    latent = tuple(source.manifest["shape"][1:])
    own = operations_of(options, latent)
    if ARMS[arm].same == "clips":
        clips, images = steps_within(options, source.lengths, (0, 1), args.steps)
    else:
        budget = args.steps * operations_of(first, latent)[1]
        clips, images = steps_within(options, source.lengths, own, budget)
    spent = images * own[0] + clips * own[1]
    return Plan(arm, seed, clips, images, spent, source.hash, heldout.hash, args.samples)


def check_kinds(source, heldout, args, arm):
    """Raise ValueError for images where clips alone are wanted, and for none where some are."""
    name = ARMS[arm].latents
    if (1 in source.lengths) != (name == "mixed"):
        has = "no clips of one frame, and is to have some" if name == "mixed" else "clips of one "\
            "frame, and is to have none"  # fmt: skip
        raise ValueError(f"`{name}` {getattr(args, name)} has {has}; give other latents")
    if set(heldout.lengths) != {FRAMES}:
        raise ValueError(f"`heldout` {args.heldout} has clips of one frame; give latents without")
    if source.classes != heldout.classes:
        raise ValueError(
            f"`heldout` {args.heldout} has the classes {', '.join(heldout.classes)}, `{name}` "
            f"{', '.join(source.classes)}; give latents of the same"
        )


# ---- how it is measured ----


@torch.no_grad()
def heldout_loss(sampler, source):
    """The mean squared error on all held-out clips, each at a time of its own, which lie evenly
    from 0 to 1; times and noise are the same each time.
    """
    generator, total = torch.Generator().manual_seed(0), len(source)
    times = (torch.randperm(total, generator=generator) + 0.5) / total  # (N,)
    losses = []
    for numbers in torch.arange(total).split(AT_ONCE):
        moments, labels, _ = zip(*(source[number, False] for number in numbers.tolist()))
        mean, std = map(frames_of, torch.stack(moments, dim=1).float())  # (n·F, C, h, w)
        drawn = sampler.space.draw(mean, std, torch.randn(mean.shape, generator=generator))
        x = clips_of(drawn, FRAMES)  # (n, C, F, h, w)
        noise, y = torch.randn(x.shape, generator=generator), torch.tensor(labels)
        predict = lambda x, t: sampler.network(x, t, y)  # noqa: E731
        losses.append(sampler.process.losses(predict, x, times[numbers], noise)["mse"])
    return torch.cat(losses).mean().item()


def judged_samples(sampler, args):
    """What the judge sees in so many clips, of all digits in turns: a dict of figures."""
    digits, parts = np.arange(args.samples) % DIGITS, []
    for numbers in torch.arange(args.samples).split(AT_ONCE):
        labels = sampler.conditions(digits[numbers].tolist())
        parts.append(sampler.decode(sampler.numbered_latents(0, numbers.tolist(), labels)).cpu())
    features = load_extractor(str(args.classifier), "cpu", argument="classifier")
    found = judged(Clips(torch.cat(parts).numpy(), digits), features)
    return {name: round(float(figure), 4) for name, figure in found.items()}


def train_and_measure(args, plan):
    """Train a network and measure it: the dict that is its file. Raises ValueError, and RunEnded
    for what ends the training early.
    """
    begun, steps = time.monotonic(), plan.clip_steps + plan.image_steps
    options = options_of(args, plan.arm, plan.seed, steps)
    checkpoint = run_training(options) / "checkpoints" / f"{steps:07d}.pt"
    if not checkpoint.exists():
        raise RunEnded("stopped by a signal; the same command goes on")
    seconds = round(time.monotonic() - begun)
    sampler = load_sampler(
        checkpoint, vae=args.vae, steps=args.sampling_steps, device="cpu", sampler="heun",
        cfg_scale=2.0,
    )  # fmt: skip
    loss = heldout_loss(sampler, opened(options, latents=args.heldout))
    samples = judged_samples(sampler, args) if args.samples else {}
    parameters = sum(p.numel() for p in sampler.network.parameters())
    return dict(zip(MEASURED, (plan._asdict(), parameters, loss, samples, seconds), strict=True))


# ---- the folder ----


def file_of(folder, arm, seed):
    """Where the result of a run lies."""
    return folder / f"{arm}-seed-{seed}.json"


def result_of(folder, plan):
    """What the file of a finished run says; None without one. Raises ValueError for a damaged one,
    and one of another plan.
    """
    file = file_of(folder, plan.arm, plan.seed)
    if not file.exists():
        return None
    found = read_json(file)
    if set(found) != set(MEASURED) or found["plan"] != plan._asdict():
        raise ValueError(
            f"`output` {folder} has {file.name} of other latents, steps or samples; give another "
            "folder, or take it away"
        )
    return found


def keep(folder, result):
    """Write what a run came to, whole or not at all."""
    file = file_of(folder, result["plan"]["arm"], result["plan"]["seed"])
    text = json.dumps(result, indent=1) + "\n"
    write_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def as_table(results):
    """A table in Markdown: a line for each arm, of its seeds' results."""
    columns = ["", "batches of clips, images", "operations", "held-out loss, mean", "of each seed"]
    shares = ["frames read as the digit asked for", "clips that keep one digit"]
    shown = [name for name in shares if all(name in one["samples"] for one in results)]
    lines = [[*columns, *shown], ["---"] * (len(columns) + len(shown))]
    for arm in dict.fromkeys(one["plan"]["arm"] for one in results):
        runs = [one for one in results if one["plan"]["arm"] == arm]
        losses = [one["heldout_loss"] for one in runs]
        clips, images, spent = (
            np.mean([one["plan"][name] for one in runs])
            for name in ("clip_steps", "image_steps", "operations")
        )
        lines.append([
            arm, f"{clips:,.0f}, {images:,.0f}", f"{spent:.3g}", f"{np.mean(losses):.4f}",
            ", ".join(f"{loss:.4f}" for loss in losses),
            *(" and ".join(f"{one['samples'][name]:.1%}" for one in runs) for name in shown),
        ])  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run_study(args):
    """Do what is left of a study; the results of all its runs. Raises ValueError, and RunEnded."""
    plans = [plan_of(args, arm, seed) for arm, seed in product(ARMS, SEEDS)]
    found = [result_of(args.output, plan) for plan in plans]
    for number, plan in enumerate(plans):
        if found[number] is None:
            found[number] = train_and_measure(args, plan)
            keep(args.output, found[number])
            print(f"{plan.arm}, seed {plan.seed}: {found[number]['heldout_loss']:.4f}", flush=True)
    return found


def build_parser():
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    add("--latents", required=True, help="folder of cached clips to learn from")
    add("--mixed", required=True, help="the same, with single frames among the clips")
    add("--heldout", required=True, help="folder of cached clips to measure on")
    add("--vae", default=HERE / "vae", help="of all latents (default: that of the moving digits)")
    add("--classifier", default=HERE / "classifier", help="(default: that of the moving digits)")
    add("--steps", type=int, default=2000, help="of the first of the four, which say how long all "
        "are trained (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=16, help="(default: %(default)s)")
    add("--samples", type=int, default=0,
        help="clips of each network to be judged; networks so short trained draw nothing that can "
        "be read (default: %(default)s)")  # fmt: skip
    add("--sampling-steps", type=int, default=10, help="for these (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder for the results, and the runs in runs/")
    return parser


@door("--batch-size", resumes=True)
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    with parser.refusing():
        check_numbers(args, samples=Range(0, 10**6), sampling_steps=Range(2, 1000))
        args.output.mkdir(parents=True, exist_ok=True)
        check_writable(file_of(args.output, next(iter(ARMS)), SEEDS[0]))
        torch.set_num_threads(1)
        try:
            results = run_study(args)
        except RunEnded as ended:
            sys.exit(1 if ended.told else f"{parser.prog}: error: {ended}")
        finally:
            torch.set_num_threads(threads)
    print(as_table(results), end="")


if __name__ == "__main__":
    main()
