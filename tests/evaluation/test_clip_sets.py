"""evaluate.py --frames: sets of clips, the distance of what a network makes of them, and what users
get wrong.
"""

from dataclasses import replace
import json

import numpy as np
from PIL import Image
import pytest
from scipy.linalg import sqrtm
import torch

from conftest import ROOT
import evaluate
from evaluation.clip_distance import evaluate_clips
from evaluation.clip_sets import ClipOptions, Frames, open_clips
from evaluation.options import EvaluationOptions
from evaluation.report import evaluate as evaluate_images
from runtime.clip_files import write_gif
from test_evaluate import fresh_accelerator, refused  # noqa: F401

FOUR = ClipOptions(frames=4)
CLASSIFIER = str(ROOT / "examples" / "digits" / "classifier")
QUICK = ["--device", "cpu", "--num-workers", "0", "--batch-size", "7"]


class Means(torch.nn.Module):
    """Of each frame's three channels the mean, and of the clip's last step: (N, 3·F + 1)."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        step = (clips[:, :, -1] - clips[:, :, -2]).square().mean(dim=[1, 2, 3])  # (N,)
        return torch.cat([clips.mean(dim=[3, 4]).flatten(1), step[:, None]], dim=1)


class Odd(torch.nn.Module):
    """A row for each frame instead of each clip."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.mean(dim=[3, 4]).transpose(1, 2).flatten(0, 1)


class Lost(torch.nn.Module):
    """What takes images alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 2).flatten(1)


def clips_of(count, frames=6, side=8, seed=0):
    """Random clips uint8 (count, frames, side, side, 3) of few colours."""
    source = np.random.default_rng(seed)
    shades = source.integers(0, 256, (count, frames, 1, 1, 3))
    spread = source.integers(0, 2, (count, frames, side, side, 1)) * source.integers(1, 90)
    return np.uint8(np.clip(shades + spread, 0, 255))


def write_gifs(folder, clips, rate=10):
    folder.mkdir(parents=True)
    for i, clip in enumerate(clips):
        write_gif(folder / f"{i:04d}.gif", clip, rate)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of clips, each as a folder of GIFs and as an .npz, and networks of clips."""
    root = tmp_path_factory.mktemp("clips")
    for name, count, seed in (("samples", 40, 0), ("real", 50, 1)):
        clips = clips_of(count, seed=seed)
        write_gifs(root / name, clips)
        np.savez(root / f"{name}.npz", clips)
    for network in (Means, Odd, Lost):
        torch.jit.script(network()).save(root / f"{network.__name__.lower()}.ts")
    return root


def run(capsys, *flags):
    """What evaluate.main reports of these flags, and what it says beside it."""
    evaluate.main([*QUICK, *map(str, flags)])
    out, err = capsys.readouterr()
    return json.loads(out), err


def options(sets, **changes):
    given = EvaluationOptions(
        samples=sets / "samples", reference=sets / "real", features=str(sets / "means.ts"),
        batch_size=16, num_workers=0, device="cpu",
    )  # fmt: skip
    return replace(given, **changes)


def scipy_distance(ours, theirs):
    """The Fréchet distance of features (N, D) and (M, D), with a matrix root by SciPy."""
    means = ours.mean(axis=0) - theirs.mean(axis=0)
    a, b = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    return means @ means + np.trace(a + b - 2 * sqrtm(a @ b).real)


def features(clips, stride=1, frames=4):
    """What Means makes of clips uint8 (N, F, H, W, 3), in NumPy."""
    x = clips[:, : frames * stride : stride].astype(np.float64) / 127.5 - 1
    means = x.mean(axis=(2, 3)).transpose(0, 2, 1).reshape(len(x), -1)  # (N, 3·F)
    return np.hstack([means, ((x[:, -1] - x[:, -2]) ** 2).mean(axis=(1, 2, 3))[:, None]])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ending", ["", ".npz"])
def test_the_distance_is_scipys(sets, capsys, stride, ending):
    frames = 4 if stride == 1 else 3
    report, _ = run(
        capsys, "--samples", f"{sets}/samples{ending}", "--reference", f"{sets}/real{ending}",
        "--frames", frames, "--frame-stride", stride, "--features", sets / "means.ts",
    )  # fmt: skip
    sides = (features(clips_of(n, seed=seed), stride, frames) for n, seed in ((40, 0), (50, 1)))
    assert report["scores"]["frechet_distance"] == pytest.approx(scipy_distance(*sides), rel=1e-4)
    assert report["features"]["dimension"] == 3 * frames + 1
    assert (report["settings"]["frames"], report["settings"]["frame_stride"]) == (frames, stride)
    assert report["samples"]["clips"] == 40 and report["reference"]["size"] == [8, 8]


def test_a_folder_and_its_npz_have_the_same_pixels_and_no_distance(sets):
    report = evaluate_clips(options(sets, samples=sets / "real.npz"), FOUR)
    assert report["scores"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert report["scores"]["precision"] == report["scores"]["recall"] == 1
    hashes = {report[side]["sha256_of_pixels"] for side in ("samples", "reference")}
    assert len(hashes) == 1 and None not in hashes


def test_batches_and_workers_change_nothing(sets):
    first = evaluate_clips(options(sets), FOUR)
    second = evaluate_clips(options(sets, batch_size=3, num_workers=2), FOUR)
    assert first["samples"] == second["samples"]
    assert first["scores"] == pytest.approx(second["scores"], rel=1e-6)


def test_frames_alone_are_scored_as_images_are(sets, tmp_path):
    """Against images that are the clips' frames, in folders."""
    found = evaluate_clips(
        options(sets, features=CLASSIFIER), ClipOptions(frames=3, frame_stride=2, per_frame=True)
    )
    for name, count, seed in (("samples", 40, 0), ("real", 50, 1)):
        (tmp_path / name).mkdir()
        for i, frame in enumerate(clips_of(count, seed=seed)[:, :5:2].reshape(-1, 8, 8, 3)):
            Image.fromarray(frame).save(tmp_path / name / f"{i:04d}.png")
    images = options(
        sets, samples=tmp_path / "samples", reference=tmp_path / "real", features=CLASSIFIER
    )
    wanted = evaluate_images(images)
    assert found["scores"].pop("sfid") is wanted["scores"].pop("sfid") is None
    assert found["scores"] == pytest.approx(wanted["scores"], rel=1e-6)
    assert found["samples"]["sha256_of_pixels"] == wanted["samples"]["sha256_of_pixels"]


def test_each_clip_is_read_once_for_its_frames(sets, monkeypatch):
    clips = open_clips(sets / "samples", "samples", FOUR)
    read, own = [], clips.frames_of_clip
    monkeypatch.setattr(clips, "frames_of_clip", lambda i: read.append(i) or own(i))
    frames = Frames(clips)
    assert len(frames) == 160
    items = [frames[i][0] for i in range(12)]
    assert read == [0, 1, 2]
    wanted = clips_of(40)[:3, :4].reshape(-1, 8, 8, 3).transpose(0, 3, 1, 2)
    assert np.array_equal(torch.stack(items), wanted)


def test_what_is_worth_knowing_is_said(sets, capsys, tmp_path):
    write_gifs(tmp_path / "few", clips_of(9, side=6), rate=5)
    report, err = run(
        capsys, "--samples", tmp_path / "few", "--reference", sets / "real", "--frames", 4,
        "--features", sets / "means.ts",
    )  # fmt: skip
    assert any("9 clips of samples are too few for 13 features" in n for n in report["notes"])
    assert "samples are of 6x6 pixels, the reference of 8x8" in err
    assert "the first clip of samples has 5 frames a second, that of the reference 10" in err


@pytest.mark.parametrize(("changes", "message"), [
    ([], "--features inception is no file; with --frames it is a TorchScript file"),
    (["--features", "no.ts"], "no.ts is no file"),
    (["--features", "{sets}/odd.ts"], "returns (8, 3) on clips float32 (2, 3, 4, 8, 8)"),
    (["--features", "{sets}/lost.ts"], "it must return features (2, D)"),
    (["--features", "{sets}/real.npz"], "is no TorchScript file"),
    (["--features", "{sets}/means.ts", "--frames", "7"],
     "0000.gif has 6 frames; --frames asks for 7: leave short clips out, or ask for fewer"),
    (["--features", "{sets}/means.ts", "--frame-stride", "2"],
     "has 6 frames; --frames asks for 4, 2 apart, which is 7 in all"),
    (["--features", "{sets}/means.ts", "--samples", "{sets}/samples.npz", "--frames", "7"],
     "each clip of arr_0 has 6 frames"),
    (["--frames", "0"], "--frames is 0; it must be at least 1"),
    (["--frame-stride", "0"], "--frame-stride is 0; it must be at least 1"),
    (["--samples", "nowhere"], "nowhere: there is no such file or folder; give a folder of clips"),
    (["--samples", "{sets}/odd.ts"], "wanted is arr_0"),
    (["--make-reference", "{sets}/real"], "--make-reference does not go with --frames"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(sets, capsys, changes, message):
    flags = ["--samples", f"{sets}/samples", "--reference", f"{sets}/real", "--frames", "4"]
    flags += [word.replace("{sets}", str(sets)) for word in changes]
    assert message in refused(capsys, *flags)


def test_a_clip_of_another_size_and_a_damaged_one_are_named(sets, capsys, tmp_path):
    write_gifs(tmp_path / "a", clips_of(3))
    write_gif(tmp_path / "a" / "0001.gif", clips_of(1, side=6)[0], 10)
    flags = ["--reference", sets / "real", "--frames", 4, "--features", sets / "means.ts"]
    said = refused(capsys, "--samples", tmp_path / "a", *flags)
    assert "0001.gif is 6x6, " in said and "0000.gif is 8x8" in said
    (tmp_path / "a" / "0001.gif").write_bytes(b"GIF89a and no more")
    assert "0001.gif cannot be read as a clip" in refused(
        capsys, "--samples", tmp_path / "a", *flags
    )


def test_images_and_flags_without_frames_are_refused(sets, capsys, tmp_path):
    np.savez(tmp_path / "images.npz", clips_of(4)[:, 0])
    said = refused(
        capsys, "--samples", tmp_path / "images.npz", "--reference", sets / "real", "--frames", 4
    )
    assert "arr_0 is uint8 (4, 8, 8, 3); wanted are clips, uint8 (N, F, H, W, 3)" in said
    arrays = ["--samples", sets / "samples.npz", "--reference", sets / "real.npz"]
    said = refused(capsys, *arrays, "--features", "pixels")
    assert "wanted are images, uint8 (N, H, W, 3), or for clips --frames" in said
    both = ["--samples", sets / "samples", "--reference", sets / "real"]
    for flag in (["--per-frame"], ["--frame-stride", 2]):
        assert "goes with --frames; give both, or leave it" in refused(capsys, *both, *flag)
    for other in ("--clip", "--likelihood"):
        said = refused(capsys, "--samples", sets / "samples", other, "x", "--frames", 4)
        assert f"--frames does not go with {other}" in said
