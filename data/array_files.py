"""Arrays on disk that are filled bit by bit: .npy files of a known size."""

import errno
from io import BytesIO
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np


def npy_layout(shape: tuple[int, ...], kind: str) -> tuple[bytes, int]:
    """(header, size of the file) of an .npy file with an array of a shape and a kind of number."""
    dtype, header = np.dtype(kind), BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": shape}
    )
    return header.getvalue(), len(header.getvalue()) + math.prod(shape) * dtype.itemsize


def make_array(path: Path, header: bytes, size: int) -> None:
    """Write an .npy file of a header and size, empty as yet.

    The disk space is taken at once where the system can do that.
    """
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
        file.truncate(size)


def write_durably(file: BinaryIO, offset: int, content: bytes) -> None:
    """Write bytes at an offset of an open file, and wait until the disk has them."""
    file.seek(offset)
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
