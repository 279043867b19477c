"""How far a set of clips lies from another: the Fréchet distance of what a network makes of whole
clips, or of their single frames.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.clip_sets import (
    ArrayClips, ClipOptions, FolderClips, Frames, check_clip_numbers, open_clips,
)  # fmt: skip
from evaluation.features import (
    MANIFOLD_IMAGES, MOST_FEATURES, Extractor, Rows, load_extractor, scripted_classifier,
)  # fmt: skip
from evaluation.image_sets import hash_of, in_pixels, read_batches
from evaluation.inputs import NAMED_FEATURES
from evaluation.metrics import Summary, score
from evaluation.options import EvaluationOptions, check_comparison
from evaluation.report import LIBRARIES, feature_facts, installed, join_others, settings
from evaluation.summaries import summarize
from runtime.disk import check_name, file_hash
from runtime.team import Team

Clips = FolderClips | ArrayClips


def load_clip_extractor(name: str, device: torch.device | str) -> Extractor:
    """The Extractor of a TorchScript file, which is a program and runs as it is.

    The module is called with clips float32 (n, 3, F, H, W) in [-1, 1], and returns features (n, D).
    The Extractor itself takes uint8. Raises ValueError if there is no such file.
    """
    path = Path(name)
    if name not in NAMED_FEATURES:
        check_name(path)
    if name in NAMED_FEATURES or not path.is_file():
        raise ValueError(
            f"`features` {name} is no file; with `frames` it is a TorchScript file of a network "
            "that takes whole clips, or pass `per_frame` for features of single frames"
        )
    network = scripted_classifier(path, device, "features")

    def extract(clips):
        return Rows(network(clips.float() / 127.5 - 1).features)

    return Extractor(extract, name, file_hash(path))


def check_clip_features(
    extractor: Extractor, shape: Sequence[int], device: torch.device | str
) -> None:
    """Raise ValueError unless an extractor gives a row of features for each clip of a shape
    (3, F, H, W). It is tried on two clips of noise.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (2, *shape), generator=generator, dtype=torch.uint8)
    wanted = f"on clips float32 {(2, *shape)}; it must return features (2, D)"
    try:
        found = tuple(extractor(noise.to(device)).features.shape)
    except Exception as error:  # whatever a user's network raises
        reason = str(error).strip().splitlines()[-1:] or [""]
        raise ValueError(
            f"`features` {extractor.name} fails ({type(error).__name__}: {reason[0][:300]}) "
            f"{wanted}"
        ) from None
    if len(found) != 2 or found[0] != 2 or not 0 < found[1] <= MOST_FEATURES:
        raise ValueError(
            f"`features` {extractor.name} returns {found} {wanted}, D at most {MOST_FEATURES:,}"
        )


def evaluate_clips(options: EvaluationOptions, clips: ClipOptions) -> dict | None:
    """The report on samples and a reference that are sets of clips, a dict for JSON: the Fréchet
    distance, precision and recall of clips, or the scores of their frames as of images.

    Under torchrun the processes share the work, and all but the first return None. Raises
    ValueError for what cannot be compared.
    """
    check_comparison(options)
    check_clip_numbers(clips)
    accelerator = join_others(options)
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    assert options.samples is not None and options.reference is not None  # check_comparison
    sides = {
        name: open_clips(path, name, clips, whole=team.rank == 0)
        for name, path in (("samples", options.samples), ("reference", options.reference))
    }
    with accelerator.local_main_process_first():
        extractor = load(options, clips, accelerator.device)
    for side in sides.values():
        check_fit(extractor, side, clips, accelerator.device)
    found = {
        name: summarized(side, extractor, name == "samples", options, accelerator.device, team)
        for name, side in sides.items()
    }
    (ours, _), (theirs, _) = found.values()
    if ours is None or theirs is None:  # not the first process
        return None
    return {
        "scores": scores(ours, theirs, clips),
        "notes": notes(sides, extractor, ours),
        **{name: facts(side, found[name][1]) for name, side in sides.items()},
        "features": feature_facts(extractor, ours),
        "settings": settings(theirs, accelerator.device) | vars(clips),
        "versions": {name: installed(name) for name in (*LIBRARIES, "av")},
    }  # fmt: skip


def load(options: EvaluationOptions, clips: ClipOptions, device: torch.device) -> Extractor:
    """The Extractor of clips, or of their frames. Raises ValueError if it cannot be had."""
    if clips.per_frame:
        return load_extractor(options.features, device, options.inception_weights)
    return load_clip_extractor(options.features, device)


def check_fit(
    extractor: Extractor, side: Clips, clips: ClipOptions, device: torch.device
) -> None:
    """Raise ValueError unless an extractor takes the clips of a set, or their frames."""
    width, height = side.size
    if clips.per_frame:
        extractor.dimensions(side.size, device)
    else:
        check_clip_features(extractor, (3, clips.frames, height, width), device)


def summarized(
    side: Clips, extractor: Extractor, is_samples: bool, options: EvaluationOptions,
    device: torch.device, team: Team,
) -> tuple[Summary | None, str | None]:  # fmt: skip
    """(the Summary of a set of clips, or of their frames, and the hash of the pixels) in the first
    process; (None, None) elsewhere. Raises ValueError if a clip is damaged or of another size.
    """
    of = Frames(side) if side.clips.per_frame else side
    batches = read_batches(of, options.batch_size, device, team, options.num_workers)
    keep = None if is_samples else MANIFOLD_IMAGES
    summary, digests = summarize(extractor, batches, len(of), keep, is_samples, team)
    return summary, None if digests is None else hash_of(digests)


def scores(ours: Summary, theirs: Summary, clips: ClipOptions) -> dict[str, float | None]:
    """The scores of samples against a reference: of frames those of images; of clips the distance,
    precision and recall.
    """
    found = score(ours, theirs)
    if clips.per_frame:
        return found
    return {
        "frechet_distance": found["fid"],
        "precision": found["precision"], "recall": found["recall"],
    }  # fmt: skip


def notes(sides: dict[str, Clips], extractor: Extractor, ours: Summary) -> list[str]:
    """What a reader of the scores must know, as sentences."""
    told = [note for side in sides.values() for note in side.notes]
    dimension = 0 if ours.statistics is None else len(ours.statistics.mean)
    for name, side in sides.items():
        count = len(Frames(side) if side.clips.per_frame else side)
        if count <= dimension:
            what = "frames" if side.clips.per_frame else "clips"
            told.append(
                f"{count:,} {what} of {name} are too few for {dimension:,} features: their "
                "covariance has no full rank, and the distance says little"
            )
    ours_size, theirs_size = (in_pixels(side.size) for side in sides.values())
    if ours_size != theirs_size:
        told.append(f"samples are of {ours_size} pixels, the reference of {theirs_size}")
    rates = [side.rate for side in sides.values()]
    if None not in rates and rates[0] != rates[1]:
        told.append(
            f"the first clip of samples has {rates[0]:g} frames a second, that of the reference "
            f"{rates[1]:g}; frames are compared one by one, whatever their times"
        )
    return told


def facts(side: Clips, pixels: str | None) -> dict:
    """What a report says of a set of clips with this hash of its pixels."""
    return {
        "path": side.named.partition(" ")[2], "clips": len(side), "size": list(side.size),
        "sha256_of_pixels": pixels,
    }  # fmt: skip
