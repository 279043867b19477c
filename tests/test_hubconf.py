"""torch.hub's entry points, each asked for in a process of its own, from another folder."""
import json
import sys

import pytest
import torch

from checkpoints import publish
from conftest import ROOT, fill_randomly
import hubconf
from models import DiT_models
from processes.flow import FlowProcess
from starts import STARTS
from test_house import packages
from written import reader, saved

NAMES = [name.replace("-", "_").replace("/", "_") for name in DiT_models]
ASK = dict(trust_repo=True, skip_validation=True)


@pytest.fixture(params=STARTS)
def run(request, monkeypatch):
    """run(folder, code): what a script in `folder`, with torch and REPO at hand, prints as JSON in
    its last line.
    """
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(folder, code, **environment):
        text = f"import json, sys, torch\nREPO = {str(ROOT)!r}\n{code}"
        (folder / "script.py").write_text(text, encoding="utf-8")
        done = request.param("script.py", folder=folder, CUDA_VISIBLE_DEVICES="", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_each_network_has_an_entry_with_a_docstring():
    assert hubconf.DiT_XL_2.__name__ == "DiT_XL_2" and "digits_sampler" not in NAMES
    for name in NAMES:
        assert name.replace("_", "-", 1).replace("_", "/", 1) in getattr(hubconf, name).__doc__


def test_list_and_help_show_the_entries_and_no_helper(run, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/owner_repo_main").symlink_to(ROOT)  # as if it had been fetched
    found = run(tmp_path, f"""
names = torch.hub.list("owner/repo:main", **{ASK!r})
texts = [torch.hub.help("owner/repo:main", name, **{ASK!r}) for name in names]
network = torch.hub.load("owner/repo:main", "DiT_Ti_8", **{ASK!r})
print(json.dumps([names, texts, network.config]))
""", TORCH_HOME=str(tmp_path))  # fmt: skip
    assert sorted(found[0]) == sorted([*NAMES, "digits_sampler", "network", "sampler"])
    assert all(len(text) > 100 for text in found[1])
    assert found[2] == DiT_models["DiT-Ti/8"]().config


def test_a_network_takes_its_arguments_and_two_names(run, tmp_path):
    """A network of random weights imports `models` and `layers`, and leaves sys.path as it was."""
    config, same_path, taken = run(tmp_path, """
before = list(sys.path)
network = torch.hub.load(REPO, "DiT_XL_8", source="local", input_size=16, num_classes=0, depth=1)
output = network(torch.zeros(1, 4, 16, 16), torch.zeros(1))
assert output.shape == (1, 8, 16, 16)
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
taken = {name.partition(".")[0] for name, file in files.items()
         if file.startswith(REPO + "/") and not file.startswith(REPO + "/.venv/")}
print(json.dumps([network.config, sys.path == before, sorted(taken)]))
""")  # fmt: skip
    expected = {"input_size": 16, "patch_size": 8, "depth": 1, "num_classes": 0}
    assert config | expected == config
    assert same_path and set(taken) <= {"models", "layers", "hubconf"}


def test_digits_beside_modules_of_the_caller_that_have_the_names_of_wings(run, tmp_path):
    """Also from a relative path, and whatever is imported after the folder has changed."""
    (tmp_path / "data.py").write_text("OWN = 'data'", encoding="utf-8")
    (tmp_path / "training").mkdir()
    (tmp_path / "training/__init__.py").write_text("OWN = 'training'", encoding="utf-8")
    shape, kind, own, taken = run(tmp_path, """
import os
place = os.path.relpath(REPO)
sampler = torch.hub.load(place, "digits_sampler", source="local", steps=2, device="cpu")
os.chdir("/")
images = sampler.images([3, 1, 4], seed=0)
import data, training
from checkpoints import export_diffusers  # from rooms that nothing has needed so far
from sampling import check_writable
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
rooms = {name.partition(".")[0] for name, file in files.items()
         if file.startswith(REPO + "/") and not file.startswith(REPO + "/.venv/")}
print(json.dumps([images.shape, str(images.dtype), [data.OWN, training.OWN], sorted(rooms)]))
""")  # fmt: skip
    assert (shape, kind, own) == ([3, 32, 32, 3], "uint8", ["data", "training"])
    assert taken == sorted(hubconf.TAKEN)


@pytest.mark.parametrize(
    "entry, name",
    [("DiT_Ti_8", "models"), ("DiT_Ti_8", "layers"), ("digits_sampler", "sampling")],
)
def test_a_module_of_the_caller_in_the_way_is_named(run, tmp_path, entry, name):
    (tmp_path / f"{name}.py").write_text("OWN = True", encoding="utf-8")
    said, own = run(tmp_path, f"""
import {name}
try:
    torch.hub.load(REPO, {entry!r}, source="local")
except ImportError as error:
    print(json.dumps([str(error), sys.modules[{name!r}].OWN]))
""")  # fmt: skip
    file = tmp_path / f"{name}.py"
    assert own and f"another module called {name}, {file}; call torch.hub" in said


@pytest.mark.parametrize("side, file", [(32, "DiT-XL-2-256x256.pt"), (64, "DiT-XL-2-512x512.pt")])
def test_pretrained_asks_for_the_released_file_and_builds_its_network(
    monkeypatch, tmp_path, side, file
):
    asked = []

    def fetch(name, folder):
        asked.append((name, folder))
        return tmp_path / name

    def load(path, config):
        return (path, config), None

    monkeypatch.setattr("checkpoints.released.download_model", fetch)
    monkeypatch.setattr("checkpoints.loading.load_pretrained", load)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path, config = hubconf.DiT_XL_2(pretrained=True, input_size=side)
    assert asked == [(file, tmp_path / "hub/checkpoints")] and path == tmp_path / file
    with torch.device("meta"):
        assert config == DiT_models["DiT-XL/2"](input_size=side, num_classes=1000).config


@pytest.mark.parametrize("entry, arguments", [
    ("DiT_S_2", {}), ("DiT_XL_4", {}), ("DiT_XL_2", dict(input_size=16)),
    ("DiT_XL_2", dict(num_classes=10)), ("DiT_XL_2", dict(depth=2)),
])  # fmt: skip
def test_weights_that_were_not_released_are_refused(entry, arguments):
    with pytest.raises(ValueError, match="no weights were released .* only for DiT-XL/2 with"):
        getattr(hubconf, entry)(pretrained=True, **arguments)


def test_a_sampler_of_any_checkpoint_knows_its_process(run, tmp_path):
    process = FlowProcess("gvp", time_shift=2.0)
    network = fill_randomly(DiT_models["DiT-Ti/8"](input_size=16, in_channels=3, num_classes=3))
    publish.save_pretrained(network, tmp_path / "flow", process=process)
    found, shape = run(tmp_path, """
sampler = torch.hub.load(REPO, "sampler", "flow", source="local", vae="none", sampler="heun",
                         steps=2, device="cpu")
print(json.dumps([sampler.process.config, sampler.images([0, 2]).shape]))
""")  # fmt: skip
    assert (found, shape) == (process.config, [2, 16, 16, 3])


def test_networks_and_samplers_that_read_text(run, tmp_path):
    name = saved(tmp_path / "words.safetensors", reader())
    config, shape = run(tmp_path, f"""
network = torch.hub.load(REPO, "network", "MMDiT-Ti/1", source="local", text_width=24,
                         pooled_width=8)
sampler = torch.hub.load(REPO, "sampler", {name!r}, source="local", vae="none", steps=2,
                         device="cpu")
print(json.dumps([network.config, sampler.images(["a thin seven"], seed=1).shape]))
""")  # fmt: skip
    assert (config["text_width"], config["depth"], shape) == (24, 4, [1, 8, 8, 3])
    with pytest.raises(ValueError, match="`model` is MMDiT-9; give one of DiT-Ti/1, "):
        hubconf.network("MMDiT-9")


def test_dependencies_are_all_that_the_modules_import():
    """Outside libraries that what TAKEN names imports, whatever the depth."""
    paths = [path for name in hubconf.TAKEN for path in files_of(name)]
    assert len(paths) > 20
    outside = set().union(*(packages(path, top_level_only=True) for path in paths))
    outside -= sys.stdlib_module_names | set(hubconf.TAKEN)
    assert outside == set(hubconf.dependencies)


def files_of(module):
    """The files of one of our modules: itself, or all of a wing's."""
    file = ROOT / f"{module}.py"
    return [file] if file.is_file() else sorted((ROOT / module).glob("*.py"))
