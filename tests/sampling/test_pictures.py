"""pictures.py, sample.py --trajectory and Sampler.trajectory: what is shown of the way from noise
to images.
"""

import errno
import json
import os
from pathlib import Path
import threading

import numpy as np
from PIL import Image
import pytest
import torch

from conftest import ROOT, fill_randomly, randn
from checkpoints.publish import save_pretrained
from models import DiT
from sampling.pictures import (
    ENDINGS, FRAME_MS, GIF_MOMENTS, LAST_FRAME_MS, SETTINGS, STRIP_MOMENTS, captions, moments,
    picture, save, save_trajectory, write_file,
)  # fmt: skip
import sample
from processes.gaussian import GaussianProcess
from sampling.sampler import Sampler
from vae import PixelSpace

DIGITS = ROOT / "examples" / "digits"
CONFIG = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4
)


def network():
    return fill_randomly(DiT(**CONFIG)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A folder with a network of pixels, random weights and class names."""
    folder = tmp_path_factory.mktemp("ckpt") / "dit"
    save_pretrained(network(), folder, ["ant", "bee", "cat", "dog"])
    return str(folder)


def sampled(tmp_path, ckpt, *flags):
    """sample.main with two labels and these flags; the file that it always writes."""
    sample.main([
        "--ckpt", ckpt, "--vae", "none", "--device", "cpu", "--class-labels", "1", "3", "--steps",
        "40", "--sampler", "ddim", "--output", str(tmp_path / "out.png"), *flags,
    ])  # fmt: skip
    return tmp_path / "out.png"


# ---- the trajectory ----

@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", GaussianProcess.solvers)
def test_trajectory_ends_in_the_latents_and_goes_through_the_steps(solver, cfg_scale):
    sampler = Sampler(network(), PixelSpace(), None, 5, solver, cfg_scale=cfg_scale)
    labels, noise = torch.tensor([1, 3]), randn(2, 3, 8, 8).float()
    torch.manual_seed(0)
    way = []
    for out in sampler.trajectory(labels, noise):
        assert torch.is_grad_enabled()  # the generator leaves its caller's settings alone
        way.append(out)
    torch.manual_seed(0)
    assert torch.equal(way[-1]["sample"], sampler.latents(labels, noise))
    assert [out["t"] for out in way] == sampler.steps() and len(way) == 5
    assert all(out[key].shape == noise.shape for out in way for key in ("sample", "pred_xstart"))
    # Nothing is left to do after the last step
    assert (way[-1]["pred_xstart"] - way[-1]["sample"]).abs().max() < 1e-6


@pytest.mark.parametrize("solver", GaussianProcess.solvers)
def test_first_prediction_is_that_of_the_network(solver):
    sampler = Sampler(network(), PixelSpace(), None, 7, solver)
    labels, noise = torch.tensor([1, 3]), randn(2, 3, 8, 8).float()
    out = next(sampler.trajectory(labels, noise))
    eps = sampler.network(noise, torch.full((2,), out["t"]), labels)[:, :3].double()
    if solver in ("ddpm", "ddim"):
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[out["t"]]
    else:
        alpha_bar = 1 / (1 + sampler.process.scheduler(solver, 7).sigmas[0].double() ** 2)
    expected = ((noise - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5).clamp(-1, 1)
    assert (out["pred_xstart"] - expected).abs().max() < 1e-4


# ---- sample.py ----

def test_trajectory_does_not_change_the_picture(tmp_path, ckpt):
    alone = sampled(tmp_path, ckpt).read_bytes()
    (tmp_path / "again").mkdir()
    image = Image.open(sampled(tmp_path / "again", ckpt, "--trajectory", str(tmp_path / "a.gif")))
    assert np.array_equal(image, Image.open(tmp_path / "out.png")) and len(alone) > 100


def test_animation_runs_from_noise_to_the_picture(tmp_path):
    flags = ["--vae", str(DIGITS / "vae"), "--trajectory", str(tmp_path / "a.gif")]
    last = np.asarray(
        Image.open(sampled(tmp_path, str(DIGITS / "dit.safetensors"), *flags))
    ).astype(float)
    animation = Image.open(tmp_path / "a.gif")
    assert 2 < animation.n_frames <= GIF_MOMENTS and animation.info["loop"] == 0
    far, times = [], []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        far.append(np.abs(np.asarray(animation.convert("RGB")).astype(float) - last).mean())
        times.append(animation.info["duration"])
    # Equal frames are stored once and shown for longer
    assert sum(times) == (GIF_MOMENTS - 1) * FRAME_MS + LAST_FRAME_MS
    assert far[-1] < 5 < far[0] and far[-1] <= far[len(far) // 2] < far[0]  # a GIF has 256 colours


def test_strip_has_a_row_for_each_image(tmp_path, ckpt):
    picture_file = sampled(tmp_path, ckpt, "--trajectory", str(tmp_path / "a.png"))
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    first, second = np.split(np.asarray(Image.open(picture_file))[:, 4:], 2, axis=1)
    width, height = 100, 116  # of an image with its margin and caption
    assert strip.shape == (2 * height + 4, STRIP_MOMENTS * width + 4, 3)
    for row, image in enumerate((first, second)):
        assert np.array_equal(strip[row * height : (row + 1) * height, -width:], image[:height])
    assert not np.array_equal(strip[:height, :width], strip[:height, -width:])


@pytest.mark.parametrize("steps, path, expected", [
    (250, "a.gif", GIF_MOMENTS), (250, "a.webp", STRIP_MOMENTS), (20, "a.gif", 20), (3, "a.png", 3),
    (1, "a.png", 1),
])  # fmt: skip
def test_moments_are_spread_from_first_to_last(steps, path, expected):
    shown = moments(steps, path)
    assert len(shown) == expected and shown[0] == 0 and shown[-1] == steps - 1
    gaps = np.diff(shown)
    assert len(shown) == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize("flags, message", [
    (["--trajectory", "a.xyz"], "--trajectory: a.xyz: .xyz is not an image format"),
    (["--trajectory", "no/a.gif"], "--trajectory: cannot write no/a.gif"),
    (["--output", "a.ico"], "--output: a.ico: .ico is not an image format here; use .png"),
    (["--trajectory", "."], "--trajectory: . is a folder"),
    (["--trajectory", "x.png", "--output", "./x.png"],
     "--trajectory and --output are both ./x.png; give two files"),
])  # fmt: skip
def test_wrong_files_are_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "build_sampler", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        sample.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_are_in_the_picture(tmp_path, ckpt):
    settings = json.loads(Image.open(sampled(tmp_path, ckpt, "--seed", "5")).info[SETTINGS])
    assert (
        settings["seed"] == 5
        and settings["class_labels"] == [1, 3]
        and settings["num_sampling_steps"] == 40
    )
    assert settings["ckpt"] == ckpt and "said" not in settings
    # What the checkpoint says is not told as the flags have it
    assert not {"model", "num_classes", "process"} & settings.keys()
    assert settings["vae"] == "none" and "image_size" in settings
    given = sampled(tmp_path, ckpt, "--process", "diffusion")
    assert json.loads(Image.open(given).info[SETTINGS])["process"] == "diffusion"
    save(Image.new("RGB", (2, 2)), tmp_path / "a.jpg", {"seed": 1})  # which has no place for them
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"


def test_a_picture_too_large_for_its_format_is_one_message(tmp_path, ckpt, capsys):
    with pytest.raises(SystemExit) as stopped:
        sampled(
            tmp_path, ckpt, "--trajectory", str(tmp_path / "a.webp"), "--class-labels",
            *["0"] * 150, "--steps", "1",
        )  # fmt: skip
    assert stopped.value.code == 1 and "sample.py: error: " in capsys.readouterr().err


def test_a_long_name_takes_no_time():
    assert picture(np.zeros((1, 96, 96, 3), np.uint8), ["name " * 100_000]).size == (104, 120)


def test_strip_of_images_without_names(tmp_path):
    frames = [(t, np.full((2, 128, 128, 3), t, np.uint8)) for t in (30, 20, 10)]
    save_trajectory(frames, tmp_path / "a.png", captions([0, 0], 0, None))
    expected = picture(
        np.concatenate([np.stack([f[i] for _, f in frames]) for i in range(2)]),
        ["t = 30", "t = 20", ""] * 2, 3,
    )  # fmt: skip
    assert np.array_equal(Image.open(tmp_path / "a.png"), expected)


# ---- files ----

SQUARE = Image.new("RGB", (40, 40), "red")


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes the first bytes of what is written and no more."""

    def write_bytes(path, content):
        with path.open("wb") as file:
            file.write(content[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


FRAMES = [(1, np.zeros((1, 8, 8, 3), np.uint8)), (None, np.ones((1, 8, 8, 3), np.uint8))]


@pytest.mark.parametrize("write", [
    lambda path: save(SQUARE, path, {"seed": 1}), lambda path: save_trajectory(FRAMES, path, ["a"]),
])  # fmt: skip
@pytest.mark.parametrize("name", ["o.png", "o.gif", "o.webp"])
def test_a_full_disk_is_one_message_and_leaves_the_old_picture(tmp_path, full_disk, name, write):
    old = tmp_path / name
    with old.open("wb") as file:
        file.write(b"old picture")
    with pytest.raises(
        ValueError,
        match=f"cannot write .*/{name} .No space left on device.; .* make room, or choose another",
    ):
        write(old)
    assert old.read_bytes() == b"old picture" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_are_what_pillow_itself_writes(tmp_path, ending):
    save(SQUARE, tmp_path / f"ours{ending}", {})
    SQUARE.save(tmp_path / f"theirs{ending}")
    ours, theirs = Image.open(tmp_path / f"ours{ending}"), Image.open(tmp_path / f"theirs{ending}")
    assert ours.format == theirs.format and np.array_equal(
        ours.convert("RGB"), theirs.convert("RGB")
    )
    if ending != ".png":  # which has the settings as well
        assert (tmp_path / f"ours{ending}").read_bytes() == (
            tmp_path / f"theirs{ending}"
        ).read_bytes()


def test_a_new_picture_has_the_permissions_of_the_old_one_or_of_any_new_file(tmp_path):
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.touch()
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        for path in (old, new):
            save(SQUARE, path, {})
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (old, new)] == [0o640, 0o640]
    old.chmod(0o604)
    save(SQUARE, old, {})
    assert old.stat().st_mode & 0o777 == 0o604


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "far" / "o.png")
    for colour in ("red", "blue"):  # once without a target, once with one
        save(Image.new("RGB", (2, 2), colour), tmp_path / "link.png", {})
        assert (tmp_path / "link.png").is_symlink() and Image.open(
            tmp_path / "far" / "o.png"
        ).size == (2, 2)
    assert Image.open(tmp_path / "link.png").getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(ValueError, match="cannot write .*/a.png"):
        save(SQUARE, tmp_path / "a.png", {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe.png", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    save(SQUARE, pipe, {})
    reader.join(10)
    save(SQUARE, tmp_path / "file.png", {})
    assert read == [(tmp_path / "file.png").read_bytes()] and pipe.is_fifo()


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "é" * 125 + "x.png"])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    sample.check_output("--output", str(tmp_path / name))
    write_file(tmp_path / name, b"whole")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"whole"
    with pytest.raises(ValueError, match="File name too long"):
        sample.check_output("--output", str(tmp_path / f"n{name}"))
    with pytest.raises(ValueError, match="File name too long"):
        write_file(tmp_path / f"n{name}", b"")


@pytest.mark.parametrize(
    "name", ["\udcff\udcfe", "two\nlines\tand more", "\x00", "x" * 100_000, "\ud83d\ude00 é"]
)
def test_any_class_name_can_be_written_below_an_image(name):
    assert picture(np.zeros((1, 96, 96, 3), np.uint8), [name]).size == (104, 120)
