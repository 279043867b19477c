"""Score samples against a reference: FID, sFID, Inception Score, precision and recall, in the
conventions of ADM's suite.

    python evaluate.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py --samples samples/NAME --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --samples samples/NAME --reference digits/train --features examples/digits/classifier
    python evaluate.py --make-reference imagenet/train --image-size 256 --output imagenet256.npz

Samples are a folder of images or an .npz with `arr_0`; a reference may also be an .npz with mu and
sigma, as ADM's are. The scores are printed as JSON, with hashes of both sides; what to know about
them goes to the error output.
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from pathlib import Path

import torch

from evaluation.report import COLLECTIVE_TIMEOUT, evaluate, make_reference
from runtime.disk import check_writable
from runtime.limits import check_memory, check_numbers
from runtime.surroundings import check_accelerate, own_place
from runtime.team import make_accelerator


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
        "inception, pixels, a folder that timm's save_for_hf wrote, or a TorchScript file, which is a program: it runs with "
        "your rights, so trust where it comes from (default: %(default)s)"
    )
    features("--features", default="inception", metavar="{inception,pixels,PATH}", help=kinds)
    weights = "torch-fidelity's weights-inception-2015-12-05 (default: fetched on first use)"
    features("--inception-weights", metavar="FILE", help=weights)
    run = parser.add_argument_group("run").add_argument
    run(
        "--batch-size", type=int, default=64,
        help="images at a time in each process (default: %(default)s)",
    )  # fmt: skip
    run(
        "--num-workers", type=int, default=4,
        help="loader processes per process (default: %(default)s)",
    )  # fmt: skip
    run("--device", choices=["cpu", "cuda", "mps"], help="default: the GPU if there is one")
    return parser


@door("--batch-size or --num-workers")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        check_accelerate()
        own_place()
        accelerator = make_accelerator(args.device, COLLECTIVE_TIMEOUT)
        (make_reference if args.make_reference else evaluate)(args, accelerator)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(
            f"{error.filename or args.output}: {error.strerror or error}; mend that and give the command again"
        )
    accelerator.end_training()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together and numbers out of range, before anything
    is loaded.
    """
    if args.make_reference:
        if args.samples or args.reference or not args.output:
            raise ValueError(
                "--make-reference DIR goes with --output FILE.npz, and without --samples and --reference"
            )
        if not Path(args.make_reference).is_dir():
            raise ValueError(
                f"--make-reference {args.make_reference} is no folder; give one with images below it"
            )
    elif not (args.samples and args.reference):
        raise ValueError("--samples and --reference are wanted, or --make-reference")
    elif args.image_size is not None:
        raise ValueError(
            "--image-size is for --make-reference; samples and reference are scored as they are"
        )
    if args.inception_weights and args.features != "inception":
        raise ValueError(f"--inception-weights is for --features inception, not {args.features}")
    check_numbers(args)
    if args.image_size is not None:
        check_memory(args.batch_size, args.image_size, "--image-size or --batch-size")
    for name, there in {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }.items():
        if args.device == name and not there:
            raise ValueError(
                f"--device {name}: PyTorch sees none here; leave the flag out or pass --device cpu"
            )
    if args.output and Path(args.output).exists():
        raise ValueError(f"--output {args.output} exists already; remove it or give another name")
    if args.output:
        check_writable(args.output)


if __name__ == "__main__":
    main()
