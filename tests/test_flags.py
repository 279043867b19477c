"""The flags of every door are those of the version before the modules moved into wings."""
from importlib import import_module
import json

import pytest

from conftest import ROOT
from models import DiT_models

RECORDED = json.loads((ROOT / "tests/old_version/flags.json").read_text(encoding="utf-8"))


def flags_of(parser):
    """What a parser's users rely on, a dict for each argument in its order, as JSON has them."""
    titles = {
        id(action): group.title
        for group in parser._action_groups
        for action in group._group_actions
    }
    found = [
        {
            "flags": action.option_strings or [action.dest], "dest": action.dest,
            "default": action.default, "group": titles[id(action)],
            "choices": None if action.choices is None else [str(c) for c in action.choices],
            "nargs": action.nargs, "metavar": action.metavar, "help": action.help,
        }
        for action in parser._actions
    ]  # fmt: skip
    return json.loads(json.dumps(found, default=str))


@pytest.mark.parametrize("door", RECORDED)
def test_flags_are_those_of_before(door):
    """New ones may stand among them, and take more words; their help may be put better."""
    known = [flag["flags"] for flag in RECORDED[door]]
    found = flags_of(import_module(door).build_parser())
    found = [flag for flag in found if flag["flags"] in known]
    assert [flag["flags"] for flag in found] == known
    for now, before in zip(found, RECORDED[door]):
        assert set(before["choices"] or ()) <= set(now["choices"] or ())
        same = [key for key in before if key not in ("choices", "help")]
        if (door, now["dest"]) == ("count", "model"):  # whose default is every DiT that there is
            assert set(before["default"]) <= set(now["default"]) == set(DiT_models)
            same.remove("default")
        assert {key: now[key] for key in same} == {key: before[key] for key in same}


def test_a_change_is_noticed():
    parser = import_module("count").build_parser()
    before = flags_of(parser)
    parser.set_defaults(image_size=512)
    assert flags_of(parser) != before
