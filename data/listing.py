"""A folder of images or clips to a list of files with their classes."""

from collections import Counter
from collections.abc import Callable
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from runtime.clip_files import CLIP_SUFFIXES, FRAME_SUFFIXES, frame_paths

# Formats that people have images in and that are not read here; files of them are counted.
OTHER_FORMATS = (
    ".apng", ".avif", ".dds", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jfif", ".jp2",
    ".jpe", ".jxl", ".psd", ".raw", ".svg", ".tga",
)  # fmt: skip
SAMPLED_FILES = 64  # of a data set, whose contents tell it from another with the same names


class Listing(NamedTuple):
    """Image files, or clips, with their class indices.

    `classes` are the names in index order; None without classes. `notes` say, in sentences, what
    below the folder was left out.
    """

    paths: list[str]
    labels: list[int]
    classes: list[str] | None
    notes: tuple[str, ...] = ()

    def hash(self, root: Path | str) -> str:
        """SHA-256, in hexadecimal, of the files' names below root and their labels."""
        lines = (
            f"{label} {str(path).removeprefix(str(Path(root)))}\n"
            for path, label in zip(self.paths, self.labels)
        )
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def sample_hash(paths: list[str]) -> str:
    """SHA-256, in hexadecimal, of the bytes of up to SAMPLED_FILES of these files, evenly spread. A
    folder of frames stands for the first of them.

    "" if one cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    count = min(SAMPLED_FILES, len(paths))
    for path in (Path(paths[i * len(paths) // count]) for i in range(count)):
        try:
            if path.is_dir():
                path = frame_paths(path)[0]
            if not path.is_file():  # a pipe, say, which might not end
                return ""
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except (OSError, IndexError):
            return ""
    return digest.hexdigest()


class Wanted(NamedTuple):
    """What a listing looks for: its name in messages, the endings of its files, and what of a
    folder's files it lists: items(folder, files, whether the folder is a class of its own).
    """

    name: str
    endings: tuple[str, ...]
    items: Callable[[str, list[str], bool], list[str]]


def list_images(root: Path | str, num_classes: int, argument: str = "data_path") -> Listing:
    """The Listing of a folder that holds one folder per class. With num_classes 0, the Listing of
    all images below the folder, without classes.

    The order is that of torchvision's ImageFolder. Hidden files and folders are left out, and links
    back to a folder above. Errors call the folder by the name of the `argument` that gave it.
    Raises ValueError if the folder is missing, cannot be read, holds no images or an empty class,
    or has more classes than num_classes.
    """
    return _listed(root, num_classes, argument, IMAGES)


def list_clips(root: Path | str, num_classes: int, argument: str = "data_path") -> Listing:
    """As list_images, of clips: videos, GIFs, folders of frames, and images, which are clips of one
    frame.

    An image right in the folder of its class, or without classes right in root, is a clip; images
    in a folder further down are together one clip, whose path is that of the folder.
    """
    return _listed(root, num_classes, argument, CLIPS)


def _listed(root, num_classes, argument, wanted):
    root = Path(root)
    given = f"`{argument}` {root}"
    if not root.is_dir():
        held = f"one folder of {wanted.name} per class" if num_classes else wanted.name
        raise ValueError(f"{given} is not a folder; give one that holds {held}")
    left_out: Counter[str] = Counter()
    folders = _walk(str(root), argument, left_out, wanted.endings)
    if num_classes == 0:
        paths = sorted(
            path
            for folder, files in folders.items()
            for path in wanted.items(folder, files, folder == str(root))
        )
        if not paths:
            raise ValueError(
                f"{given} holds no {wanted.name} ({', '.join(wanted.endings)}){_told(left_out)}"
            )
        return Listing(paths, [0] * len(paths), None, _notes(root, left_out))
    loose = folders.pop(str(root))
    if loose:
        left_out[f"loose {wanted.name} beside the class folders"] = len(loose)
    by_class: dict[str, list[str]] = {}
    for folder in sorted(folders):
        name, *below = os.path.relpath(folder, root).split(os.sep)
        by_class.setdefault(name, []).extend(wanted.items(folder, folders[folder], not below))
    classes = sorted(by_class)
    _check_classes(given, num_classes, by_class, left_out, wanted.name)
    paths = [path for name in classes for path in by_class[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return Listing(paths, labels, classes, _notes(root, left_out))


def _clips(folder, files, is_class):
    """The clips among the files of a folder, whose images are one clip unless it is a class."""
    images = [path for path in files if not path.lower().endswith(CLIP_SUFFIXES)]
    if is_class or not images:
        return files
    return [folder, *(path for path in files if path not in set(images))]


IMAGES = Wanted("images", IMG_EXTENSIONS, lambda folder, files, is_class: files)
CLIPS = Wanted("clips", (*CLIP_SUFFIXES, *FRAME_SUFFIXES), _clips)


def _walk(root, argument, left_out, endings):
    """{folder: its files with these endings in order} for a folder and all below it.

    What is not looked at is counted in `left_out`.
    """
    found: dict[str, list[str]] = {}
    folders, links, seen = [root], list[str](), set()
    while folders or links:
        # Links last: what they lead to may be listed by itself
        folder = folders.pop() if folders else links.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                left_out["links to a folder that is listed by itself"] += 1
                continue
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(
                f"`{argument}`: {folder} cannot be read ({error.strerror}); mend that, or take it "
                "away"
            ) from None
        seen.add((status.st_dev, status.st_ino))
        below, linked, found[folder] = _sorted_out(inside, left_out, endings)
        folders += below
        links = linked[::-1] + links
    return found


def _sorted_out(entries, left_out, endings):
    """(folders, links to folders, files with these endings) among a folder's entries, as paths in
    order.

    The rest is counted in `left_out`.
    """
    folders, links, wanted = list[str](), list[str](), list[str]()
    for entry in entries:
        ending = os.path.splitext(entry.name)[1].lower()
        kind = _kind(entry)
        if entry.name.startswith("."):
            if kind == "folder" or ending in endings:
                left_out[f"hidden {kind}s (names that begin with a dot)"] += 1
        elif kind == "folder":
            (links if entry.is_symlink() else folders).append(entry.path)
        elif kind != "file":
            left_out["pipes, sockets and devices"] += 1
        elif ending in endings:
            wanted.append(entry.path)
        elif ending in OTHER_FORMATS:
            left_out[f"{ending} files, a format that is not read"] += 1
        elif ending in CLIP_SUFFIXES:
            left_out[f"{ending} files, which are clips and no images (docs/video.md)"] += 1
    return folders, links, wanted


def _kind(entry):
    """What an entry of a folder is, or leads to: "folder", "file" or "other".

    A link to nothing is a "file": whoever reads it finds out.
    """
    try:
        if entry.is_dir():
            return "folder"
        is_file = entry.is_file() or not os.path.exists(entry.path)
        return "file" if is_file else "other"
    except OSError:  # a link to itself, say
        return "file"


def _told(left_out):
    """What was left out, to end a message with."""
    return "".join(f"; left out: {count:,} {what}" for what, count in sorted(left_out.items()))


def _notes(root, left_out):
    """What was left out, as the notes of a Listing."""
    return tuple(f"{root}: left out {count:,} {what}" for what, count in sorted(left_out.items()))


def _check_classes(given, num_classes, by_class, left_out, held):
    """Raise ValueError unless there are class folders, each with what is held, at most num_classes.
    """
    classes = sorted(by_class)
    empty = [name for name in classes if not by_class[name]]
    if not classes or empty:
        some = f"{', '.join(empty[:5])}{' …' if len(empty) > 5 else ''}"
        lacking = f"no {held} in {some}" if empty else "no class folders"
        raise ValueError(
            f"{given}: {lacking}{_told(left_out)}. One folder of {held} per class is wanted, "
            "or `num_classes=0`"
        )
    if len(classes) > num_classes:
        raise ValueError(
            f"{given} has {len(classes)} class folders, `num_classes` is {num_classes}: there is "
            f"no room for {', '.join(classes[num_classes:][:5])}; "
            f"pass `num_classes={len(classes)}`"
        )


def check_outside(root: Path | str, argument: str, folder: Path | str) -> None:
    """Raise ValueError if a folder to be written lies at or below root, the folder of the images:
    it would be taken for images. `argument` is the name of the one that gave the folder.
    """
    # Path.resolve raises RuntimeError for a link to itself
    inner = Path(os.path.realpath(folder))
    if Path(os.path.realpath(root)) in (inner, *inner.parents):
        raise ValueError(
            f"`{argument}` {folder} lies inside `data_path` {root} and would be taken for images; "
            "choose another"
        )
