"""What the README tells users to type exists, and its two opening commands do what it says."""

import importlib
from pathlib import Path
import re
import shlex
import subprocess
import sys
import time
import tomllib

from PIL import Image
import pytest
import torch
from torch.distributed.run import get_args_parser

import app
from conftest import ROOT
import count
import download
import evaluate
import export
import extract_latents
import sample
import sample_ddp
from test_digits import judged, make_dataset
from test_house import WING_FILES, WINGS, named
import train

DOORS = {
    "train.py": train, "sample.py": sample, "sample_ddp.py": sample_ddp, "download.py": download,
    "extract_latents.py": extract_latents, "evaluate.py": evaluate, "count.py": count,
    "export.py": export, "app.py": app,
}  # fmt: skip
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
README = (ROOT / "README.md").read_text()
TEXT = "\n".join(page.read_text() for page in PAGES)
SCRIPTS = (ROOT / "examples" / "train.slurm").read_text()


def commands():
    """Every call of a door in pages, scripts and the doors' own docstrings, as (door, its
    arguments, the launcher's).
    """
    everything = TEXT + SCRIPTS + "".join(module.__doc__ for module in DOORS.values())
    for line in everything.replace("\\\n", " ").splitlines():
        words = (
            shlex.split(line.split("#")[0]) if re.match(r"\s*(python|torchrun|srun) ", line) else []
        )
        for i, word in enumerate(words):
            if word in DOORS:
                launcher = words[words.index("torchrun") + 1 : i] if "torchrun" in words else []
                arguments = [word for word in words[i + 1 :] if word != "&"]
                yield pytest.param(DOORS[word], arguments, launcher, id=" ".join(words[i:]))


@pytest.mark.parametrize("door, arguments, launcher", list(commands()))
def test_flags_of_documented_commands_exist(door, arguments, launcher):
    door.build_parser().parse_args(arguments)
    get_args_parser().parse_args([*launcher, "script.py"])


def python_blocks(page):
    """The blocks of Python in a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_python(text):
    """Run a block of a page in the current folder, with the examples' files and the digits in it;
    the names that the block leaves.

    It is made shorter by SHORTER. Networks hold no weights where they are built.
    """
    if not Path("examples").exists():
        Path("examples").symlink_to(ROOT / "examples")
    if "digits/train" in text and not Path("digits").exists():
        make_dataset.main(["--output", "digits"])
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    names = {}
    with torch.device("meta" if re.search(r"DiT_models\[|DiT_XL_2", text) else "cpu"):
        exec(text, names)
    return names


# What makes Python of a page short enough for a test, and keeps it off the network.
SHORTER = {
    "num_fid_samples=50_000": "num_fid_samples=4", "max_steps=1300": "max_steps=2",
    '"OWNER/REPO", "DiT_XL_2"': f'{str(ROOT)!r}, "DiT_XL_2", source="local"',
    '"path/to/clone"': repr(str(ROOT)),
}  # fmt: skip
# Name that a block of the README leaves → what is to be seen of it.
LEFT = {
    "images": lambda images: (images.shape, images.dtype.name) == ((3, 32, 32, 3), "uint8"),
    "folder": lambda folder: (folder / "checkpoints" / "0000002.pt").is_file(),
    "report": lambda report: round(report["scores"]["fid"], 2) == 0.24,
    "samples": lambda path: path.is_file() and len(list(path.with_suffix("").glob("*.png"))) == 4,
    "diffusion": lambda diffusion: diffusion.num_timesteps == 250,
    "network": lambda network: network.null_label == 1000,
}  # fmt: skip


@pytest.mark.parametrize("place", range(6))
def test_python_in_the_readme_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 6
    names = run_python(blocks[place])
    seen = {name: check(names[name]) for name, check in LEFT.items() if name in names}
    assert seen and all(seen.values()), seen


def test_the_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 150
    prose = re.sub(r"```.*?```|\(http[^)]*\)", "", README, flags=re.DOTALL)
    assert len(prose.split()) <= 700
    assert README.index("make demo") < README.index("](docs/emoji.png)") < README.index("## ")


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_to_files(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [
        link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose) if not link.startswith("http")
    ]
    assert targets and all((page.parent / target).exists() for target in targets)


def test_modules_that_moved_are_where_the_table_says():
    text = (ROOT / "docs" / "migrating.md").read_text()
    table = text.split("| was | is |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) == table.count("\n") - 1 and len(dict(rows)) == len(rows)
    for _, cell in rows:
        for module in re.findall(r"`([\w.]+)`", re.sub(r"\(.*?\)", "", cell)):
            importlib.import_module(module)
        for line in re.findall(r"`(from [^`]+)`", cell):
            exec(line, {})


def headings(page):
    """What a link to a part of a page may name, as GitHub makes it of headings."""
    found = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings(page):
    for target, heading in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert heading in headings(page.parent / target if target else page), (
                f"{target}#{heading}"
            )


def test_every_file_has_its_line_in_contributing():
    found = re.findall(
        r"^\| `([\w./]+)` \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    rows = dict(found)
    folders = ["tests/", "examples/", "benchmarks/", "docs/", *(f"{wing}/" for wing in WINGS)]
    assert rows.keys() >= {*folders, *(path.name for path in ROOT.glob("*.py"))}
    assert len(rows) == len(found)
    for path in WING_FILES:
        if path.stem != "__init__":
            assert f"`{path.stem}`" in rows[f"{path.parent.name}/"], named(path)


def test_fifteen_questions_are_answered_by_files():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    part = text.split("## Fifteen questions")[1].split("\n## ")[0]
    answers = re.findall(r"^\| .+\? \| `([\w./]+)`", part, re.MULTILINE)
    assert len(answers) == 15
    assert not {name for name in answers if not (ROOT / name).is_file()}


def test_every_extra_has_its_line_among_the_extras():
    page = (ROOT / "docs" / "install.md").read_text()
    table = page.split("| extra |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))
    assert (
        set(named)
        >= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ].keys()
    )


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|[`:] *|&& )make ([\w./-]+)", TEXT, re.MULTILINE)) <= targets
    assert {"demo", "lint", "test", "test-long"} <= targets


def test_what_make_demo_calls_is_there():
    said = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    said = re.sub(r"\$\(ls .*?\)", "RUN", said.replace("\\\n", " "))  # the run that is trained
    calls = [words[1:] for line in said.splitlines() if len(words := shlex.split(line)) > 1]
    asked = [DOORS[door].build_parser().parse_args(args) for door, *args in calls if door in DOORS]
    assert [getattr(one, "output", None) for one in asked] == [
        "demo/emoji.png", "demo/digits.png", None, "demo/two-minutes.png"
    ]  # fmt: skip
    emoji, digits, _, _ = asked
    assert all((ROOT / path).exists() for one in (emoji, digits) for path in (one.ckpt, one.vae))
    assert len(emoji.prompt) == 12


@pytest.mark.alone
def test_demo_draws_emoji_and_digits_within_six_minutes():
    """`make demo`, its three pictures, and 500 digits from what it trained."""
    begun = time.monotonic()
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    assert seconds < 360
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in done.stdout.splitlines()
        if " loss " in line
    ]
    assert losses[-1] < 0.7 * losses[0]
    for name in ("digits.png", "two-minutes.png"):
        assert Image.open(ROOT / "demo" / name).size == (4 * 100 + 4, 3 * 116 + 4)
    assert Image.open(ROOT / "demo" / "emoji.png").size == (4 * 132 + 4, 3 * 148 + 4)
    found = judged(sorted((ROOT / "demo" / "results").iterdir())[-1], 500)
    print(f"make demo took {seconds:.0f} s; {found}")
    assert found["agreement with the asked-for class"] >= 0.9


@pytest.mark.long
def test_every_extra_can_be_installed():
    """As far as `pip install --dry-run` tells; it needs a package index."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert len(extras) >= 7
    for extra in extras:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", f".[{extra}]"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "does not provide the extra" not in done.stderr, (
            f"{extra}\n{done.stderr}"
        )


def test_python_in_the_page_on_flows_runs():
    (block,) = python_blocks(ROOT / "docs" / "flow.md")
    names = {}
    exec(block, names)
    assert {name: len(loss) for name, loss in names["losses"].items()} == {"loss": 2, "mse": 2}
    assert names["samples"].shape == (2, 4, 32, 32) and not names["samples"].requires_grad
