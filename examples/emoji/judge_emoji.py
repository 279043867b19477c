"""Judge the emoji's autoencoder and networks: are pictures, groups and colours what was asked for?

    python examples/emoji/judge_emoji.py --data-path emoji --output judged.json

The autoencoder is judged by drawings that it was not trained on; the network of groups by a
classifier and by how near its pictures come to drawings that it was trained on; the network of
words by the colour of what it draws, and by whether a picture goes with its own name among a
hundred. Beside each figure stands that of real drawings. Pictures are drawn on the CPU.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "shapes"), str(EXAMPLES / "emoji")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json

import torch

from checkpoints.choice import NetworkChoice
from checkpoints.loading import find_files
from emoji_judge import PARTS, Judge, judged
from evaluation.features import load_extractor
from runtime.disk import check_writable
from runtime.limits import RANGES, Range, check_numbers
from sampling.loading import build_sampler
from sampling.options import SamplingOptions, check_seed
from sampling.pictures import write_file
from sources import SIDE
from train_emoji_classifier import CLASSES
from vae import load_vae

HERE = EXAMPLES / "emoji"
JUDGED = Range(2 * len(CLASSES), 20_000)  # how many samples there may be
OF_WORDS = {"words", "retrieval", "things"}  # parts that need the network of words
SOLVER = "euler"


def build_parser():
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    add("--data-path", required=True, type=Path, help="the folder that make_emoji.py wrote")
    add("--ckpt", default=HERE / "classes.safetensors",
        help="of a network that draws by group (default: the one here)")  # fmt: skip
    add("--text-ckpt", default=HERE / "text.safetensors",
        help="of a network that reads words (default: the one here)")  # fmt: skip
    add("--vae", default=HERE / "vae", help="(default: that of the emoji)")
    add("--features", default=HERE / "classifier",
        help="what train_emoji_classifier.py wrote (default: the one here)")  # fmt: skip
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to judge (default: "
        "all): %(choices)s", metavar="PART")  # fmt: skip
    add("--num-samples", type=int, default=1000,
        help="by group; a quarter as many by colour, a tenth of each other kind (default: "
        "%(default)s)")  # fmt: skip
    add("--num-sampling-steps", type=int, default=25, help=f"of {SOLVER} (default: %(default)s)")
    add("--cfg-scale", type=float, default=2.0, help="for groups (default: %(default)s)")
    add("--text-cfg-scale", type=float, default=3.0, help="for words (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--output", type=Path, help="file of JSON to write as well")
    return parser


def sampling_options(args, cfg_scale):
    """How either network is sampled."""
    return SamplingOptions(
        sampler=SOLVER, num_sampling_steps=args.num_sampling_steps, cfg_scale=cfg_scale,
        cfg_channels="all",
    )  # fmt: skip


def load_sampler(ckpt, vae, options):
    """The Sampler of a checkpoint on the CPU."""
    choice = NetworkChoice(ckpt, vae=vae)
    return build_sampler(choice, find_files(choice, vae), options, torch.device("cpu"))


def by_group(args, options):
    """The Sampler of `ckpt`. Raises ValueError unless it draws the emoji's groups."""
    sampler = load_sampler(args.ckpt, args.vae, options)
    classes = getattr(sampler.network, "num_classes", None), sampler.classes or CLASSES
    if classes != (len(CLASSES), CLASSES) or sampler.image_size != SIDE:
        raise ValueError(
            f"`ckpt` {args.ckpt} does not draw pictures of {SIDE}x{SIDE} of the groups "
            f"{', '.join(CLASSES)}; give a network that was trained on make_emoji.py's train"
        )
    return sampler


def by_words(args, options):
    """The Sampler of `text_ckpt`. Raises ValueError unless it reads words by itself."""
    sampler = load_sampler(args.text_ckpt, args.vae, options)
    if getattr(sampler.network, "text_encoder", None) is None or sampler.image_size != SIDE:
        raise ValueError(
            f"`text_ckpt` {args.text_ckpt} does not draw pictures of {SIDE}x{SIDE} to words that "
            "it reads by itself; give a network that was trained on make_emoji.py's words"
        )
    return sampler


def load_judge(args):
    """The Judge of a command line, with the Samplers that its parts need."""
    groups, words = (sampling_options(args, s) for s in (args.cfg_scale, args.text_cfg_scale))
    features = load_extractor(str(args.features), "cpu")
    seen = features(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)).logits
    if seen is None or seen.shape[1] != len(CLASSES):
        raise ValueError(
            f"`features` {args.features} does not tell {len(CLASSES)} groups apart; give what "
            "train_emoji_classifier.py wrote"
        )
    return Judge(
        args.data_path, load_vae(str(args.vae)), features, args.num_samples, args.seed,
        by_group=by_group(args, groups) if "classes" in args.parts else None,
        by_words=by_words(args, words) if set(args.parts) & OF_WORDS else None,
    )  # fmt: skip


def settings(args):
    """What the figures depend on besides the checkpoints."""
    names = ("num_samples", "num_sampling_steps", "cfg_scale", "text_cfg_scale", "seed")
    return {"settings": {name: getattr(args, name) for name in names}}


@door("--num-samples")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args, num_samples=JUDGED, text_cfg_scale=RANGES["cfg_scale"])
        check_seed(args.seed)
        if args.output:
            check_writable(args.output)
        found = settings(args) | judged(load_judge(args), args.parts)
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        if args.output:
            write_file(args.output, text.encode())
    print(text, end="")


if __name__ == "__main__":
    main()
