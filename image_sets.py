"""What an evaluation compares: images in a folder or an .npz, and ADM's reference files with statistics in them.

An .npz of images has them as uint8 `arr_0` (N, H, W, 3). A reference file may have mu and sigma, the mean and covariance of
Inception's features, mu_s and sigma_s, those of the spatial ones, and in `arr_0` some images for precision and recall.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
import hashlib
import math
import os
from pathlib import Path
from typing import BinaryIO
import zipfile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from checkpoints import check_name, file_hash, parse_json
from data import center_crop_arr, list_images, make_loader, open_image, read, stack, to_rgb
from features import MANIFOLD_IMAGES, Extractor, Team, deal, summarize
from metrics import NEIGHBOURS, SPLIT, Statistics, Summary, inception_score

PUBLISHED = 50_000  # samples, of which published scores are
NEEDS = {  # score → what it needs of both sides
    "fid": "mu and sigma, or images alone", "sfid": "mu_s and sigma_s, or images alone",
    "precision": f"more than {NEIGHBOURS} images", "recall": f"more than {NEIGHBOURS} images",
}  # fmt: skip
STATISTICS = {"statistics": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # what a Summary calls them → ADM's names
IMAGES, LABELS = "arr_0", "arr_1"
MOST_SIDE = 16_384  # pixels of images that are scored
BOMB, SMALL = 500, 1 << 30  # times that an array may be packed, if it is larger than so many bytes
UNEVEN = 0.03  # share of the Inception Score by which another order may change it without a word

Item = tuple[Tensor | None, Tensor | str]  # an image, or a batch, and digests; or None and what is wrong
Streamed = tuple[tuple[int, ...], type | np.dtype, Iterable[np.ndarray]]  # an array: shape, dtype, rows one at a time


@dataclass
class Side:
    """One of the two sides of a comparison: its images (None if it has none), and the statistics that stand in its file."""

    path: str
    images: "FolderImages | ArrayImages | None"
    statistics: Statistics | None = None
    spatial: Statistics | None = None
    sha256: str | None = None  # of the file, where statistics come from it
    made_from: dict | None = None  # what --make-reference wrote of itself

    def check_kind(self, features: str, sha256: str | None = None) -> None:
        """Raise ValueError if a reference file says that it was made with other features than those of this name and hash."""
        made = self.made_from or {"features": features, "features_sha256": sha256}
        kinds = [name if name in ("inception", "pixels") else "a network" for name in (made["features"], features)]
        if kinds[0] != kinds[1] or (sha256 and made["features_sha256"] != sha256):
            raise ValueError(
                f"{self.path} was made with --features {made['features']}, or with other weights of it, and not with "
                f"{features}; pass those, or make it again with --make-reference"
            )

    def check_features(self, extractor: Extractor, size: tuple[int, int], device: torch.device | str) -> None:
        """Raise ValueError unless these, as a reference, can be compared by the extractor with images of a size (W, H)."""
        self.check_kind(extractor.name, extractor.sha256)
        ours = extractor.dimensions(size, device)
        theirs = extractor.dimensions(self.images.size, device) if self.images else (None, None)
        for (name, keys), samples, images in zip(STATISTICS.items(), ours, theirs):
            stored = getattr(self, name)
            for found, what in ((stored and len(stored.mean), f"{keys[0]} and {keys[1]}"), (images, "images")):
                if found and samples and found != samples:
                    raise ValueError(
                        f"{self.path} has {found} features in its {what}, samples have {samples} by "
                        f"--features {extractor.name}: it is of other features, or of other image sizes; make it again "
                        "with --make-reference"
                    )


def open_side(path: Path | str, flag: str, image_size: int | None = None, share: slice = slice(None)) -> Side:
    """The Side at a path, a folder or an .npz; flag is what the user gave it as, for messages.

    image_size brings a folder's images to that size as training does; without it they must be RGB of one size, which is
    checked for those in `share`. Raises ValueError for what cannot be compared.
    """
    path = Path(path)
    check_name(path)
    if path.is_dir():
        return Side(str(path), FolderImages(path, flag, image_size, share))
    if not path.is_file():
        raise ValueError(f"{flag} {path}: there is no such file or folder; give a folder of images or an .npz")
    try:
        names = array_names(path, whole=not share.start)  # one process looks at every byte
        statistics = {name: read_statistics(path, keys) for name, keys in STATISTICS.items() if names & set(keys)}
        images = ArrayImages(path) if IMAGES in names else None
        if images and LABELS in names and (labels := open_array(path, LABELS)).shape[:1] != (len(images),):
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
    return Side(str(path), images, sha256=file_hash(path) if statistics else None, made_from=made_from, **statistics)


def read_made_from(path: Path | str) -> dict | None:
    """What --make-reference wrote of itself into an .npz, a dict; None if that is somebody else's."""
    with suppress(ValueError):
        made = parse_json(str(open_array(path, "made_from")))
        known = isinstance(made, dict) and {"features", "features_sha256"} <= made.keys()
        if known and isinstance(made["features"], str):
            return made
    return None


def read_statistics(path: Path | str, keys: tuple[str, str]) -> Statistics:
    """Statistics from an .npz under these keys. Raises ValueError if they are damaged or do not fit together."""
    if not set(keys) <= array_names(path):
        raise ValueError(f"it has {' or '.join(keys)} alone; wanted are both of them, or neither")
    mean, covariance = (open_array(path, key) for key in keys)
    size = mean.size
    if mean.shape != (size,) or covariance.shape != (size, size) or not size:
        raise ValueError(
            f"{keys[0]} has the shape {mean.shape}, {keys[1]} {covariance.shape}; wanted are (D,) and (D, D)"
        )
    if not all(np.issubdtype(array.dtype, np.floating) for array in (mean, covariance)):
        raise ValueError(f"{keys[0]} is {mean.dtype}, {keys[1]} {covariance.dtype}; wanted are floating-point numbers")
    mean, covariance = np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(
            f"{keys[0]} or {keys[1]} has values that are not finite; the file is damaged, fetch or make it again"
        )
    if covariance.diagonal().min() < 0:
        raise ValueError(f"{keys[1]} has variances below 0, so it is no covariance; fetch or make it again")
    return Statistics(mean, covariance)


class FolderImages(Dataset):
    """All images below a folder, in the order of their paths. Items are (uint8 (3, H, W), digest) or (None, what is wrong)."""

    def __init__(
        self, folder: Path | str, flag: str, image_size: int | None = None, share: slice = slice(None)
    ) -> None:
        try:
            listing = list_images(folder, num_classes=0)
        except ValueError as error:
            raise ValueError(str(error).replace("--data-path", flag)) from None
        self.paths, self.notes = listing.paths, listing.notes
        self.folders = len({os.path.dirname(path) for path in self.paths})
        self.image_size = image_size
        self.size = (image_size, image_size) if image_size else self._header(self.paths[0])
        for path in [] if image_size else self.paths[share]:
            if self._header(path) != self.size:
                raise ValueError(
                    f"{flag} {folder}: {path} is {'{}x{}'.format(*self._header(path))}, {self.paths[0]} is "
                    f"{'{}x{}'.format(*self.size)}; all must have one size (--make-reference with --image-size crops)"
                )

    def _header(self, path):
        """(width, height) of an image, read from its header. Raises ValueError unless it is RGB."""
        try:
            with open_image(path) as image:
                mode, size = image.mode, image.size
                mode += " with transparency" if image.has_transparency_data else ""
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it or make it again") from None
        if mode != "RGB":
            raise ValueError(
                f"{path} is of mode {mode}; wanted is RGB. Convert it, or, for a reference, pass --make-reference with "
                "--image-size, which converts as training does"
            )
        return size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Item:
        try:
            with open_image(self.paths[i]) as image:
                cropped = center_crop_arr(to_rgb(image), self.image_size) if self.image_size else image
                pixels = np.array(cropped)  # (H, W, 3)
        except Exception as error:  # Pillow's decoders raise many kinds for broken files
            return None, f"{self.paths[i]} cannot be read ({error}); remove it or make it again"
        return item(pixels)


class ArrayImages(Dataset):
    """The images `arr_0` of an .npz, which are not held in memory unless they are compressed. Items as in FolderImages.

    Raises ValueError if they are no uint8 images (N, H, W, 3).
    """

    folders = 1
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.array = open_array(path, IMAGES)
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"{IMAGES} is {dtype} {shape}; wanted are images, uint8 (N, H, W, 3)")
        if max(shape[1:]) > MOST_SIDE:
            raise ValueError(f"{IMAGES} has images of {shape[2]}x{shape[1]}; at most {MOST_SIDE} pixels a side are scored")
        self.size = (shape[2], shape[1])

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Item:
        return item(np.array(self.array[i]))

    def __getstate__(self) -> dict:  # a worker process maps the file itself rather than being sent what is in it
        return vars(self) | {"array": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, array=open_array(state["path"], IMAGES))


def item(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """(uint8 (3, H, W), SHA-256 of the pixels, uint8 (32,)) of an image (H, W, 3)."""
    digest = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest(), np.uint8).copy()
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), torch.from_numpy(digest)


def collate(items: list[Item]) -> Item:
    """(images (n, 3, H, W), digests (n, 32)), or (None, what is wrong with the first bad one)."""
    for image, reason in items:
        if image is None:
            return None, reason
    images, digests = (stack(column) for column in zip(*items))
    return images, digests


def read_batches(
    images: FolderImages | ArrayImages, batch_size: int, device: torch.device, team: Team = Team(), num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches of a set of images, as `features.summarize` takes them. Raises ValueError for a damaged image."""
    batches = list(deal(len(images), batch_size, team))
    loader = make_loader(images, batches, num_workers, device.type == "cuda", collate)
    with closing(read(loader)) as found:
        for batch, digests in tqdm(found, total=len(batches), unit="batch", disable=True if team.rank else None):
            if batch is None:
                raise ValueError(digests)
            yield batch.to(device, non_blocking=True), digests.to(device, non_blocking=True)


def summarize_reference(
    side: Side, extractor: Extractor, device: torch.device, batch_size: int, team: Team = Team(), num_workers: int = 0
) -> tuple[Summary | None, str | None]:
    """(the Summary of a reference, the hash of its images or None) in the first process; (None, None) elsewhere.

    Statistics that stand in its file come before those of its images; of a folder's images, MANIFOLD_IMAGES are kept for
    precision and recall. Raises ValueError if an image is damaged or features are not finite.
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


def remarks(
    scores: dict[str, float | None], samples: tuple[int, tuple[int, int]], reference: Side,
    summaries: tuple[Summary, Summary], features: str,
) -> list[str]:  # fmt: skip
    """What a reader of the scores must know, as sentences.

    samples is (how many, their size (W, H)), reference the Side, summaries those of both, features the extractor's name.
    """
    (count, size), (ours, _) = samples, summaries
    notes = list(reference.images.notes) if reference.images else []
    assert ours.features is not None  # of samples they are kept
    dimension = ours.features.shape[1]
    if count < PUBLISHED:
        notes.append(f"{count:,} samples; published scores are of {PUBLISHED:,}, and with fewer FID comes out higher")
    few = [(count, "samples")]
    if reference.images and not (reference.statistics or reference.spatial):
        few.append((len(reference.images), "reference images"))
    for number, what in few:
        if number <= dimension:
            notes.append(
                f"{number:,} {what} are too few for {dimension:,} features: their covariance has no full rank, and FID says "
                "little"
            )
    lacking = [name for name in NEEDS if scores[name] is None and not (name == "sfid" and ours.spatial is None)]
    if lacking:
        needs = "; ".join(f"{name} needs {NEEDS[name]}" for name in lacking)
        remaining = ", ".join(name for name, value in scores.items() if value is not None) or "nothing"
        notes.append(f"samples, or the reference {reference.path}, lack something: {needs}. What remains: {remaining}")
    if reference.statistics and not reference.made_from and features != "inception":
        notes.append(
            f"{reference.path} does not say of which features its mu and sigma are; taken for those of {features}"
        )
    if ours.logits is not None and len(ours.logits) > SPLIT:  # one Inception Score and more
        mixed = torch.randperm(len(ours.logits), generator=torch.Generator().manual_seed(0))
        there, other = scores["inception_score"], inception_score(ours.logits[mixed])
        if there is not None and abs(there - other) > UNEVEN * other:
            notes.append(
                f"inception_score depends on the order of the samples, since it is taken of each {SPLIT:,} consecutive ones, "
                f"as in ADM's suite: it is {there:.4g} in this order, perhaps class by class, and {other:.4g} in a random one; "
                "published scores are of samples in random order"
            )
    if reference.images and reference.images.size != size:
        notes.append("samples are of {}x{} pixels, the reference of {}x{}".format(*size, *reference.images.size))
    return notes


def hash_of(digests: Tensor) -> str:
    """One SHA-256, in hexadecimal, for images with these digests (N, 32), in their order: equal pixels, equal hash."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()


# ---- .npz files of any size ----


def array_names(path: Path | str, whole: bool = False) -> set[str]:
    """The names of the arrays in an .npz; with `whole`, every byte in it is looked at.

    Raises ValueError if one is damaged, or packed so that it must be a trap; zipfile's and zlib's errors if it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > SMALL and info.file_size > BOMB * info.compress_size:
                raise ValueError(
                    f"{info.filename} has {info.file_size:,} bytes, packed in {info.compress_size:,}; save it with np.savez"
                )
        damaged = archive.testzip() if whole else None
        if damaged:
            raise ValueError(f"{damaged} is damaged; fetch or make it again")
        return {name.removesuffix(".npy") for name in archive.namelist()}


def open_array(path: Path | str, name: str) -> np.ndarray:
    """An array of an .npz, mapped from the file where it is not compressed. Raises ValueError, KeyError or OSError.

    It is looked at in its header before anything is read or made room for.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as file:
            shape, fortran_order, dtype = _header(file, name)
            header = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read; save it as an array of numbers")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != info.file_size - header:
        raise OSError(f"{name} is cut short, or its header is wrong: it says {shape} {dtype}")
    if info.compress_type != zipfile.ZIP_STORED or fortran_order or not size:
        with np.load(path) as file:
            return file[name]
    with open(path, "rb") as file:  # the length of the name and of the extra field stand in the file's local header
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2").astype(int)
    offset = int(info.header_offset + 30 + lengths.sum() + header)
    if offset + size > Path(path).stat().st_size:
        raise OSError(f"{name} is cut short")
    return np.memmap(path, dtype, "r", offset, shape)


def _header(file, name):
    """(shape, whether it is in Fortran's order, dtype) of an array in .npy's format. Raises ValueError for nonsense."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{name} is in version {version} of .npy's format, which has named fields; save it as plain numbers")
    try:
        return readers[version](file)
    except Exception as error:  # of nonsense, Python's parser makes many kinds
        raise ValueError(f"{name} has a header that is none ({(str(error) or type(error).__name__)[:200]})") from None


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray | Streamed]) -> None:
    """Write arrays, a dict of name → array, to an open file as an .npz without compression; equal arrays, equal bytes.

    Instead of an array, (shape, dtype, rows) may stand, whose rows are taken one at a time: they need not fit in memory.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if not isinstance(array, tuple):
                array = np.asarray(array, order="C")
                array = (array.shape, array.dtype, [array])
            shape, dtype, rows = array
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                "fortran_order": False,
                "shape": tuple(shape),
            }
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as out:  # an entry without a time
                np.lib.format.write_array_header_1_0(out, header)
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                for row in rows:
                    size -= out.write(row.tobytes())
                if size:
                    raise ValueError(f"the rows of {name} do not make up its shape {tuple(shape)}")
