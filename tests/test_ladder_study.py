"""examples/scaling/ladder_study.py: a tiny study from end to end, its rungs and sizes, and the
committed numbers.
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
import ladder_plot  # noqa: E402
import ladder_study  # noqa: E402
from patches import REAL, Classifier, draw_patches  # noqa: E402
from records import LadderPoint, read_study  # noqa: E402
from trial import Judge, statistics  # noqa: E402
from vae import from_uint8  # noqa: E402

TINY = ["--preset", "tiny", "--device", "cpu", "--workers", "1"]
PLAN = ladder_study.PRESETS["tiny"]
FLOW = ladder_study.RUNGS["rectified flow"]


def results(folder):
    """The rows of a study but for the seconds they took, by what they are of."""
    rows = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    return {(row["rung"], row["seed"]): row | {"seconds": 0, "cpu_seconds": 0} for row in rows}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a whole tiny study."""
    folder = tmp_path_factory.mktemp("ladder")
    ladder_study.main(["--output", str(folder), *TINY])
    return folder


def made(rung):
    """(a network of a Rung that is not at its start, its process)."""
    torch.manual_seed(0)
    network = DiT(**ladder_study.config_of(PLAN, rung)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network, process_of(network, rung.process)


def test_a_study_has_every_network_and_its_figure(tiny, tmp_path, capsys):
    rows = results(tiny)
    assert set(rows) == {(rung, seed) for rung in ladder_study.RUNGS for seed in (0, 1)}
    for (rung, _), row in rows.items():
        assert [place["step"] for place in row["curve"]] == list(PLAN.scored_at)
        distances = [place["distance"] for place in (*row["by_way"], *row["by_grid"])]
        assert np.isfinite(distances).all()
        assert row["by_way"][0]["distance"] == row["curve"][-1]["distance"]
        assert (row["held_mse"] is None) == (rung == "DiT")
        found = [(place["size"], place["extrapolation"]) for place in row["by_grid"]]
        wanted = [([16, 24], name) for name in ladder_study.ELSEWHERE.get(rung[13:], ())]
        assert found == ([([16, 16], None), *wanted] if wanted else [])
    # Each change changes something; where tokens are tells in more than 8 steps
    errors = [rows[rung, 1]["held_mse"] for rung in ladder_study.LADDER if rung != "RoPE"]
    assert len(set(errors)) == len(errors)
    assert rows["RoPE", 0]["held_mse"] != rows["RoPE", 1]["held_mse"]
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        ladder_plot.main(["--results", str(tiny), "--output", str(tmp_path / name)])
    drawn = [(tmp_path / name / "ladder-study.svg").read_bytes() for name in ("a", "b")]
    assert drawn[0] == drawn[1] and "| other grids, rope | ntk |" in capsys.readouterr().out


def test_a_study_goes_on_and_repeats_nothing(tiny, tmp_path, monkeypatch):
    lines = (tiny / "points.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(tiny, tmp_path / "part")
    left = LadderPoint("RoPE", 1)
    kept = [line for line in lines if (json.loads(line)["rung"], json.loads(line)["seed"]) != left]
    (tmp_path / "part" / "points.jsonl").write_text("".join(kept))
    again, run_point = [], ladder_study.run_point

    def watched(*args):
        again.append(args[1])
        return run_point(*args)

    monkeypatch.setattr(ladder_study, "run_point", watched)
    ladder_study.main(["--output", str(tmp_path / "part"), *TINY])
    assert again == [left] and results(tmp_path / "part") == results(tiny)


def test_each_rung_adds_one_change_to_the_one_before():
    def told(rung):
        return {"beta2": rung.beta2, **rung.process, **rung.parts}

    ladder = [rung for name, rung in ladder_study.LADDER.items() if not name.startswith("batch")]
    changes = [dict(told(new).items() - told(old).items()) for old, new in zip(ladder, ladder[1:])]
    assert changes == [
        {"name": "flow", "path": "linear"}, {"beta2": 0.95},
        {"time_sampling": "logit-normal:0,1"}, {"cosine_loss": True}, {"mlp": "swiglu"},
        {"norm": "rms"}, {"positions": "table+rope"},
    ]  # fmt: skip
    assert all((rung.patch, rung.batch, rung.lr, rung.steps) == (2, 1, 1, 1) for rung in ladder)


def test_batches_are_larger_and_images_or_steps_are_equal():
    plan = ladder_study.PRESETS["small"]
    images, steps = (
        ladder_study.plan_of(plan, ladder_study.RUNGS[f"batch x4, equal {what}"])
        for what in ("images", "steps")
    )
    assert images.batch_size * images.scored_at[-1] == plan.batch_size * plan.scored_at[-1]
    assert steps.scored_at == plan.scored_at and steps.lr == images.lr == 2 * plan.lr
    assert steps.batch_size == images.batch_size == 4 * plan.batch_size


def test_beta2_is_that_of_the_rung():
    for name, beta2 in (("rectified flow", 0.999), ("RoPE", 0.95)):
        state = ladder_study.state_of(PLAN, ladder_study.RUNGS[name], 0, "cpu")
        assert {group["betas"] for group in state.opt.param_groups} == {(0.9, beta2)}


def test_latents_are_squares_of_pixels():
    patches, _ = draw_patches(3, (16, 24), PLAN.reduction, REAL)
    latents, pixels = ladder_study.encode(patches), from_uint8(patches)
    assert latents.shape == (3, 4, 8, 12)
    assert torch.equal(latents[:, :, 5, 7], pixels[:, 0, 10:12, 14:16].flatten(1))
    assert torch.equal(ladder_study.Squares().decode(latents), pixels)


@pytest.mark.parametrize("name", ["euler", "sde, w = sigma"])
@pytest.mark.parametrize("size", [16, (24, 16)])
def test_what_is_drawn_is_the_flows_sample_loop(name, size):
    network, process = made(FLOW)
    indices, labels = [0, 7], torch.tensor([1, 2])
    height, width = (size, size) if size == 16 else size
    noise_fn = ImageNoise(0, indices, "cpu")
    noise = noise_fn(torch.empty(2, 4, height // 2, width // 2))
    rest = dict(num_steps=8, model_kwargs={"y": labels})
    if name == "euler":
        x = process.flow.ode_sample_loop(network, noise.shape, noise, method="euler", **rest)
    else:
        x = process.flow.sde_sample_loop(
            network, noise.shape, noise, noise_fn=noise_fn, diffusion_form="sigma",
            diffusion_norm=0.5, **rest,
        )  # fmt: skip
    images = ladder_study.drawing(network, process, name, 8, size)(indices, labels)
    pixels = torch.nn.functional.pixel_shuffle(x, 2)
    assert images.shape == (2, 1, height, width)
    wanted = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    assert (images.float() - wanted).abs().max() <= 1 and wanted.std() > 1


def test_the_error_of_a_network_that_says_nothing_is_that_of_the_velocity():
    network, process = made(FLOW)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    found = ladder_study.held_mse(PLAN, network, process, (16, 24))
    patches, _ = draw_patches(PLAN.samples, (16, 24), PLAN.reduction, REAL)
    x = torch.nn.functional.pixel_unshuffle(patches.double() / 127.5 - 1, 2)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(ladder_study.NOISE))
    assert found == pytest.approx((x - noise).square().mean().item(), rel=1e-5)


def test_other_sizes_are_judged_by_real_patches_of_that_size():
    torch.manual_seed(0)
    judge = Judge(Classifier().eval(), None)
    here = ladder_study.judge_of(PLAN, judge, (16, 24), "cpu")
    wanted = statistics(
        judge.classifier,
        draw_patches(PLAN.reference, (16, 24), PLAN.reduction, ladder_study.REFERENCE)[0],
    )
    assert here.classifier is judge.classifier
    assert np.array_equal(here.reference.mean, wanted.mean)


def test_a_folder_of_another_study_is_refused(tiny, tmp_path, capsys):
    other = str(shutil.copytree(EXAMPLE / "flow_results", tmp_path / "other"))
    with pytest.raises(SystemExit):
        ladder_study.main(["--output", other, *TINY])
    assert "holds another study" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ladder_plot.main(["--results", other, "--output", str(tmp_path)])
    assert "points.jsonl is damaged" in capsys.readouterr().err


# ---- the committed study ----


def test_committed_numbers_are_of_the_plan_and_the_networks():
    rows, about = read_study(ladder_plot.RESULTS, LadderPoint)
    plan = ladder_study.PRESETS["small"]
    assert about["plan"] == json.loads(json.dumps(plan._asdict()))
    points = {LadderPoint(row["rung"], row["seed"]): row for row in rows}
    assert list(points) == ladder_study.list_points(plan)
    for point, row in points.items():
        rung = ladder_study.RUNGS[point.rung]
        own = ladder_study.plan_of(plan, rung)
        with torch.device("meta"):
            network = DiT(**ladder_study.config_of(plan, rung))
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
        assert row["images"] == own.batch_size * own.scored_at[-1]
    assert sum(row["cpu_seconds"] for row in rows) < 2 * 60 * 60  # an hour on two cores


def test_the_page_has_the_committed_numbers():
    rows, about = read_study(ladder_plot.RESULTS, LadderPoint)
    page = " ".join((EXAMPLE / "README.md").read_text(encoding="utf-8").split())
    for part in ladder_plot.tables(rows, about):
        for line in filter(None, part.splitlines()):
            assert " ".join(line.split()) in page


def test_grids_again_have_the_order_that_the_page_says():
    rows, _ = read_study(ladder_plot.RESULTS, LadderPoint)
    text = (ladder_plot.RESULTS / "grids_again.jsonl").read_text(encoding="utf-8")
    for again in map(json.loads, text.splitlines()):
        (first,) = [row for row in rows if all(row[k] == again[k] for k in ("rung", "seed"))]
        orders = [
            sorted(
                (place["size"], place["distance"], place["extrapolation"])
                for place in row["by_grid"]
            )
            for row in (first, again)
        ]
        told = [[(size, extrapolation) for size, _, extrapolation in order] for order in orders]
        assert told[0] == told[1]


def test_the_committed_figure_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    ladder_plot.main(["--output", str(tmp_path)])
    assert (tmp_path / "ladder-study.svg").exists()
    assert (ROOT / "docs" / "ladder-study.svg").exists()
