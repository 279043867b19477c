"""An evaluation from end to end: two sides to a dict of scores, or to a reference file."""

import argparse
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
import json
from pathlib import Path
import sys

from accelerate import Accelerator
import numpy as np

from evaluation.features import MANIFOLD_IMAGES, Extractor, load_extractor
from evaluation.image_sets import hash_of, read_batches
from evaluation.metrics import NEIGHBOURS, SPLIT, score
from evaluation.remarks import remarks
from evaluation.sides import STATISTICS, Side, open_side, summarize_reference
from evaluation.summaries import spread, summarize
from runtime.disk import write_whole
from runtime.json_files import read_json
from runtime.npz import Streamed, write_npz
from runtime.team import Team

# Others wait this long while one fetches Inception or reads from a slow disk
COLLECTIVE_TIMEOUT = timedelta(hours=2)
LIBRARIES = ("torch", "torch-fidelity", "timm", "numpy", "pillow")


def begin(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Extractor, Team, dict]:
    """(the Extractor, the Team, the flags that loaders take); one process of each machine fetches
    what must be fetched.
    """
    with accelerator.local_main_process_first():
        extractor = load_extractor(args.features, accelerator.device, args.inception_weights)
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    return extractor, team, dict(team=team, num_workers=args.num_workers)


def evaluate(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print the scores and all that belongs to them, in the first process.

    Raises ValueError for what cannot be compared.
    """
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    samples, reference = (
        open_side(getattr(args, name), f"--{name}", share=mine) for name in ("samples", "reference")
    )
    beside = check_samples(samples)
    assert samples.images is not None  # which check_samples looks at
    reference.check_kind(args.features)
    extractor, team, reading = begin(args, accelerator)
    reference.check_features(extractor, samples.images.size, accelerator.device)
    batches = read_batches(samples.images, args.batch_size, accelerator.device, **reading)
    ours, digests = summarize(extractor, batches, len(samples.images), with_logits=True, team=team)
    theirs, reference_hash = summarize_reference(
        reference, extractor, accelerator.device, args.batch_size, **reading
    )
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
            "reference_images_in_precision_and_recall": 0
            if theirs.features is None
            else len(theirs.features),
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
        write_whole(
            Path(args.output), lambda temporary: temporary.write_text(text + "\n", encoding="utf-8")
        )


def check_samples(samples: Side) -> list[str]:
    """What is odd about the samples, as sentences.

    Raises ValueError if they are not what can be scored.
    """
    if samples.images is None:
        raise ValueError(
            f"--samples {samples.path} has statistics and no images; give a folder of images or an .npz of them"
        )
    count, manifest = len(samples.images), Path(samples.path) / "manifest.json"
    wanted = count
    # A folder of sample_ddp.py says how many there are to be
    with suppress(OSError, ValueError, KeyError, TypeError):
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
        notes.append(
            f"{samples.path} has statistics as a reference has; of samples the images alone count"
        )
    return notes


def describe(side: Side, pixels: str | None) -> dict:
    """What a report says of a Side whose images have this hash."""
    images = side.images
    return {
        "path": side.path, "images": len(images) if images else None,
        "size": list(images.size) if images else None, "sha256_of_pixels": pixels,
        "sha256_of_file": side.sha256,
    }  # fmt: skip


def installed(name: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def make_reference(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Write the statistics of all images below a folder, and some of the images, as ADM's reference
    files have them.

    Raises ValueError if an image cannot be read or does not fit.
    """
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    side = open_side(args.make_reference, "--make-reference", args.image_size, mine)
    assert side.images is not None  # it is a folder
    extractor, team, reading = begin(args, accelerator)
    # Which finds out whether it can be used
    extractor.dimensions(side.images.size, accelerator.device)
    summary, pixels = summarize_reference(
        side, extractor, accelerator.device, args.batch_size, **reading
    )
    if not accelerator.is_main_process:
        return
    arrays: dict[str, np.ndarray | Streamed] = {}
    for name, keys in STATISTICS.items():
        if getattr(summary, name) is not None:
            arrays |= dict(zip(keys, getattr(summary, name)))
    width, height = side.images.size
    chosen = spread(len(side.images), MANIFOLD_IMAGES)
    rows = (side.images[i][0].numpy().transpose(1, 2, 0) for i in chosen)  # type: ignore[union-attr]  # all were read above
    made_from = describe(side, pixels) | {
        "features": extractor.name,
        "features_sha256": extractor.sha256,
    }
    arrays |= {
        "arr_0": ((len(chosen), height, width, 3), np.uint8, rows),
        "made_from": np.array(json.dumps(made_from)),
    }

    def write(temporary):
        with open(temporary, "wb") as file:
            write_npz(file, arrays)

    write_whole(Path(args.output), write)
    print(
        f"{args.output}: {', '.join(arrays)} of {len(side.images):,} images, {len(chosen):,} of them as arr_0"
    )
