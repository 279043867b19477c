"""Clips: what the Sampler draws, with given frames and without, and what doors write of them."""

import errno
import json

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.files import save_checkpoint
from checkpoints.weights import Weights, save_weights
from conditions.given import Given
from conditions.labels import random_labels
from conftest import ROOT, fill_randomly
from layers.clips import frames_of
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from processes.noise import ImageNoise
import sample_ddp
from runtime import clip_files
from runtime.clip_files import read_clip, write_gif
import sample
from sampling import pictures
from sampling.loading import load_sampler
from sampling.pictures import MARGIN
from sampling.sampler import Sampler
from variants.video import TextVideo, VideoDiT
from vae import PixelSpace, load_vae

SIZES = dict(
    input_size=8, frames=4, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2,
    num_classes=5, learn_sigma=False,
)  # fmt: skip
FLOW, GAUSSIAN = FlowProcess(), GaussianProcess(learn_sigma=False)
SOLVERS = [(process, name) for process in (FLOW, GAUSSIAN) for name in process.solvers]
LABELS = [3, 0, 4]


def maker(kind=VideoDiT, **changes):
    """A network of random weights whose output depends on all that it is given."""
    network = fill_randomly(kind(**{**SIZES, **changes}), std=0.3)
    return network.eval().requires_grad_(False)


def sampler_of(network, process=FLOW, name="euler", **options):
    """A Sampler on pixels, of a few steps, guided."""
    chosen = {"num_sampling_steps": 4, "cfg_scale": 2.0, "process": process, **options}
    return Sampler(network, PixelSpace(), None, sampler=name, **chosen)


def given_frames(places, process=FLOW, frames=4, count=1, seed=7):
    """Given frames of grey levels as pixels have them, those at `places` alone."""
    levels = torch.randint(256, (count, 3, frames, 8, 8), generator=torch.manual_seed(seed))
    mask = torch.zeros(count, frames, dtype=torch.bool)
    mask[:, places] = True
    return Given(levels / 127.5 - 1, mask, process.clean), levels.permute(0, 2, 3, 4, 1).numpy()


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A file with a network of clips of pixels, which has learned a flow."""
    network, path = maker(), tmp_path_factory.mktemp("clips") / "video.safetensors"
    said = Weights(network.state_dict(), network.config, None, process=FLOW.config)
    save_weights(path, said)
    return str(path)


# ---- the Sampler ----


@pytest.mark.parametrize("process, name", SOLVERS)
def test_given_frames_come_back_exactly_and_lead_the_others(process, name):
    sampler = sampler_of(maker(), process, name, cfg_interval=(0.0, 0.6))
    given, levels = given_frames([0, -1], process)
    clips = sampler.images(LABELS, given=given)
    assert clips.shape == (3, 4, 8, 8, 3) and clips.dtype == np.uint8
    assert (clips[:, [0, -1]] == levels[:, [0, -1]]).all()
    other = sampler.images(LABELS, given=given_frames([0, -1], process, seed=8)[0])
    assert (clips[:, 1:3] != other[:, 1:3]).any()


@pytest.mark.parametrize("process, name", SOLVERS)
def test_no_frame_given_is_nothing_given(process, name):
    sampler = sampler_of(maker(), process, name)
    none, _ = given_frames([], process)
    plain = sampler.latents(torch.tensor(LABELS), noise := noise_of(3))
    if name not in ("ddpm", "ddim", "sde", "sde-heun"):  # they draw from torch's generator
        assert torch.allclose(sampler.latents(torch.tensor(LABELS), noise, given=none), plain,
                              atol=1e-4)  # fmt: skip
    clips = sampler.images(LABELS)
    again = sampler.images(LABELS, given=none)
    assert abs(clips.astype(int) - again).max() <= 1


def noise_of(count, frames=4):
    return torch.randn(count, 3, frames, 8, 8, generator=torch.manual_seed(3))


@pytest.mark.parametrize("process", [FLOW, GAUSSIAN], ids=lambda process: process.name)
def test_the_network_sees_given_frames_clean_and_at_the_time_of_clean_data(process):
    network, seen = maker(), []
    forward = network.forward

    def recorded(x, t, *others, **named):
        seen.append((x.clone(), t.clone()))
        return forward(x, t, *others, **named)

    network.forward = recorded
    given, _ = given_frames([0, 2], process, count=3)
    sampler_of(network, process, process.usual).images(LABELS, given=given)
    assert len(seen) >= 4
    for x, t in seen:
        assert x.shape == (6, 3, 4, 8, 8) and t.shape == (6, 4)  # guided, and so doubled
        for half in (x[:3], x[3:]):
            assert torch.equal(half[:, :, [0, 2]], given.clips[:, :, [0, 2]])
        assert (t[:, [0, 2]] == process.clean).all()
        assert (t[:, [1, 3]] == t[0, 1]).all()
    assert seen[0][1][0, 1] != process.clean


def test_a_clip_does_not_depend_on_those_drawn_with_it():
    sampler, labels = sampler_of(maker(), name="sde"), torch.tensor(LABELS)
    given, _ = given_frames([1])

    def drawn(numbers):
        noise_fn = ImageNoise(5, numbers, "cpu")
        noise = noise_fn(torch.empty(len(numbers), *sampler.latent))
        return sampler.latents(labels[numbers.start : numbers.stop], noise, noise_fn, given=given)

    parts = torch.cat([drawn(range(1)), drawn(range(1, 3))])
    assert torch.allclose(parts, drawn(range(3)), atol=1e-4)


def test_a_clip_of_one_frame_and_one_of_many_are_drawn():
    network = maker()
    for frames in (1, 7):
        sampler = sampler_of(network, latent_shape=(3, frames, 8, 16))
        assert sampler.frames == frames and sampler.image_size == (8, 16)
        assert sampler.images(LABELS).shape == (3, frames, 8, 16, 3)


def test_frames_are_decoded_by_the_autoencoder_one_as_another(vae):
    network, space = maker(in_channels=4), load_vae(vae)
    sampler = Sampler(network, space, None, 2, "euler", process=FLOW)
    latents = torch.randn(2, 4, 4, 8, 8, generator=torch.manual_seed(0))
    clips = sampler.decode(latents)
    assert clips.shape == (2, 4, 16, 16, 3)
    alone = sampler.decode(frames_of(latents)[5:6])
    assert abs(clips[1, 1].int() - alone[0].int()).max() <= 1


def test_all_channels_are_guided_unless_told_otherwise():
    assert sampler_of(maker()).cfg_channels == "all"
    assert sampler_of(maker(), cfg_channels=1).cfg_channels == 1


def test_text_makes_clips():
    sizes = {key: value for key, value in SIZES.items() if key != "num_classes"}
    network = fill_randomly(TextVideo(**sizes, text_length=8), std=0.3).eval()
    clips = sampler_of(network).images(["a thick three", "seven"])
    assert clips.shape == (2, 4, 8, 8, 3) and (clips[0] != clips[1]).any()


@pytest.mark.parametrize("change, message", [
    (dict(mask=torch.ones(1, 3, dtype=torch.bool)), "mask of shape .1, 3.; what is drawn wants"),
    (dict(clips=torch.zeros(2, 3, 4, 8, 8)), "clips of shape .2, 3, 4, 8, 8.; what is drawn wants"),
])  # fmt: skip
def test_given_frames_of_another_shape_are_refused(change, message):
    given, _ = given_frames([0])
    with pytest.raises(ValueError, match=message):
        sampler_of(maker()).images(LABELS, given=given._replace(**change))


def test_part_of_a_patch_cannot_be_given():
    sampler = sampler_of(maker(patch_frames=2, attention="full"))
    with pytest.raises(ValueError, match="patches have 2 frames: give frames 0-1"):
        sampler.images(LABELS, given=given_frames([0])[0])
    given, levels = given_frames([2, 3])
    assert (sampler.images(LABELS, given=given)[:, 2:] == levels[:, 2:]).all()


# ---- from a checkpoint, and many in files ----


def test_the_number_of_frames_is_an_option(ckpt):
    options = dict(vae="none", steps=2, device="cpu")
    assert load_sampler(ckpt, **options).latent == (3, 4, 8, 8)
    assert load_sampler(ckpt, frames=6, **options).latent == (3, 6, 8, 8)
    sampler = load_sampler(ckpt, frames=2, image_size=(16, 8), **options)
    assert sampler.images(LABELS).shape == (3, 2, 16, 8, 3)


def many(folder, ckpt, *flags):
    """sample_ddp.main for three clips; the array in its .npz, and the folder."""
    sample_ddp.main([
        "--ckpt", ckpt, "--vae", "none", "--num-fid-samples", "3", "--steps", "2", "--device",
        "cpu", "--sample-dir", str(folder), *flags,
    ])  # fmt: skip
    (npz,) = folder.glob("*.npz")
    return np.load(npz)["arr_0"], npz.with_suffix("")


def test_many_clips_are_strips_and_one_npz(tmp_path, ckpt):
    clips, folder = many(tmp_path, ckpt, "--frames", "6")
    assert clips.shape == (3, 6, 8, 8, 3) and clips.dtype == np.uint8
    strip = np.asarray(Image.open(folder / "000001.png"))
    assert strip.shape == (8, 48, 3)
    assert (strip[:, 16:24] == clips[1, 2]).all()
    sampler = load_sampler(ckpt, vae="none", steps=2, device="cpu", cfg_scale=1.5, frames=6)
    labels = random_labels(0, range(3), 5)
    drawn = sampler.decode(sampler.numbered_latents(0, range(3), labels)).numpy()
    assert np.array_equal(clips, drawn)
    assert json.loads((folder / "manifest.json").read_text())["options"]["frames"] == 6


def test_the_split_into_batches_changes_nothing_and_a_job_goes_on(tmp_path, ckpt, capsys):
    whole, folder = many(tmp_path / "whole", ckpt)
    parts, _ = many(tmp_path / "parts", ckpt, "--per-proc-batch-size", "2")
    assert whole.shape == (3, 4, 8, 8, 3)
    assert abs(whole.astype(int) - parts).max() <= 1
    (folder / "000002.png").unlink()
    again, _ = many(tmp_path / "whole", ckpt)
    assert "2 of 3 clips are in" in capsys.readouterr().out
    assert np.array_equal(again, whole)


def test_frames_as_trained_go_on_in_the_folder_of_none_and_others_do_not(tmp_path, ckpt):
    _, plain = many(tmp_path, ckpt)
    _, same = many(tmp_path, ckpt, "--frames", "4")
    assert plain == same
    sample_ddp.main([
        "--ckpt", ckpt, "--vae", "none", "--num-fid-samples", "3", "--steps", "2", "--device",
        "cpu", "--sample-dir", str(tmp_path), "--frames", "2",
    ])  # fmt: skip
    assert len(list(tmp_path.glob("*.npz"))) == 2


# ---- one picture ----

TILE, LINE = 96 + MARGIN, 100 + MARGIN + 12  # of 8 pixels enlarged, and of one with its text


def drawn(ckpt, output, *flags):
    """sample.main for two classes, its file."""
    sample.main([
        "--ckpt", ckpt, "--vae", "none", "--steps", "2", "--device", "cpu", "--class-labels", "3",
        "1", "--output", str(output), *flags,
    ])  # fmt: skip
    return output


def tiles(frame, count=2):
    """The first `count` images in a row of a picture, back at 8 pixels."""
    starts = [MARGIN + i * TILE for i in range(count)]
    return np.stack([frame[MARGIN : MARGIN + 96 : 12, x : x + 96 : 12] for x in starts])


def test_a_gif_plays_the_clips_that_the_sampler_draws(tmp_path, ckpt, capsys):
    clip = read_clip(drawn(ckpt, tmp_path / "a.gif", "--frames", "3", "--frame-rate", "10"))
    assert "2 clips of 3 frames of 8x8 pixels" in capsys.readouterr().out
    assert clip.rate == 10 and len(clip.frames) == 3
    sampler = load_sampler(ckpt, vae="none", steps=2, device="cpu", cfg_scale=4.0, frames=3)
    clips = sampler.images([3, 1])
    assert len(np.unique(clips.reshape(-1, 3), axis=0)) < 200  # a GIF has them all
    got = np.stack([tiles(frame) for frame in clip.frames], axis=1)  # (N, F, H, W, 3)
    assert np.array_equal(got, clips)


def test_another_ending_is_a_strip_with_its_settings(tmp_path, ckpt):
    path = drawn(ckpt, tmp_path / "a.png", "--frame-rate", "12")
    clips = load_sampler(ckpt, vae="none", steps=2, device="cpu", cfg_scale=4.0).images([3, 1])
    with Image.open(path) as image:
        settings, pixels = json.loads(image.text["settings"]), np.asarray(image)
    assert (tiles(pixels, 4) == clips[0]).all()
    assert (settings["frames"], settings["frame_rate"], settings["cfg_channels"]) == (4, 12, "all")
    one = np.asarray(Image.open(drawn(ckpt, tmp_path / "b.png", "--frames", "1")))
    assert tiles(one).shape == (2, 8, 8, 3) and one.shape[1] == 2 * TILE + MARGIN


def test_a_video_plays_as_long(tmp_path, ckpt):
    pytest.importorskip("av", reason="videos need PyAV: pip install .[clips]")
    clip = read_clip(drawn(ckpt, tmp_path / "a.mp4", "--frame-rate", "5"))
    assert (len(clip.frames), clip.rate) == (4, 5)


def test_clips_go_to_a_gif_and_one_frame_to_a_picture_where_nobody_says(
    tmp_path, ckpt, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", ckpt, "--vae", "none", "--steps", "2", "--device", "cpu"]
    sample.main(flags)
    sample.main([*flags, "--frames", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {"sample.gif", "sample.png"}


@pytest.mark.parametrize("places, where", [(None, [0]), ("-1", [3]), ("0,3", [0, 3]),
                                           ("1-2", [1, 2])])  # fmt: skip
def test_frames_of_a_file_are_in_every_clip(tmp_path, ckpt, places, where):
    levels = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    write_gif(tmp_path / "given.gif", levels, 10)
    flags = [] if places is None else ["--given-frames", places]
    path = drawn(ckpt, tmp_path / "a.png", "--given", str(tmp_path / "given.gif"), *flags)
    pixels = np.asarray(Image.open(path))
    for top in (0, LINE):  # of each clip's row
        assert (tiles(pixels[top:], 4)[where] == levels[: len(where)]).all()


def test_a_folder_of_frames_of_another_size_is_cropped_as_training_does(tmp_path, ckpt, capsys):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, level in ((2, 40), (10, 200)):
        pixels = np.full((16, 32, 3), level, np.uint8)
        pixels[:, :8] = 0  # is cut away
        Image.fromarray(pixels).save(folder / f"{number}.png")
    flags = ["--given", str(folder), "--given-frames", "1-2"]
    pixels = np.asarray(Image.open(drawn(ckpt, tmp_path / "a.png", *flags)))
    assert (tiles(pixels, 4)[1] == 40).all() and (tiles(pixels, 4)[2] == 200).all()
    assert "16x32 pixels; it is scaled and cropped centrally to 8x8" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--given-frames", "0"], "--given-frames 0 goes with --given"),
    (["--given", "{dir}/no.gif"], "no.gif cannot be read as a clip"),
    (["--given", "{dir}/one.png", "--given-frames", "0-1"],
     "one.png has 1 of the 2 frames that --given-frames names"),
    (["--given", "{dir}/one.png", "--given-frames", "4"],
     "names frame 4, and the clip has 4: give numbers from 0 to 3"),
    (["--given", "{dir}/one.png", "--given-frames", "0,-4"], "names a frame twice"),
    (["--given", "{dir}/one.png", "--given-frames", "0-3"], "names all 4 frames"),
    (["--given", "{dir}/one.png", "--given-frames", "3-1"], "ends before it begins"),
    (["--given", "{dir}/one.png", "--given-frames", "1;2"], "names no frames"),
    (["--frame-rate", "51"], "--frame-rate is 51, and a GIF shows at most 50"),
    (["--frame-rate", "0"], "--frame-rate is 0"),
    (["--frames", "0"], "--frames is 0; it must be at least 1"),
    (["--frames", "4096", "--image-size", "4096"], "tokens, and a network of this width takes"),
    (["--trajectory", "{dir}/way.gif"], "this network makes clips; leave the flag out"),
    (["--output", "{dir}/a.xyz"], ".xyz is not an image format here"),
])  # fmt: skip
def test_what_cannot_be_had_is_told_before_anything_is_drawn(
    tmp_path, ckpt, capsys, flags, message
):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(SystemExit):
        drawn(ckpt, tmp_path / "a.gif", *[flag.format(dir=tmp_path) for flag in flags])
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"one.png"}


@pytest.mark.parametrize("given, output", [
    ("a.gif", "a.gif"), ("a.gif", "link.gif"), ("frames", "frames/1.png"),
])  # fmt: skip
def test_frames_that_are_given_are_not_replaced(tmp_path, ckpt, capsys, given, output):
    (tmp_path / "frames").mkdir()
    for name in ("a.gif", "frames/0.png", "frames/1.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "link.gif").symlink_to("a.gif")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        drawn(ckpt, tmp_path / output, "--given", str(tmp_path / given))
    assert "would change it; give another file" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_disk_that_is_full_is_named(tmp_path, ckpt, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (pictures, clip_files):  # where it is to lie, and where its parts are written
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(module, "write_whole", full)
            drawn(ckpt, tmp_path / "a.gif")
        told = capsys.readouterr().err
        assert f"cannot write {tmp_path / 'a.gif'}" in told and "No space left" in told
        assert ("set TMPDIR" in told) is (module is clip_files)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "count"), [("a.mp4", 580), ("a.gif", 2320), ("a.webp", 160)])
def test_what_is_too_large_for_a_file_is_told_before_anything_is_drawn(
    tmp_path, ckpt, capsys, monkeypatch, name, count
):
    pytest.importorskip("av", reason="videos need PyAV: pip install .[clips]")
    monkeypatch.setattr(Sampler, "seeded_trajectory", None)
    with pytest.raises(SystemExit):
        drawn(ckpt, tmp_path / name, "--class-labels", *["1"] * count)
    assert f"{name[1:]} takes at most" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [
    ["--frames", "2"], ["--frame-rate", "9"], ["--given", "x.png"], ["--given-frames", "0"],
    ["--output", "x.mp4"],
])  # fmt: skip
def test_options_of_clips_are_not_for_networks_of_images(tmp_path, capsys, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = ROOT / "examples" / "digits"
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(digits / "dit.safetensors"), "--vae", str(digits / "vae"),
                     "--device", "cpu", *flags])  # fmt: skip
    assert flags[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_frames_of_whole_patches_are_asked_for(tmp_path, capsys):
    network = maker(patch_frames=2, attention="full")
    path = tmp_path / "tubes.safetensors"
    save_weights(path, Weights(network.state_dict(), network.config, None, process=FLOW.config))
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    for flags, message in (
        (["--frames", "5"], "--frames 5 is not a multiple of 2, the frames of a patch"),
        (["--given", str(tmp_path / "one.png")], "patches have 2 frames: give frames 0-1"),
    ):
        with pytest.raises(SystemExit):
            drawn(str(path), tmp_path / "a.gif", *flags)
        assert message in capsys.readouterr().err


def test_clips_play_as_fast_as_those_of_the_run(tmp_path):
    network, path = maker(), tmp_path / "run.pt"
    args = {"frame_rate": 12.0, "frame_stride": 2}
    save_checkpoint(
        path, {"ema": network.state_dict(), "args": args, "step": 3, "config": network.config}
    )
    assert read_clip(drawn(str(path), tmp_path / "a.gif", "--process", "diffusion")).rate == 6
    assert load_sampler(path, vae="none", device="cpu").frame_rate == 6
    assert sampler_of(network).frame_rate is None
