"""Scores while training: what they are, that they leave the run alone, and that stopping and
restarting lose none.
"""

from copy import deepcopy
import json
import os
from pathlib import Path
import runpy
import signal

from accelerate import Accelerator
from accelerate.state import AcceleratorState
import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.files import list_checkpoints, read_checkpoint
from conftest import ROOT
import evaluate
from training import assembly
from processes.gaussian import GaussianProcess
from training import records
from training import scores as training_scores
from training.flags import read_options
from kill_campaign import end, launcher, start
import sample_ddp
from test_train import ASKED, QUICK, fresh_accelerator, images, run, same  # noqa: F401
import train

SCORES = [
    "eval_fid", "eval_sfid", "eval_inception_score", "eval_precision", "eval_recall",
    "eval_samples",
]  # fmt: skip


def scored(images, every="3", samples="10"):
    return [
        "--eval-every", every, "--eval-samples", samples, "--eval-reference", str(images),
        "--eval-features", "pixels",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def square(tmp_path_factory, images):
    """The images of the run cut to what the network sees, as a reference must be."""
    path = tmp_path_factory.mktemp("reference") / "square.npz"
    evaluate.main([
        "--make-reference", str(images), "--image-size", "16", "--features", "pixels", "--output",
        str(path), "--device", "cpu", "--num-workers", "0",
    ])  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    return path


def rows(results, name="eval_fid"):
    """The lines of metrics.jsonl that have scores, without the time."""
    (path,) = Path(results).glob("000-*/metrics.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key != "time"} for row in found if name in row
    ]


def test_scores_come_at_their_steps_and_change_nothing_else(images, square, tmp_path, capsys):
    plain = run(images, tmp_path / "plain", "--max-steps", "7", "--ckpt-every", "2")
    judged = run(
        images, tmp_path / "judged", "--max-steps", "7", "--ckpt-every", "2", *scored(square)
    )
    assert same(plain["model"], judged["model"]) and same(plain["ema"], judged["ema"])
    assert plain["log"] == judged["log"]
    found = rows(tmp_path / "judged")
    assert [row["step"] for row in found] == [3, 6] and list(found[0]) == [
        "step", *SCORES, "eval_reference", "eval_features",
    ]  # fmt: skip
    assert (
        found[0]["eval_samples"] == 10
        and found[0]["eval_fid"] != found[1]["eval_fid"]
        and found[0]["eval_sfid"] is None
    )
    assert (
        rows(tmp_path / "plain", "loss")[-1]["loss"]
        == rows(tmp_path / "judged", "loss")[-1]["loss"]
    )
    out = capsys.readouterr().out
    assert (
        "step 0000003: fid " in out
        and out.count("note: 10 samples are too few for 768 features") == 1
    )


def test_scores_are_those_of_sample_ddp_and_evaluate(images, square, tmp_path, capsys):
    """The same images, sampled and scored by the doors."""
    run(
        images, tmp_path, "--max-steps", "3", "--ckpt-every", "3", *scored(square), "--global-seed",
        "5",
    )  # fmt: skip
    (row,) = rows(tmp_path)
    (checkpoint,) = list_checkpoints(tmp_path / "000-DiT-Ti-8")
    sample_ddp.main([
        "--ckpt", str(checkpoint), "--vae", "none", "--num-fid-samples", "10",
        "--per-proc-batch-size", "4", "--cfg-scale", "1", "--sampler", GaussianProcess.quick[0],
        "--num-sampling-steps", str(GaussianProcess.quick[1]), "--sample-dir", str(tmp_path / "s"),
        "--device", "cpu", "--global-seed", "5",
    ])  # fmt: skip
    (samples,) = (tmp_path / "s").glob("*.npz")
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    evaluate.main(
        [
            "--samples",
            str(samples),
            "--reference",
            str(square),
            "--features",
            "pixels",
            "--device",
            "cpu",
        ]
    )
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert row["eval_fid"] == pytest.approx(scores["fid"], rel=1e-9)
    assert (row["eval_precision"], row["eval_recall"]) == (scores["precision"], scores["recall"])


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_two_processes_score_what_one_does(images, square, tmp_path, more):
    flags = [*QUICK, "--max-steps", "2", *scored(square, "2", "9")]
    run(images, tmp_path / "alone" / "results", *flags)
    context = launcher()
    end(start(context, images, tmp_path / "two", 2, run=[*flags, *more]), 0)
    (alone,), (two,) = rows(tmp_path / "alone" / "results"), rows(tmp_path / "two" / "results")
    assert (
        two["eval_fid"] == pytest.approx(alone["eval_fid"], rel=1e-3)
        and two["eval_recall"] == alone["eval_recall"]
    )


def test_a_signal_breaks_scoring_off_and_the_restart_takes_it_up(
    images, square, tmp_path, monkeypatch, capsys
):
    flags = ["--max-steps", "5", "--ckpt-every", "100", *scored(square), "--resume", "auto"]
    run(images, tmp_path / "alone", *flags)
    score = training_scores.score_samples

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*args)

    monkeypatch.setattr(records, "score_samples", signalled)
    assert run(images, tmp_path / "stopped", *flags)["step"] == 3
    assert (
        rows(tmp_path / "stopped") == []
        and "stopped by SIGTERM after step 3" in capsys.readouterr().out
    )
    run(images, tmp_path / "stopped", *flags)  # and again, before the first step of the restart
    assert "stopped while scoring" in capsys.readouterr().out
    monkeypatch.setattr(records, "score_samples", score)
    end = run(images, tmp_path / "stopped", *flags)
    assert end["step"] == 5 and rows(tmp_path / "stopped") == rows(tmp_path / "alone")
    steps = [row["step"] for row in rows(tmp_path / "stopped", "step")]
    assert steps == [row["step"] for row in rows(tmp_path / "alone", "step")] == [2, 3, 4, 5]


@pytest.mark.parametrize("process", ASKED)
def test_a_restart_does_not_score_twice(images, square, tmp_path, process):
    flags = [*scored(square, "2"), "--ckpt-every", "2", "--resume", "auto", *ASKED[process]]
    run(images, tmp_path, "--max-steps", "2", *flags)
    before = rows(tmp_path)
    run(images, tmp_path, "--max-steps", "4", *flags)
    assert rows(tmp_path)[:1] == before and [row["step"] for row in rows(tmp_path)] == [2, 4]


def test_cached_latents_are_decoded_for_scores(images, square, tmp_path, monkeypatch):
    """Where latents are cached the VAE is loaded for that alone."""
    asked = []
    monkeypatch.setattr(assembly, "load_vae", lambda name, device: asked.append(name))
    for flags in (["--latents", "x"], ["--latents", "x", *scored(square)]):
        options = read_options(train.build_parser().parse_args(flags))
        dataset = type(
            "", (), {"manifest": {"channels": 4, "ratio": 8, "scale": 1.0, "shift": 0.0}}
        )
        accelerator = Accelerator(cpu=True)
        assembly.load_space(options, accelerator, dataset)
    assert asked == ["ema"]


def test_samples_without_finite_features_do_not_end_a_run(images, square, tmp_path, capsys):
    class Broken(torch.nn.Module):
        def forward(self, images):
            return images.float().mean(dim=(2, 3)) / (images.float().std() - images.float().std())

    torch.jit.script(Broken()).save(str(tmp_path / "broken.ts"))
    flags = scored(images)
    flags[flags.index("pixels")] = str(tmp_path / "broken.ts")
    # The reference's features are looked at before anything is written
    with pytest.raises(SystemExit):
        run(images, tmp_path / "a", "--max-steps", "3", *flags)
    assert not (tmp_path / "a").exists()
    capsys.readouterr()


def test_a_network_that_went_wrong_is_reported(images, square, tmp_path, capsys, monkeypatch):
    """NaN in the average: neither scores nor previews come of it, and the run goes on."""
    average = records.whole_average

    def broken(job):
        network = deepcopy(average(job))
        network.final_layer.linear.bias.data.fill_(float("nan"))
        return network

    monkeypatch.setattr(records, "whole_average", broken)
    assert (
        run(images, tmp_path, "--max-steps", "4", *scored(square), "--sample-every", "4")["step"]
        == 4
    )
    out = capsys.readouterr().out
    assert "step 0000003: not scored (the images that the network draws are not finite)" in out
    assert (
        "0000004.png was not written (some images have values that are not finite" in out
        and rows(tmp_path) == []
    )


def test_features_that_are_not_finite_are_reported_by_every_process(
    images, square, tmp_path, monkeypatch, capsys
):
    def fail(*args, **kwargs):
        raise ValueError("the features of some image are not finite")

    monkeypatch.setattr(training_scores, "summarize", fail)
    assert run(images, tmp_path, "--max-steps", "4", *scored(square))["step"] == 4
    assert (
        "step 0000003: not scored (the features of some image are not finite)"
        in capsys.readouterr().out
    )


def test_references_and_features_that_do_not_fit_are_found_at_the_start(
    images, square, tmp_path, capsys
):
    floats = torch.jit.trace(
        lambda x: torch.nn.functional.avg_pool2d(x, 16).flatten(1), torch.zeros(1, 3, 16, 16)
    )
    floats.save(str(tmp_path / "floats.ts"))
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64))
    for reference, features, message in (
        (
            tmp_path / "other.npz",
            "pixels",
            "has 64 features in its mu and sigma, samples have 768 by --eval-features pixels",
        ),
        (
            tmp_path / "other.npz",
            str(tmp_path / "floats.ts"),
            "cannot be used on uint8 images of 16x16",
        ),
    ):
        flags = [
            "--eval-every", "2", "--eval-reference", str(reference), "--eval-features", features,
        ]  # fmt: skip
        with pytest.raises(SystemExit):
            run(images, tmp_path / "results", "--max-steps", "3", *flags)
        assert message in capsys.readouterr().err and not (tmp_path / "results").exists()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_scores_that_never_come_are_noted(images, square, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "2", *scored(square))
    assert (
        "--eval-every 3 is beyond the last step 2: nothing will be scored"
        in capsys.readouterr().out
    )


def test_scores_reach_the_tracker(images, square, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(images, tmp_path, "--max-steps", "3", *scored(square), "--log-with", "tensorboard")
    (events,) = (tmp_path / "000-DiT-Ti-8").rglob("events.out*")
    accumulator = EventAccumulator(str(events)).Reload()
    (event,) = accumulator.Scalars("eval_fid")
    (row,) = rows(tmp_path)
    assert event.step == 3 and event.value == pytest.approx(row["eval_fid"], rel=1e-6)


@pytest.mark.parametrize("flags, message", [
    (["--eval-every", "3"], "--eval-every and --eval-reference go together"),
    (["--eval-reference", "x"], "--eval-every and --eval-reference go together"),
    (["--eval-every", "0", "--eval-reference", "x"], "--eval-every is 0; it must be at least 1"),
    (["--eval-every", "3", "--eval-reference", "x", "--eval-samples", "3"],
     "--eval-samples is 3; it must be at least 4"),
    (["--eval-every", "3", "--eval-reference", "x", "--eval-features", "pixels"],
     "--eval-reference x: there is no such"),
    (["--eval-every", "3", "--eval-reference", "x", "--eval-features", "y"],
     "--eval-features y: there is no file y"),
])  # fmt: skip
def test_mistakes_come_before_anything_is_written(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path / "results", *flags)
    assert (
        stopped.value.code == 2
        and message in capsys.readouterr().err
        and not (tmp_path / "results").exists()
    )


def test_checkpoints_do_not_know_of_scores(images, square, tmp_path):
    """They decide nothing: a run goes on whether or not it is scored."""
    run(images, tmp_path, "--max-steps", "2")
    run(images, tmp_path, "--max-steps", "4", "--resume", "auto", *scored(square, "4"))
    assert [folder.name for folder in tmp_path.iterdir()] == ["000-DiT-Ti-8"] and rows(tmp_path)[0][
        "step"
    ] == 4
    assert read_checkpoint(list_checkpoints(tmp_path / "000-DiT-Ti-8")[-1])["step"] == 4


def test_scores_are_drawn_beside_the_losses(images, square, tmp_path):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "examples" / "plot_run.py"))
    for name, more in (("plain", []), ("judged", scored(square))):
        run(images, tmp_path / name, "--max-steps", "3", *more)
        script["main"](
            [str(tmp_path / name / "000-DiT-Ti-8"), "--output", str(tmp_path / f"{name}.png")]
        )
    heights = [Image.open(tmp_path / f"{name}.png").size[1] for name in ("plain", "judged")]
    assert heights[1] == pytest.approx(1.5 * heights[0], rel=0.01)
