"""Files on disk: written whole or not at all, hashed, and whether there is room for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import errno
import hashlib
import os
from pathlib import Path
import shutil
from tempfile import TemporaryDirectory
from typing import Any

LONGEST_NAME = 255  # bytes, on the file systems that are met
# What the system says where a folder cannot be opened or synced, as on Windows and on some network
# disks.
NO_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES,
    errno.EPERM, errno.EISDIR,
}  # fmt: skip


@contextmanager
def readable_name(path: Path | str) -> Iterator[Path]:
    """The path, or a link to it that is in UTF-8 where the path is not.

    Libraries that are not Python's refuse such a path.
    """
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as folder:
            link = Path(folder) / f"link{path.suffix.encode(errors='ignore').decode()}"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def check_name(path: Path) -> None:
    """Raise ValueError if no file can be called so, or its place cannot be looked at."""
    try:
        with suppress(FileNotFoundError):
            path.lstat()
    except (OSError, ValueError) as error:  # the second of a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{str(path)[:300]} is no name for a file or folder ({reason}); give another"
        ) from None


def check_path(path: object, name: str) -> None:
    """Raise ValueError, naming the argument, for what is no path, and for an empty text."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError(f"`{name}` is {path!r:.60}; give the name of a file or folder")


def file_hash(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hidden_name(path: Path, suffix: str) -> Path:
    """A hidden name in the folder of `path`: its own with this suffix.

    The file's own name is cut if only the suffix makes the new one too long.
    """
    name = path.name
    if len(os.fsencode(name)) <= LONGEST_NAME:
        while len(os.fsencode(f".{name}{suffix}")) > LONGEST_NAME:
            name = name[1:]
    return path.parent / f".{name}{suffix}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), bring the file safely to disk, and give it its name.

    A failed write leaves nothing. Raises OSError if the disk refuses, or if something else than a
    file has the name: a device would be gone for all.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file, and is not replaced by one", str(path))
    temporary = hidden_name(path, ".partial")
    try:
        write(temporary)
        _to_disk(temporary, os.O_RDWR)  # Windows syncs only what may be written
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        reason: BaseException | None = error
        # torch.save hides the disk's answer behind its own
        while reason and not isinstance(reason, OSError):
            reason = reason.__context__
        if isinstance(reason, OSError) and reason.errno:
            # For a message that names the file
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        raise (reason or error) from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder safely to disk, where its file system can do that.

    Raises OSError if the disk refuses.
    """
    try:
        _to_disk(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _to_disk(path, access):
    handle = os.open(path, access)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path | str) -> None:
    """Raise ValueError unless a file can be written at path."""
    path = Path(path)
    probe = path.parent / f".{os.getpid()}.probe"  # not path's name and more, which may be too long
    try:
        with suppress(FileNotFoundError):
            path.stat()  # an error for a name that is too long, and for a loop of links
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}); choose a file in a folder that exists and is "
            "writable"
        ) from None


def disk_space(folder: Path) -> str:
    """The free space where a folder is, in GB, for a message."""
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
