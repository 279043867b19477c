"""Names that a wing hands on from its rooms, loaded when they are first asked for."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def handed_on(wing: str, rooms: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's __getattr__ for {room: names, separated by spaces}.

    Importing the wing then loads none of the rooms. It raises AttributeError for any other name.
    """
    homes = {name: room for room, names in rooms.items() for name in names.split()}

    def get(name):
        if name not in homes:
            raise AttributeError(f"module {wing!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get
