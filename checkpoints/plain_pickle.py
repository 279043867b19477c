"""What a file of torch.save may hold beside tensors, and the plain value that each becomes.

Contents are told by name, and no code ever runs. torch.load(weights_only=True) reads tensors and
plain containers. Training scripts also store numbers of NumPy, paths, dates and the like. Such a
name stands here for a function of ours that makes a plain value of it, or `Unread` if nobody needs
the value: neither the library that wrote it nor anything else that the file names is called. Every
other name is refused.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
import re
import sys
import threading
from typing import Any, Literal
import warnings

import numpy as np
import torch

NUMBER = re.compile(r"b1|[iuf][1248]|c(8|16)")  # NumPy's codes of plain numbers


class Unread:
    """An object beside the weights whose value nobody needs.

    Whatever a pickle gives to this object is taken, and nothing is kept.
    """

    def __new__(cls, *args: object) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class DataType(Unread):
    """A data type of NumPy: its code such as "f8", and its byte order."""

    code: object = None
    order: Literal["<", ">", "="] = "="

    def __new__(cls, *args: object) -> "DataType":
        made = object.__new__(cls)
        made.code = args[0] if args else None
        return made

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def number(kind: object = None, data: object = b"") -> Any:
    """A number of NumPy as Python's own; None for one of another kind."""
    if not (
        isinstance(kind, DataType) and NUMBER.fullmatch(str(kind.code)) and isinstance(data, bytes)
    ):
        return None
    return np.frombuffer(data, np.dtype(str(kind.code)).newbyteorder(kind.order)).tolist()[0]


def path_text(*parts: object) -> str:
    """A path as text."""
    return str(PurePosixPath(*map(str, parts)))


def empty_dict(*factory: object) -> dict:
    """The dict that stands for a defaultdict, to be filled by the pickle.

    The defaultdict's factory is never called.
    """
    return {}


def plain_list(items: object = (), *most: object) -> list:
    """The list that stands for a deque."""
    return list(items) if isinstance(items, (list, tuple)) else []


def empty_bytes() -> bytes:
    """b"", which is pickled as a call; given a number, bytes would take so much memory."""
    return b""


PATHS = [f"{kind}Path" for kind in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")]
NUMPY_TYPES = [
    "bool", "bool_", "str_", "float16", "float32", "float64", "complex64", "complex128",
    "longdouble", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
]  # fmt: skip
NUMPY_RANDOM = [
    "_pickle.__generator_ctor", "_pickle.__bit_generator_ctor", "_pickle.__randomstate_ctor",
    "_generator.Generator", "mtrand.RandomState", "_pcg64.PCG64", "_mt19937.MT19937",
    "_philox.Philox", "_sfc64.SFC64", "bit_generator.SeedSequence",
    "bit_generator.__pyx_unpickle_SeedSequence",
]  # fmt: skip
STAND_INS: dict[str, Any] = {  # name in the file → what is called, or stands, in its place
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": argparse.Namespace,
    "torch.torch_version.TorchVersion": str,
    "collections.defaultdict": empty_dict,
    "collections.deque": plain_list,
    "builtins.frozenset": frozenset,
    "builtins.bytes": empty_bytes,
    "numpy.dtype": DataType,
    **{f"{module}.multiarray.scalar": number for module in ("numpy.core", "numpy._core")},
    **{f"{module}.multiarray._reconstruct": Unread for module in ("numpy.core", "numpy._core")},
    **{f"{module}.{name}": path_text for module in ("pathlib", "pathlib._local") for name in PATHS},
    **{
        f"datetime.{name}": Unread for name in ("datetime", "date", "time", "timedelta", "timezone")
    },
    **{f"numpy.{name}": Unread for name in ("ndarray", *NUMPY_TYPES)},
    **{f"numpy.random.{name}": Unread for name in NUMPY_RANDOM},
    **{
        f"builtins.{name}": Unread
        for name in (
            "list", "dict", "tuple", "str", "int", "float", "bool", "slice", "range", "object",
            "Ellipsis",
        )
    },
    **{name: Unread for name in ("decimal.Decimal", "fractions.Fraction", "uuid.UUID")},
}  # fmt: skip
# Configurations hold objects of these parts of the standard library. A pickle with others wants to
# run something.
HARMLESS = {
    "enum", "zoneinfo", "re", "logging", "time", "random", "copyreg", "array", "dataclasses",
    "collections", "functools",
}  # fmt: skip
_lock = threading.Lock()  # torch keeps one list for all threads


@contextmanager
def only_plain_values() -> Iterator[None]:
    """Within it, torch.load(weights_only=True) takes the names of STAND_INS beside its own.

    Other names are refused.
    """
    with _lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals([(made, name) for name, made in STAND_INS.items()])
            with warnings.catch_warnings():
                # What cannot be read is refused anyway
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def refusal(error: Exception) -> str | None:
    """Why torch.load refused a pickle's contents and what to do, to follow the file's name.

    The answer is None if the file was broken.
    """
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    name = asked[1].rstrip(".") if asked else "something that is no data"
    if "torch.distributed" in text:
        return (
            "holds tensors that are split over processes (DTensor or ShardedTensor, as FSDP keeps "
            "them); save whole ones, "
            "with get_model_state_dict(..., options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict"
        )
    if "Unsupported operand" in text:
        return (
            "has a pickle of another protocol than torch.save's own, or a number of hundreds of "
            "digits, or it is damaged; copy it again, or save it again with torch.save as it is"
        )
    if not asked and not re.search(r"call reduce|Can only (create|build)", text):
        return None
    module = name.partition(".")[0] if "." in name else "builtins"
    if not asked or module in sys.stdlib_module_names - HARMLESS:
        return (
            f"was not loaded: it asks for {name}, and a checkpoint of weights needs no code; do "
            "not trust this file, or save it again as a state dict"
        )
    return (
        f"was not loaded: it asks for {name}, an object of the program that made it, and only "
        "tensors, numbers, texts and "
        "plain containers are read; save the weights alone where it was made, as "
        "torch.save(network.state_dict(), FILE)"
    )
