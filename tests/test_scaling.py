"""examples/scaling: a tiny study from end to end, its data and sums, and the committed numbers."""

from contextlib import suppress
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import psutil
import pytest
import torch

from conditions.labels import random_labels
from conftest import ROOT
from models import BLOCKS, DiT
from training.cost import training_flops
from training.folder_lock import FolderLock

pytest.importorskip(
    "sklearn", reason="the photographs come with scikit-learn: pip install .[digits]"
)
EXAMPLE = ROOT / "examples" / "scaling"
sys.path.insert(0, str(EXAMPLE))
import patches  # noqa: E402
import plot  # noqa: E402
import study  # noqa: E402
import trial  # noqa: E402

TINY = ["--preset", "tiny", "--device", "cpu"]


def results(folder):
    """The rows of a study but for the seconds they took, by what they are of."""
    rows = [json.loads(line) for line in (Path(folder) / "points.jsonl").read_text().splitlines()]
    return {tuple(row[name] for name in study.Point._fields): {**row, "seconds": 0} for row in rows}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a whole tiny study, one network at a time."""
    folder = tmp_path_factory.mktemp("study")
    threads = torch.get_num_threads()
    study.main(["--output", str(folder), *TINY, "--workers", "1"])
    assert torch.get_num_threads() == threads
    return folder


# ---- the data ----


def test_a_patch_is_of_its_own_region():
    size, reduction = 16, 2
    photos = patches.photographs(reduction)
    assert photos.shape == (2, 214, 320) and photos.dtype == torch.uint8
    found, labels = patches.draw_patches(200, size, reduction, patches.TRAINING, 0, 0)
    assert found.shape == (200, 1, 16, 16) and found.dtype == torch.uint8
    windows = photos.unfold(1, size, 1).unfold(2, size, 1)  # (2, 199, 305, 16, 16)
    for patch, label in zip(found[:40], labels[:40].tolist()):
        photo, region = divmod(label, 6)
        row, column = divmod(region, 3)
        tops, lefts = (windows[photo] == patch[0]).all(dim=(-1, -2)).nonzero(as_tuple=True)
        inside = (
            (tops >= 107 * row)
            & (tops <= 107 * row + 91)
            & (lefts >= 106 * column)
            & (lefts <= 106 * column + 90)
        )
        assert inside.any()


def test_patches_depend_on_their_seed_and_purpose_alone():
    def drawn(*seed):
        return patches.draw_patches(500, 16, 2, *seed)

    first, again, other = drawn(0, 1, 2), drawn(0, 1, 2), drawn(0, 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(
        first[0], other[0]
    )
    assert not torch.equal(drawn(patches.REFERENCE)[0], drawn(patches.REAL)[0])
    assert first[1].bincount(minlength=12).min() > 20


def test_the_classifier_learns_and_is_the_same_each_time():
    (model, accuracy), (again, _) = (patches.train_classifier(16, 2, 40, "cpu") for _ in range(2))
    assert accuracy > 0.3  # chance is 1/12
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    features, logits = model(torch.zeros(3, 1, 16, 16, dtype=torch.uint8))
    assert features.shape == (3, 64) and logits.shape == (3, 12) and not model.training


# ---- the study ----


def test_a_study_has_every_network_and_its_figures(tiny, tmp_path, capsys):
    plan, rows = study.PRESETS["tiny"], results(tiny)
    assert set(rows) == {
        (s, p, "adaln_zero", seed) for s in plan.sizes for p in plan.patch_sizes for seed in (0, 1)
    } | {(*plan.compared, block, seed) for block in BLOCKS for seed in (0, 1)}
    for (_, _, block, seed), row in rows.items():
        assert [place["step"] for place in row["curve"]] == list(plan.scored_at)
        assert all(np.isfinite(place["distance"]) and place["mse"] > 0.3 for place in row["curve"])
        steps = [place["steps"] for place in row["by_sampling_steps"]]
        assert steps == ([20, 5, 10, 40] if seed == 0 and block == "adaln_zero" else [20])
    about = json.loads((tiny / "study.json").read_text())
    assert (
        about["device_type"] == "cpu"
        and about["torch"] == torch.__version__
        and about["distance_of_real_patches"] > 0
    )
    assert Image.open(tiny / "samples" / "S-8.png").size == (12 * 16, 16)
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        plot.main(["--results", str(tiny), "--output", str(tmp_path / name)])
    assert (tmp_path / "a" / "scaling.svg").read_bytes() == (
        tmp_path / "b" / "scaling.svg"
    ).read_bytes()
    assert Image.open(tmp_path / "a" / "scaling-samples.png").size[0] > 500
    assert "| M/4 | 51,744 | 0.47 | 5.9" in capsys.readouterr().out


def copied(tiny, folder, lines):
    """A study's folder with these lines of points.jsonl alone."""
    shutil.copytree(tiny, folder)
    (folder / "points.jsonl").write_text("".join(lines))
    return folder


def test_a_study_goes_on_and_repeats_nothing(tiny, tmp_path, capsys, monkeypatch):
    lines = (tiny / "points.jsonl").read_text().splitlines(keepends=True)
    folder = copied(tiny, tmp_path / "part", lines[:9] + lines[12:])
    count, run_point = [], study.run_point

    def interrupted(*args):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(args[1])
        return run_point(*args)

    monkeypatch.setattr(study, "run_point", interrupted)
    monkeypatch.setattr(trial, "train_classifier", lambda *_: pytest.fail("the judge is made once"))
    with pytest.raises(SystemExit, match="the same command goes on"):
        study.main(["--output", str(folder), *TINY, "--workers", "1"])
    assert len(results(folder)) == len(lines) - 1
    monkeypatch.setattr(study, "run_point", run_point)
    study.main(["--output", str(folder), *TINY, "--workers", "1"])
    assert f"{len(lines) - 1} networks are done, 1 are left" in capsys.readouterr().out
    assert results(folder) == results(tiny)
    study.main(["--output", str(folder), *TINY, "--workers", "1"])
    assert f"{len(lines)} networks are done, 0 are left" in capsys.readouterr().out


def test_what_another_process_finished_meanwhile_is_not_lost(tiny, tmp_path, monkeypatch, capsys):
    """The second of two looks at the points only once the first has ended."""
    lines = (tiny / "points.jsonl").read_text().splitlines(keepends=True)
    folder = copied(tiny, tmp_path / "part", lines[:3])
    take = FolderLock.take

    def late(lock, path):
        (folder / "points.jsonl").write_text("".join(lines))
        take(lock, path)

    monkeypatch.setattr(FolderLock, "take", late)
    study.main(["--output", str(folder), *TINY, "--workers", "1"])
    assert f"{len(lines)} networks are done, 0 are left" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr("training.folder_lock.LOCK_PATIENCE", 0)
    with FolderLock() as lock:
        lock.take(folder)
        with pytest.raises(SystemExit):
            study.main(["--output", str(folder), *TINY, "--workers", "1"])
    assert "is being written by process" in capsys.readouterr().err


@pytest.mark.long
def test_workers_end_with_the_first_process(tmp_path):
    command = [
        sys.executable, EXAMPLE / "study.py", "--output", tmp_path, "--preset", "small", "--device",
        "cpu", "--workers", "2",
    ]  # fmt: skip
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def workers():
        children = psutil.Process(first.pid).children(recursive=True)
        return [child for child in children if "multiprocessing.spawn" in " ".join(child.cmdline())]

    patience = time.monotonic() + 240
    while len(workers()) < 2:  # the judge comes first
        assert first.poll() is None and time.monotonic() < patience
        time.sleep(1)
    time.sleep(20)  # by then they train
    training = workers()
    assert len(training) >= 2
    first.kill()
    first.wait()
    patience = time.monotonic() + 60
    while any(map(at_work, training)):
        assert time.monotonic() < patience
        time.sleep(1)


def at_work(process):
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.long
def test_two_workers_find_what_one_does(tiny, tmp_path):
    """As a user calls it; two networks at a time in processes of their own."""
    done = subprocess.run(
        [sys.executable, EXAMPLE / "study.py", "--output", tmp_path, *TINY, "--workers", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == results(tiny)


@pytest.mark.parametrize("preset", study.PRESETS)
def test_every_preset_can_be_built(preset):
    plan = study.PRESETS[preset]
    assert (
        patches.draw_patches(5, plan.image_size, plan.reduction, patches.REAL)[0].shape[2:]
        == (plan.image_size,) * 2
    )
    points = study.list_points(plan)
    for point in {point._replace(seed=0): point for point in points}.values():
        with torch.device("meta"):
            DiT(**study.config_of(plan, point))  # refuses sizes that do not fit
    assert (
        tuple(sorted(plan.scored_at)) == plan.scored_at
        and (*plan.compared, "adaln_zero", 0) in points
    )


def test_training_depends_on_the_seed(tiny):
    rows = results(tiny)
    first, second = (rows["M", 4, "adaln_zero", seed]["curve"][-1] for seed in (0, 1))
    assert first["mse"] != second["mse"] and first["distance"] != second["distance"]


@pytest.mark.parametrize("flags, message", [
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--workers", "0"], "--workers is 0"),
    ([], "holds another study "
     "(python examples/scaling/study.py --output OUTPUT --preset tiny on a cpu)"),
    (["--output", str(ROOT / "README.md")], "File exists"),
])  # fmt: skip
def test_mistakes_get_one_message(tiny, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(["--output", str(tiny), *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert len(results(tiny)) == 16


def test_an_unfinished_study_is_not_drawn(tiny, tmp_path, capsys):
    lines = (tiny / "points.jsonl").read_text().splitlines(keepends=True)
    without_a_size = copied(tiny, tmp_path / "a", lines[1:])
    without_a_design = copied(
        tiny, tmp_path / "b", [line for line in lines if "in_context" not in line]
    )
    for folder, message in (
        (without_a_size, "is not finished, 1 networks are missing"),
        (without_a_design, "2 networks are missing"), (tmp_path / "no", "study.json"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            plot.main(["--results", str(folder), "--output", str(tmp_path / "figures")])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("damage, message", [
    (lambda lines: [*lines[:-1], lines[-1][:40]],
     "line 16 of .*points.jsonl is damaged .*; delete it"),
    (lambda lines: ["{}\n", *lines], "line 1 of .*damaged"),
    (lambda lines: ["[1, 2]\n", *lines], "line 1 of .*damaged"),
    (lambda lines: [lines[0].replace('"step": 2', '"step": 3'), *lines[1:]],
     "line 1 of .*another plan"),
    (lambda lines: [lines[0].replace('"seed": 0', '"seed": 7'), *lines[1:]],
     "line 1 of .*another plan"),
])  # fmt: skip
def test_damaged_lines_are_named(tiny, tmp_path, capsys, damage, message):
    lines = (tiny / "points.jsonl").read_text().splitlines(keepends=True)
    folder = copied(tiny, tmp_path / "damaged", damage(lines))
    before = (folder / "points.jsonl").read_text()
    for door, flags in (
        (study.main, ["--output", str(folder), *TINY]),
        (plot.main, ["--results", str(folder), "--output", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit):
            door(flags)
        assert re.search(message, capsys.readouterr().err)
    assert (folder / "points.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["study.json", "judge.pt"])
def test_other_damaged_files_are_named(tiny, tmp_path, capsys, name):
    folder = copied(tiny, tmp_path / "damaged", [])
    (folder / name).write_text("{}")
    with pytest.raises(SystemExit):
        study.main(["--output", str(folder), *TINY])
    assert f"{folder / name}" in capsys.readouterr().err
    if name == "study.json":
        (folder / name).unlink()
        with pytest.raises(SystemExit):
            study.main(["--output", str(folder), *TINY])
        assert "has a points.jsonl without its study.json" in capsys.readouterr().err


# ---- the scores ----


def test_the_distance_tells_patches_from_noise_and_from_other_classes():
    plan = study.PRESETS["tiny"]._replace(classifier_steps=60, reference=500, samples=300)
    judge, told = trial.make_judge(plan, torch.device("cpu"))
    real, labels = patches.draw_patches(300, 16, 2, patches.REAL)

    def distance(images):
        return trial.frechet_distance(trial.statistics(judge.classifier, images), judge.reference)

    source = torch.Generator().manual_seed(0)
    noise = torch.randint(-40, 40, real.shape, generator=source)
    noisy = (real + noise).clamp(0, 255).to(torch.uint8)
    found = [
        distance(real), distance(real[labels < 6]), distance(noisy),
        distance((noise + 128).to(torch.uint8)),
    ]  # fmt: skip
    assert (
        found[0] == told["distance_of_real_patches"]
        and found[0] < 0.3 * found[1]
        and found[0] < 0.1 * min(found[2:])
    )


def test_training_brings_samples_nearer(monkeypatch):
    """Of the average's weights, for the labels that random_labels gives."""
    plan = study.PRESETS["tiny"]._replace(
        scored_at=(1, 150), samples=200, reference=500, classifier_steps=60, lr=3e-3, ema_decay=0.9
    )
    judge, _ = trial.make_judge(plan, torch.device("cpu"))
    seen, draw_images = [], study.draw_images

    def watched(plan, network, steps, indices, labels):
        seen.append((network, list(indices), labels))
        return draw_images(plan, network, steps, indices, labels)

    monkeypatch.setattr(study, "draw_images", watched)
    row = study.run_point(
        plan, study.Point("M", 4, "adaln_zero", 1), judge, torch.device("cpu"), None
    )
    first, last = row["curve"]
    assert last["mse"] < 0.5 * first["mse"] and last["distance"] < 0.7 * first["distance"]
    assert row["by_sampling_steps"] == [dict(steps=20, distance=last["distance"])]
    for network, indices, labels in seen:
        # The average, not what is trained
        assert not any(p.requires_grad for p in network.parameters())
        assert labels.tolist() == random_labels(0, indices, 12).tolist() and indices == list(
            range(200)
        )


def test_a_network_that_is_not_finite_gets_no_score(tmp_path, monkeypatch):
    plan, point, device = (
        study.PRESETS["tiny"], study.Point("S", 8, "adaln", 0), torch.device("cpu"),
    )  # fmt: skip
    judge, _ = trial.make_judge(plan._replace(reference=50), device)
    with pytest.raises(
        ValueError, match="S/8 adaln, seed 0: the loss or gradient of step [12] is not finite"
    ):
        study.run_point(plan._replace(lr=1e30), point, judge, device, tmp_path)
    new_state = study.new_state

    def broken(network, recipe):
        state = new_state(network, recipe)
        state.ema.final_layer.linear.bias.fill_(float("nan"))
        return state

    monkeypatch.setattr(study, "new_state", broken)
    with pytest.raises(
        ValueError, match="S/8 adaln, seed 0: some images have values that are not finite"
    ):
        study.run_point(plan, point, judge, device, tmp_path)


# ---- the sums ----


def row(size, patch, seed, macs, distances, by_steps=()):
    return dict(
        size=size, patch=patch, block="adaln_zero", seed=seed, macs=macs, training_flops=6 * macs,
        batch_size=10, parameters=1,
        curve=[dict(step=step, distance=d, mse=1.0) for step, d in zip((1, 2), distances)],
        by_sampling_steps=[dict(steps=steps, distance=d) for steps, d in by_steps],
    )  # fmt: skip


ROWS = [
    row("S", 2, 0, 100, (9.0, 8.0), ((20, 8.0), (5, 9.0))), row("S", 2, 1, 100, (9.0, 6.0)),
    row("M", 2, 0, 400, (12.0, 2.0), ((20, 2.0), (5, 8.5))), row("M", 2, 1, 400, (10.0, 2.0)),
    row("L", 2, 0, 1000, (30.0, 1.0), ((20, 1.0), (5, 10.0))), row("L", 2, 1, 1000, (30.0, 3.0)),
]  # fmt: skip


def test_correlations():
    found = plot.correlations(ROWS)
    for seed, last in ((0, [8, 2, 1]), (1, [6, 2, 3])):
        macs = np.log([100, 400, 1000])
        first, second = (np.corrcoef(macs, y)[0, 1] for y in (last, np.log(last)))
        assert found[seed] == pytest.approx((first, second, {0: -1, 1: -0.5}[seed]))


def test_training_is_compared_at_equal_operations():
    # spent: S 6,000 and 12,000 (distances 9, 7), M 24,000 and 48,000: nothing in common. M and L
    # (60,000): nothing
    assert plot.compute_contests(ROWS) == []
    near = [
        row("M", 2, 0, 150, (12.0, 3.0)), row("M", 2, 1, 150, (12.0, 3.0)),
        row("M", 4, 0, 160, (1.0, 1.0)),
    ]  # fmt: skip
    # M spends 9,000 and 18,000; in the middle of 9,000 to 12,000 S is a part of the way from 9 to
    # 7, M from 12 to 3
    ((small, large, spent, distance, other),) = plot.compute_contests([*ROWS[:2], *near])
    assert (small, large) == ("S/2", "M/2") and spent == pytest.approx((9000 * 12000) ** 0.5)
    way, other_way = (np.log2(spent / start) for start in (6000, 9000))
    assert distance == pytest.approx(9 * (7 / 9) ** way) and other == pytest.approx(
        12 * (3 / 12) ** other_way
    )


def test_contests_are_between_a_small_network_and_a_larger_one_that_spends_less():
    # spent on a sample: S 1,000 and 4,000, M 4,000 and 16,000, L 10,000 and 40,000 S with 20 steps
    # (8.0) against M with 5 (8.5): lost; M with 20 (2.0) against L with 5 (10.0): lost
    assert plot.sampling_contests(ROWS) == (0, 2)
    ROWS_BETTER = [
        *ROWS[:2], {**ROWS[2], "by_sampling_steps": [dict(steps=5, distance=7.0)]}, *ROWS[3:],
    ]  # fmt: skip
    assert plot.sampling_contests(ROWS_BETTER) == (1, 1)


# ---- the committed study ----


def test_committed_numbers_are_of_the_plan_and_the_networks():
    rows, about = plot.read_study(EXAMPLE / "results")
    plan = study.PRESETS["small"]
    assert about["plan"] == json.loads(json.dumps(plan._asdict()))
    points = {study.Point(*(row[name] for name in study.Point._fields)): row for row in rows}
    assert list(points) == study.list_points(plan) and len(points) == 26
    counted = {}
    for point, numbers in points.items():
        config = study.config_of(plan, point)
        network = point._replace(seed=0)  # the same whatever the seed
        if network not in counted:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in DiT(**config).parameters())
            counted[network] = parameters, training_flops(config)
        flops = numbers["training_flops"]
        assert (numbers["parameters"], flops) == counted[network] and flops == 6 * numbers["macs"]


def test_the_page_has_the_committed_numbers():
    rows, about = plot.read_study(EXAMPLE / "results")
    page = " ".join((EXAMPLE / "README.md").read_text(encoding="utf-8").split())
    for part in plot.tables(rows, about):
        for line in filter(None, part.splitlines()):
            assert line in page


def test_committed_figures_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    plot.main(["--output", str(tmp_path)])
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "scaling-samples.png")),
        np.asarray(Image.open(ROOT / "docs" / "scaling-samples.png")),
    )
    assert (tmp_path / "scaling.svg").exists() and (ROOT / "docs" / "scaling.svg").exists()
