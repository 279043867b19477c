"""Every command in the README, docs/ and examples/ is run, on small data, or at least parsed by the
parser of its script.

A command is run unless a rule in NEEDS says what it lacks here; so one that is new and fits no rule
is run. Pages are run from top to bottom, as a user would, in a copy of the repository that has
nothing but its files.
"""

import importlib
import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
from torch.distributed.run import get_args_parser

from conftest import ROOT
from emoji_packages import write_packages
from test_readme import DOORS, PAGES, python_blocks, run_python

# What a command needs that is not here → how such a command is told. The first that fits counts.
NEEDS = {
    "a package index": r"^(pip|conda) ", "a test of its own, in test_readme.py": r"^make ",
    "a test of its own, in test_scaling.py": r"examples/scaling/",
    "a test of its own, in test_captioned_digits.py": r"examples/captions/caption_",
    "a test of its own, in test_clip_study.py": r"examples/moving_digits/clip_study",
    "ImageNet": r"imagenet",
    "a cluster": r"nproc_per_node=(8|N)|nnodes|/shared", "somebody's photos": r"photos",
    "a network trained on ImageNet": r"results/000-DiT-XL-2", "LightningDiT's": r"lightningdit\.pt",
    "released weights":
        r"facebook/|^python (download\.py|sample\.py(?!.*--ckpt)|sample_ddp\.py(?!.*--ckpt))",
    "the released autoencoder": r"load_vae\('ema'\)",
    "Stable Diffusion 3's weights": r"stable-diffusion-3",
    "a network of clips, such as I3D": r"i3d\.ts",
}  # fmt: skip
# What makes a command short enough for a test: flags after its own.
SHORTER = {
    "examples/digits/train_vae.py": "--steps 20",
    "examples/emoji/train_autoencoder.py": "--steps 20",
    "examples/emoji/train_emoji_classifier.py": "--epochs 1",
    "examples/emoji/judge_emoji.py": "--num-samples 24 --num-sampling-steps 2",
    "--max-steps 16242 ": "--max-steps 20", "--max-steps 15228 ": "--max-steps 20",
    "--max-steps 14000": "--max-steps 20",
    "--max-steps 1000 ": "--max-steps 8",
    "--max-steps 1300 ": "--max-steps 20", "--max-steps 8000": "--max-steps 20",
    "--max-steps 2000 ": "--max-steps 8 --sample-every 4", "--max-steps 300 ": "--max-steps 8",
    "--max-steps 600 ": "--max-steps 8", "--max-steps 9000 ": "--max-steps 8",
    "--num-fid-samples 519": "--num-fid-samples 24",
    "examples/digits/train_classifier.py": "--epochs 1",
    "examples/digits/judge.py": "--num-samples 50",
    "examples/digits/compare_likelihood.py": "--num-digits 3",
    "examples/captions/judge_captions.py": "--num-samples 20 --num-sampling-steps 2",
    "examples/moving_digits/make_moving_digits.py": "--clips 60 --heldout 40",
    "--images 5748": "--images 60",
    "examples/moving_digits/train_frames": "--steps 20", "--max-steps 12000": "--max-steps 8",
    "--max-steps 13442": "--max-steps 8",
    "--num-clips 200 ": "--num-clips 6 --num-sampling-steps 2",
    "--num-fid-samples 500 ": "--num-fid-samples 20 --num-sampling-steps 3",
}  # fmt: skip
# What must be there when a page has been run.
LEAVES = {
    "README.md": ["sample.png", "sample.gif"],
    "docs/flow.md": ["results/000-DiT-Ti-1/checkpoints/0000020.pt", "sample.png"],
    "docs/text.md": ["sample.png", "negative.png", "samples/*.npz"],
    "docs/video.md": ["sample.gif", "long.gif", "strip.png", "goes-on.gif", "samples/*.npz"],
    "docs/architecture.md": [], "docs/dynamic.md": ["sample.png"],
    "docs/checkpoints.md": ["my-dit/README.md", "my-pipeline/vae", "sample.png"],
    "docs/evaluation.md": ["samples/*.npz"],
    "docs/install.md": [],
    "docs/migrating.md": [
        "digits-hub/README.md",
        "digits-pipeline/model_index.json",
        "digits-back.safetensors",
        "sample.png",
    ],
    "docs/sampling.md": [
        "trajectory.png", "guidance.png", "interpolate.png", "wide.png", "exits.png", "two.png",
        "cached.png",
    ],
    "docs/own-data.md": [
        "shapes-runs/*/previews/0000008.png",
        "shapes-runs/sample.png",
        "shapes-runs/words.png",
        "shapes-samples/*.npz",
    ],
    "examples/digits/README.md": [
        "sample.png",
        "digits-vae/config.json",
        "digits-dit.safetensors",
        "digits-flow.safetensors",
        "digits-classifier/*",
    ],
    "examples/emoji/README.md": [
        "sample.png", "groups.png", "emoji/NOTICE.txt", "emoji-vae/config.json",
        "emoji-classes.safetensors", "emoji-text.safetensors", "emoji-classifier/*",
        "emoji-judged.json",
    ],
    "examples/moving_digits/README.md": [
        "moving-digits/heldout/3/*.gif", "samples/*.npz", "moving-judged.json", "continued.npz",
        "moving-vae/config.json", "moving-classifier/*",
    ],
    "examples/shapes/README.md": ["shapes/train/metadata.jsonl", "shapes/heldout/heart/*.png"],
    "examples/captions/README.md": [
        "sample.png", "captioned/train/metadata.jsonl", "captions-mmdit.safetensors",
    ],
}
# What a page finds when its commands are run, so that nothing need be fetched.
PREPARED = {
    "examples/emoji/README.md": lambda folder: write_packages(folder / "emoji" / "packages"),
}
LIMIT = 300  # seconds for one command


def commands(page):
    """The commands in a page's bash blocks, in order, each in one line and without its comment."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if command := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
                yield command


def inline_commands(page):
    """The calls of Python in a page's running text."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(text.split()) for text in re.findall(r"`((?:python|torchrun) [^`]+)`", prose)]


def need(command):
    """What the command needs that is not here, None if it can be run."""
    return next((what for what, sign in NEEDS.items() if re.search(sign, command)), None)


def parse(command):
    """Have each part of a command read by the parser that reads it when it is run.

    Raises AssertionError for one unknown.
    """
    for part in command.split(" && "):
        words = shlex.split(part)
        script = next(
            (i for i, word in enumerate(words) if word in DOORS or word.startswith("benchmarks.")),
            None,
        )
        if words[0] == "torchrun":
            get_args_parser().parse_args([*words[1:script], "script.py"])
        if script:
            parse_script(words[script], [word for word in words[script + 1 :] if word != "--help"])
        elif words[0] != "torchrun":
            check_other(words)


def parse_script(name, arguments):
    """Have a script's arguments read by its own parser; a benchmark without any need only be there.
    """
    module = DOORS.get(name) or importlib.import_module(name)
    if arguments or name in DOORS:
        module.build_parser().parse_args(arguments)


def check_other(words):
    """Raise AssertionError unless this is a command of another program that is known, with what is
    here.
    """
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        asked, *more = words[2:]
        assert (
            not more and set(re.fullmatch(r"\.(?:\[(.*)])?", asked)[1].split(",")) <= extras.keys()
        )
    elif words[:3] == ["conda", "env", "create"]:
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    elif words[:2] == ["python", "-c"]:
        compile(words[2], words[2], "exec")
    else:
        assert words[0] == "make" or words[:2] == ["conda", "activate"], (
            f"nothing here can read {words}"
        )


@pytest.fixture
def copy(tmp_path):
    """A folder with the files of the repository that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("what belongs to the repository is known to git alone, and this is no clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(command, folder):
    """Run a command in the folder as a user's shell would, with this Python, the network out of
    reach; its output.
    """
    done = subprocess.run(
        ["bash", "-ec", command], cwd=folder, capture_output=True, text=True, timeout=LIMIT,
        env=os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(text, id=f"{named(page)}: {text}")
        for page in PAGES
        for text in commands(page)
        if need(text)
    ]
    + [
        pytest.param(text, id=f"{named(page)}: {text}")
        for page in PAGES
        for text in inline_commands(page)
    ],
)
def test_what_cannot_be_run_here_can_be_parsed(command):
    words = shlex.split(command)
    if words[1].startswith("examples/"):  # whose parsers are parts of their mains
        source = (ROOT / words[1]).read_text()
        for name in re.findall(r"^from (\w+) import", source, re.MULTILINE):
            for beside in ROOT.glob(f"examples/*/{name}.py"):  # may have the parser
                source += beside.read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    else:
        parse(command)


@pytest.mark.long
@pytest.mark.parametrize(
    "page", [page for page in PAGES if not all(map(need, commands(page)))], ids=named
)
def test_commands_run_one_after_the_other(page, copy):
    output = ""
    if prepare := PREPARED.get(named(page)):
        prepare(copy)
    for command in commands(page):
        if need(command) is None:
            shorter = " ".join(flags for sign, flags in SHORTER.items() if sign in command)
            # Which sample_ddp.py said, for a page that calls it NAME
            made = re.search(r"samples/(\S+)\.npz", output)
            output += run(
                f"{command.replace('NAME', made[1]) if made else command} {shorter}", copy
            )
    assert output and all(list(copy.glob(name)) for name in LEAVES[named(page)])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_are_of_kinds_that_are_looked_at(page, tmp_path, monkeypatch):
    """Commands stand in bash blocks; Python runs (that of the README in test_readme.py)."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for kind, text in blocks:
        assert kind in ("bash", "python") or (
            not kind and not re.search(r"^\W*(python|torchrun|pip|make) ", text, re.MULTILINE)
        )
    for text in python_blocks(page) if page.name != "README.md" else []:
        run_python(text)


def test_the_rules_are_all_needed():
    """A rule that no command needs would let one through that is written one day."""
    everything = [text for page in PAGES for text in commands(page)]
    assert set(NEEDS) == {need(text) for text in everything} - {None}
    assert all(any(sign in text for text in everything) for sign in SHORTER)


def test_each_step_of_own_data_is_there_for_shapes_too():
    """docs/own-data.md has the same scripts in the same order for photos and for shapes."""
    page = ROOT / "docs" / "own-data.md"
    scripts = {True: {}, False: {}}  # whether they run here → names, in order
    for text in commands(page):
        if (name := text.split()[1]) in DOORS and name != "download.py":
            scripts[need(text) is None][name] = text
    photos, shapes = list(scripts[False]), list(scripts[True])
    assert (
        photos
        == shapes
        == ["extract_latents.py", "train.py", "sample.py", "sample_ddp.py", "evaluate.py"]
    )
