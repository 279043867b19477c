"""The page of a network that makes clips: what is drawn plays, and has its settings inside."""

from dataclasses import replace
import json

import numpy as np
from PIL import Image
import pytest

import app
from checkpoints.weights import Weights, save_weights
from conftest import fill_randomly
from page import drawing, visitors
from page.layout import Shown
from processes.flow import FlowProcess
from sampling.pictures import FRAME_RATE, SETTINGS
from sampling.sampler import Sampler
from test_app import CPU, ask, free_port, listen, request
from variants.video import VideoDiT
from vae import PixelSpace

FLOW = FlowProcess()
CHOICES = [[3, 1], 3, 2.0, "euler", 2, "5"]


@pytest.fixture(scope="module")
def network():
    sizes = dict(input_size=8, frames=5, patch_size=4, in_channels=3, num_classes=4)
    small = VideoDiT(**sizes, hidden_size=32, depth=2, num_heads=2, learn_sigma=False)
    return fill_randomly(small, std=0.3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sampler(network):
    return Sampler(network, PixelSpace(), None, 2, "euler", process=FLOW)


def frames_in(path):
    """All frames (F, height, width, 3) of a picture that plays, its settings, milliseconds each."""
    with Image.open(path) as image:
        settings, durations, found = json.loads(image.text[SETTINGS]), [], []
        for number in range(image.n_frames):
            image.seek(number)
            found.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(found), settings, durations


def test_the_last_picture_plays_what_the_sampler_draws(sampler):
    answers = drawing.answer(sampler, {"frames": 5}, CPU, [3, 1], 3, 2.0, "euler", 2, "5")
    steps = [next(answers) for _ in range(2)]
    status, path, rows, same = next(answers)
    found, settings, durations = frames_in(path)
    assert path == same and status == "Seed 5" and settings["frames"] == 5
    assert durations == [1000 / FRAME_RATE] * 5
    guided = replace(sampler, cfg_scale=2.0)
    labels = guided.conditions([3, 1, 3])
    clips = guided.decode(guided.numbered_latents(5, range(3), labels)).numpy()
    for number in range(5):
        wanted = np.asarray(drawing.picture(clips[:, number], ["3", "1", "3"]))
        assert np.array_equal(found[number], wanted)
    # While it is drawn, and over time: middle frames
    assert all(drawn.size == found.shape[2:0:-1] for _, drawn, _, _ in steps)
    assert rows.height > 3 * 96


def test_the_page_opens_on_a_checkpoint_of_clips(tmp_path, network, monkeypatch):
    ckpt, opened = tmp_path / "clips.safetensors", []
    said = Weights(network.state_dict(), network.config, None, process=FLOW.config)
    save_weights(ckpt, said)
    monkeypatch.setattr(app, "is_installed", lambda name: True)
    monkeypatch.setattr(app, "serve", lambda *given: opened.append(given))
    flags = ["--vae", "none", "--device", "cpu", "--port", str(free_port())]
    app.main(["--ckpt", str(ckpt), *flags])
    ((((_, found, settings, *_),), _, _),) = opened
    assert found.makes_clips and settings["cfg_channels"] == "all" and settings["frames"] == 5


def test_a_visitor_gets_clips_that_play(tmp_path, sampler):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    place = ("127.0.0.1", free_port())
    with app.private_folder() as folder, app.served([Shown("", sampler, {})], CPU, folder, place):
        name, (status, shown, _, download) = listen(place[1], ask(place[1], CHOICES)[1])
        assert (name, status) == ("complete", "Seed 5")
        for kept in (shown["path"], download["value"]["path"]):
            content = request(place[1], "GET", f"{visitors.FILE}{kept}")[1]
            (tmp_path / "shown.png").write_bytes(content)
            found, settings, _ = frames_in(tmp_path / "shown.png")
            assert len(found) == 5 and settings["class_labels"] == [3, 1, 3]
