"""What people say of the images in a folder: captions, from files beside them.

An image's captions are the lines of NAME.txt beside it, or what a metadata.jsonl has for it, in its
folder or in one above: a JSON object a line, as in Hugging Face's image folders, with `file_name`,
relative to the folder, and `text` or `captions`, a text or a list of several.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.listing import Listing
from runtime.disk import write_whole

METADATA, BESIDE = "metadata.jsonl", ".txt"
NAME_KEY, TEXT_KEYS = "file_name", ("text", "captions")
MOST_BYTES = 2**20  # of a text file, and of a line of metadata: nobody says so much of an image
FILES_AT_ONCE = 16  # a disk on a network answers after a while


@dataclass(frozen=True)
class Captions:
    """The captions of N images, M in all.

    `text` has them one after another, as UTF-8; caption m begins at starts[m], of starts (M + 1,),
    and those of image i are numbers firsts[i] to firsts[i + 1] - 1, of firsts (N + 1,). `notes` say
    in sentences what a user should know.
    """

    text: bytes
    starts: np.ndarray
    firsts: np.ndarray
    notes: tuple[str, ...] = ()

    @classmethod
    def made(cls, captions: Iterable[Sequence[str]], notes: tuple[str, ...] = ()) -> "Captions":
        """The captions of each image in order."""
        texts, firsts = list[bytes](), [0]
        for several in captions:
            texts += [caption.encode() for caption in several]
            firsts.append(len(texts))
        starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)  # (M + 1,)
        return cls(b"".join(texts), starts, np.array(firsts, np.int64), notes)

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def of(self, index: int) -> list[str]:
        """The captions of an image; none where it has none."""
        at = self.starts[self.firsts[index] : self.firsts[index + 1] + 1].tolist()
        return [self.text[start:stop].decode() for start, stop in zip(at, at[1:])]

    def __iter__(self) -> Iterator[list[str]]:
        return (self.of(index) for index in range(len(self)))

    @property
    def count(self) -> int:
        """How many captions there are in all."""
        return len(self.starts) - 1

    @property
    def missing(self) -> int:
        """How many images have none."""
        return int((np.diff(self.firsts) == 0).sum())

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of all captions and of which image has which."""
        digest = hashlib.sha256(self.text)
        for numbers in (self.starts, self.firsts):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()

    def chosen(self, images: Iterable[int]) -> "Captions":
        """The captions of these images, in this order."""
        return Captions.made(map(self.of, images), self.notes)


def read_captions(
    listing: Listing, folder: Path | str, argument: str = "data_path"
) -> Captions:
    """The Captions of a Listing's images, which lie below the folder.

    Images without a caption are counted in the notes, and so are rows for files that are no images
    of the Listing. Errors call the folder by the name of the `argument` that gave it. Raises
    ValueError, naming file and line, for a file that cannot be read, is no UTF-8 or JSON, or says
    twice what an image is, and if no image has a caption.
    """
    captions = find_captions(listing, folder, argument)
    if captions.count:
        return captions
    left = "".join(f"; {note}" for note in captions.notes)
    raise ValueError(
        f"`{argument}` {folder}: none of the {len(captions):,} images has a caption{left}. Wanted "
        f"is NAME{BESIDE} beside an image, or {METADATA} with {NAME_KEY} and {TEXT_KEYS[0]}"
    )


def find_captions(
    listing: Listing, folder: Path | str, argument: str = "data_path"
) -> Captions:
    """As read_captions, but it is no error if no image has a caption."""
    try:
        found = _Found(listing.paths)
        beside, metadata = _files(listing.paths, str(Path(folder)))
        found.take_files(beside)
        for file in metadata:
            found.take_rows(file)
    except OSError as error:
        raise ValueError(
            f"`{argument}`: {error.filename} cannot be read ({error.strerror}); mend that, or take "
            "it away"
        ) from None
    except ValueError as error:
        raise ValueError(f"`{argument}`: {error}") from None
    return Captions.made(found.captions, found.notes())


def _files(paths, root):
    """({image's number: the text file beside it}, the metadata files), by what is in the folders
    from the root down to the images. No file is opened, or looked at by itself.
    """
    by_folder: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        by_folder.setdefault(os.path.dirname(path), []).append(number)
    beside, metadata = dict[int, str](), list[str]()
    for folder in sorted(_with_those_above(by_folder, root)):
        with os.scandir(folder) as entries:
            names = {
                entry.name for entry in entries
                if (entry.name == METADATA or entry.name.endswith(BESIDE)) and entry.is_file()
            }  # fmt: skip
        if METADATA in names:
            metadata.append(os.path.join(folder, METADATA))
        for number in by_folder.get(folder, ()) if names else ():
            stem = os.path.splitext(paths[number])[0]
            if f"{os.path.basename(stem)}{BESIDE}" in names:
                beside[number] = stem + BESIDE
    return beside, metadata


def _with_those_above(folders, root):
    """These folders, and those between them and the root."""
    found = {root}
    for folder in folders:
        while folder not in found and len(folder) > len(root):
            found.add(folder)
            folder = os.path.dirname(folder)
    return found


class _Found:
    """What is found of the captions of images so far."""

    def __init__(self, paths):
        self.paths = paths
        self.captions: list[Sequence[str]] = [()] * len(paths)
        self.said_in: dict[int, str] = {}  # image's number → where its captions stand
        self.strangers: dict[str, list[str]] = {}  # metadata file → rows for what is no image

    def take_files(self, beside):
        """Take up text files beside images, {image's number: file}."""
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for (number, file), lines in zip(beside.items(), pool.map(_lines_of, beside.values())):
                self.captions[number], self.said_in[number] = lines, file

    def take_rows(self, file):
        """Take up the rows of a metadata file."""
        for line, row in _rows_of(file):
            where = f"{file}, line {line}"
            name, captions = _row_said(row, where)
            path = os.path.normpath(os.path.join(os.path.dirname(file), name))
            number = self.numbers.get(path)
            if number is None:
                self.strangers.setdefault(file, []).append(f"{name} in line {line}")
            elif number in self.said_in:
                raise ValueError(
                    f"{where}, has captions of {path}, and so has {self.said_in[number]}; keep one "
                    "of them"
                )
            else:
                self.captions[number], self.said_in[number] = captions, where

    @cached_property
    def numbers(self):
        """{path of an image as normpath has it: its number}."""
        return {os.path.normpath(path): number for number, path in enumerate(self.paths)}

    def notes(self):
        """Sentences on images without captions and captions without images."""
        silent = [path for path, said in zip(self.paths, self.captions) if not said]
        notes = [
            f"{file}: {len(rows):,} row(s) are of files that are not among the images, such as "
            f"{rows[0]}"
            for file, rows in self.strangers.items()
        ]
        if silent and len(silent) < len(self.paths):
            notes.append(
                f"{len(silent):,} of {len(self.paths):,} images have no caption, such as "
                f"{silent[0]}; the empty caption stands for theirs"
            )
        return tuple(notes)


def _lines_of(file):
    """The captions in a text file: its lines, but for empty ones."""
    with open(file, "rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{file} has more than {MOST_BYTES:,} bytes, which is no caption")
    return [line.strip() for line in _decoded(content, file).split("\n") if line.strip()]


def _rows_of(file, most=MOST_BYTES):
    """(number of a line, what stands there) for each line of a file of JSON, but for empty ones."""
    with open(file, "rb") as opened:
        for number, content in enumerate(iter(lambda: opened.readline(most + 1), b""), 1):
            where = f"{file}, line {number},"
            if len(content) > most:
                raise ValueError(f"{where} has more than {most:,} bytes; shorten it")
            text = _decoded(content, where).strip()
            if not text:
                continue
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is no JSON ({error}); mend it") from None


def _decoded(content, where):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is no UTF-8 (at byte {error.start}); save it as UTF-8"
        ) from None


def _row_said(row: Any, where: str) -> tuple[str, list[str]]:
    """(file's name, captions) in a row of metadata. Raises ValueError if there is no such thing."""
    name = row.get(NAME_KEY) if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{where}, is no JSON object with a text for {NAME_KEY}; mend it")
    given = [key for key in TEXT_KEYS if row.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{where}, has {' and '.join(given)}; keep one of them")
    said = row[given[0]] if given else []
    several = [said] if isinstance(said, str) else said
    if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
        raise ValueError(f"{where}, has {given[0]} that is neither a text nor a list of texts")
    for text in (name, *several):
        if not _is_unicode(text):
            raise ValueError(f"{where}, has half of a surrogate pair in a text; mend it")
    return name, [text.strip() for text in several if text.strip()]


def _is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- beside cached latents ----

STORED = "captions.jsonl"  # a JSON list for each image
MOST_STORED = 8 * MOST_BYTES  # of a line: JSON writes a byte as up to six, and quotes


def write_captions(path: Path, captions: Captions) -> None:
    """Write captions to a file of a cache, whole or not at all. Raises OSError."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(said, ensure_ascii=False) + "\n" for said in captions)

    write_whole(path, write)


def stored_captions(path: Path, images: int, wanted: str) -> Captions:
    """The captions of so many images that write_captions wrote; `wanted` is their hash.

    Raises ValueError if they are damaged.
    """
    rows = [row for _, row in _rows_of(path, MOST_STORED)]
    texts = all(
        isinstance(row, list) and all(isinstance(one, str) and _is_unicode(one) for one in row)
        for row in rows
    )
    captions = Captions.made(rows) if texts and len(rows) == images else None
    if captions is None or captions.hash != wanted:
        raise ValueError(f"{path.name} is damaged")
    return captions


def stand_ins(paths: Sequence[str], bad: Iterable[str]) -> list[int]:
    """For each image the number of the one that is cached in its place: itself, or the next that is
    readable. `bad` are a cache's bad_images, "PATH (reason)". Raises ValueError if one of them is
    none of the paths.
    """
    gone = set(bad_numbers(paths, bad))
    standing, after = [0] * len(paths), next((i for i in range(len(paths)) if i not in gone), 0)
    for number in reversed(range(len(paths))):
        after = after if number in gone else number
        standing[number] = after
    return standing


def left(paths: Sequence[str], bad: Iterable[str]) -> list[int]:
    """The numbers of the clips that are cached: none stands in for those in `bad`. Raises
    ValueError as stand_ins.
    """
    gone = set(bad_numbers(paths, bad))
    return [number for number in range(len(paths)) if number not in gone]


def bad_numbers(paths: Sequence[str], bad: Iterable[str]) -> list[int]:
    """For each of a cache's bad_images, "PATH (reason)", which of the paths it is. Raises
    ValueError for one that is none of them.
    """
    known, found = {path: number for number, path in enumerate(paths)}, []
    for image in bad:
        parts = image.split(" (")
        heads = (" (".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        number = next((known[head] for head in heads if head in known), None)
        if number is None:
            raise ValueError(
                f"the latents have another image in place of {image}, which is not among those of "
                "`data_path`; give it as extract_latents.py had it, or leave it out"
            )
        found.append(number)
    return found
