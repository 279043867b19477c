"""Judge pictures that a checkpoint draws to captions: is a "thin seven leaning left" all of that?

    python examples/captions/judge_captions.py --output examples/captions/results/judged.json

A classifier of real digits says which digit a picture shows, and measure.py how thick, wide and
slanted that digit is, by the words' scale (words.py). Judged are samples of all prompts, samples of
the combinations that were left out of training, guidance, a negative prompt and the empty prompt.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "digits"), str(EXAMPLES / "captions")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from dataclasses import replace
import json

import numpy as np
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.loading import find_files
from conditions.text import TextCondition, pieces
from make_dataset import IMAGE_SIZE
from runtime.disk import check_writable
from runtime.limits import Range, check_numbers
from sampling.loading import build_sampler
from sampling.options import SamplingOptions, check_seed
from sampling.pictures import write_file
from scores import draw, load_judge
from words import (
    COMBINED, DIGITS, LEVELS, MEASURES, WORDS, Said, combination, every_prompt, load_captioned,
)  # fmt: skip

BOTH = " and ".join(COMBINED)
JUDGED = Range(len(DIGITS) * 2, 10**6)  # how many samples there may be
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
AGAINST = Said(None, {"slant": 0})  # the negative prompt: a digit leaning left


def shares(met, asked):
    """{what is asked for: the share of N pictures that have it, of those that are asked for it},
    "thickness and slant" where both are asked for, "all" that is asked for.
    """
    found = {"digit": float(met["digit"].mean())}
    for name in MEASURES:
        told = np.array([name in said.levels for said in asked])
        if told.any():
            found[name] = float(met[name][told].mean())
    told = np.array([set(COMBINED) <= said.levels.keys() for said in asked])
    if told.any():
        found[BOTH] = float(np.logical_and(*(met[name] for name in COMBINED))[told].mean())
    return found | {"all": float(np.all(list(met.values()), axis=0).mean())}


def chance(asked):
    """`shares` of a digit and levels that are guessed. Whatever the levels' sizes, which add up to
    1, a guess by them is right for a third of prompts that ask for each level as often.
    """
    third, counts = 1 / LEVELS, [len(said.levels) for said in asked]
    found = {"digit": 1 / len(DIGITS)} | dict.fromkeys(MEASURES, third)
    every = float(np.mean([third**count for count in counts])) / len(DIGITS)
    return found | {BOTH: third**2, "all": every}


def judged(judge, sampler, asked, seed):
    """How many, and the `shares`, of pictures drawn to N Said."""
    images = draw(sampler, [said.caption for said in asked], seed)
    return {"samples": len(asked)} | shares(judge.met(images, asked), asked)


def repeated(asked, count):
    """So many of the Said, each as often, spread evenly if there are more of them."""
    spread = count < len(asked)
    return [asked[i * len(asked) // count if spread else i % len(asked)] for i in range(count)]


def judge_all(judge, sampler, left, count, seed):
    """All that is told, a dict, of so many samples of all prompts, and half as many of each other
    thing. `left` are the numbers of the combinations that were left out of training.
    """
    numbers = range(len(DIGITS) * LEVELS ** len(COMBINED))
    seen, unseen = [combination(n) for n in numbers if n not in left], list(map(combination, left))
    every, few = repeated(list(every_prompt()), count), count // 2

    def of(asked, scale=sampler.cfg_scale):
        return judged(judge, replace(sampler, cfg_scale=scale), asked, seed)

    return {
        "all prompts": of(every),
        "by chance, all prompts": chance(every),
        "seen in training": of(repeated(seen, few)),
        "left out of training": of(repeated(unseen, few)),
        "by chance, these two": chance(seen),
        "guidance": {f"{scale:g}": of(repeated(seen, few), scale) for scale in SCALES},
        "negative prompt": negative(judge, sampler, few, seed),
        "empty prompt": empty(judge, sampler, few, seed),
    }  # fmt: skip


def negative(judge, sampler, count, seed):
    """The shares of slants of digits asked for by name alone, guided against the empty caption and
    against AGAINST; `digit` is the share that is the one asked for.
    """
    asked = repeated([Said(digit, {}) for digit in range(len(DIGITS))], count)
    against = replace(sampler)
    against.condition = TextCondition(pieces([AGAINST.caption], sampler.network.text_length))
    found = {}
    for name, one in {"nothing": sampler, AGAINST.caption: against}.items():
        images = draw(one, [said.caption for said in asked], seed)
        digits = np.array([said.digit for said in asked])
        levels = judge.scale.levels(images.mean(axis=-1), digits)["slant"]
        found[f"against {name}"] = {
            "digit": float(judge.met(images, asked)["digit"].mean()), **of_levels("slant", levels)
        }  # fmt: skip
    return found


def empty(judge, sampler, count, seed):
    """What is drawn to the empty caption, without guidance: the share of each digit, and of each
    level of each measure by the digit that is seen.
    """
    images = draw(replace(sampler, cfg_scale=1.0), [""] * count, seed)
    digits = judge.digits(images)
    levels = judge.scale.levels(images.mean(axis=-1), digits)
    found = dict(zip(DIGITS, (np.bincount(digits, minlength=len(DIGITS)) / count).tolist()))
    return found | {name: of_levels(name, levels[name]) for name in MEASURES}


def of_levels(name, levels):
    """{word: the share of pictures with that level (N,) of a measure}."""
    return dict(zip(WORDS[name], (np.bincount(levels, minlength=LEVELS) / len(levels)).tolist()))


def build_parser():
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    add("--ckpt", default=EXAMPLES / "captions" / "mmdit.safetensors",
        help="of a network that reads captions (default: the one here)")  # fmt: skip
    add("--vae", default=EXAMPLES / "digits" / "vae", help="(default: that of the digits)")
    add("--num-samples", type=int, default=1000, help="of all prompts (default: %(default)s)")
    add("--num-sampling-steps", type=int, default=10, help="of heun (default: %(default)s)")
    add("--cfg-scale", type=float, default=3.0, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--output", type=Path, help="file of JSON to write as well")
    return parser


def load_sampler(args):
    """The Sampler of a command line. Raises ValueError unless its network reads captions."""
    options = SamplingOptions(
        num_sampling_steps=args.num_sampling_steps, cfg_scale=args.cfg_scale, cfg_channels="all"
    )
    choice = NetworkChoice(args.ckpt, vae=args.vae)
    sampler = build_sampler(choice, find_files(choice, args.vae), options, torch.device("cpu"))
    check_captioned(sampler)
    return sampler


def check_captioned(sampler):
    """Raise ValueError unless what is sampled are digits to captions, as far as sizes tell."""
    if getattr(sampler.network, "text_encoder", None) is None or sampler.image_size != IMAGE_SIZE:
        raise ValueError(
            f"{sampler.checkpoint} does not draw pictures of {IMAGE_SIZE}x{IMAGE_SIZE} to captions "
            "that it reads by itself; give a network that was trained on make_captions.py's digits"
        )


@door("--num-samples")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args, num_samples=JUDGED)
        check_seed(args.seed)
        if args.output:
            check_writable(args.output)
        sampler = load_sampler(args)
        _, scale, left = load_captioned()
        found = judge_all(load_judge(scale), sampler, left, args.num_samples, args.seed)
        text = json.dumps(settings(args) | found, indent=1) + "\n"
        if args.output:
            write_file(args.output, text.encode())
    print(text, end="")


def settings(args):
    """What the figures depend on besides the checkpoint."""
    names = ("num_samples", "num_sampling_steps", "cfg_scale", "seed")
    return {"settings": {name: getattr(args, name) for name in names}}


if __name__ == "__main__":
    main()
