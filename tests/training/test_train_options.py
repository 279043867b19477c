"""Training from Python: its options, what is wrong with them, and a run without a command line."""

from dataclasses import FrozenInstanceError, fields
import json
from pathlib import Path

import pytest

from checkpoints.files import list_checkpoints, newest_checkpoint, read_checkpoint
from test_train import QUICK, fresh_accelerator, images, run, same  # noqa: F401
from test_switches import poisoned
from training import RunEnded, TrainOptions, flags, run_training
from training.options import CHOICES, DECIDING, NOT_DECIDING, PATHS, UNRECORDED, defaults

NAMES = [field.name for field in fields(TrainOptions)]


def quick(images, results, **more):
    """The TrainOptions of QUICK's command line, and these."""
    args = flags.build_parser().parse_args(["--data-path", str(images), *QUICK])
    return TrainOptions(**{**vars(args), "results_dir": results, **more})


# ---- the options ----


def test_each_option_decides_or_does_not():
    assert sorted([*DECIDING, *NOT_DECIDING]) == sorted(NAMES)
    assert {*PATHS, *UNRECORDED} <= {*DECIDING} and {*CHOICES} <= {*NAMES}


def test_options_are_the_flags_in_their_order():
    args = vars(flags.build_parser().parse_args([]))
    assert list(args) == NAMES == list(defaults()) and args == defaults()


def test_files_have_what_the_command_line_gave():
    args = flags.build_parser().parse_args(
        ["--data-path", "x", "--ema-decay", "0.5", "0.9", "--grad-clip", "2", "--no-flip"]
    )
    # What they stand for in a diffusion, and in a DiT
    recorded = vars(args) | {"learn_sigma": True, "condition": "labels"}
    assert json.dumps(flags.read_options(args).recorded()) == json.dumps(recorded)


def test_paths_and_lists_are_kept_as_text_and_tuples():
    options = TrainOptions(data_path=Path("a") / "b", ema_decay=[0.5, 0.25])
    assert options.data_path == "a/b" and options.ema_decay == (0.5, 0.25)
    assert options.recorded()["ema_decay"] == [0.5, 0.25]
    with pytest.raises(FrozenInstanceError):
        options.lr = 1.0


WRONG = [
    ({"data_path": None}, "`data_path` is missing; give a folder of images, or `latents`"),
    ({"lr": 0.0}, "is 0.0; it must be"), ({"eval_samples": 3}, "it must be at least 4"),
    ({"ema_decay": 0.5}, "`ema_decay` is 0.5; give a tuple"),
    ({"ema_decay": (0.5, 1.0)}, "`ema_decay` is 1.0; each must be"),
    ({"model": "DiT-M/2"}, "`model` is DiT-M/2; choose from DiT-Ti/1, "),
    ({"device": "gpu"}, "`device` is gpu; choose from cpu, cuda, mps"),
    ({"init_labels": "drop"}, "`init_labels` drop is about `init_from`, which is not given"),
    ({"init_from": "a", "resume": "b"}, "`init_from` and `resume` PATH both say"),
    ({"eval_every": 5}, "`eval_every` and `eval_reference` go together"),
    ({"latents": "y", "vae": "none"}, '`latents` with `vae="none"`: pixels'),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_what_is_wrong_whatever_the_data(more, message):
    with pytest.raises(ValueError) as refused:
        TrainOptions(**{"data_path": "x", **more})
    assert message in str(refused.value)


def test_a_door_words_arguments_as_flags():
    message = '`vae="none"`, `flip=False` or `num_classes=0`; `resume` x, `nothing`'
    assert flags.build_parser().worded(message) == (
        "--vae none, --no-flip or --num-classes 0; --resume x, `nothing`"
    )


# ---- runs ----


def test_a_run_from_python_is_that_of_the_command_line(images, tmp_path, capsys):
    told = run(images, tmp_path / "flags", "--max-steps", "3")
    theirs = (tmp_path / "flags" / "000-DiT-Ti-8" / "log.txt").read_text()
    folder = run_training(quick(images, tmp_path / "python", max_steps=3))
    assert folder == tmp_path / "python" / "000-DiT-Ti-8"
    ours = read_checkpoint(newest_checkpoint(folder))
    assert same(told["model"], ours["model"]) and same(told["ema"], ours["ema"])
    assert list(told["args"]) == list(ours["args"])
    log = (folder / "log.txt").read_text()
    assert [line[22:50] for line in log.splitlines() if "step " in line] == [
        line[22:50] for line in theirs.splitlines() if "step " in line
    ]


def test_lines_name_options_as_who_started_the_run_does(images, tmp_path):
    run(images, tmp_path / "flags", "--max-steps", "1")
    run(images, tmp_path / "flags", "--max-steps", "1", "--resume", "auto")
    run_training(quick(images, tmp_path / "python", max_steps=1))
    run_training(quick(images, tmp_path / "python", max_steps=1, resume="auto"))
    said = {"flags": "raise --epochs or --max-steps", "python": "raise `epochs` or `max_steps`"}
    for name, words in said.items():
        assert words in (tmp_path / name / "000-DiT-Ti-8" / "log.txt").read_text()


def test_what_is_wrong_with_the_data_is_refused_before_anything_is_written(images, tmp_path):
    with pytest.raises(ValueError, match="12 images do not fill one batch of 13"):
        run_training(quick(images, tmp_path / "results", global_batch_size=13))
    with pytest.raises(ValueError, match="`resume` nowhere.pt: there is no such checkpoint"):
        run_training(quick(images, tmp_path / "results", resume=Path("nowhere.pt")))
    with pytest.raises(ValueError, match="File name too long"):
        run_training(quick(images, tmp_path / "results", init_from="x", init_labels="x" * 5000))
    assert not (tmp_path / "results").exists()


def test_an_early_end_is_raised_with_its_message(images, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, range(1, 20))
    with pytest.raises(RunEnded, match="stopped after 2 such steps in a row") as ended:
        run_training(quick(images, tmp_path, max_steps=6, max_bad_steps=2))
    assert "a lower `lr` or a `grad_clip`" in str(ended.value) and ended.value.told
    assert str(ended.value) in (tmp_path / "000-DiT-Ti-8" / "log.txt").read_text()
    assert not list_checkpoints(tmp_path / "000-DiT-Ti-8")
