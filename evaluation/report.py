"""An evaluation from end to end: samples and a reference to a report; images to a reference file.
"""

from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
import json
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
import numpy as np
import torch

from evaluation.features import MANIFOLD_IMAGES, Extractor, load_extractor
from evaluation.image_sets import ImageSet, hash_of, read_batches
from evaluation.inputs import (
    EvaluationInput, check_mixed, find_sizes, open_input, summarize_reference,
)  # fmt: skip
from evaluation.metrics import NEIGHBOURS, SPLIT, Summary, score
from evaluation.options import EvaluationOptions, check_comparison, check_making
from evaluation.reference_file import write_reference
from evaluation.remarks import remarks
from evaluation.summaries import spread, summarize
from runtime.disk import write_whole
from runtime.json_files import read_json
from runtime.surroundings import check_accelerate, own_place
from runtime.team import Team, make_accelerator

# Others wait this long while one fetches Inception or reads from a slow disk
COLLECTIVE_TIMEOUT = timedelta(hours=2)
LIBRARIES = ("torch", "torch-fidelity", "timm", "numpy", "pillow")


class Means(NamedTuple):
    """By what images are summarized: the extractor, its device, the team, and how they are read."""

    extractor: Extractor
    device: torch.device
    team: Team
    batch_size: int
    num_workers: int

    def summarize_samples(self, samples: EvaluationInput) -> tuple[Summary | None, str | None]:
        """(the Summary of samples with logits, the hash of their pixels) in the first process.

        Elsewhere: (None, None). Raises ValueError if an image is damaged or features are not
        finite.
        """
        assert samples.images is not None  # check_samples looks at that
        batches = read_batches(
            samples.images, self.batch_size, self.device, self.team, self.num_workers
        )
        count = len(samples.images)
        ours, digests = summarize(
            self.extractor, batches, count, with_logits=True, team=self.team
        )
        return ours, None if digests is None else hash_of(digests)

    def summarize_reference(self, reference: EvaluationInput) -> tuple[Summary | None, str | None]:
        """As inputs.summarize_reference."""
        return summarize_reference(
            reference, self.extractor, self.device, self.batch_size, self.team, self.num_workers
        )


def evaluate(options: EvaluationOptions) -> dict | None:
    """The report on samples and a reference, a dict for JSON: scores, notes, and what they are of.

    Under torchrun the processes share the work, and all but the first return None. Nothing is
    written; `write_report` does that. Raises ValueError for what cannot be compared.
    """
    check_comparison(options)
    accelerator = join_others(options)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    assert options.samples is not None and options.reference is not None  # check_comparison
    samples = open_input(options.samples, "samples", share=share)
    reference = open_input(options.reference, "reference", share=share)
    odd = check_samples(samples)
    reference.check_kind(options.features)
    means = load_means(options, accelerator)
    assert samples.images is not None  # check_samples looks at that
    for side in (samples, reference):
        check_mixed(side, means.extractor, means.device, means.team)
    reference.check_features(means.extractor, samples.images.size, means.device)
    ours, sample_pixels = means.summarize_samples(samples)
    theirs, reference_pixels = means.summarize_reference(reference)
    if ours is None or theirs is None:  # not the first process
        return None
    size = None if samples.images.mixed else samples.images.size
    scores, of_samples = score(ours, theirs), (len(samples.images), size)
    told = remarks(scores, of_samples, reference, (ours, theirs), means.extractor.name)
    return {
        "scores": scores, "notes": odd + told, "samples": input_facts(samples, sample_pixels),
        "reference": input_facts(reference, reference_pixels),
        "features": feature_facts(means.extractor, ours),
        "settings": settings(theirs, means.device),
        "versions": {name: installed(name) for name in LIBRARIES},
    }  # fmt: skip


def join_others(options: EvaluationOptions) -> Accelerator:
    """The Accelerator of this process among those that a launcher started.

    Raises ValueError for a launcher that asks for what is not heeded here.
    """
    check_accelerate()
    own_place()
    return make_accelerator(options.device, COLLECTIVE_TIMEOUT)


def load_means(options: EvaluationOptions, accelerator: Accelerator) -> Means:
    """The Means that the options ask for; one process of each machine fetches what must be fetched.
    """
    with accelerator.local_main_process_first():
        extractor = load_extractor(options.features, accelerator.device, options.inception_weights)
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    return Means(extractor, accelerator.device, team, options.batch_size, options.num_workers)


def check_samples(samples: EvaluationInput) -> list[str]:
    """What is odd about the samples, as sentences.

    Raises ValueError if they are not what can be scored.
    """
    if samples.images is None:
        raise ValueError(
            f"`samples` {samples.path} has statistics and no images; give a folder of images or an "
            ".npz of them"
        )
    count, manifest = len(samples.images), Path(samples.path) / "manifest.json"
    wanted = count
    # A folder of sample_ddp.py says how many there are to be
    with suppress(OSError, ValueError, KeyError, TypeError):
        wanted = read_json(manifest)["decides"]["num_fid_samples"]
    if wanted != count:
        raise ValueError(
            f"`samples` {samples.path} holds {count} images, its manifest.json says {wanted}: give "
            "the same sample_ddp.py command again, which goes on, or take out what does not belong "
            "there"
        )
    notes, folders = list(samples.images.notes), samples.images.folders
    if folders > 1:
        notes.append(f"samples come from {folders} folders at or below {samples.path}")
    if samples.statistics or samples.spatial:
        notes.append(
            f"{samples.path} has statistics as a reference has; of samples the images alone count"
        )
    return notes


def input_facts(given: EvaluationInput, pixels: str | None) -> dict:
    """What a report says of samples, or of a reference, whose images have this hash."""
    images = given.images
    size = list(images.size) if images and not images.mixed else None
    return {
        "path": given.path, "images": len(images) if images else None, "size": size,
        "sha256_of_pixels": pixels, "sha256_of_file": given.sha256,
    }  # fmt: skip


def feature_facts(extractor: Extractor, ours: Summary) -> dict:
    """What a report says of the features that samples were summarized by."""
    dimension = ours.statistics and len(ours.statistics.mean)
    return {"name": extractor.name, "sha256": extractor.sha256, "dimension": dimension}


def settings(theirs: Summary, device: torch.device) -> dict:
    """What a report says of how the scores were computed."""
    kept = 0 if theirs.features is None else len(theirs.features)
    return {
        "neighbours": NEIGHBOURS, "reference_images_in_precision_and_recall": kept,
        "inception_score_split": SPLIT, "device": device.type,
    }  # fmt: skip


def installed(name: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def as_text(report: dict) -> str:
    """A report as JSON text."""
    return json.dumps(report, indent=1, allow_nan=False)


def write_report(report: dict, path: Path | str) -> None:
    """Write a report as JSON, whole or not at all. Raises OSError if the disk refuses."""
    text = as_text(report) + "\n"
    write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def make_reference(options: EvaluationOptions) -> str | None:
    """Write the statistics of all images below a folder, and some of the images, as ADM's reference
    files have them; a sentence on what is in the file.

    Under torchrun the processes share the work, and all but the first return None. Raises
    ValueError if an image cannot be read or does not fit, OSError if the disk refuses.
    """
    check_making(options)
    accelerator = join_others(options)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    assert options.make_reference is not None and options.output is not None  # check_making
    given = open_input(options.make_reference, "make_reference", options.image_size, share)
    images = given.images
    assert images is not None  # it is a folder
    means = load_means(options, accelerator)
    if told := find_sizes(images, means.device, means.team):
        raise ValueError(f"{told}; a reference has images of one size: pass `image_size`")
    # This finds out whether the extractor can be used
    means.extractor.dimensions(images.size, means.device)
    summary, pixel_hash = means.summarize_reference(given)
    if summary is None:  # not the first process
        return None
    width, height = images.size
    chosen = spread(len(images), MANIFOLD_IMAGES)
    rows = (pixels_of(images, i) for i in chosen)
    made_from = input_facts(given, pixel_hash) | {
        "features": means.extractor.name, "features_sha256": means.extractor.sha256,
    }  # fmt: skip
    shape = (len(chosen), height, width, 3)
    names = write_reference(Path(options.output), summary, shape, rows, made_from)
    return (
        f"{options.output}: {', '.join(names)} of {len(images):,} images, {len(chosen):,} of them "
        "as arr_0"
    )


def pixels_of(images: ImageSet, i: int) -> np.ndarray:
    """The pixels uint8 (H, W, 3) of an image. Raises ValueError if it cannot be read."""
    image, reason = images[i]
    if not isinstance(image, torch.Tensor):
        raise ValueError(reason)
    return image.numpy().transpose(1, 2, 0)  # (H, W, 3)
