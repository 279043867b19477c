"""Score samples against a reference: FID, sFID, Inception Score, precision and recall.

    python evaluate.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py --samples samples/NAME --reference imagenet256.npz
    python evaluate.py --samples samples/NAME --reference digits/train \\
        --features examples/digits/classifier
    python evaluate.py --make-reference imagenet/train --image-size 256 --output imagenet256.npz
    python evaluate.py --likelihood results/NAME --samples imagenet/val
    python evaluate.py --clip openai/clip-vit-large-patch14 --samples samples/NAME
    python evaluate.py --frames 16 --samples samples/NAME.npz --reference clips \\
        --features i3d.ts

Samples are a folder of images or an .npz with `arr_0`; a reference may also be an .npz with mu and
sigma, as ADM's are. The scores follow the conventions of ADM's suite, and are printed as JSON, with
hashes of both sides; what to know about them goes to the error output. --likelihood reports instead
how likely images are to a network that has learned a flow, in bits per dimension, and --clip how
near images are to their captions, by the CLIP score of Hessel et al. (2021). With --frames both
sides are sets of clips: folders of videos, GIFs or folders of frames, or an .npz of them.
"""

from runtime.command_line import Parser, door, end_at_interrupt, read_size

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from argparse import Namespace
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
import sys

import torch

from checkpoints.choice import IMAGE_SIZE, MODEL, NUM_CLASSES, NetworkChoice
from data.options import DataOptions
from evaluation.options import EvaluationOptions, check_common
from evaluation.report import (
    LIBRARIES, as_text, evaluate, installed, join_others, make_reference, write_report,
)  # fmt: skip
from processes.table import WORDS
from runtime.team import Team

# Flags that go with --likelihood alone, and others that do not go with it
OF_LIKELIHOOD = (
    "vae", "weights", "model", "num_classes", "process", "exact", "seed", "cfg_scale",
    "text_encoder",
)  # fmt: skip
OF_CLIP = ("captions",)
OF_FRAMES = ("frame_stride", "per_frame")
OF_OTHERS = ("reference", "make_reference", "features", "inception_weights")
# What is asked for instead of scores of images against a reference → the flags that go with it
# alone, and those that do not go with it
INSTEAD = {"likelihood": OF_LIKELIHOOD, "clip": OF_CLIP, "frames": OF_FRAMES}
STRANGERS = {
    "likelihood": OF_OTHERS, "clip": (*OF_OTHERS, "image_size"),
    "frames": ("make_reference", "image_size"),
}  # fmt: skip


def build_parser() -> Parser:
    usage = "%(prog)s --samples PATH --reference PATH [flags; --help lists them]"
    parser = Parser(__file__, description=__doc__, usage=usage)
    sides = parser.add_argument_group("what is compared").add_argument
    sides(
        "--samples", metavar="PATH",
        help="folder of images, or .npz with uint8 arr_0 (N, H, W, 3); with --likelihood a folder "
        "with one folder of images per class, or one of cached latents",
    )  # fmt: skip
    sides(
        "--reference", metavar="PATH", help="the same, or .npz with mu, sigma, mu_s, sigma_s, arr_0"
    )
    making = "instead: write such a file, of all images below this folder, to --output"
    sides("--make-reference", metavar="DIR", help=making)
    cropping = (
        "with --make-reference: crop to this size, a number or HEIGHTxWIDTH, and convert to RGB, "
        f"as training does; with --likelihood: as --model (default: {IMAGE_SIZE})"
    )
    sides("--image-size", type=read_size, help=cropping)
    sides(
        "--output", metavar="FILE",
        help="where to write the JSON as well, or the reference; must not exist",
    )  # fmt: skip
    features = parser.add_argument_group("features").add_argument
    kinds = (
        "inception, pixels, a folder that timm's save_for_hf wrote, or a TorchScript file, which "
        "is a program: it runs with your rights, so trust where it comes from "
        "(default: %(default)s)"
    )
    features(
        "--features", default=EvaluationOptions.features, metavar="{inception,pixels,PATH}",
        help=kinds,
    )  # fmt: skip
    weights = "torch-fidelity's weights-inception-2015-12-05 (default: fetched on first use)"
    features("--inception-weights", metavar="FILE", help=weights)
    add_clip_flags(parser)
    add_frame_flags(parser)
    add_likelihood_flags(parser)
    run = parser.add_argument_group("run").add_argument
    run(
        "--batch-size", type=int, default=EvaluationOptions.batch_size,
        help="images at a time in each process (default: %(default)s)",
    )  # fmt: skip
    run(
        "--num-workers", type=int, default=EvaluationOptions.num_workers,
        help="loader processes per process (default: %(default)s)",
    )  # fmt: skip
    run("--device", choices=["cpu", "cuda", "mps"], help="default: the GPU if there is one")
    return parser


def add_clip_flags(parser: Parser) -> None:
    """Add the flags that say by which CLIP, and to which captions, images are to be near."""
    add = parser.add_argument_group("CLIP score, instead of scores").add_argument
    add(
        "--clip", metavar="NAME",
        help="the mean of 100 max(cosine, 0) between the samples and their captions, to this CLIP: "
        "a local folder or a hub id",
    )  # fmt: skip
    beside = (
        "a caption a line, for the samples in order (default: captions.txt in their folder, or "
        "NAME.captions.txt beside NAME.npz, as sample_ddp.py writes them)"
    )
    add("--captions", metavar="FILE", help=beside)


def add_frame_flags(parser: Parser) -> None:
    """Add the flags that say which frames of clips are compared."""
    add = parser.add_argument_group("clips, instead of images").add_argument
    add(
        "--frames", type=int, metavar="F",
        help="compare clips by their first F frames: their Fréchet distance by --features, then a "
        "TorchScript file, called with clips (N, 3, F, H, W) from -1 to 1, that returns (N, D)",
    )  # fmt: skip
    add(
        "--frame-stride", type=int, default=1, metavar="S",
        help="take every S-th frame (default: %(default)s)",
    )  # fmt: skip
    add("--per-frame", action="store_true", help="score each frame by itself, as images are")


def add_likelihood_flags(parser: Parser) -> None:
    """Add the flags that say to which network images are to be likely."""
    add = parser.add_argument_group("likelihood, instead of scores").add_argument
    add(
        "--likelihood", metavar="CKPT",
        help="bits per dimension of the samples to this checkpoint of a flow: a file, run folder, "
        "folder with config.json, or OWNER/NAME on the Hugging Face hub",
    )  # fmt: skip
    weights = "which of the checkpoint's weights: ema, raw or ema@DECAY (default: %(default)s)"
    add("--weights", default=NetworkChoice.weights, help=weights)
    vae = (
        "ema, mse, a hub id, a local folder, or none for pixels (default: the cached latents' or "
        f"the pipeline's, else {DataOptions.vae})"
    )
    add("--vae", help=vae)
    bare = "for a checkpoint that does not say it (default: {})"
    add("--model", help=bare.format(MODEL))
    add("--num-classes", type=int, help=bare.format(NUM_CLASSES))
    add("--process", choices=WORDS, help=bare.format("what --model says, or diffusion"))
    encoders = "where the text encoders lie that it names (default: where it says)"
    add("--text-encoder", nargs="+", metavar="NAME", help=encoders)
    exact = "the trace itself, for small latents (default: an estimate, by one probe an image)"
    add("--exact", action="store_true", help=exact)
    seed = "what is drawn for image i depends on it and on i alone (default: 0)"
    add("--seed", type=int, help=seed)
    guidance = "1 alone, none: a likelihood is that of the network without guidance"
    add("--cfg-scale", type=float, help=guidance)


@door("--batch-size or --num-workers")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        options = EvaluationOptions(
            **{field.name: getattr(args, field.name) for field in fields(EvaluationOptions)}
        )
        check_together(args, given := parser.given(argv))
        if args.clip:
            if found := clip_scores(args, options):
                publish(found, options.output)
        elif args.likelihood:
            if found := likelihood(args, given, options):
                publish(found, options.output)
        elif args.frames is not None:
            if found := clip_distance(args, options):
                publish(found, options.output)
        elif options.make_reference:
            if told := make_reference(options):
                print(told)
        elif report := evaluate(options):
            publish(report, options.output)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        where = f"{error.filename or args.output}: {error.strerror or error}"
        parser.error(f"{where}; mend that and give the command again")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_together(args: Namespace, given: Collection[str]) -> None:
    """Raise ValueError for flags that are given and do not go with the others."""
    asked = [name for name in INSTEAD if getattr(args, name) not in (None, "")]
    for name, own in INSTEAD.items():
        wrong = [other for other in own if other in given and name not in asked]
        if wrong:
            raise ValueError(f"`{wrong[0]}` goes with `{name}`; give both, or leave it out")
    for name in asked:
        strangers = (*STRANGERS[name], *asked)
        wrong = [other for other in strangers if other in given and other != name]
        if wrong:
            raise ValueError(f"`{wrong[0]}` does not go with `{name}`; leave one of them out")
    if args.likelihood and not args.samples:
        raise ValueError("`samples` are wanted with `likelihood`: a folder of images or latents")
    if args.clip and not args.samples:
        raise ValueError("`samples` are wanted with `clip`: a folder of images, or an .npz")


def clip_scores(args: Namespace, options: EvaluationOptions) -> dict | None:
    """The report on how near samples are to their captions; None in all processes but the first.

    Raises ValueError for images or captions that do not fit.
    """
    from evaluation.clip_score import Clip, open_pairs, score_by_clip

    check_common(options)
    accelerator = join_others(options)
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    pairs = open_pairs(args.samples, args.captions, team)
    with accelerator.local_main_process_first():
        clip = Clip(args.clip, accelerator.device)
    report = score_by_clip(clip, pairs, options, team)
    versions = {name: installed(name) for name in (*LIBRARIES, "transformers")}
    return report and report | {"versions": versions}


def clip_distance(args: Namespace, options: EvaluationOptions) -> dict | None:
    """The report on two sets of clips; None in all processes but the first.

    Raises ValueError for clips that cannot be compared.
    """
    from evaluation.clip_distance import evaluate_clips
    from evaluation.clip_sets import ClipOptions

    return evaluate_clips(options, ClipOptions(args.frames, args.frame_stride, args.per_frame))


def likelihood(
    args: Namespace, given: Collection[str], options: EvaluationOptions
) -> dict | None:
    """The report on how likely the samples are; None in all processes but the first.

    Raises ValueError for a network, or images, that there is no likelihood of.
    """
    # Here, since it takes a second that scores need not wait
    from evaluation.likelihood import LikelihoodOptions, load_measured, report_on

    choice = NetworkChoice(
        args.likelihood, args.weights, args.vae, args.model, args.image_size, args.num_classes,
        args.process, args.text_encoder,
    )  # fmt: skip
    how = LikelihoodOptions(**{
        field.name: getattr(args, field.name)
        for field in fields(LikelihoodOptions)
        if field.name in given
    })  # fmt: skip
    check_common(options)
    accelerator = join_others(options)
    with accelerator.local_main_process_first():
        measured = load_measured(choice, how, accelerator.device)
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    bits = measured.bits(team)
    if team.rank:
        return None
    return report_on(measured, bits) | {"versions": {name: installed(name) for name in LIBRARIES}}


def publish(report: dict, output: Path | str | None) -> None:
    """Print a report and, to the error output, its notes; write it to a file, if one is given."""
    print(as_text(report))
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if output:
        write_report(report, output)


if __name__ == "__main__":
    main()
