"""The files of a study: study.json, what it is of and where it was made, and points.jsonl, a line
for each network. A network is named by a Point in study.py, by a FlowPoint in flow_study.py, by a
LadderPoint in ladder_study.py, by a CaptionPoint in captions/caption_study.py.
"""

import json
from typing import NamedTuple


class Point(NamedTuple):
    """One network of a study."""

    size: str
    patch: int
    block: str
    seed: int

    def __str__(self):
        return f"{self.size}/{self.patch} {self.block}, seed {self.seed}"


class FlowPoint(NamedTuple):
    """One network of a study of flows: what it learns, and its seed."""

    variant: str
    seed: int

    def __str__(self):
        return f"{self.variant}, seed {self.seed}"


class LadderPoint(NamedTuple):
    """One network of a study of a ladder: its rung, and its seed."""

    rung: str
    seed: int

    def __str__(self):
        return f"{self.rung}, seed {self.seed}"


class CaptionPoint(NamedTuple):
    """One network of a study of captions: how text comes in, and its seed."""

    network: str
    seed: int

    def __str__(self):
        return f"{self.network}, seed {self.seed}"


def read_about(folder, kind=Point):
    """What study.json says. Raises ValueError if it cannot be read."""
    path = folder / "study.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8-sig"))
        about["plan"]["scored_at"], [kind(*point) for point in about["points"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"cannot read {path} ({error}); give a folder that this study wrote"
        ) from None
    return about


def read_rows(folder, about, kind=Point):
    """The rows of points.jsonl by point.

    Raises ValueError, naming the line, for one that is damaged.
    """
    path, rows = folder / "points.jsonl", {}
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        try:
            row = json.loads(line)
            point = kind(*(row[field] for field in kind._fields))
            if (
                list(point) not in about["points"]
                or [place["step"] for place in row["curve"]] != about["plan"]["scored_at"]
            ):
                raise ValueError("it is of another plan")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path} is damaged ({error}); delete it, the study makes it again"
            ) from None
        rows[point] = row
    return rows


def read_study(folder, kind=Point):
    """(the rows of a whole study, what study.json says).

    Raises ValueError if one is missing or damaged.
    """
    about = read_about(folder, kind)
    rows = read_rows(folder, about, kind)
    missing = [point for point in about["points"] if kind(*point) not in rows]
    if missing:
        raise ValueError(
            f"the study in {folder} is not finished, {len(missing)} networks are missing; "
            "run its command again"
        )
    return list(rows.values()), about
