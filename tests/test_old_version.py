"""Files that the version before the wings wrote (tests/old_version) are read, and work that it left
half done is finished.

Numbers are compared within rounding: processors differ in the last bits of float32.
"""
from functools import partial
import json
import shutil

import numpy as np
from PIL import Image
import pytest
from safetensors.torch import load_file
import torch

from checkpoints import import_diffusers, load_pretrained, read_checkpoint
from conftest import ROOT, randn
from data import CachedLatents
import evaluate
import extract_latents
from models import DiT, DiT_models
import sample
import sample_ddp
from test_train import ASKED, LEARNED, fresh_accelerator  # noqa: F401
import train

OLD = ROOT / "tests/old_version"
COMMANDS = json.loads((OLD / "commands.json").read_text(encoding="utf-8"))
TRAIN, MANY, EXTRACT, SCORE = (
    COMMANDS[door].split() for door in ("train", "sample_ddp", "extract_latents", "evaluate")
)
SPEEDS = {"time", "images_per_second", "model_flops_per_second"}
CLASSES = ["ape", "bee", "cat"]


@pytest.fixture(autouse=True)
def old(tmp_path, monkeypatch):
    """A copy of the files, the working folder; a DiT-Ti/8 as small as theirs."""
    folder = shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(folder)
    tiny = partial(DiT, patch_size=8, hidden_size=16, depth=1, num_heads=2)
    monkeypatch.setitem(DiT_models, "DiT-Ti/8", tiny)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def close(a, b, most=1e-4):
    return a.shape == b.shape and np.abs(np.asarray(a) - np.asarray(b)).max() <= most


def predicted(network):
    """What a network makes of fixed latents, in evaluation mode."""
    x = randn(3, network.in_channels, network.input_size, network.input_size, dtype=torch.float32)
    with torch.no_grad():
        return network.eval()(x, torch.tensor([10, 500, 990]), torch.tensor([0, 1, 3]))


def test_a_stopped_run_goes_on_to_the_weights_of_one_that_was_left_alone(old, capsys):
    train.main(TRAIN)
    assert "going on from" in capsys.readouterr().out
    [folder] = (old / "results").iterdir()  # the same one
    contents = read_checkpoint(folder / "checkpoints/0000008.pt")
    finished = load_file("finished.safetensors")
    for kind in ("model", "ema"):
        networks = [DiT(**contents["config"]) for _ in range(2)]
        networks[0].load_state_dict(contents[kind])
        weights = {k.partition(".")[2]: v for k, v in finished.items() if k.startswith(kind)}
        networks[1].load_state_dict(weights)
        outputs = [predicted(network) for network in networks]
        assert outputs[1].abs().max() > 0.003 and close(*outputs, most=1e-5)
    found, expected = rows(folder / "metrics.jsonl"), rows(old / "finished.jsonl")
    assert [row["step"] for row in found] == [2, 4, 6, 8]
    for row, other in zip(found, expected, strict=True):
        assert list(row) == list(other)
        for name in row.keys() - SPEEDS:
            assert row[name] == (other[name] and pytest.approx(other[name], rel=1e-4)), name


def test_half_made_samples_are_finished_in_the_same_folder(old):
    [folder] = (old / "samples").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(before) == 3
    sample_ddp.main(MANY)
    assert sorted(path.name for path in (old / "samples").iterdir()) == [
        folder.name, f"{folder.name}.npz",
    ]  # fmt: skip
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}
    images = np.load(f"{folder}.npz")["arr_0"].astype(int)
    assert close(images, np.load("finished.npz")["arr_0"].astype(int), most=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["runs"]) == 2 and manifest["decides"]["num_sampling_steps"] == 4


def test_cached_latents_are_those_that_would_be_made_now(old):
    cached = CachedLatents(old / "latents")
    extract_latents.main([*EXTRACT, "--output", "again"])
    again = CachedLatents(old / "again")
    assert cached.classes == CLASSES and cached.labels == again.labels
    for flip in (False, True):
        for i in range(12):
            assert close(cached[i, flip][0], again[i, flip][0], most=0.002)  # they are float16


@pytest.mark.parametrize("process", ASKED)
def test_training_reads_the_cached_latents(old, process):
    flags = [*TRAIN, "--latents", "latents", "--vae", "vae", *ASKED[process]]
    at = flags.index("--data-path")
    del flags[at : at + 2]
    train.main(flags)
    [folder] = (old / "results").glob("001-*")
    last = rows(folder / "metrics.jsonl")[-1]
    assert last["step"] == 8 and last["loss"] > 0 and {*LEARNED[process].parts} <= {*last}


@pytest.mark.parametrize("name", ["pretrained", "pipeline"])
def test_exported_folders_are_the_network_they_were_made_of(old, name):
    network, classes = load_pretrained("latent.safetensors")
    found, names = load_pretrained(name)
    assert names == classes == CLASSES and found.config == network.config
    assert predicted(network).abs().max() > 0.01 and close(predicted(found), predicted(network))


def test_the_pipeline_brings_its_autoencoder(old):
    found, _ = import_diffusers("pipeline")
    assert found.in_channels == 4
    for flags in (["--ckpt", "pipeline"], ["--ckpt", "latent.safetensors", "--vae", "vae"]):
        flags += ["--class-labels", "1", "cat", "--num-sampling-steps", "3", "--device", "cpu"]
        sample.main([*flags, "--cfg-scale", "1.5", "--output", f"{flags[1]}.png"])
    pictures = [Image.open(old / f"{name}.png") for name in ("pipeline", "latent.safetensors")]
    assert close(*(np.asarray(picture).astype(int) for picture in pictures), most=1)


def test_scores_against_an_old_reference(old, capsys):
    evaluate.main(SCORE)
    found = json.loads(capsys.readouterr().out)
    expected = json.loads((old / "scores.json").read_text())
    assert list(found) == list(expected) and found["samples"] == expected["samples"]
    for name in ("fid", "precision", "recall"):
        assert found["scores"][name] == pytest.approx(expected["scores"][name], rel=1e-3)
