"""Random flags with nasty values for every door: each ends well or in one line of error, quickly,
and takes no nonsense.

The doors run in this process, but for their work: what comes after all checks is replaced. A
failure names the seed and the whole command line. Nothing outside of a case's own folder may be
written, renamed or removed: what is written to gets no absolute path, and an attempt fails before
it does harm, for whoever runs this may be root.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
import os
from pathlib import Path
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace
from typing import NamedTuple

from diffusers import AutoencoderKL
import numpy as np
from PIL import Image
import pytest
import torch

from conftest import ROOT
from emoji_packages import write_packages

EXAMPLES = ROOT / "examples"
DIGITS = EXAMPLES / "digits"
sys.path[:0] = [
    str(EXAMPLES / name)
    for name in ("", "digits", "scaling", "captions", "shapes", "emoji", "moving_digits")
]

from drawing import Shape  # noqa: E402
from runtime.command_line import read_size  # noqa: E402
from training.cost import Cost, Sampled  # noqa: E402
from variants.video import VideoDiT  # noqa: E402
from written import reader, saved  # noqa: E402

SECONDS = 5  # of computing that a case may take
HANGS = 60  # seconds after which it is broken off
NETWORK = [
    "--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae"), "--device", "cpu",
]  # fmt: skip
ERROR = re.compile(r"[\w.]+( \w+)?: error: .+")

WHOLE = [
    "-1", "0", "1", "2", "3", "64", "+1", "1_0", "１２", "1.5", "1e3", "0x10", "None", "nan", " ",
    "-" + "9" * 30,
]  # fmt: skip
WHOLE += [
    "1000", "1000000000", "1000000001", str(2**31), str(2**63), str(2**64 + 1), "9" * 40,
    "9" * 5000,
]  # fmt: skip
SIZES = ["32x64", "64x32", "0x3", "32x", "x", "32*64", "1e9", "16384x16384", "9" * 3000 + "x1"]
REAL = [
    "nan", "inf", "-inf", "1e300", "-1e300", "1e999", "5e-324", "1e-300", "-1", "-0.0", "0", "0.5",
    "1", "１.５", "x", " ",
]  # fmt: skip
REAL += ["9" * 400]
TEXTS = [
    "all", "ema", "raw", "ema@0.5", "ema@", "ema@nan", "ema@1e5", "-1", "0", "3", "9", "１", "²",
    "9" * 5000, "x" * 5000,
]  # fmt: skip
TEXTS += [
    "a\nb", "\x1b[31m", "é中", "\udcff", "{}", "-", "balanced", "random", "keep", "drop", "auto",
    "none", "pixels",
]  # fmt: skip
DEVICES = [
    "cpu", "cpu:0", "cpu:-1", "cpu:" + "9" * 30, "cuda", "cuda:99", "mps", "meta", "xla", "vulkan",
    "hpu", "x", "é",
]  # fmt: skip
PATHS = [
    "-", ".", "..", "~", "x" * 300, "x" * 250, "x" * 5000, "a/" * 3000, "é中", "\udcff\udcfe",
    "new\nline", "*", "[",
]  # fmt: skip
PATHS += [
    "/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "/proc/self/nothing", "none",
    "new.png", "new.json",
]  # fmt: skip
PATHS += [
    "folder", "empty", "images", "text.txt", "text.txt/below", "loop", "dangling", "list.json",
    "deep.json", "new.gif",
]  # fmt: skip
PATHS += [
    "new.safetensors", "socket", "bad.npz", "bad.pt", "bad.safetensors", "labels.txt",
    "folder/new/new",
]  # fmt: skip
# Or locked, or tidied
WRITTEN = {"output", "trajectory", "results_dir", "sample_dir", "folder", "resume", "results"}
NEVER = ["", "\0", "a\0b", "=\0"]  # what no flag takes
# Numbers that no flag takes.
NO_WHOLE = {"-1", "9" * 40, str(2**63), str(2**64 + 1)}
NO_REAL = {"nan", "inf", "-inf", "1e300", "-1e300", "1e999"}


# Event of Python's audit hooks → how many of its first arguments are names of what is changed.
CHANGES = {
    "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.symlink": 2,
    "os.link": 2,
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
INSIDE: list[str] = []  # the folder in which a test may write, while it runs
OUTSIDE: list[str] = []  # what it tried elsewhere
HOOKED: list[bool] = []
SCRATCH = tuple(
    os.path.join(os.path.realpath(place), "")
    for place in (
        Path.home() / ".cache",
        Path.home() / ".config",
        "/dev/shm",
        tempfile.gettempdir(),
    )
)


class Door(NamedTuple):
    """A module with a main; the command lines that cases begin with; what replaces its work:
    {"module.name": stand-in}.
    """

    module: str
    bases: list[list[str]]
    stubs: dict[str, Callable] = {}


def nothing(*_, **__):
    return None


def black(sampler, labels, *rest, given=None):
    """What sample.sample returns; of clips at most two frames."""
    frames = getattr(sampler, "frames", None) or 0
    images = np.zeros((len(labels), *[min(2, frames)] * bool(frames), 8, 8, 3), np.uint8)
    return images, [(0, images)] * len(rest[-1] if rest else ())


def state_without_weights(*args, **kwargs):
    """What training.assembly.build_state returns, with the weights that it makes on device meta."""
    with torch.device("meta"):
        return BUILD_STATE(*args, **kwargs)


def one_image(split):
    return lambda: tuple(part[:3] for part in split())


def save_model(model, folder, **_):
    (Path(folder) / "config.json").write_text("{}")


BUILD_STATE = import_module("training.assembly").build_state
TRAINING = [
    "--num-classes", "2", "--image-size", "32", "--vae", str(DIGITS / "vae"), "--model", "DiT-Ti/1",
    "--device", "cpu",
]  # fmt: skip
TRAINING += ["--global-batch-size", "2", "--num-workers", "0", "--results-dir", "runs"]
SCORING = [
    "--eval-every", "1", "--eval-reference", "images", "--eval-features",
    str(DIGITS / "classifier"),
]  # fmt: skip
FILMING = ["--model", "VideoDiT-Ti/2", "--frames", "3", "--given-frames", "0.5"]
CACHING = [
    "--data-path", "images", "--num-classes", "2", "--image-size", "32", "--vae",
    str(DIGITS / "vae"), "--device", "cpu",
]  # fmt: skip
COMPARING = ["--features", str(DIGITS / "classifier"), "--device", "cpu", "--num-workers", "0"]
QUIET = {"sampling.loading.prepare": nothing}  # which compiles
WORDS = ["--ckpt", "words.safetensors", "--vae", "none", "--device", "cpu"]  # it reads text
CLIPS = ["--ckpt", "clips.safetensors", "--vae", "none", "--device", "cpu"]  # it makes clips
DOORS = {
    "train": Door(
        "train",
        [
            ["--data-path", "images", *TRAINING],
            ["--data-path", "images", *TRAINING, *SCORING],
            ["--data-path", "images", *TRAINING, "--process", "flow"],
            ["--data-path", "split", *TRAINING, *FILMING],
            [
                "--data-path",
                "images",
                *TRAINING,
                "--init-from",
                str(DIGITS / "dit.safetensors"),
                "--init-labels",
                "drop",
            ],
            [
                "--data-path", "images", *TRAINING, "--init-from", str(DIGITS / "dit.safetensors"),
                "--init-labels", "drop", "--dynamic", "0.5",
            ],
        ],
        {
            "training.run.train": nothing,
            "training.assembly.build_state": state_without_weights,
            "models.DiT.to": lambda self, *_, **__: self,
            "variants.video.VideoDiT.to": lambda self, *_, **__: self,
            "training.assembly.new_state": lambda network, *_, **__: SimpleNamespace(
                network=network, step=0, bad_in_a_row=0, window=None
            ),
            "training.scores.summarize_reference": lambda *_, **__: (None, None),
        },
    ),
    "sample": Door(
        "sample",
        [
            [*NETWORK, "--class-labels", "3", "1"], [*WORDS, "--prompt", "a thick three", "b"],
            [*CLIPS, "--given", "images/0/0.png"], [*CLIPS, "--output", "new.mp4"],
        ],
        {"sample.sample": black, **QUIET},
    ),
    "sample_ddp": Door(
        "sample_ddp",
        [
            [*NETWORK, "--num-fid-samples", "4", "--sample-dir", "samples"],
            [*CLIPS, "--num-fid-samples", "4", "--sample-dir", "samples"],
            [
                *WORDS, "--num-fid-samples", "4", "--sample-dir", "samples", "--prompts",
                "labels.txt",
            ],
        ],
        {
            "sample_ddp.make_all": nothing,
            "sampling.many.random_labels": lambda _, indices, __: torch.zeros(len(indices)),
            **QUIET,
        },
    ),
    "extract_latents": Door(
        "extract_latents",
        [[*CACHING, "--output", "latents-{n}"], []],
        {
            "data.cache_writer.encode_share": nothing,
            "data.cache_writer.finish": nothing,
            "os.posix_fallocate": nothing,
        },
    ),
    "evaluate": Door(
        "evaluate",
        [
            ["--samples", "images", "--reference", "images", *COMPARING],
            [
                "--make-reference",
                "images",
                "--output",
                "reference-{n}.npz",
                "--batch-size",
                "4",
                *COMPARING,
            ],
        ],
        {
            "evaluation.report.summarize": lambda *_, **__: (None, None),
            "evaluation.report.summarize_reference": lambda *_, **__: (None, None),
            "evaluation.clip_distance.summarize": lambda *_, **__: (None, None),
        },
    ),
    "export": Door("export", [[*NETWORK[:4], "--output", "exported-{n}"]]),
    "download": Door(
        "download",
        [["--folder", "released"], []],
        {"checkpoints.released.fetch": lambda _, path: path.touch()},
    ),
    "count": Door(
        "count",
        [["--model", "DiT-Ti/8"], NETWORK[:2]],
        {
            "count.count": lambda *_: Cost(*[1] * 6),
            "count.sampled": lambda *_: Sampled(1, 1, 1, "ddim"),
        },
    ),
    "app": Door(
        "app", [["--port", "7931"], NETWORK, WORDS, CLIPS], {"app.serve": nothing, **QUIET}
    ),
    "interpolate": Door("grids", [["interpolate", "--device", "cpu"]], QUIET),
    "guidance": Door("grids", [["guidance", "--device", "cpu"]], QUIET),
    "plot_run": Door("plot_run", [["run"]]),
    "judge": Door(
        "judge",
        [NETWORK],
        {"judge.sample_digits": lambda *_: (0, 0), "judge.judge": lambda *_: {}, **QUIET},
    ),
    "make_dataset": Door("make_dataset", [["--output", "made"], []], {}),
    "plot_scores": Door("plot_scores", [["--output", "scores.svg"]]),
    "train_vae": Door("train_vae", [["--data-path", "images", "--output", "vae-{n}"]], {}),
    "train_classifier": Door(
        "train_classifier",
        [["--data-path", "split", "--output", "classifier-{n}"]],
        {
            "train_classifier.train": lambda *_: lambda x: torch.zeros(len(x), 10),
            "train_classifier.save_for_hf": save_model,
        },
    ),
    "study": Door(
        "study", [["--output", "study", "--device", "cpu"]], {"studies.run_job": nothing}
    ),
    "flow_study": Door(
        "flow_study", [["--output", "flows", "--device", "cpu"]], {"studies.run_job": nothing}
    ),
    "ladder_study": Door(
        "ladder_study", [["--output", "ladder", "--device", "cpu"]], {"studies.run_job": nothing}
    ),
    "make_shapes": Door(
        "make_shapes",
        [["--output", "shapes"], []],
        {"make_shapes.all_shapes": lambda: [Shape("star", "red", "big", "at the top")] * 4},
    ),
    "make_captions": Door("make_captions", [["--output", "captioned"], []], {}),
    "make_emoji": Door(
        "make_emoji",
        [["--output", "emoji", "--packages", "packages"]],
        {"make_emoji.all_images": lambda _: {"train": []}, "sources.shutil.which": nothing},
    ),
    "train_autoencoder": Door(
        "train_autoencoder", [["--data-path", "images", "--output", "autoencoder-{n}"]], {}
    ),
    "train_emoji_classifier": Door(
        "train_emoji_classifier",
        [["--data-path", "groups", "--output", "emoji-classifier-{n}"]],
        {
            "train_emoji_classifier.train": lambda *_: torch.nn.Flatten(),
            "train_emoji_classifier.save_for_hf": save_model,
        },
    ),
    "judge_emoji": Door(
        "judge_emoji",
        [["--data-path", "groups", "--output", "judged.json"], ["--data-path", "groups"]],
        {"judge_emoji.judged": lambda *_: {}, **QUIET},
    ),
    "make_moving_digits": Door(
        "make_moving_digits", [["--output", "moving-{n}", "--clips", "2", "--heldout", "1"]],
        {"make_moving_digits.write_part": nothing},
    ),
    "train_frames_autoencoder": Door(
        "train_frames_autoencoder", [["--output", "frames-autoencoder-{n}"]], {}
    ),
    "train_frames_classifier": Door(
        "train_frames_classifier", [["--output", "frames-classifier-{n}"]],
        {
            "train_frames_classifier.train": lambda *_: torch.nn.Flatten(),
            "train_frames_classifier.accuracy": lambda *_: 1.0,
            "train_frames_classifier.save_for_hf": save_model,
        },
    ),
    "continue_clips": Door(
        "continue_clips",
        [["--ckpt", "x", "--truth", "images", "--output", "on-{n}.npz"]],
        {
            **{f"continue_clips.{name}": nothing for name in (
                "find_files", "build_sampler", "read_clips", "check_fit", "spread_out",
            )},
            "continue_clips.go_on": lambda *_: torch.zeros(1, dtype=torch.uint8).numpy(),
        },
    ),
    "judge_clips": Door(
        "judge_clips", [["--samples", "clips.npz"], ["--real", "clips.npz"]],
        {"judge_clips.judge": lambda *_: {}},
    ),
    "clip_study": Door(
        "clip_study",
        [["--latents", "x", "--mixed", "x", "--heldout", "x", "--output", "clip-study"]],
        {"clip_study.run_study": lambda _: []},
    ),
    "judge_captions": Door(
        "judge_captions",
        [["--output", "judged.json"], []],
        {
            "judge_captions.load_captioned": lambda: (None, None, None),
            "judge_captions.load_judge": nothing,
            "judge_captions.judge_all": lambda *_: {},
            **QUIET,
        },
    ),
    "caption_study": Door(
        "caption_study", [["--output", "captions", "--device", "cpu"]], {"studies.run_job": nothing}
    ),
    "plot": Door(
        "plot",
        [["--output", "figures"]],
        {"plot.draw_figure": nothing, "plot.draw_samples": nothing},
    ),
}
FEW = 16  # cases of each door in every test, a multiple in the long one
MANY = 110


def late_stubs(name):
    """Those that must know what they replace."""
    module = import_module(DOORS[name].module)
    if module.__name__ == "grids":
        return {"grids.draw": lambda *args: black(*args[2:])[0], "grids.prepare": nothing}
    if name == "make_dataset":
        return {"make_dataset.load_split": one_image(module.load_split)}
    if name == "make_captions":
        parts, *rest = module.load_captioned()
        few = {part: digits.chosen(slice(1)) for part, digits in parts.items()}
        return {"make_captions.load_captioned": lambda: (few, *rest)}
    if name in ("train_vae", "train_autoencoder", "train_frames_autoencoder"):
        return {f"{name}.train": lambda *_: AutoencoderKL(**module.ARCHITECTURE)}
    return {}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder two levels down, with files good and bad; nothing is fetched."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "a" / "b"
    names = ["images/0", "images/1", "split/train/0", "split/heldout/0"]
    for i, name in enumerate([*names, "groups/train/faces", "groups/heldout/faces"]):
        (folder / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (32, 32), (i * 50, k * 50, 0)).save(folder / name / f"{k}.png")
    for name in ("folder", "empty", "run"):
        (folder / name).mkdir()
    shutil.copy(DIGITS / "logs" / "scores.jsonl", folder / "run" / "metrics.jsonl")
    saved(folder / "words.safetensors", reader())
    small = dict(input_size=8, frames=2, patch_size=4, in_channels=3, hidden_size=32, depth=1)
    saved(folder / "clips.safetensors", VideoDiT(**small, num_heads=2, num_classes=3))
    write_packages(folder / "packages")
    (folder / "folder" / "config.json").write_text(
        '{"depth": 1e400, "_class_name": "AutoencoderKL"}'
    )
    (folder / "list.json").write_text("[1, 2]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "labels.txt").write_text("0\n1\n2\n99999999999999999999\n")
    for name in ("text.txt", "bad.npz", "bad.pt", "bad.safetensors"):
        (folder / name).write_bytes(b"\xff\x00 no such file \n" * 20)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")  # no file, no folder, and harmless
    if not HOOKED:
        sys.addaudithook(refuse_outside)  # for good: Python does not take one back
        HOOKED.append(True)
    INSIDE.append(os.path.realpath(tmp_path))
    yield folder
    INSIDE.clear()
    OUTSIDE.clear()


def refuse_outside(event, args):
    """An audit hook of Python: raise AssertionError for what would change something outside of
    INSIDE, and note it.
    """
    count = (
        1
        if event == "open" and isinstance(args[2], int) and args[2] & WRITING
        else CHANGES.get(event, 0)
    )
    for place in args[:count] if INSIDE else ():
        if isinstance(place, (str, bytes, os.PathLike)) and not may_change(place, event):
            OUTSIDE.append(f"{event} of {place!r}, outside of the test's folder")
            raise AssertionError(OUTSIDE[-1])


def may_change(place, event):
    """Whether what has this name lies, links to folders followed, below INSIDE, or is a library's
    scratch.
    """
    parent, name = os.path.split(os.path.abspath(os.fsdecode(place)))
    path = os.path.join(os.path.realpath(parent), name)
    if event == "open" and path == os.devnull:
        return True
    return path.startswith((*INSIDE, *SCRATCH)) or "__pycache__" in path


def options_of(name):
    """The actions of a door's parser, or of its subcommand's, without --help."""
    parser = import_module(DOORS[name].module).build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices[name]
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def value_for(action, rng):
    """A value, good or bad, as a user might write one after this option."""
    if rng.random() < 0.04:
        return rng.choice(NEVER)
    if action.choices:
        return rng.choice([*action.choices, "x", "é", " "])
    if action.type in (int, float):
        return rng.choice(WHOLE if action.type is int else REAL)
    if action.type is read_size:
        return rng.choice(WHOLE + SIZES)
    if action.dest == "device":
        return rng.choice(DEVICES)
    if action.dest in ("weights", "cfg_channels", "class_labels", "prompt", "host"):
        return rng.choice(TEXTS)
    paths = [path for path in PATHS if not (path.startswith("/") and action.dest in WRITTEN)]
    return rng.choice(paths if rng.random() < 0.8 else TEXTS)


def words_for(action, rng):
    """(words of a command line, the values in them)."""
    count = {None: 1, "+": rng.randint(1, 3), "*": rng.randint(1, 2)}.get(
        action.nargs, action.nargs
    )
    values = [value_for(action, rng) for _ in range(count)]
    if not action.option_strings:
        return values, values
    option = rng.choice(action.option_strings)
    return (
        [f"{option}={values[0]}"] if count == 1 and rng.random() < 0.3 else [option, *values]
    ), values


def drawn(name, rng, number):
    """(a command line, [(action, values)] that were drawn)."""
    argv = [word.format(n=number) for word in rng.choice(DOORS[name].bases)]
    chosen = rng.sample(options_of(name), k=min(rng.choice([1, 1, 2, 3]), len(options_of(name))))
    given = []
    for action in chosen:
        words, values = words_for(action, rng)
        argv, given = [*argv, *words], [*given, (action, values)]
    return argv, given


def is_nonsense(action, values):
    """Whether no door may take these."""
    never = {"\0", "a\0b", "=\0", ""}
    kinds = {int: NO_WHOLE, float: NO_REAL, read_size: NO_WHOLE | {"0x3", "32x", "1e9"}}
    wrong = never | kinds.get(action.type, set())
    return bool(wrong & set(values))


def run(name, argv, capsys):
    """(the exit code, None for success; the error output) of a door's main."""
    code, text = None, ""
    try:
        import_module(DOORS[name].module).main(argv)
    except SystemExit as stopped:
        code, text = stopped.code, "" if isinstance(stopped.code, int) else str(stopped.code)
    return code, f"{capsys.readouterr().err}\n{text}".strip()


class Hangs(BaseException):
    """A case takes too long; no door may catch it, as it might an Exception."""


def too_long(*_):
    raise Hangs(f"more than {HANGS} s")


def complaint(name, argv, given, capsys):
    """What is wrong with how a door answers a command line, None if nothing is."""
    begun = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        code, err = run(name, argv, capsys)
    except BaseException:  # a traceback is what the user would have seen
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if OUTSIDE:
        return OUTSIDE.pop()
    if (took := time.process_time() - begun) > SECONDS:
        return f"it took {took:.1f} s"
    if "Traceback" in err:
        return err
    if code in (None, 0):
        return next(
            (
                f"it took {values} for {action.dest}"
                for action, values in given
                if is_nonsense(action, values)
            ),
            None,
        )
    lines = err.splitlines()
    if not ERROR.fullmatch(lines[-1]) or sum(": error: " in line for line in lines) != 1:
        return f"exit code {code}, and no line of error at the end of\n{err}"
    return None


def fuzz(name, seed, cases, capsys, monkeypatch):
    """Run so many cases of a door; all complaints."""
    monkeypatch.setattr(signal, "SIGALRM", signal.SIGALRM)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    before = signal.signal(signal.SIGALRM, too_long)
    for target, stub in (DOORS[name].stubs | late_stubs(name)).items():
        monkeypatch.setattr(target, stub)
    wrong, rng = [], random.Random(f"{name} {seed}")
    for number in range(cases):
        argv, given = drawn(name, rng, number)
        if found := complaint(name, argv, given, capsys):
            wrong.append(
                f"seed {seed}, case {number}: {DOORS[name].module}.main({argv!r})\n{found}"
            )
    signal.signal(signal.SIGALRM, before)
    return wrong


@pytest.mark.parametrize("name", DOORS)
def test_every_door_answers_nonsense_with_one_line(name, place, capsys, monkeypatch):
    wrong = fuzz(name, 0, FEW, capsys, monkeypatch)
    assert not wrong, "\n\n".join(wrong[:5])


@pytest.mark.long
@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("seed", [1])
def test_every_door_answers_much_nonsense(name, seed, place, capsys, monkeypatch):
    wrong = fuzz(name, seed, MANY, capsys, monkeypatch)
    assert not wrong, "\n\n".join(wrong[:5])


@pytest.mark.parametrize("name", DOORS)
def test_no_option_takes_a_number_that_none_may(name, place, capsys, monkeypatch):
    """Each option that is a number, with each of NO_WHOLE or NO_REAL; chance may miss one."""
    for target, stub in (DOORS[name].stubs | late_stubs(name)).items():
        monkeypatch.setattr(target, stub)
    base, wrong = [word.format(n="numbers") for word in DOORS[name].bases[0]], []
    for action in options_of(name):
        for value in sorted({int: NO_WHOLE, float: NO_REAL}.get(action.type, ())):
            values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            # "=" alone takes what begins with a minus
            words = values if not action.option_strings else (
                [action.option_strings[0], *values] if len(values) > 1
                else [f"{action.option_strings[0]}={value}"]
            )  # fmt: skip
            code, _ = run(name, [*base, *words], capsys)
            if code in (None, 0):
                wrong.append(words)
    assert not wrong


@pytest.mark.parametrize("name", DOORS)
def test_what_the_cases_begin_with_is_taken(name, place, capsys, monkeypatch):
    """Or no case would come to the checks that are behind others."""
    for target, stub in (DOORS[name].stubs | late_stubs(name)).items():
        monkeypatch.setattr(target, stub)
    for number, base in enumerate(DOORS[name].bases):
        if base:
            code, err = run(name, [word.format(n=f"base-{number}") for word in base], capsys)
            assert code in (None, 0), err


@pytest.mark.parametrize(
    "change", [os.remove, os.rmdir, os.mkdir, lambda path: os.replace("text.txt", path)]
)
def test_nothing_outside_of_the_folder_can_be_changed(change, place):
    with pytest.raises(AssertionError, match="outside of the test's folder"):
        change("/proc/self/nothing")
    with pytest.raises(AssertionError, match="outside of the test's folder"):
        open("/proc/self/nothing", "w")
