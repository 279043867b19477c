"""The .npz format: arrays inside are read row by row and written without being held in memory."""

from collections.abc import Iterable, Mapping
import math
from pathlib import Path
from typing import BinaryIO
import zipfile

import numpy as np

IMAGES, LABELS = "arr_0", "arr_1"
BOMB, SMALL = 500, 1 << 30  # times that an array may be packed, if it is larger than so many bytes
# An array: shape, dtype, rows one at a time
Streamed = tuple[tuple[int, ...], type | np.dtype, Iterable[np.ndarray]]


def array_names(path: Path | str, whole: bool = False) -> set[str]:
    """The names of the arrays in an .npz; with `whole`, every byte in it is looked at.

    Raises ValueError if one is damaged, or packed so that it must be a trap; zipfile's and zlib's
    errors if it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > SMALL and info.file_size > BOMB * info.compress_size:
                raise ValueError(
                    f"{info.filename} has {info.file_size:,} bytes, packed in "
                    f"{info.compress_size:,}; save it with np.savez"
                )
        damaged = archive.testzip() if whole else None
        if damaged:
            raise ValueError(f"{damaged} is damaged; fetch or make it again")
        return {name.removesuffix(".npy") for name in archive.namelist()}


def open_array(path: Path | str, name: str) -> np.ndarray:
    """An array of an .npz, mapped from the file where it is not compressed.

    Raises ValueError, KeyError or OSError.

    It is looked at in its header before anything is read or made room for.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as file:
            shape, fortran_order, dtype = _header(file, name)
            header = file.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{name} holds Python objects, which are not read; save it as an array of numbers"
        )
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != info.file_size - header:
        raise OSError(f"{name} is cut short, or its header is wrong: it says {shape} {dtype}")
    if info.compress_type != zipfile.ZIP_STORED or fortran_order or not size:
        with np.load(path) as file:
            return file[name]
    # The length of the name and of the extra field stand in the file's local header
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2").astype(int)
    offset = int(info.header_offset + 30 + lengths.sum() + header)
    if offset + size > Path(path).stat().st_size:
        raise OSError(f"{name} is cut short")
    return np.memmap(path, dtype, "r", offset, shape)


def _header(file, name):
    """(shape, whether it is in Fortran's order, dtype) of an array in .npy's format.

    Raises ValueError for nonsense.
    """
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(
            f"{name} is in version {version} of .npy's format, which has named fields; save it as "
            "plain numbers"
        )
    try:
        return readers[version](file)
    except Exception as error:  # of nonsense, Python's parser makes many kinds
        raise ValueError(
            f"{name} has a header that is none ({(str(error) or type(error).__name__)[:200]})"
        ) from None


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray | Streamed]) -> None:
    """Write arrays, a dict of name → array, to an open file as an .npz without compression.

    Equal arrays give equal bytes. Instead of an array, (shape, dtype, rows) may stand, whose rows
    are taken one at a time: they need not fit in memory.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if not isinstance(array, tuple):
                array = np.asarray(array, order="C")
                array = (array.shape, array.dtype, [array])
            shape, dtype, rows = array
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                "shape": tuple(shape),
            }  # fmt: skip
            # An entry without a time
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, header)
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                for row in rows:
                    size -= out.write(row.tobytes())
                if size:
                    raise ValueError(f"the rows of {name} do not make up its shape {tuple(shape)}")
