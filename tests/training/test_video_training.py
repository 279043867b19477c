"""Training on clips: runs from files and from cached latents, what they begin with, and what is
refused.
"""

from pathlib import Path
import random
import shutil

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.files import newest_checkpoint, read_checkpoint
from conftest import randn
import extract_latents
from kill_campaign import end, fingerprint, launcher, start, survive
from runtime.clip_files import write_gif
from test_runs import rows, without_rates
from test_train import QUICK, fresh_accelerator, images, run, same  # noqa: F401
import train
from training import TrainOptions
from training.loop import to_latents
from training.options import OF_CLIPS
from training.records import side_by_side
from vae import LatentShape, LatentSpace, PixelSpace

SIZE, FRAMES = 16, 6
CLIPS = [
    *QUICK, "--model", "VideoDiT-Ti/4", "--frames", "4", "--lr", "1e-3", "--given-frames", "0.5",
]  # fmt: skip
FLOW = ["--process", "flow"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of 3 classes with 3 clips and 2 pictures each."""
    folder, source = tmp_path_factory.mktemp("clips") / "train", np.random.default_rng(0)
    for i in range(15):
        path = folder / ("ape", "bee", "cat")[i % 3] / f"{i:02d}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = source.integers(0, 256, (FRAMES, SIZE, SIZE + 3, 1), dtype=np.uint8)
        if i < 9:
            write_gif(path, np.repeat(grey, 3, axis=-1), 10)
        else:
            Image.fromarray(np.repeat(grey[0], 3, axis=-1)).save(path.with_suffix(".png"))
    return folder


@pytest.fixture(scope="module")
def moving(clips, tmp_path_factory):
    """The clips among them."""
    folder = tmp_path_factory.mktemp("moving") / "train"
    shutil.copytree(clips, folder, ignore=shutil.ignore_patterns("*.png"))
    return folder


@pytest.fixture(scope="module")
def cache(clips, vae, tmp_path_factory):
    """Their latents, of an autoencoder of ratio 2."""
    folder = tmp_path_factory.mktemp("latents") / "cache"
    extract_latents.main([
        "--data-path", str(clips), "--output", str(folder), "--clips", "--image-size", str(SIZE),
        "--num-classes", "3", "--vae", vae, "--num-workers", "0", "--device", "cpu",
    ])  # fmt: skip
    return folder


def folder_of(results):
    (folder,) = Path(results).iterdir()
    return folder


# ---- runs ----


@pytest.mark.parametrize("process", ["diffusion", "flow"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(clips, tmp_path, vae, process):
    """On files, with an autoencoder; clips and pictures have their steps."""
    flags = [*CLIPS, "--vae", vae, "--process", process]
    whole = run(clips, tmp_path / "whole", *flags, "--max-steps", "6")
    run(clips, tmp_path / "cut", *flags, "--max-steps", "3")
    cut = run(clips, tmp_path / "cut", *flags, "--max-steps", "6", "--resume", "auto")
    assert same(cut["model"], whole["model"]) and same(cut["ema"], whole["ema"])
    folders = [folder_of(tmp_path / name) for name in ("cut", "whole")]
    ends = [without_rates(folder)[-1] for folder in folders]
    assert ends[0] == ends[1] and ends[0]["step"] == 6
    assert cut["config"]["frames"] == 4 and cut["config"]["_class_name"] == "VideoDiT"
    log = (folders[1] / "log.txt").read_text()
    assert "6 images; 9 clips of 4 frames" in log and "clips in 3 of 3 classes" in log
    assert "clips/s" in log and "images/s" not in log
    assert "alternate attention: " in log and "adaln_zero: " not in log


@pytest.mark.parametrize("more", [["--num-workers", "2"], ["--grad-accum", "2"],
                                  ["--grad-checkpointing"]])  # fmt: skip
def test_a_run_from_cached_latents_is_the_same_however_it_is_done(cache, tmp_path, vae, more):
    flags = ["--latents", str(cache), *CLIPS, *FLOW, "--vae", vae, "--max-steps", "4"]
    train_on = [*flags, "--frame-stride", "2", "--frames", "3"]
    found = [begin(tmp_path / name, *train_on, *others) for name, others in
             {"plain": [], "other": more}.items()]  # fmt: skip
    for part in ("model", "ema"):
        for key, tensor in found[0][part].items():
            torch.testing.assert_close(found[1][part][key], tensor, rtol=1e-4, atol=1e-5)


def begin(results, *flags):
    """Train with these flags alone; the newest checkpoint's contents."""
    train.main(["--results-dir", str(results), *flags])
    return read_checkpoint(newest_checkpoint(folder_of(results)))


def test_half_precision_learns_about_the_same(cache, tmp_path, vae):
    flags = ["--latents", str(cache), *CLIPS, *FLOW, "--vae", vae, "--max-steps", "4"]
    begin(tmp_path / "whole", *flags)
    begin(tmp_path / "half", *flags, "--mixed-precision", "bf16")
    both = [rows(folder_of(tmp_path / name)) for name in ("whole", "half")]
    for one, other in zip(*both, strict=True):
        assert one["loss"] != other["loss"]
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)


@pytest.mark.parametrize("model", ["Latte-Ti/4", "SpaceTime-Ti/4x2"])
def test_other_networks_of_clips_learn_too(moving, tmp_path, model):
    found = run(moving, tmp_path, *CLIPS, "--model", model, "--max-steps", "2")
    first = rows(folder_of(tmp_path))[0]
    assert 0.5 < first["mse"] < 2 and found["config"]["attention"] in ("latte", "full")


def without_classes(flags):
    return [flag for flag in flags if flag not in ("--num-classes", "3")]


@pytest.fixture(scope="module")
def said(clips, tmp_path_factory):
    """The clips, each with a caption beside it."""
    folder = tmp_path_factory.mktemp("said")
    for i, path in enumerate(sorted(clips.rglob("*.gif"))):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).with_suffix(".txt").write_text(f"clip {'abc'[i % 3]}")
    return folder


def test_a_network_learns_from_clips_with_captions(said, tmp_path):
    flags = [*without_classes(CLIPS), "--model", "TextVideo-Ti/4", "--max-steps", "2"]
    found = begin(tmp_path, "--data-path", str(said), *flags)
    assert found["config"]["_class_name"] == "TextVideo" and found["config"]["frames"] == 4


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--fsdp", "--grad-accum", "2", "--grad-checkpointing"]])
def test_two_processes_learn_what_one_does(clips, tmp_path, more):
    flags = [*CLIPS, *FLOW, "--max-steps", "4"]
    alone = run(clips, tmp_path / "alone", *flags)
    end(start(launcher(), clips, tmp_path / "two", 2, run=[*flags, *more]), 0)
    folder = folder_of(tmp_path / "two" / "results")
    found = read_checkpoint(newest_checkpoint(folder))
    for part in ("model", "ema"):
        for key, tensor in alone[part].items():
            torch.testing.assert_close(found[part][key], tensor, rtol=1e-3, atol=5e-4)
    both = rows(folder), rows(folder_of(tmp_path / "alone"))
    for ours, theirs in zip(*both, strict=True):
        for key in ("loss", "mse", "gradient_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_end_as_one_that_was_left_alone(clips, tmp_path, processes):
    """From outside, and in the middle of a checkpoint."""
    steps, more = 16, ["--num-workers", "1", "--ckpt-every", "5", "--resume", "auto"]
    more += ["--ema-decay", "0.5", "0.25"]
    run, of = [*CLIPS, *FLOW, *more, "--max-steps", str(steps)], (launcher(), clips)
    end(start(*of, tmp_path / "alone", processes, run=run), 0)
    for name, death in {"out": None, "in": {"at": "byte", "save": 2, "share": 0.5}}.items():
        source = random.Random(processes)
        step, found = survive(*of, tmp_path / name, processes, death, source, run, steps)
        assert found == fingerprint(tmp_path / "alone", steps), f"killed after step {step}"


@pytest.mark.long
def test_compiled_runs_learn_what_eager_ones_do(clips, tmp_path):
    flags = [*CLIPS, *FLOW, "--max-steps", "6"]
    eager = run(clips, tmp_path / "eager", *flags)
    compiled = run(clips, tmp_path / "compiled", *flags, "--compile")
    for name in eager["ema"]:
        torch.testing.assert_close(compiled["ema"][name], eager["ema"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", ["VideoDiT-Ti/4", "TextVideo-Ti/4"])
def test_previews_have_the_frames_of_clips_side_by_side(clips, said, tmp_path, model):
    flags = [*CLIPS, *FLOW, "--model", model, "--max-steps", "2", "--sample-every", "2"]
    if model.startswith("Text"):
        flags = without_classes(flags)
    begin(tmp_path, "--data-path", str(said if model.startswith("Text") else clips), *flags)
    with Image.open(folder_of(tmp_path) / "previews" / "0000002.png") as picture:
        assert picture.size == (4 * SIZE + 4, 16 * (SIZE + 2) + 2)  # torchvision's margins
    assert "was not written" not in (folder_of(tmp_path) / "log.txt").read_text()


def test_frames_lie_side_by_side():
    clips = torch.arange(2 * 3 * 2 * 2 * 3).view(2, 3, 2, 2, 3)
    found = side_by_side(clips)
    assert found.shape == (2, 2, 6, 3) and torch.equal(found[1, :, 2:4], clips[1, 1])
    assert side_by_side(clips[0]) is not None and side_by_side(clips[0]).shape == (3, 2, 2, 3)


# ---- how a run begins ----


def test_a_run_begins_with_a_dit_and_goes_on_with_more_frames(images, clips, tmp_path):
    flags = ["--process", "flow", "--max-steps", "2"]
    dit = run(images, tmp_path / "dit", *flags, "--model", "DiT-Ti/4")
    path = newest_checkpoint(folder_of(tmp_path / "dit"))
    video = run(clips, tmp_path / "video", *CLIPS, *flags, "--init-from", str(path))
    moved = (video["ema"]["blocks.2.mlp.fc1.weight"] - dit["ema"]["blocks.1.mlp.fc1.weight"]).abs()
    assert 0 < moved.max() < 0.01
    path = newest_checkpoint(folder_of(tmp_path / "video"))
    more = run(clips, tmp_path / "more", *CLIPS, *flags, "--frames", "6", "--init-from", str(path))
    assert more["config"]["frames"] == 6
    moved = (video["ema"]["blocks.1.mlp.fc1.weight"] - more["ema"]["blocks.1.mlp.fc1.weight"]).abs()
    assert 0 < moved.max() < 0.01


@pytest.mark.parametrize(
    ("model", "message"),
    [("VideoDiT-Ti/2", "is a DiT with patch_size 4, and the network of clips here goes on from"),
     ("Latte-Ti/4", "begin those alone that have attention alternate and labels: give a --model")],
)  # fmt: skip
def test_a_dit_that_begins_no_such_run_is_refused(images, clips, tmp_path, capsys, model, message):
    run(images, tmp_path / "dit", "--max-steps", "1", "--model", "DiT-Ti/4")
    path = newest_checkpoint(folder_of(tmp_path / "dit"))
    with pytest.raises(SystemExit):
        run(clips, tmp_path / "video", *CLIPS, "--model", model, "--init-from", str(path))
    assert message in capsys.readouterr().err and not (tmp_path / "video").exists()


def test_a_run_goes_on_with_as_many_frames_alone(clips, tmp_path, capsys):
    run(clips, tmp_path / "first", *CLIPS, "--max-steps", "1")
    here = ["--resume", str(folder_of(tmp_path / "first")), "--max-steps", "2"]
    for more, message in {
        ("--frames", "3"): "was trained on clips of 4 frames, and those here have 3; pass the same",
        ("--model", "Latte-Ti/4"): "has depth 12, the network here 6; give the --model",
    }.items():
        with pytest.raises(SystemExit):
            run(clips, tmp_path / "second", *CLIPS, *more, *here)
        assert message in capsys.readouterr().err and not (tmp_path / "second").exists()


def test_options_of_clips_make_another_run(clips, tmp_path):
    flags = [*CLIPS, "--max-steps", "1", "--resume", "auto"]
    for more in ([], ["--frames", "3"], ["--frame-stride", "2", "--frames", "3"],
                 ["--frame-rate", "10"], ["--given-frames", "0"]):  # fmt: skip
        run(clips, tmp_path, *flags, *more)
    assert len(list(tmp_path.iterdir())) == 5


# ---- what is refused ----

VIDEO = {"model": "VideoDiT-S/2", "frames": 8}
WRONG = [
    ({"model": "VideoDiT-S/2"}, "`model` VideoDiT-S/2 makes clips, and `frames` is not given; say"),
    ({"frames": 8}, "`frames` is 8, and `model` DiT-XL/2 makes images; leave `frames` out, or "
     "choose a `model` whose name begins with Latte, SpaceTime, TextVideo, VideoDiT"),
    ({"given_frames": 0.5}, "`given_frames` is 0.5, which is about clips, and `frames` is not giv"),
    ({"frame_stride": 2}, "`frame_stride` is 2, which is about clips"),
    ({"frame_rate": 8.0}, "`frame_rate` is 8.0, which is about clips"),
    ({"model": "SpaceTime-S/2x2", "frames": 7}, "`frames` is 7, and a patch of `model` SpaceTime-S"
     "/2x2 has 2 frames; give a multiple of 2"),
    ({**VIDEO, "frames": 1, "given_frames": 0.1}, "clips of `frames` 1 are one patch long"),
    ({**VIDEO, "frames": 0}, "`frames` is 0; it must be at least 1"),
    ({**VIDEO, "frame_stride": 0}, "`frame_stride` is 0; it must be at least 1"),
    ({**VIDEO, "given_frames": 1.5}, "`given_frames` is 1.5; it must be from 0 to 1"),
    ({**VIDEO, "aspect_buckets": True}, "`aspect_buckets` is for images, and `frames` asks for"),
    ({**VIDEO, "pack": 64}, "`pack` is for images, and `frames` asks for clips; leave `pack` out"),
    ({**VIDEO, "eval_every": 5, "eval_reference": "x"}, "`eval_every` is for images, and `frames` "
     "asks for clips; leave `eval_every` out, and score samples of clips with evaluate.py"),
    ({**VIDEO, "block": "in_context"}, "`block` is in_context, and `model` VideoDiT-S/2, which"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_what_does_not_go_together(more, message):
    with pytest.raises(ValueError) as refused:
        TrainOptions(data_path="x", **more)
    assert message in str(refused.value)


def test_what_goes_together():
    options = TrainOptions(data_path="x", **VIDEO, given_frames=1.0, frame_stride=3, qk_norm=True)
    assert options.network_arguments["frames"] == 8 and options.patch_frames == 1
    assert {name: getattr(TrainOptions(data_path="x"), name) for name in OF_CLIPS} == OF_CLIPS
    assert "frames" not in TrainOptions(data_path="x").network_arguments


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "7"], "9 of 15 clips have fewer than the 7 frames that --frames 7 and"),
        (["--global-batch-size", "10"], "which do not fill one batch of 10; lower --global-batch"),
        (["--model", "SpaceTime-Ti/4x2"], "6 of 15 clips have one frame, and a patch of --model"),
        (["--model", "DiT-Ti/4"], "--frames is 4, and --model DiT-Ti/4 makes images; leave"),
    ],
)
def test_what_does_not_fit_the_clips_is_refused_before_the_work(
    clips, tmp_path, capsys, flags, message
):
    with pytest.raises(SystemExit):
        run(clips, tmp_path / "results", *CLIPS, *flags)
    assert message in capsys.readouterr().err and not (tmp_path / "results").exists()


# ---- latents of clips ----


def test_latents_of_clips_are_those_of_each_frame():
    space = LatentSpace(LatentShape(2, 2), [1.0, 2.0], [0.5, 0.0])
    moments, noise = randn(3, 2, 2, 4, 8, 8), randn(3, 2, 4, 8, 8, seed=1)
    found = to_latents(space, moments, noise)
    for frame in range(4):
        wanted = to_latents(space, moments[:, :, :, frame], noise[:, :, frame])
        torch.testing.assert_close(found[:, :, frame], wanted.to(found.dtype))
    # Of a picture the first numbers of the noise
    image = to_latents(space, moments[:, :, :, :1], noise)
    first = noise.flatten(1)[:, : 2 * 64].view(3, 2, 8, 8)
    torch.testing.assert_close(image[:, :, 0], to_latents(space, moments[:, :, :, 0], first))


def test_pixels_of_clips_are_their_own_latents():
    pixels = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    found = to_latents(PixelSpace(), pixels, torch.zeros(2, 3, 4, 8, 8))
    torch.testing.assert_close(found, pixels / 127.5 - 1)
