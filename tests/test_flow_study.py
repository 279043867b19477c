"""examples/scaling/flow_study.py: a tiny study from end to end, its solvers, and the committed
numbers.
"""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from models import DiT
from processes.noise import ImageNoise
from processes.table import process_of

pytest.importorskip(
    "sklearn", reason="the photographs come with scikit-learn: pip install .[digits]"
)
EXAMPLE = ROOT / "examples" / "scaling"
sys.path.insert(0, str(EXAMPLE))
import flow_plot  # noqa: E402
import flow_study  # noqa: E402
import study  # noqa: E402
import trial  # noqa: E402
from records import FlowPoint, Point, read_study  # noqa: E402

TINY = ["--preset", "tiny", "--device", "cpu", "--workers", "1"]
PLAN = flow_study.PRESETS["tiny"]
WAYS = [(kind, way) for kind, ways in flow_study.WAYS.items() for way in ways]


def results(folder):
    """The rows of a study but for the seconds they took, by what they are of."""
    rows = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    return {(row["variant"], row["seed"]): {**row, "seconds": 0} for row in rows}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a whole tiny study."""
    folder = tmp_path_factory.mktemp("flows")
    flow_study.main(["--output", str(folder), *TINY])
    return folder


def network_and_way(kind, way):
    """(a network that is not at its start, its process, one of WAYS)."""
    torch.manual_seed(0)
    network = DiT(**flow_study.config_of(PLAN, "noise" if kind == "gaussian" else "linear")).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network, process_of(network, {"name": kind}), flow_study.WAYS[kind][way]


def test_a_study_has_every_network_and_its_figure(tiny, tmp_path, capsys):
    rows = results(tiny)
    assert set(rows) == {(variant, seed) for variant in flow_study.VARIANTS for seed in (0, 1)}
    for (variant, _), row in rows.items():
        assert [place["step"] for place in row["curve"]] == list(PLAN.scored_at)
        ways = flow_study.WAYS[flow_study.VARIANTS[variant]["name"]]
        found = {(place["way"], place["calls"]): place["distance"] for place in row["by_way"]}
        assert set(found) == {(way, calls) for way in ways for calls in PLAN.calls}
        assert np.isfinite(list(found.values())).all()
        assert found[next(iter(ways)), PLAN.curve_calls] == row["curve"][-1]["distance"]
    first, second = (rows["linear", seed]["curve"][-1]["mse"] for seed in (0, 1))
    assert first != second != rows["logit-normal", 1]["curve"][-1]["mse"]
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        flow_plot.main(["--results", str(tiny), "--output", str(tmp_path / name)])
    drawn = [(tmp_path / name / "flow-study.svg").read_bytes() for name in ("a", "b")]
    assert drawn[0] == drawn[1] and "| GVP, velocity | heun |" in capsys.readouterr().out


def test_noise_is_learned_as_in_the_other_study(tiny, tmp_path):
    """Same network, seeds, batches and draws, by the code that both share."""
    plan, device = study.PRESETS["tiny"], torch.device("cpu")
    judge, _ = trial.make_judge(plan, device)
    point = Point(*plan.compared, "adaln_zero", 1)
    row, ours = study.run_point(plan, point, judge, device, tmp_path), results(tiny)["noise", 1]
    for name in ("parameters", "macs", "batch_size"):
        assert row[name] == ours[name]
    assert [place["mse"] for place in row["curve"]] == [place["mse"] for place in ours["curve"]]
    judge_of_study = trial.load_judge(tiny / "judge.pt", device)
    assert np.array_equal(judge_of_study.reference.mean, judge.reference.mean)


def test_a_study_goes_on_and_repeats_nothing(tiny, tmp_path, monkeypatch):
    lines = (tiny / "points.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(tiny, tmp_path / "part")
    (tmp_path / "part" / "points.jsonl").write_text("".join(lines[:6] + lines[7:]))
    made, run_point = [], flow_study.run_point

    def watched(*args):
        made.append(args[1])
        return run_point(*args)

    monkeypatch.setattr(flow_study, "run_point", watched)
    flow_study.main(["--output", str(tmp_path / "part"), *TINY])
    assert made == [FlowPoint("vp", 1)] and results(tmp_path / "part") == results(tiny)


@pytest.mark.parametrize("kind, way", WAYS)
def test_every_way_asks_the_network_as_often_as_it_says(kind, way):
    network, process, way = network_and_way(kind, way)
    for calls in flow_study.PRESETS["small"].calls[:2]:
        asked = []
        hook = network.register_forward_hook(lambda *_: asked.append(1))
        images = flow_study.drawing(PLAN, network, process, way, calls)([3], torch.tensor([5]))
        hook.remove()
        assert len(asked) == calls and images.shape == (1, 1, 16, 16)


@pytest.mark.parametrize("way", flow_study.WAYS["flow"])
def test_every_way_of_a_flow_is_its_sample_loop(way):
    """With the options that it names, from the noise of each image."""
    network, process, way = network_and_way("flow", way)
    indices, labels, options = [0, 7], torch.tensor([1, 2]), dict(way.options)
    noise_fn = ImageNoise(0, indices, "cpu")
    noise = noise_fn(torch.empty(2, 1, 16, 16))
    flow = process.flow
    if "sample_eps" in options:
        flow = type(flow)(sample_eps=options.pop("sample_eps"))
    rest = dict(num_steps=8 // way.calls, model_kwargs={"y": labels})
    if way.solver == "sde":
        x = flow.sde_sample_loop(network, noise.shape, noise, noise_fn=noise_fn, **options, **rest)
    else:
        x = flow.ode_sample_loop(network, noise.shape, noise, method=way.solver, **rest)
    images = flow_study.drawing(PLAN, network, process, way, 8)(indices, labels)
    wanted = ((x.clamp(-1, 1) + 1) * 127.5).round()
    assert (images.float() - wanted).abs().max() <= 1 and wanted.std() > 1


def test_a_folder_of_the_other_study_is_refused(tiny, tmp_path, capsys):
    other = str(shutil.copytree(EXAMPLE / "results", tmp_path / "other"))
    for door, flags in (
        (flow_study.main, ["--output", other, *TINY]),
        (flow_plot.main, ["--results", other, "--output", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit):
            door(flags)
        assert "give a folder that this study wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flow_study.main(["--output", str(tiny), *TINY[2:]])
    assert "holds another study" in capsys.readouterr().err


# ---- the committed study ----


def test_committed_numbers_are_of_the_plan_and_the_networks():
    rows, about = read_study(flow_plot.RESULTS, FlowPoint)
    plan = flow_study.PRESETS["small"]
    assert about["plan"] == json.loads(json.dumps(plan._asdict()))
    points = {FlowPoint(row["variant"], row["seed"]): row for row in rows}
    assert list(points) == flow_study.list_points(plan)
    for point, row in points.items():
        config = flow_study.config_of(plan, point.variant)
        assert row.items() >= trial.cost_of(plan, config).items()
        ways = flow_study.WAYS[flow_study.VARIANTS[point.variant]["name"]]
        found = {(place["way"], place["calls"]) for place in row["by_way"]}
        assert found == {(way, calls) for way in ways for calls in plan.calls}


def test_the_page_has_the_committed_numbers():
    rows, about = read_study(flow_plot.RESULTS, FlowPoint)
    page = " ".join((EXAMPLE / "README.md").read_text(encoding="utf-8").split())
    for part in flow_plot.tables(rows, about):
        for line in filter(None, part.splitlines()):
            assert line in page


def test_the_committed_figure_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    flow_plot.main(["--output", str(tmp_path)])
    assert (tmp_path / "flow-study.svg").exists() and (ROOT / "docs" / "flow-study.svg").exists()
