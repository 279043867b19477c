"""What encoders outside of a network made of captions: a folder beside cached latents.

Each caption has one row, however many images have it; row 0 is the empty caption. tokens.npy
(all tokens, E) has those of a row after those of the row before, without any that only fill up;
counts.npy (rows, parts) says how many a row has in each part of the sequence, and pooled.npy
(rows, P) has the captions' vectors, where there are any. captions.jsonl has the captions. rows.npy
has the rows of the images' captions one after another, and firsts.npy (images + 1,) where each
image's begin. manifest.json, plan.json and chunks are as data/cache_format.py has them.
"""

import hashlib
from pathlib import Path
from typing import Any
import zlib

import numpy as np
import torch
from tqdm.auto import tqdm

from conditions.encoders import check_says, in_words
from conditions.text import Share
from data.cache import checksums, map_array
from data.cache_format import DTYPES, MANIFEST
from layers.text import Text
from runtime.json_files import read_json

FOLDER = "text"  # in the folder of latents
TEXT_MANIFEST = f"{FOLDER}/{MANIFEST}"
TOKENS, POOLED, COUNTS, CAPTIONS = "tokens.npy", "pooled.npy", "counts.npy", "captions.jsonl"
ROWS, FIRSTS = "rows.npy", "firsts.npy"
SMALL = (COUNTS, CAPTIONS, ROWS, FIRSTS)  # files that are there from the beginning
# What a manifest or plan must say: name → (kind, least)
ENTRIES: dict[str, tuple[type, int]] = {
    "images": (int, 1), "files_sha256": (str, 0), "captions_sha256": (str, 0),
    "captions": (int, 0), "missing": (int, 0), "cut": (int, 0), "rows": (int, 1),
    "tokens": (int, 1), "width": (int, 1), "pooled_width": (int, 0), "parts": (list, 0),
    "masked": (bool, 0), "dtype": (str, 0), "encoders": (list, 0), "shares": (list, 0),
}  # fmt: skip
MOST = 2**40  # of each number
# Entries that a manifest of latents has, too, if it is of the same images and captions
SHARED = ("images", "files_sha256", "captions_sha256")


def check_text_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, naming the entry, unless a manifest or plan has what its readers look at.
    """
    for name, (kind, least) in ENTRIES.items():
        value: Any = manifest.get(name)
        right = type(value) is kind
        if not right or (kind is int and not least <= value <= MOST):
            raise ValueError(f"its manifest has {str(value)[:60]!r} for {name}")
    check_says(manifest["encoders"])
    if manifest["dtype"] not in DTYPES:
        raise ValueError(f"its manifest has {manifest['dtype'][:60]!r} for dtype")
    lengths = {one["length"] for one in manifest["encoders"]}
    if not manifest["parts"] or not all(part in lengths for part in manifest["parts"]):
        raise ValueError("its manifest has parts that are not those of its encoders")
    ends = (sum(manifest["parts"]), manifest["width"], manifest["pooled_width"])
    right = len(manifest["shares"]) == len(manifest["encoders"])
    for share in manifest["shares"] if right else ():
        right &= isinstance(share, list) and len(share) == len(ends)
        right = right and all(map(_is_inside, share, ends))
    if not right:
        raise ValueError("its manifest has shares that are not those of its encoders")


def _is_inside(pair, end):
    numbers = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
    return numbers and 0 <= pair[0] <= pair[1] <= end


class CachedText:
    """The output of encoders for the captions of a folder of latents, a row for each caption.

    `null` is that of the empty caption, `shares` and `says` are those of the encoders (a Reader's),
    `hash` tells it from others, and `notes` say in sentences what a user should know. Raises
    ValueError if the folder of latents has none, it is damaged, or of other images or captions.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder) / FOLDER
        try:
            self.manifest = read_json(self.folder / MANIFEST)
            check_text_manifest(self.manifest)
            self._map()
            check_latents(self.manifest, read_json(Path(folder) / MANIFEST))
            self.hash = hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            advice = f"remove {self.folder} and encode the captions again"
            if not (self.folder / MANIFEST).exists():
                advice = f"run extract_latents.py --output {folder} --text-encoder until it ends"
            raise ValueError(
                f"{folder} has no output of text encoders that can be used ({error}); {advice}"
            ) from None
        self.says: list[dict[str, Any]] = self.manifest["encoders"]
        self.shares = tuple(
            Share(*(slice(*pair) for pair in share)) for share in self.manifest["shares"]
        )
        self.notes = notes_on(self.manifest)
        self.null = self.text(0)

    def _map(self):
        self.tokens, self.pooled, self.counts, rows, firsts = open_arrays(
            self.folder, self.manifest
        )
        self.image_rows, self.firsts = rows, firsts
        self.starts = starts_of(self.counts)  # (rows + 1,)

    # A worker process maps the files itself rather than being sent what is in them
    def __getstate__(self) -> dict:
        mapped = ("tokens", "pooled", "counts", "image_rows", "firsts", "starts")
        return vars(self) | dict.fromkeys(mapped)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._map()

    def __len__(self) -> int:
        return self.manifest["rows"]

    def rows(self, index: int) -> list[int]:
        """The rows of an image's captions; [0], the empty caption, for an image without any."""
        first, stop = self.firsts[index : index + 2]
        return self.image_rows[first:stop].tolist() or [0]

    def text(self, row: int) -> Text:
        """The Text of one caption, float32: tokens (1, sum of parts, E), mask (1, sum of parts) or
        None where no token only fills up, pooled (1, P) or None.
        """
        parts, stored = self.manifest["parts"], self.tokens[slice(*self.starts[row : row + 2])]
        mask = filled(self.counts[row : row + 1], parts)  # (1, L)
        tokens = torch.zeros(1, sum(parts), self.manifest["width"])
        tokens[mask] = torch.from_numpy(np.asarray(stored, np.float32))
        pooled = None
        if self.pooled is not None:
            pooled = torch.from_numpy(np.array(self.pooled[row : row + 1], np.float32))
        return Text(tokens, mask if self.manifest["masked"] else None, pooled)


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Where the tokens of each row begin, and where the last one's end: (rows + 1,), int64."""
    return np.concatenate([[0], counts.sum(axis=1, dtype=np.int64).cumsum()])


def filled(counts: np.ndarray, parts: list[int]) -> torch.Tensor:
    """Which tokens there are, bool (n, sum of parts), of captions with so many in each part."""
    masks = [np.arange(part) < counts[:, at, None] for at, part in enumerate(parts)]
    return torch.from_numpy(np.concatenate(masks, axis=1))


def notes_on(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Sentences on captions that the encoders did not read to their end."""
    if not manifest["cut"]:
        return ()
    return (
        f"{manifest['cut']:,} of {manifest['rows'] - 1:,} different captions are longer than what "
        f"is read by {in_words(manifest['encoders'])}; they are cut",
    )


def check_latents(manifest: dict[str, Any], latents: dict[str, Any]) -> None:
    """Raise ValueError unless a manifest is of the same images as that of the latents beside it,
    and of the same captions, if that has any.
    """
    for name in SHARED:
        if name in latents and latents[name] != manifest[name]:
            what = "captions" if "captions" in name else "images"
            raise ValueError(f"they are of other {what} than the latents")


Arrays = tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray, np.ndarray]


def open_arrays(folder: Path, manifest: dict[str, Any]) -> Arrays:
    """(tokens (all, E), pooled (rows, P) or None, counts (rows, parts), rows of the images'
    captions, firsts (images + 1,)): tokens and pooled are mapped, and read when they are used.

    Raises ValueError if one is missing, or they do not fit together.
    """
    parts, rows = manifest["parts"], manifest["rows"]
    counts, found, firsts = (
        np.array(whole_numbers(folder, name, shape))
        for name, shape in (
            (COUNTS, (rows, len(parts))), (ROWS, None), (FIRSTS, (manifest["images"] + 1,)),
        )
    )  # fmt: skip
    if (counts < 1).any() or (counts > parts).any() or counts.sum() != manifest["tokens"]:
        raise ValueError(f"{COUNTS} is damaged")
    if firsts[0] != 0 or firsts[-1] != len(found) or (np.diff(firsts) < 0).any():
        raise ValueError(f"{FIRSTS} is damaged")
    if len(found) and not 0 <= found.min() <= found.max() < rows:
        raise ValueError(f"{ROWS} is damaged")
    shapes = {TOKENS: (manifest["tokens"], manifest["width"])}
    if manifest["pooled_width"]:
        shapes[POOLED] = (rows, manifest["pooled_width"])
    mapped = [map_array(folder, name) for name in shapes]
    for array, (name, shape) in zip(mapped, shapes.items()):
        if array.shape != shape or array.dtype != np.dtype(manifest["dtype"]):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, its manifest says {shape}")
    return mapped[0], mapped[1] if len(mapped) > 1 else None, counts, found, firsts


def whole_numbers(folder: Path, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """An array of whole numbers, of a shape; None: of one axis. Raises ValueError for another."""
    array = map_array(folder, name)
    if array.dtype.kind not in "iu" or (array.ndim != 1 if shape is None else array.shape != shape):
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return array


def find_text_damage(folder: Path | str) -> list[str]:
    """What is wrong, by its checksums, with the text beside latents in a folder, in sentences.

    Raises ValueError if there is none that is finished.
    """
    cached = CachedText(folder)
    (sums, chunk), rows = checksums(cached.manifest), len(cached)
    if chunk < 1 or len(sums) != -(-rows // chunk):
        return [f"{TEXT_MANIFEST} has no checksums"]
    wrong = [
        f"{FOLDER}/{name} is damaged" for name in SMALL
        if small_sum(cached.folder / name) != cached.manifest.get(f"{name}_crc32")
    ]  # fmt: skip
    for number, crc32 in enumerate(tqdm(sums, unit="chunk", disable=None)):
        first, stop = number * chunk, min((number + 1) * chunk, rows)
        content = cached.tokens[cached.starts[first] : cached.starts[stop]].tobytes()
        pooled = b"" if cached.pooled is None else cached.pooled[first:stop].tobytes()
        if zlib.crc32(pooled, zlib.crc32(content)) != crc32:
            wrong.append(f"the text of captions {first} to {stop - 1} is damaged")
    return wrong


def small_sum(path: Path) -> int:
    """The CRC32 of a file."""
    return zlib.crc32(path.read_bytes())
