"""What an evaluation compares: images, or a reference file with statistics in it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.features import MANIFOLD_IMAGES, Extractor
from evaluation.image_sets import (
    ArrayImages, FolderImages, ImageSet, hash_of, npz_errors, read_batches,
)  # fmt: skip
from evaluation.metrics import Statistics, Summary
from evaluation.reference_file import MADE_FROM, STATISTICS, read_made_from, read_statistics
from evaluation.summaries import summarize
from runtime.disk import check_name, file_hash
from runtime.image_size import ImageSize
from runtime.npz import IMAGES, LABELS, array_names, open_array
from runtime.team import Team

NAMED_FEATURES = ("inception", "pixels")  # other features are called by the path of a network


@dataclass
class EvaluationInput:
    """The samples or the reference.

    Images are None if there are none; the statistics are those that stand in the file.
    """

    path: str
    images: ImageSet | None
    statistics: Statistics | None = None
    spatial: Statistics | None = None
    sha256: str | None = None  # of the file, where statistics come from it
    made_from: dict | None = None  # what make_reference wrote of the file

    def check_kind(
        self, features: str, sha256: str | None = None, argument: str = "features"
    ) -> None:
        """Raise ValueError if a reference file says that it was made with other features than those
        of this name and hash, which the `argument` named so chose.
        """
        made = self.made_from or {"features": features, "features_sha256": sha256}
        kinds = [
            name if name in NAMED_FEATURES else "a network" for name in (made["features"], features)
        ]
        if kinds[0] != kinds[1] or (sha256 and made["features_sha256"] != sha256):
            raise ValueError(
                f"{self.path} was made with `{argument}={made['features']}`, or with other weights "
                f"of it, and not with {features}; pass those, or make it again with "
                "`make_reference`"
            )

    def check_features(
        self, extractor: Extractor, size: tuple[int, int], device: torch.device | str
    ) -> None:
        """Raise ValueError unless these, as a reference, can be compared by the extractor with
        images of a size (W, H).
        """
        self.check_kind(extractor.name, extractor.sha256, extractor.argument)
        ours = extractor.dimensions(size, device)
        theirs = extractor.dimensions(self.images.size, device) if self.images else (None, None)
        for (name, keys), wanted, of_images in zip(STATISTICS.items(), ours, theirs):
            stored = getattr(self, name)
            in_file = len(stored.mean) if stored else None
            for found, what in ((in_file, f"{keys[0]} and {keys[1]}"), (of_images, "images")):
                if found and wanted and found != wanted:
                    raise ValueError(
                        f"{self.path} has {found} features in its {what}, samples have {wanted} by "
                        f"`{extractor.argument}={extractor.name}`: it is of other features, or of "
                        "other image sizes; make it again with `make_reference`"
                    )


def find_sizes(images: ImageSet | None, device: torch.device, team: Team) -> str:
    """Settle whether a set of images has several sizes, each process having looked at its share;
    then a sentence on that, else "".
    """
    if not isinstance(images, FolderImages):
        return ""
    strange = torch.tensor([int(bool(images.strange))], device=device)
    images.mixed = bool(team.gather([strange])[0].any())
    return f"{images.named}: {images.strange or 'images differ in size'}" if images.mixed else ""


def check_mixed(
    given: EvaluationInput, extractor: Extractor, device: torch.device, team: Team
) -> None:
    """Raise ValueError for images of several sizes, if the extractor does not bring each to one."""
    told = find_sizes(given.images, device, team)
    if told and not extractor.resizes:
        raise ValueError(
            f"{told}; `{extractor.argument}={extractor.name}` takes images of one size alone "
            "(`make_reference` with `image_size` crops): pass inception or a timm classifier, "
            "which bring each image to theirs"
        )


def open_input(
    path: Path | str, argument: str, image_size: ImageSize | None = None,
    share: slice = slice(None),
) -> EvaluationInput:
    """The EvaluationInput at a path, a folder or an .npz.

    Errors call it by the name of the `argument` that gave it. image_size brings a folder's images
    to that size as training does; without it they must be RGB, and `share` is looked at for other
    sizes. Raises ValueError for what cannot be compared.
    """
    path = Path(path)
    check_name(path)
    if path.is_dir():
        return EvaluationInput(str(path), FolderImages(path, argument, image_size, share))
    if not path.is_file():
        raise ValueError(
            f"`{argument}` {path}: there is no such file or folder; give a folder of images or an "
            ".npz"
        )
    with npz_errors(path, argument, "a folder of images or an .npz"):
        found = open_npz(path, whole=not share.start)  # one process looks at every byte
    if not (found.images or found.statistics or found.spatial):
        inside = ", ".join(sorted(array_names(path))) or "nothing"
        raise ValueError(
            f"`{argument}` {path} has {inside}; wanted is {IMAGES} (uint8 images), or mu and sigma"
        )
    return found


def open_npz(path: Path, whole: bool) -> EvaluationInput:
    """The EvaluationInput in an .npz, which may hold nothing of use.

    With `whole`, every byte of the file is looked at. Raises ValueError for what cannot be
    compared, and whatever zipfile, zlib and NumPy raise for a broken file.
    """
    names = array_names(path, whole=whole)
    statistics = {
        name: read_statistics(path, keys)
        for name, keys in STATISTICS.items()
        if names & set(keys)
    }
    images = ArrayImages(path) if IMAGES in names else None
    if images and LABELS in names:
        check_labels(path, len(images))
    made_from = read_made_from(path) if MADE_FROM in names else None
    sha256 = file_hash(path) if statistics else None
    return EvaluationInput(str(path), images, sha256=sha256, made_from=made_from, **statistics)


def check_labels(path: Path, images: int) -> None:
    """Raise ValueError unless an .npz has a label for each of its images."""
    labels = open_array(path, LABELS)
    if labels.shape[:1] != (images,):
        raise ValueError(
            f"{IMAGES} has {images} images and {LABELS}, their labels, the shape {labels.shape}; "
            "one of them is cut or of other samples: make the file again"
        )


def summarize_reference(
    reference: EvaluationInput, extractor: Extractor, device: torch.device, batch_size: int,
    team: Team = Team(), num_workers: int = 0,
) -> tuple[Summary | None, str | None]:  # fmt: skip
    """(the Summary of a reference, the hash of its images or None) in the first process.

    Elsewhere: (None, None). Statistics that stand in its file come before those of its images; of a
    folder's images, MANIFOLD_IMAGES are kept for precision and recall. Raises ValueError if an
    image is damaged or features are not finite.
    """
    images, stored = reference.images, (reference.statistics, reference.spatial)
    if images is None:
        return (None, None) if team.rank else (Summary(*stored), None)
    batches = read_batches(images, batch_size, device, team, num_workers)
    keep = MANIFOLD_IMAGES if isinstance(images, FolderImages) else None
    summary, digests = summarize(extractor, batches, len(images), keep, team=team)
    if summary is None or digests is None:  # not the first process
        return None, None
    if any(stored):
        summary.statistics, summary.spatial = stored
    return summary, hash_of(digests)
