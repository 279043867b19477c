"""What users may give: names that there are, and numbers within bounds."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def check_names(**given: tuple[object, Any]) -> None:
    """Raise ValueError unless each name is one of those it is given with."""
    for argument, (name, known) in given.items():
        if not (name is None or isinstance(name, str)) or name not in known:
            raise ValueError(
                f"`{argument}` is {name!r:.60}; choose one of {', '.join(map(str, known))}"
            )


def check_number(argument: str, value: object, wanted: str, holds: Callable[[Any], bool]) -> None:
    """Raise ValueError unless a value is a number, and as it is wanted: holds(value)."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not holds(value):
        raise ValueError(f"`{argument}` is {value!r:.60}; it must be {wanted}")


def check_steps(num_steps: int, least: int, why: str = "") -> None:
    """Raise ValueError unless there are at least so many steps, and whole ones."""
    check_number(
        "num_steps", num_steps, f"at least {least}, and whole{why}",
        lambda n: isinstance(n, Integral) and int(n) >= least,
    )  # fmt: skip
