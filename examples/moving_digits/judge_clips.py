"""Judge clips of moving digits: is it the digit asked for, does it stay one, does it go straight?

    python examples/moving_digits/judge_clips.py --samples samples/NAME.npz \\
        --real moving-digits/heldout --output judged.json
    python examples/moving_digits/judge_clips.py --samples continued.npz \\
        --truth moving-digits/heldout

Clips are an .npz of sample_ddp.py, or a folder of clips. A classifier reads every frame. Each
clip's centres of mass are compared with the nearest way that is straight but for turns at the
borders. Beside the samples stand real clips, and these through the autoencoder. With --truth,
samples are clips that go on as true ones begin (continue_clips.py); their places are compared.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "moving_digits")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import json

from evaluation.features import load_extractor
from moving_judge import (
    LEAST_FRAMES, digits_in, judged, judged_continuations, read_clips, spread_out,
    through_autoencoder,
)  # fmt: skip
from runtime.disk import check_writable, write_whole
from runtime.limits import Range, check_numbers
from vae import load_vae

HERE = EXAMPLES / "moving_digits"


def build_parser():
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    add("--samples", type=Path, help=".npz of clips uint8 (N, F, 32, 32, 3), or a folder of clips")
    add("--labels", type=Path, help="file with a digit a line, which the samples were asked for "
        "(default: what sample_ddp.py noted of them, or the names of their folders)")  # fmt: skip
    add("--real", type=Path, help="real clips to judge as well, such as moving-digits/heldout")
    add("--truth", type=Path, help="clips that the samples go on from, in their order; of more "
        "of them those evenly spread, as continue_clips.py takes them")  # fmt: skip
    add("--given-frames", type=int, default=LEAST_FRAMES,
        help="with --truth: how many first frames were given (default: %(default)s)")  # fmt: skip
    add("--vae", default=HERE / "vae", help="(default: that of the moving digits)")
    add("--classifier", default=HERE / "classifier", help="(default: that of the moving digits)")
    add("--seed", type=int, default=0, help="of the autoencoder's noise (default: %(default)s)")
    add("--output", type=Path, help="file of JSON to write as well")
    return parser


def check_together(args):
    """Raise ValueError for flags that do not go together."""
    if not (args.samples or args.real):
        raise ValueError("`samples` or `real` are wanted: clips to judge")
    for name in ("labels", "truth"):
        if getattr(args, name) and not args.samples:
            raise ValueError(f"`{name}` goes with `samples`; give both")
    if args.output and args.output.exists():
        raise ValueError(f"`output` {args.output} exists already; remove it or give another name")
    if args.output:
        check_writable(args.output)


def read_samples(args):
    """The Clips of `samples`, with the digits of `labels` if it is given. Raises ValueError."""
    clips = read_clips(args.samples, "samples")
    if args.labels:
        return clips._replace(digits=digits_in(args.labels, len(clips.frames)))
    return clips


def read_truth(args, samples):
    """The Clips that samples go on from. Raises ValueError if they are fewer, or of another length.
    """
    truth = spread_out(read_clips(args.truth, "truth"), len(samples.frames))
    if truth.frames.shape != samples.frames.shape:
        raise ValueError(
            f"`truth` has clips {truth.frames.shape}, `samples` {samples.frames.shape}; give the "
            "clips that the samples go on from"
        )
    if args.given_frames >= truth.frames.shape[1]:
        raise ValueError(
            f"`given_frames` is {args.given_frames}, and clips have {truth.frames.shape[1]} "
            "frames; give fewer"
        )
    return truth


def judge(args):
    """{what was judged: its figures}. Raises ValueError for clips that cannot be judged."""
    features = load_extractor(str(args.classifier), "cpu", argument="classifier")
    found = {}
    if args.samples:
        samples = read_samples(args)
        truth = read_truth(args, samples) if args.truth else None
        if truth and samples.digits is None:
            samples = samples._replace(digits=truth.digits)
        found["samples"] = judged(samples, features)
        if truth:
            found["samples"] |= judged_continuations(samples, truth.frames, args.given_frames)
    if args.real:
        real = read_clips(args.real, "real")
        space = load_vae(str(args.vae))
        again = real._replace(frames=through_autoencoder(real.frames, space, args.seed))
        found |= {"real": judged(real, features), "real, autoencoder": judged(again, features)}
    return {
        name: {key: round(float(x), 4) for key, x in row.items()} for name, row in found.items()
    }


def as_table(found):
    """A table in Markdown: a line for each figure, a column for each set of clips."""
    rows = dict.fromkeys(key for figures in found.values() for key in figures)
    lines = [["", *found], ["---"] * (1 + len(found))]
    lines += [[key, *(f"{f[key]:g}" if key in f else "" for f in found.values())] for key in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@door()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args, given_frames=Range(2, 10**4))
        check_together(args)
        found = judge(args)
        if args.output:
            text = json.dumps(found, indent=1) + "\n"
            write_whole(args.output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(as_table(found), end="")


if __name__ == "__main__":
    main()
