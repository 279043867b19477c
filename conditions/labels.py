"""Class labels: as a user writes them, as a class is called, and as numbers."""

from collections.abc import Iterable
import re
from typing import Any
import unicodedata

import numpy as np
import torch
from torch import Tensor

from conditions.condition import Labelled
from layers.sizes import MOST_CLASSES
from runtime.limits import Range

# What labels may be kept as
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# How many classes a network may have
CLASSES = Range(0, MOST_CLASSES)
# Before a label that is both a number and a name, to say which of the two is meant
INDEX, NAME = "index:", "name:"


def label_index(text: str, num_classes: int, names: dict[str, set[int]]) -> int:
    """The class index for a label that a user wrote: a number from 0 on, or one of `names`, {name:
    its indices}.

    "index:3" and "name:3" say which of the two 3 is. A name may be in another Unicode form. Raises
    ValueError for a label that does not exist, or that may mean several classes.
    """
    named = indices_of(text, names)
    if not named and text.startswith((INDEX, NAME)):
        kind, text = text[: text.index(":") + 1], text[text.index(":") + 1 :]
        numbered, named = (
            (_number(text, num_classes), set())
            if kind == INDEX
            else (set(), indices_of(text, names))
        )
    else:
        numbered = _number(text, num_classes)
    found = numbered | named
    if numbered and len(found) > 1:
        of_name, (number,) = " and ".join(map(str, sorted(named))), numbered
        raise ValueError(
            f"{text} may be the class with the number {number} or the class that is called {text} "
            f"(number {of_name}); give {INDEX}{text} or {NAME}{text}"
        )
    if len(found) > 1:
        raise ValueError(
            f"{text}: several classes have that name; give the number, "
            f"{' or '.join(map(str, sorted(found)))}"
        )
    if not found:
        some = f"{', '.join(list(names)[:10])}{' …' if len(names) > 10 else ''}"
        known = f" or one of the names {some}" if names else ""
        raise ValueError(f"{text}: give a number from 0 to {num_classes - 1}{known}")
    return found.pop()


def indices_of(text: str, names: dict[str, set[int]]) -> set[int]:
    """The indices of a name, or of those that are that name in another Unicode form.

    Another form counts where the name is not there as it is written.
    """
    if text in names or text.isascii():
        return set(names.get(text, ()))
    wanted = unicodedata.normalize("NFC", text)
    return {
        i
        for name, indices in names.items()
        if unicodedata.normalize("NFC", name) == wanted
        for i in indices
    }


def _number(text, num_classes):
    """{the number that a text is} if there is such a class, else nothing."""
    short = text.isdecimal() and len(text) <= len(str(num_classes)) + 20
    return {int(text)} if short and int(text) < num_classes else set()


def imagenet_names() -> list[str]:
    """The names of the 1,000 ImageNet classes in index order, as torchvision has them."""
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


def readable(classes: list[str] | None) -> list[str] | None:
    """Class names for people.

    Names of ImageNet's folders, such as n02099601, become words ("golden retriever").
    """
    if not classes or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-22k")
    synsets = set(known.label_names())
    return [known.label_name_to_description(name) if name in synsets else name for name in classes]


def label_tensor(labels: Any, network: Labelled) -> Tensor:
    """Labels (N,) for a network, int64: those of its classes, or its null label.

    Raises ValueError for what is not a row of whole numbers, and for a label that the network does
    not have; of labels on a GPU the numbers are not looked at.
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty(())
    if found.dim() != 1 or found.dtype not in INTEGERS:
        raise ValueError(
            f"`labels` are {labels!r:.60}; give a row of whole numbers, one for each image"
        )
    null = network.null_label
    last = network.num_classes - 1 if null is None else null
    if network.num_classes and found.device.type == "cpu" and len(found):
        for label in (int(found.min()), int(found.max())):
            if not 0 <= label <= last:
                none = "" if null is None else f", or {null} for no class"
                raise ValueError(
                    f"`labels` has {label}; give numbers from 0 to {network.num_classes - 1}{none}"
                )
    return found.to(torch.int64)


def random_labels(seed: int, indices: Iterable[int], num_classes: int) -> Tensor:
    """A uniformly drawn label for each image index, int64 (N,).

    Each label depends on (seed, index) alone.
    """
    return torch.tensor(
        [np.random.default_rng([seed, i]).integers(num_classes) for i in indices], dtype=torch.int64
    )


def label_indices(texts: Iterable[str], num_classes: int, classes: list[str] | None) -> list[int]:
    """The class indices for labels that a user wrote, as labels.label_index takes them.

    Raises ValueError as that does.
    """
    names = label_names(classes)
    return [label_index(text, num_classes, names) for text in texts]


def label_names(classes: list[str] | None) -> dict[str, set[int]]:
    """{name: indices} of every name that a class may be called by.

    ImageNet has two classes called crane.
    """
    names: dict[str, set[int]] = {}
    for written in (readable(classes), classes):
        for i, name in enumerate(written or []):
            names.setdefault(name, set()).add(i)
    return names
