"""Score samples against a reference: FID, sFID, Inception Score, precision and recall.

    python evaluate.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py --samples samples/NAME --reference imagenet256.npz
    python evaluate.py --samples samples/NAME --reference digits/train \\
        --features examples/digits/classifier
    python evaluate.py --make-reference imagenet/train --image-size 256 --output imagenet256.npz

Samples are a folder of images or an .npz with `arr_0`; a reference may also be an .npz with mu and
sigma, as ADM's are. The scores follow the conventions of ADM's suite, and are printed as JSON, with
hashes of both sides; what to know about them goes to the error output.
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from dataclasses import fields
from pathlib import Path
import sys

import torch

from evaluation.options import EvaluationOptions
from evaluation.report import as_text, evaluate, make_reference, write_report


def build_parser() -> Parser:
    usage = "%(prog)s --samples PATH --reference PATH [flags; --help lists them]"
    parser = Parser(__file__, description=__doc__, usage=usage)
    sides = parser.add_argument_group("what is compared").add_argument
    sides(
        "--samples", metavar="PATH", help="folder of images, or .npz with uint8 arr_0 (N, H, W, 3)"
    )
    sides(
        "--reference", metavar="PATH", help="the same, or .npz with mu, sigma, mu_s, sigma_s, arr_0"
    )
    making = "instead: write such a file, of all images below this folder, to --output"
    sides("--make-reference", metavar="DIR", help=making)
    cropping = "with --make-reference: crop to this size and convert to RGB, as training does"
    sides("--image-size", type=int, help=cropping)
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


@door("--batch-size or --num-workers")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        options = EvaluationOptions(
            **{field.name: getattr(args, field.name) for field in fields(EvaluationOptions)}
        )
        if options.make_reference:
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


def publish(report: dict, output: Path | str | None) -> None:
    """Print a report and, to the error output, its notes; write it to a file, if one is given."""
    print(as_text(report))
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if output:
        write_report(report, output)


if __name__ == "__main__":
    main()
