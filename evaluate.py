"""Score samples against a reference: FID, sFID, Inception Score, precision and recall, in the conventions of ADM's suite.

    python evaluate.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py --samples samples/NAME --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --samples samples/NAME --reference digits/train --features examples/digits/classifier
    python evaluate.py --make-reference imagenet/train --image-size 256 --output imagenet256.npz

Samples are a folder of images or an .npz with `arr_0`; a reference may also be an .npz with mu and sigma, as ADM's are. The
scores are printed as JSON, with hashes of both sides; what to know about them goes to the error output.
"""

from command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
import json
from pathlib import Path
import sys

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
import numpy as np
import torch

from checkpoints import read_json, write_whole
from features import MANIFOLD_IMAGES, Extractor, Team, load_extractor, spread, summarize
from image_sets import (
    STATISTICS, Side, Streamed, hash_of, open_side, read_batches, remarks, summarize_reference, write_npz,
)  # fmt: skip
from limits import check_memory, check_numbers
from metrics import NEIGHBOURS, SPLIT, score
from sampling import check_writable
from surroundings import check_accelerate, own_place

COLLECTIVE_TIMEOUT = timedelta(hours=2)  # others wait this long while one fetches Inception or reads from a slow disk
LIBRARIES = ("torch", "torch-fidelity", "timm", "numpy", "pillow")


def build_parser() -> Parser:
    usage = "%(prog)s --samples PATH --reference PATH [flags; --help lists them]"
    parser = Parser(__file__, description=__doc__, usage=usage)
    sides = parser.add_argument_group("what is compared").add_argument
    sides("--samples", metavar="PATH", help="folder of images, or .npz with uint8 arr_0 (N, H, W, 3)")
    sides("--reference", metavar="PATH", help="the same, or .npz with mu, sigma, mu_s, sigma_s, arr_0")
    making = "instead: write such a file, of all images below this folder, to --output"
    sides("--make-reference", metavar="DIR", help=making)
    cropping = "with --make-reference: crop to this size and convert to RGB, as training does"
    sides("--image-size", type=int, help=cropping)
    sides("--output", metavar="FILE", help="where to write the JSON as well, or the reference; must not exist")
    features = parser.add_argument_group("features").add_argument
    kinds = (
        "inception, pixels, a folder that timm's save_for_hf wrote, or a TorchScript file, which is a program: it runs with "
        "your rights, so trust where it comes from (default: %(default)s)"
    )
    features("--features", default="inception", metavar="{inception,pixels,PATH}", help=kinds)
    weights = "torch-fidelity's weights-inception-2015-12-05 (default: fetched on first use)"
    features("--inception-weights", metavar="FILE", help=weights)
    run = parser.add_argument_group("run").add_argument
    run("--batch-size", type=int, default=64, help="images at a time in each process (default: %(default)s)")
    run("--num-workers", type=int, default=4, help="loader processes per process (default: %(default)s)")
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
        no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        accelerator = Accelerator(
            cpu=args.device == "cpu" or no_gpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)]
        )
        (make_reference if args.make_reference else evaluate)(args, accelerator)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(
            f"{error.filename or args.output}: {error.strerror or error}; mend that and give the command again"
        )
    accelerator.end_training()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together and numbers out of range, before anything is loaded."""
    if args.make_reference:
        if args.samples or args.reference or not args.output:
            raise ValueError("--make-reference DIR goes with --output FILE.npz, and without --samples and --reference")
        if not Path(args.make_reference).is_dir():
            raise ValueError(f"--make-reference {args.make_reference} is no folder; give one with images below it")
    elif not (args.samples and args.reference):
        raise ValueError("--samples and --reference are wanted, or --make-reference")
    elif args.image_size is not None:
        raise ValueError("--image-size is for --make-reference; samples and reference are scored as they are")
    if args.inception_weights and args.features != "inception":
        raise ValueError(f"--inception-weights is for --features inception, not {args.features}")
    check_numbers(args)
    if args.image_size is not None:
        check_memory(args.batch_size, args.image_size, "--image-size or --batch-size")
    for name, there in {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.items():
        if args.device == name and not there:
            raise ValueError(f"--device {name}: PyTorch sees none here; leave the flag out or pass --device cpu")
    if args.output and Path(args.output).exists():
        raise ValueError(f"--output {args.output} exists already; remove it or give another name")
    if args.output:
        check_writable(args.output)


def begin(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Extractor, Team, dict]:
    """(the Extractor, the Team, the flags that loaders take); one process of each machine fetches what must be fetched."""
    with accelerator.local_main_process_first():
        extractor = load_extractor(args.features, accelerator.device, args.inception_weights)
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    return extractor, team, dict(team=team, num_workers=args.num_workers)


def evaluate(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print the scores and all that belongs to them, in the first process. Raises ValueError for what cannot be compared."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    samples, reference = (open_side(getattr(args, name), f"--{name}", share=mine) for name in ("samples", "reference"))
    beside = check_samples(samples)
    assert samples.images is not None  # which check_samples looks at
    reference.check_kind(args.features)
    extractor, team, reading = begin(args, accelerator)
    reference.check_features(extractor, samples.images.size, accelerator.device)
    batches = read_batches(samples.images, args.batch_size, accelerator.device, **reading)
    ours, digests = summarize(extractor, batches, len(samples.images), with_logits=True, team=team)
    theirs, reference_hash = summarize_reference(reference, extractor, accelerator.device, args.batch_size, **reading)
    if ours is None or theirs is None or digests is None:  # not the first process
        return
    scores, of_samples = score(ours, theirs), (len(samples.images), samples.images.size)
    report = {
        "scores": scores,
        "notes": beside + remarks(scores, of_samples, reference, (ours, theirs), extractor.name),
        "samples": describe(samples, hash_of(digests)),
        "reference": describe(reference, reference_hash),
        "features": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "dimension": ours.statistics and len(ours.statistics.mean),
        },
        "settings": {
            "neighbours": NEIGHBOURS,
            "reference_images_in_precision_and_recall": 0 if theirs.features is None else len(theirs.features),
            "inception_score_split": SPLIT,
            "device": accelerator.device.type,
        },
        "versions": {name: installed(name) for name in LIBRARIES},
    }
    text = json.dumps(report, indent=1, allow_nan=False)
    print(text)
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if args.output:
        write_whole(Path(args.output), lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def check_samples(samples: Side) -> list[str]:
    """What is odd about the samples, as sentences. Raises ValueError if they are not what can be scored."""
    if samples.images is None:
        raise ValueError(
            f"--samples {samples.path} has statistics and no images; give a folder of images or an .npz of them"
        )
    count, manifest = len(samples.images), Path(samples.path) / "manifest.json"
    wanted = count
    with suppress(OSError, ValueError, KeyError, TypeError):  # a folder of sample_ddp.py says how many there are to be
        wanted = read_json(manifest)["decides"]["num_fid_samples"]
    if wanted != count:
        raise ValueError(
            f"--samples {samples.path} holds {count} images, its manifest.json says {wanted}: give the same sample_ddp.py "
            "command again, which goes on, or take out what does not belong there"
        )
    notes, folders = list(samples.images.notes), samples.images.folders
    if folders > 1:
        notes.append(f"samples come from {folders} folders at or below {samples.path}")
    if samples.statistics or samples.spatial:
        notes.append(f"{samples.path} has statistics as a reference has; of samples the images alone count")
    return notes


def describe(side: Side, pixels: str | None) -> dict:
    """What a report says of a Side whose images have this hash."""
    images = side.images
    return {
        "path": side.path,
        "images": len(images) if images else None,
        "size": list(images.size) if images else None,
        "sha256_of_pixels": pixels,
        "sha256_of_file": side.sha256,
    }


def installed(name: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def make_reference(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Write the statistics of all images below a folder, and some of the images, as ADM's reference files have them.

    Raises ValueError if an image cannot be read or does not fit.
    """
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    side = open_side(args.make_reference, "--make-reference", args.image_size, mine)
    assert side.images is not None  # it is a folder
    extractor, team, reading = begin(args, accelerator)
    extractor.dimensions(side.images.size, accelerator.device)  # which finds out whether it can be used
    summary, pixels = summarize_reference(side, extractor, accelerator.device, args.batch_size, **reading)
    if not accelerator.is_main_process:
        return
    arrays: dict[str, np.ndarray | Streamed] = {}
    for name, keys in STATISTICS.items():
        if getattr(summary, name) is not None:
            arrays |= dict(zip(keys, getattr(summary, name)))
    width, height = side.images.size
    chosen = spread(len(side.images), MANIFOLD_IMAGES)
    rows = (side.images[i][0].numpy().transpose(1, 2, 0) for i in chosen)  # type: ignore[union-attr]  # all were read above
    made_from = describe(side, pixels) | {"features": extractor.name, "features_sha256": extractor.sha256}
    arrays |= {"arr_0": ((len(chosen), height, width, 3), np.uint8, rows), "made_from": np.array(json.dumps(made_from))}

    def write(temporary):
        with open(temporary, "wb") as file:
            write_npz(file, arrays)

    write_whole(Path(args.output), write)
    print(f"{args.output}: {', '.join(arrays)} of {len(side.images):,} images, {len(chosen):,} of them as arr_0")


if __name__ == "__main__":
    main()
