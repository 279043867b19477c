"""The two sides of a comparison: images, or a reference file with statistics in it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.features import MANIFOLD_IMAGES, Extractor
from evaluation.image_sets import ArrayImages, FolderImages, hash_of, read_batches
from evaluation.metrics import Statistics, Summary
from evaluation.summaries import summarize
from runtime.disk import check_name, file_hash
from runtime.json_files import parse_json
from runtime.npz import IMAGES, LABELS, array_names, open_array
from runtime.team import Team

# What a Summary calls them → ADM's names
STATISTICS = {"statistics": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass
class Side:
    """One of the two sides of a comparison: its images (None if it has none), and the statistics
    that stand in its file.
    """

    path: str
    images: "FolderImages | ArrayImages | None"
    statistics: Statistics | None = None
    spatial: Statistics | None = None
    sha256: str | None = None  # of the file, where statistics come from it
    made_from: dict | None = None  # what --make-reference wrote of itself

    def check_kind(self, features: str, sha256: str | None = None) -> None:
        """Raise ValueError if a reference file says that it was made with other features than those
        of this name and hash.
        """
        made = self.made_from or {"features": features, "features_sha256": sha256}
        kinds = [
            name if name in ("inception", "pixels") else "a network"
            for name in (made["features"], features)
        ]
        if kinds[0] != kinds[1] or (sha256 and made["features_sha256"] != sha256):
            raise ValueError(
                f"{self.path} was made with --features {made['features']}, or with other weights of it, and not with "
                f"{features}; pass those, or make it again with --make-reference"
            )

    def check_features(
        self, extractor: Extractor, size: tuple[int, int], device: torch.device | str
    ) -> None:
        """Raise ValueError unless these, as a reference, can be compared by the extractor with
        images of a size (W, H).
        """
        self.check_kind(extractor.name, extractor.sha256)
        ours = extractor.dimensions(size, device)
        theirs = extractor.dimensions(self.images.size, device) if self.images else (None, None)
        for (name, keys), samples, images in zip(STATISTICS.items(), ours, theirs):
            stored = getattr(self, name)
            for found, what in (
                (stored and len(stored.mean), f"{keys[0]} and {keys[1]}"),
                (images, "images"),
            ):
                if found and samples and found != samples:
                    raise ValueError(
                        f"{self.path} has {found} features in its {what}, samples have {samples} by "
                        f"--features {extractor.name}: it is of other features, or of other image sizes; make it again "
                        "with --make-reference"
                    )


def open_side(
    path: Path | str, flag: str, image_size: int | None = None, share: slice = slice(None)
) -> Side:
    """The Side at a path, a folder or an .npz; flag is what the user gave it as, for messages.

    image_size brings a folder's images to that size as training does; without it they must be RGB
    of one size, which is checked for those in `share`. Raises ValueError for what cannot be
    compared.
    """
    path = Path(path)
    check_name(path)
    if path.is_dir():
        return Side(str(path), FolderImages(path, flag, image_size, share))
    if not path.is_file():
        raise ValueError(
            f"{flag} {path}: there is no such file or folder; give a folder of images or an .npz"
        )
    try:
        names = array_names(path, whole=not share.start)  # one process looks at every byte
        statistics = {
            name: read_statistics(path, keys)
            for name, keys in STATISTICS.items()
            if names & set(keys)
        }
        images = ArrayImages(path) if IMAGES in names else None
        if (
            images
            and LABELS in names
            and (labels := open_array(path, LABELS)).shape[:1] != (len(images),)
        ):
            raise ValueError(
                f"{IMAGES} has {len(images)} images and {LABELS}, their labels, the shape {labels.shape}; one of them is cut "
                "or of other samples: make the file again"
            )
        made_from = read_made_from(path) if "made_from" in names else None
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    except Exception as error:  # a broken file makes zipfile, zlib and NumPy raise many kinds
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{flag} {path} cannot be read as an .npz ({reason[:300]}); give a folder of images or an .npz"
        ) from None
    if not images and not statistics:
        raise ValueError(
            f"{flag} {path} has {', '.join(sorted(names)) or 'nothing'}; wanted is {IMAGES} (uint8 images), or mu and sigma"
        )
    return Side(
        str(path), images, sha256=file_hash(path) if statistics else None, made_from=made_from,
        **statistics,
    )  # fmt: skip


def read_made_from(path: Path | str) -> dict | None:
    """What --make-reference wrote of itself into an .npz, a dict; None if that is somebody else's.
    """
    with suppress(ValueError):
        made = parse_json(str(open_array(path, "made_from")))
        known = isinstance(made, dict) and {"features", "features_sha256"} <= made.keys()
        if known and isinstance(made["features"], str):
            return made
    return None


def read_statistics(path: Path | str, keys: tuple[str, str]) -> Statistics:
    """Statistics from an .npz under these keys.

    Raises ValueError if they are damaged or do not fit together.
    """
    if not set(keys) <= array_names(path):
        raise ValueError(f"it has {' or '.join(keys)} alone; wanted are both of them, or neither")
    mean, covariance = (open_array(path, key) for key in keys)
    size = mean.size
    if mean.shape != (size,) or covariance.shape != (size, size) or not size:
        raise ValueError(
            f"{keys[0]} has the shape {mean.shape}, {keys[1]} {covariance.shape}; wanted are (D,) and (D, D)"
        )
    if not all(np.issubdtype(array.dtype, np.floating) for array in (mean, covariance)):
        raise ValueError(
            f"{keys[0]} is {mean.dtype}, {keys[1]} {covariance.dtype}; wanted are floating-point numbers"
        )
    mean, covariance = np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(
            f"{keys[0]} or {keys[1]} has values that are not finite; the file is damaged, fetch or make it again"
        )
    if covariance.diagonal().min() < 0:
        raise ValueError(
            f"{keys[1]} has variances below 0, so it is no covariance; fetch or make it again"
        )
    return Statistics(mean, covariance)


def summarize_reference(
    side: Side, extractor: Extractor, device: torch.device, batch_size: int, team: Team = Team(),
    num_workers: int = 0,
) -> tuple[Summary | None, str | None]:  # fmt: skip
    """(the Summary of a reference, the hash of its images or None) in the first process; (None,
    None) elsewhere.

    Statistics that stand in its file come before those of its images; of a folder's images,
    MANIFOLD_IMAGES are kept for precision and recall. Raises ValueError if an image is damaged or
    features are not finite.
    """
    if side.images is None:
        return (None, None) if team.rank else (Summary(side.statistics, side.spatial), None)
    batches = read_batches(side.images, batch_size, device, team, num_workers)
    keep = MANIFOLD_IMAGES if isinstance(side.images, FolderImages) else None
    summary, digests = summarize(extractor, batches, len(side.images), keep, team=team)
    if summary is None or digests is None:  # not the first process
        return None, None
    if side.statistics or side.spatial:
        summary.statistics, summary.spatial = side.statistics, side.spatial
    return summary, hash_of(digests)
