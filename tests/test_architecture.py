"""docs/architecture.md: its tables and figures are what the code has."""

from functools import cache
import re
import sys

import pytest
import torch

from conftest import ROOT
from layers.parts import DEFAULTS, NAMES
from layers.positions import POSITIONS
from models import BLOCKS, DiT_models
from test_models import parameters_and_macs

sys.path.insert(0, str(ROOT / "docs"))
import draw_blocks

drawn = cache(draw_blocks.draw)
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def cells(pattern, text=PAGE):
    """The cells of the page's table rows whose first cell matches."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if re.fullmatch(pattern, row[0])]


def section(heading):
    """What the page has under a heading."""
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_way_of_a_batch():
    n, shapes = 7, {}
    with torch.device("meta"), torch.no_grad():
        network = DiT_models["DiT-XL/2"]().eval()
        for name, module in network.named_modules():
            module.register_forward_hook(
                lambda _, args, out, name=name: shapes.update({name: tuple(out.shape)})
            )
        out = network(torch.zeros(n, 4, 32, 32), torch.zeros(n), torch.zeros(n, dtype=torch.long))
    shapes["unpatchify"] = tuple(out.shape)
    rows = cells("(`[a-z_0-9.]+`( … )?)+", section("A batch on its way"))
    assert [row[0].split("`")[1] for row in rows] == [
        "x_embedder", "t_embedder", "y_embedder", "shared_modulation", "blocks.0", "final_layer",
        "unpatchify",
    ]  # fmt: skip
    for first, _, shape in rows:
        for name in re.findall("`(.+?)`", first):
            assert shape == f"(N, {', '.join(map(str, shapes[name][1:]))})" and shapes[name][0] == n


def test_the_table_of_designs():
    rows = cells("`[a-z_]+`")
    rows = {row[0].strip("`"): row for row in rows if row[0].strip("`") in BLOCKS}
    assert rows.keys() == BLOCKS.keys()
    for block, row in rows.items():
        parameters, macs = parameters_and_macs(DiT_models["DiT-XL/2"], block=block)
        assert row[3] == f"{parameters:,}" and row[5] == f"{macs:.3f}"
        design = BLOCKS[block]
        assert design.block.__name__ in row[2] and ("adaLN +" in row[2]) == (
            design.final_layer.__name__ == "FinalLayer"
        )


def test_the_table_of_parts():
    """Under each argument what it makes of XL/2's parameters."""
    part = {"positions": "rope", "norm": "rms", "mlp": "swiglu", "qk_norm": True}
    rows = {row[0].strip("`"): row[2] for row in cells("`[a-z_]+`") if row[0].strip("`") in part}
    assert rows.keys() == part.keys()
    with torch.device("meta"):
        for name, value in part.items():
            network = DiT_models["DiT-XL/2"](**{name: value})
            count = sum(parameter.numel() for parameter in network.parameters())
            assert rows[name].split()[-1] == f"{count:,}"


def test_the_table_of_parts():
    rows = cells("`[a-z_]+`", section("Parts that later work added"))
    rows = {row[0].strip("`"): row for row in rows}
    assert rows.keys() == DEFAULTS.keys() - {"extrapolation"}
    for name, (_, what, parameters) in rows.items():
        value, _, said = parameters.rpartition(" ")
        value = value.strip("`") or True
        count, _ = parameters_and_macs(DiT_models["DiT-XL/2"], **{name: value})
        assert said == f"{count:,}"
        assert all(f"`{choice}`" in what for choice in NAMES.get(name, ()))


def test_the_table_of_extrapolations():
    _, *rows = cells("`[a-z_]+`(, the default with .*)?", section("Any shape"))  # below the heading
    found = {row[0].split("`")[1]: "default" in row[0] for row in rows}
    assert list(found) == list(NAMES["extrapolation"])
    usual = {kind.extrapolation for kind in POSITIONS.values()}
    assert {name for name, said in found.items() if said} == usual


@pytest.mark.parametrize("block", BLOCKS)
def test_figures_are_those_that_the_code_draws(block):
    assert (ROOT / "docs" / f"block-{block}.svg").read_text(encoding="utf-8") == drawn(block)


def test_figures_show_what_differs():
    gates = {block: drawn(block).count("· gate") for block in BLOCKS}
    assert gates == dict(adaln_zero=2, adaln=0, cross_attention=0, in_context=0, adaln_single=2)
    assert "(N, 258, 1152)" in drawn("in_context")
    assert "(N, 2, 1152)" in drawn("cross_attention")
    assert "scale_shift_table" in drawn("adaln_single")


def test_the_script_writes_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw_blocks, "draw", drawn)
    draw_blocks.main(["--output", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"block-{block}.svg" for block in BLOCKS
    )
    with pytest.raises(SystemExit):
        draw_blocks.main(["--output", str(tmp_path / "missing")])
    assert "missing" in capsys.readouterr().err
