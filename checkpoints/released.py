"""The released checkpoints, DiT-XL/2 and SiT-XL/2: their names, and how one is fetched whole."""

from contextlib import suppress
import errno
import http.client
import math
from pathlib import Path
import time
from typing import NamedTuple
import urllib.error
import urllib.request
import zipfile

from torch import Tensor
from tqdm.auto import tqdm

from checkpoints.weights import load_weights
from runtime.image_size import ImageSize, sides, written
from runtime.offline import why_offline

BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models"
SIT_URL = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0"


class Released(NamedTuple):
    """The --model and --image-size that a released file is for, and where it lies."""

    model: str
    image_size: int
    address: str


RELEASED = {  # by the file's name here
    "DiT-XL-2-256x256.pt": Released("DiT-XL/2", 256, f"{BASE_URL}/DiT-XL-2-256x256.pt"),
    "DiT-XL-2-512x512.pt": Released("DiT-XL/2", 512, f"{BASE_URL}/DiT-XL-2-512x512.pt"),
    "SiT-XL-2-256x256.pt": Released(
        "SiT-XL/2", 256, f"{SIT_URL}/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
    ),
}
pretrained_models = set(RELEASED)
FOLDER = "pretrained_models"
TRIES = 5  # in a row without a single new byte
PATIENCE = 30  # seconds that a silent server is waited for
BLOCK = 1 << 20
# What the system says of locks where there are none, and of a disk that does not take more.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
DISK = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR}
DISK |= {getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota of this name


def find_model(model_name: str) -> dict[str, Tensor]:
    """The state dict (EMA where there is one) of a released checkpoint or of a local file.

    A released one is fetched if need be. Raises ValueError if it cannot be had, or is no
    checkpoint.
    """
    return load_weights(
        download_model(model_name) if model_name in pretrained_models else model_name
    ).tensors


def released_name(model: str, image_size: ImageSize, num_classes: int) -> str:
    """The released file for these flags: of the model's that whose pixels are nearest in number.

    Raises ValueError if none was released.
    """
    pixels = math.prod(sides(image_size))
    fitting = {
        name: abs(math.log(pixels / entry.image_size**2))
        for name, entry in RELEASED.items()
        if entry.model == model and num_classes == 1000
    }
    if fitting:
        return min(fitting, key=lambda name: fitting[name])
    known = " and ".join(f"{entry.model} at {entry.image_size}" for entry in RELEASED.values())
    raise ValueError(
        f"no weights were released for {model} at {written(image_size)} pixels with {num_classes} "
        f"classes (only for {known}, 1000 classes); pass `ckpt`"
    )


def download_model(
    model_name: str, folder: Path | str = FOLDER, base_url: str | None = None
) -> Path:
    """The path of a released checkpoint in the folder, fetched if it is not there yet: from its
    address, or from base_url if another server has it under its name.

    Any number of processes may ask at once: one fetches, the others wait for it (but on Windows,
    which has no such lock). Raises ValueError for a name that was not released, for a download
    that does not come to its end, and for a file of that name that is cut short or something else.
    """
    if model_name not in pretrained_models:
        raise ValueError(
            f"unknown released model {model_name!r}; there are "
            f"{', '.join(sorted(pretrained_models))}"
        )
    path = Path(folder) / model_name
    if path.exists():
        return kept(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{model_name}.lock"), "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot keep {path} ({error.strerror}); choose a folder that is writable"
        ) from None
    with lock:
        _wait_for(lock)
        if not path.exists():  # another process may have fetched it meanwhile
            address = RELEASED[model_name].address
            fetch(address if base_url is None else f"{base_url}/{model_name}", path)
    return path


def kept(path: Path) -> Path:
    """The path of a checkpoint that is there. Raises ValueError unless it is a whole archive, as
    its end tells.
    """
    if not zipfile.is_zipfile(path):
        what = "a folder" if path.is_dir() else "cut short or no checkpoint"
        raise ValueError(f"{path} is {what}; remove it, and it is fetched again")
    return path


def _wait_for(lock):
    """Hold the lock on a file alone.

    Where there are no locks, as on Windows and on some shared disks, go on without.
    """
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ValueError(
                    f"cannot lock {lock.name} ({error.strerror}); give the command again"
                ) from None


def fetch(url: str, path: Path) -> None:
    """Download url to path by way of path.partial, going on after interruptions.

    Raises ValueError if that fails.
    """
    partial = path.with_name(path.name + ".partial")
    failures, size, most = 0, None, _length(partial)
    while size is None or _length(partial) < size:
        reason, offline = "the connection closed early", None
        try:
            size = _receive(url, partial, _length(partial))
        except (urllib.error.HTTPError, ValueError) as error:
            raise ValueError(f"cannot download {url} ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise ValueError(
                    f"cannot write {partial} ({error.strerror}); make room there, or choose "
                    "another folder, and give the command again: what has come is kept"
                ) from None
            reason, offline = str(error) or type(error).__name__, why_offline(error)
        failures = 0 if _length(partial) > most else failures + 1
        most = max(most, _length(partial))
        if failures == TRIES:
            raise ValueError(
                f"cannot download {url} ({reason}, {TRIES} times in a "
                f"row{f'; {offline}' if offline else ''}); what has "
                f"come is kept, try again later, or fetch it by other means to {path}"
            )
        if failures:
            time.sleep(0.2 * failures)
    _check(partial, size, url)
    partial.replace(path)


def _length(file):
    return file.stat().st_size if file.exists() else 0


def _receive(url, partial, have):
    """Append what the server sends to `partial`, which holds `have` bytes.

    Returns the length of the whole file.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if _total(error.headers) == have:
            return have  # it had all come
        partial.unlink()  # it is longer than the file: begin again
        return _receive(url, partial, 0)
    with response:
        if response.status != 206:
            have = 0  # the server sends the file from its start
        size = _total(response.headers) if have else int(response.headers["Content-Length"] or 0)
        if not size:
            raise ValueError("the server does not say how long the file is")
        with (
            open(partial, "r+b" if have else "wb") as file,
            tqdm(
                total=size, initial=have, unit="B", unit_scale=True, desc=partial.stem, disable=None
            ) as bar,
        ):
            file.seek(have)
            while block := response.read1(BLOCK):
                file.write(block)
                bar.update(len(block))
    return size


def _total(headers):
    """The N of "Content-Range: bytes …/N", or None."""
    total = (headers["Content-Range"] or "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _check(partial, size, url):
    """Raise ValueError, and remove the file, unless its size and every CRC-32 in it are right.

    The size is the announced one.
    """
    try:
        with zipfile.ZipFile(partial) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile answers to damage with many kinds
        bad = f"the archive's directory; {type(error).__name__}"
    got = _length(partial)
    if bad is not None or got != size:
        partial.unlink()
        raise ValueError(
            f"{url} arrived damaged ({bad}; {got:,} of {size:,} bytes) and was removed; download "
            "it again"
        )
