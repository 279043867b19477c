"""What all doors share: parser, limits, and how they end."""

import argparse
import ast
from dataclasses import dataclass
import os
from pathlib import Path
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT
from runtime.disk import write_whole
from runtime.command_line import LONGEST_MESSAGE, Parser, door, one_line
from conditions.labels import CLASSES
import count
import export
import extract_latents
from runtime import limits
from training import flags as training_flags
from runtime.limits import check_memory, check_numbers
from layers.sizes import MOST_CLASSES
from models import DiT
import sample
import train

INTERRUPTIBLE = [
    "train.py", "sample.py", "sample_ddp.py", "extract_latents.py", "evaluate.py", "export.py",
    "download.py", "count.py", "app.py", "examples/grids.py", "examples/plot_run.py",
    "examples/digits/judge.py", "examples/digits/make_dataset.py", "examples/digits/plot_scores.py",
    "examples/digits/train_vae.py", "examples/digits/train_classifier.py",
    "examples/digits/compare_likelihood.py",
    "examples/scaling/study.py", "examples/scaling/plot.py", "examples/scaling/flow_study.py",
    "examples/scaling/flow_plot.py", "examples/scaling/ladder_study.py",
    "examples/scaling/ladder_plot.py",
    "examples/captions/make_captions.py", "examples/captions/judge_captions.py",
    "examples/captions/caption_study.py", "examples/captions/caption_plot.py",
    "examples/emoji/make_emoji.py", "examples/emoji/train_autoencoder.py",
    "examples/emoji/train_emoji_classifier.py", "examples/emoji/judge_emoji.py",
    "examples/shapes/make_shapes.py",
    "examples/moving_digits/make_moving_digits.py", "examples/moving_digits/judge_clips.py",
    "examples/moving_digits/continue_clips.py", "examples/moving_digits/clip_study.py",
    "examples/moving_digits/train_frames_autoencoder.py",
    "examples/moving_digits/train_frames_classifier.py",
]  # fmt: skip


def parser():
    made = Parser("folder/door.py")
    made.add_argument("--seed", type=int)
    made.add_argument("--steps", "--num-steps", type=int)
    made.add_argument("--flip", action="store_true", default=True)
    made.add_argument("--no-flip", dest="flip", action="store_false")
    made.add_argument("--many", nargs="+")
    made.add_argument("--path")
    made.add_argument("rest", nargs="*")
    return made


# ---- the parser ----


@pytest.mark.parametrize(("words", "note"), [
    (["--seed", "1", "--seed", "3"], "--seed is given twice; the last one, 3, counts"),
    (["--seed=1", "--seed", "3", "--seed", "1", "a"],
     "--seed is given 3 times; the last one, 1, counts"),
    (["--steps", "1", "--num-steps=2"],
     "--steps and --num-steps decide the same; the last one, 2, counts"),
    (["--many", "a", "b", "--many", "a"], "--many is given twice; the last one, a, counts"),
    (["--seed", "-1", "--seed", "-2"], "--seed is given twice; the last one, -2, counts"),
])  # fmt: skip
def test_an_option_given_twice_is_told(words, note, capsys):
    parser().parse_args(words)
    assert capsys.readouterr().err == f"note: {note}\n"


def door_with_commands():
    parser = Parser("door.py")
    parser.add_argument("--seed", type=int)
    command = parser.add_subparsers(dest="kind").add_parser("draw")
    command.add_argument("--steps", "--num-steps", dest="num_steps", type=int, default=7)
    command.add_argument("--weights")
    command.add_argument("--flip", action=argparse.BooleanOptionalAction)
    return parser


def test_what_is_given_is_known_also_at_its_default_and_after_a_command():
    words = ["--seed=1", "draw", "--num-steps", "7", "--", "--weights"]
    assert door_with_commands().given(words) == {"seed", "num_steps"}


@pytest.mark.parametrize("message, worded", [
    ("`num_steps` is 3; pass `num_steps=7`", "--steps is 3; pass --steps 7"),
    ('pass `weights="raw"`, or leave `flip=False`', "pass --weights raw, or leave --no-flip"),
    ("leave the argument out; `other` stays", "leave the flag out; `other` stays"),
    ("give evaluate.py `make_reference=DIR`", "give evaluate.py --make-reference DIR"),
])  # fmt: skip
def test_arguments_of_a_library_are_flags_of_a_door(message, worded):
    assert door_with_commands().worded(message) == worded


@pytest.mark.parametrize("words", [
    ["--seed", "1", "--steps", "1"], ["--seed", "1", "--seed=1"], ["--seed", "1", "b"],
    ["--", "--seed", "--seed"], ["--seed", "1", "--seed", "1", "b"], ["--no-flip", "--no-flip"],
])  # fmt: skip
def test_what_is_not_given_twice_is_not_told(words, capsys):
    parser().parse_args(words)
    assert capsys.readouterr().err == ""


def test_a_switch_and_its_contrary_are_told(capsys):
    args = training_flags.build_parser().parse_args(["--data-path", "x", "--flip", "--no-flip"])
    assert args.flip is False
    assert (
        "--flip and --no-flip decide the same; the last one, --no-flip, counts"
        in capsys.readouterr().err
    )


def test_one_process_of_several_tells(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    parser().parse_args(["--seed", "1", "--seed", "3"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("words", "message"), [
    (["--path", ""], "--path is empty"), (["--path="], "--path is empty"),
    (["a", ""], "an argument is empty"), (["--many", "a", ""], "--many is empty"),
    (["--path", "a\0"], "--path has a zero byte"),
    (["--see", "1"], "unrecognized arguments: --see"),
    (["--seed", "9" * 5000], "invalid int value"),
])  # fmt: skip
def test_what_no_option_takes(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "door.py: error: " in err and message in err
    assert len(err.splitlines()[-1]) < LONGEST_MESSAGE + 100


def test_a_message_is_one_line():
    assert one_line("a\nb \x1b[31m\udcff é中") == "a\\nb \\x1b[31m\\udcff é中"
    assert len(one_line("x" * 10_000)) < LONGEST_MESSAGE + 10


@pytest.mark.parametrize("name", ["x" * 300, "text/below", "loop", "\udcff" * 200])
def test_a_name_that_the_system_refuses_is_one_message(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as stopped:
        sample.main(
            ["--ckpt", name, "--vae", "none", "--device", "cpu", "--output", f"{name}/a.png"]
        )
    assert (
        stopped.value.code == 2
        and "sample.py: error: --output: " in capsys.readouterr().err.splitlines()[-1]
    )


# ---- numbers ----


@pytest.mark.parametrize(("flags", "message"), [
    (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
    (["--epochs", "1000000001"], "--epochs is 1000000001; it must be from 1 to 1,000,000,000"),
    (["--global-seed", str(2**63)],
     f"--global-seed is {2**63}; it must be from 0 to {2**63 - 1:,}"),
    (["--image-size", "9" * 4000],
     "--image-size is 9999999999… (4000 digits); it must be from 1 to 16,384"),
    (["--lr", "nan"], "--lr is nan; it must be from 1e-12 to 100"),
    (["--lr", "1e300"], "--lr is 1e+300; it must be from 1e-12 to 100"),
    (["--ckpt-minutes", "inf"], "--ckpt-minutes is inf; it must be from 1e-12 to 1e+09"),
    (["--num-workers", "1025"], "--num-workers is 1025; it must be from 0 to 1,024"),
    (["--ema-decay", *["0.9"] * 17], "--ema-decay has 17 values; it takes 16 at most"),
])  # fmt: skip
def test_numbers_beyond_what_exists(flags, message):
    parser = training_flags.build_parser()
    args = parser.parse_args(["--data-path", "x", *flags])
    with pytest.raises(ValueError) as refused:
        training_flags.read_options(args)
    assert parser.worded(str(refused.value)) == message


def test_the_ends_of_every_range_are_taken():
    for name, ends in limits.RANGES.items():
        for value in ends:
            check_numbers({name: value})
    for value in CLASSES:
        check_numbers({"num_classes": value}, num_classes=CLASSES)


@pytest.mark.parametrize("value", ["a", True, 1.5, 3 + 0j])
def test_what_is_no_number_is_told(value):
    with pytest.raises(ValueError, match="^`frames` is .*; give a whole number$"):
        check_numbers({"frames": value})
    if value != 1.5:
        with pytest.raises(ValueError, match="^`cfg_scale` is .*; give a number$"):
            check_numbers({"cfg_scale": value})


@dataclass(frozen=True)
class Chosen:
    epochs: int = 0
    ema_decay: tuple[float, ...] = (0.9,)


@pytest.mark.parametrize("options", [{"epochs": 0}, Chosen(), SimpleNamespace(epochs=0)])
def test_numbers_of_a_mapping_and_of_an_object_are_looked_at(options):
    with pytest.raises(ValueError, match="^`epochs` is 0; it must be at least 1$"):
        check_numbers(options)
    with pytest.raises(ValueError, match="`epochs` is 0; it must be from -5 to -1"):
        check_numbers(options, epochs=limits.Range(-5, -1))
    with pytest.raises(ValueError, match="`ema_decay` has 17 values; it takes 16 at most"):
        check_numbers(Chosen(epochs=1, ema_decay=(0.9,) * 17))


@pytest.mark.parametrize("door, words", [
    (train, ["--data-path", "x"]), (sample, []), (export, ["--output", "x"]),
    (extract_latents, ["--data-path", "x", "--output", "y"]),
])  # fmt: skip
def test_every_door_bounds_the_number_of_classes(door, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        door.main([*words, "--num-classes", str(MOST_CLASSES + 1)])
    told = "--num-classes is 1000001; it must be from 0 to 1,000,000"
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {told}")


def test_a_batch_that_no_memory_holds(monkeypatch):
    monkeypatch.setattr(limits, "memory", lambda: 10**9)
    check_memory(64, 2048, "--batch-size")
    with pytest.raises(
        ValueError,
        match="65 images of 4096x4096 .* take 3 GB, and this machine has 1 GB.*; lower --x",
    ):
        check_memory(65, 4096, "--x")
    monkeypatch.setattr(limits, "memory", lambda: None)
    check_memory(65, 4096, "--batch-size")


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(depth=10**9), "depth is 1000000000; it must be at most 1024"),
    (dict(hidden_size=10**9), "hidden_size is 1000000000; it must be at most"),
    (dict(input_size=30000), "input_size is 30000; it must be at most 16384"),
    (dict(input_size=8192, patch_size=1), "position table of 2,147,483,648 numbers"),
    (dict(num_classes=MOST_CLASSES + 1), "num_classes is 1000001; it must be at most 1000000"),
    (dict(depth="2"), "depth is '2'; it must be a whole number"),
    (dict(depth=2.0), "depth is 2.0; it must be a whole"),
    (dict(depth=True), "depth is True; it must be a whole"),
    (dict(mlp_ratio=float("nan")), "mlp_ratio is nan"),
    (dict(mlp_ratio=1e9), "mlp_ratio is 1000000000.0"),
    (dict(class_dropout_prob="0"), "class_dropout_prob is '0'"),
    (dict(learn_sigma="no"), "learn_sigma is 'no'"),
    (dict(block=["adaln"]), r"block is \['adaln'\]"),
])  # fmt: skip
def test_a_network_beyond_all_bounds_is_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**dict(input_size=8, hidden_size=32, depth=1, num_heads=4), **wrong})


def test_numpys_whole_numbers_are_sizes():
    assert (
        DiT(
            input_size=np.int64(8), hidden_size=np.int32(32), depth=np.int16(1), num_heads=4
        ).input_size
        == 8
    )


# ---- how a door ends ----


def ending_with(error, **options):
    """(the SystemExit of a door whose main raises this error, or None)."""

    @door(**options)
    def main(argv=None):
        if error:
            raise error

    with pytest.raises(SystemExit) as stopped:
        main([])
    return stopped.value


SMALL = "error: the memory is too small for this"
OUT_OF_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 99 bytes."
)


@pytest.mark.parametrize(("error", "options", "code", "line"), [
    (KeyboardInterrupt(), {}, 130, "interrupted"),
    (KeyboardInterrupt(), {"resumes": True}, 130, "interrupted; the same command goes on"),
    (OSError(28, "No space left on device", "a.png"), {}, 1,
     "error: a.png: No space left on device"),
    (MemoryError(), {"lower": "--x"}, 1, f"{SMALL}; lower --x"),
    (MemoryError("Unable to allocate 2.5 TiB for an array"), {}, 1,
     f"{SMALL} (it wanted 2.5 TiB more)"),
    (RuntimeError(OUT_OF_MEMORY), {"lower": "--x"}, 1,
     f"{SMALL} (it wanted 99 bytes more); lower --x"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), {}, 1,
     f"{SMALL} (it wanted 2.00 GiB more)"),
])  # fmt: skip
def test_a_door_ends_in_one_line(error, options, code, line, capsys):
    assert ending_with(error, **options).code == code
    assert capsys.readouterr().err == f"test_command_line.py: {line}\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    @door()
    def main(argv=None):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        main([])


def test_interrupted_writing_leaves_nothing(tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", write)
    assert not list(tmp_path.iterdir())


def test_nothing_but_a_file_is_replaced_by_one(tmp_path):
    """For root, os.replace would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no file"):
        write_whole(tmp_path / "pipe", lambda temporary: temporary.write_text("text"))
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def python(*words, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **options,
    )  # fmt: skip


# Runs a script whose first import after it has taken charge of Ctrl-C does not end.
STUCK = """
import os, runpy, signal, sys, time
class Stuck:
    def find_spec(self, *_):
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            print("importing", flush=True)
            for _ in range(600):  # a signal just before a sleep is heard after it
                time.sleep(0.1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal
sys.meta_path.insert(0, Stuck())
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def interrupted(script):
    """(exit code, error output) of a door that gets Ctrl-C while it imports what it needs."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = python("-c", STUCK, ROOT / script, "--help", env=env)
    assert running.stdout.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    return running.returncode, err


@pytest.mark.parametrize("script", INTERRUPTIBLE)
def test_ctrl_c_while_any_door_is_imported(script):
    assert interrupted(script) == (130, f"{Path(script).name}: interrupted\n")


def test_every_door_can_be_interrupted_while_it_is_imported():
    """Each ends at Ctrl-C from its first line on, and its main is answered for by `door`."""
    names = ("", "digits", "scaling", "captions", "emoji", "shapes", "moving_digits")
    folders = (ROOT, *(ROOT / "examples" / name for name in names))
    doors = {
        path
        for folder in folders
        for path in folder.glob("*.py")
        if "\ndef main(argv" in path.read_text()
    }
    assert {str(path.relative_to(ROOT)) for path in doors} == set(INTERRUPTIBLE)
    for path in doors:
        text = path.read_text()
        assert text.count("    end_at_interrupt()") == 1 and text.count("\n@door(") == 1, path


PRINTS = (
    "from runtime.command_line import door\n@door()\ndef main(argv=None):\n"
    "    print({text}, flush={flush})\nmain()\n"
)


@pytest.mark.parametrize("flush", [True, False])
def test_a_closed_pipe_is_no_error(tmp_path, flush):
    script = tmp_path / "door.py"
    script.write_text(PRINTS.format(text="'x' * 200_000", flush=flush))
    running = python(script, env=os.environ | {"PYTHONPATH": str(ROOT)})
    running.stdout.close()
    assert (running.stderr.read(), running.wait(60)) == ("", 141)


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    script = tmp_path / "door.py"
    script.write_text(PRINTS.format(text="1", flush=False))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, script], stdout=full, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "door.py: error: No space left on device\n")


def test_every_text_can_be_printed_in_every_locale(tmp_path):
    script = tmp_path / "door.py"
    script.write_text(PRINTS.format(text=r"'\u4e2d\udcff\xe9'", flush=False))
    poor = {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
    }  # fmt: skip
    running = python(script, env=os.environ | poor | {"PYTHONPATH": str(ROOT)})
    assert running.communicate(timeout=60) == ("\\u4e2d\\udcff\\xe9\n", "")


def test_main_leaves_the_output_as_it_was(capsys):
    before = sys.stdout.errors
    count.main(["--model", "DiT-Ti/8"])
    assert sys.stdout.errors == before and "DiT-Ti/8" in capsys.readouterr().out


def opens_text(node):
    """Whether a call reads or writes text."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
    return name in ("read_text", "write_text") or (
        isinstance(node.func, ast.Name) and name == "open" and "b" not in mode
    )


def test_every_text_file_has_its_encoding_named():
    """A file written in one locale is read in another."""
    found = []
    for path in [
        *ROOT.glob("*.py"), *(ROOT / "diffusion").glob("*.py"), *(ROOT / "examples").rglob("*.py"),
    ]:  # fmt: skip
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and opens_text(node)
                and "encoding" not in [word.arg for word in node.keywords]
            ):
                found.append(f"{path.name}:{node.lineno}")
    assert not found
