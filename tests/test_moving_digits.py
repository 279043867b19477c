"""The moving digits: what is drawn, and that the judge sees what is there, by closed forms."""

import json
import sys

import numpy as np
from PIL import Image
import pytest
import torch

from conftest import ROOT

EXAMPLE = ROOT / "examples" / "moving_digits"
sys.path[:0] = [str(EXAMPLE.parent / "digits"), str(EXAMPLE)]
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install .[digits]")

import continue_clips  # noqa: E402
import judge_clips  # noqa: E402
import make_moving_digits  # noqa: E402
import moving  # noqa: E402
import moving_judge  # noqa: E402
import tracks  # noqa: E402
import train_frames_autoencoder  # noqa: E402
import train_frames_classifier  # noqa: E402
from conditions.given import Given  # noqa: E402
from conditions.labels import random_labels  # noqa: E402
from data.listing import list_clips  # noqa: E402
from evaluation.features import load_extractor  # noqa: E402
from make_dataset import load_split  # noqa: E402
from runtime.clip_files import read_clip  # noqa: E402
from vae import load_vae  # noqa: E402


def heldout_clips(count, frames=16, seed=0):
    """Clips uint8 (count, F, 32, 32, 3) of held-out digits, their digits, starts and velocities."""
    _, _, digits, labels = load_split()
    starts, velocities = moving.draw_motion(count, np.random.default_rng(seed))
    ways = moving.places(starts, velocities, frames)
    clips = moving.render(moving.enlarge(digits[:count]), ways)
    return np.repeat(clips[..., None], 3, axis=-1), labels[:count], starts, velocities


# ---- how digits move ----


@pytest.mark.parametrize(("start", "velocity", "wanted"), [
    (3, 2, [3, 5, 7, 9]), (17, 2, [17, 17, 15, 13]), (1, -2, [1, 1, 3, 5]),
    (0, -1.5, [0, 1.5, 3, 4.5]), (18, 1, [18, 17, 16, 15]), (10, 0, [10, 10, 10, 10]),
    (9, 20, [9, 7, 13, 3]),
])  # fmt: skip
def test_digits_go_straight_and_turn_at_borders(start, velocity, wanted):
    found = moving.places(np.full((1, 2), start), np.full((1, 2), velocity), 4)
    assert np.allclose(found, np.stack([wanted, wanted], axis=-1))


def test_starts_and_velocities_are_as_said():
    starts, velocities = moving.draw_motion(5000, np.random.default_rng(0))
    speed = np.hypot(*velocities.T)
    assert 0 <= starts.min() < 0.1 and 17.9 < starts.max() <= 18
    assert 0.8 <= speed.min() < 0.81 and 1.99 < speed.max() <= 2
    assert np.abs(velocities.mean(axis=0)).max() < 0.05  # all directions alike


def test_the_centre_of_mass_moves_exactly_with_the_corner():
    digits = moving.enlarge(load_split()[0][:20])
    corners = np.random.default_rng(0).uniform(0, 18, (20, 5, 2))
    frames = moving.render(digits, corners).astype(float)
    mass = frames.sum(axis=(2, 3))
    centre = np.stack(
        [(frames.sum(axis=3) @ np.arange(32)), (frames.sum(axis=2) @ np.arange(32))], axis=-1
    ) / mass[..., None]  # fmt: skip
    box = digits.sum(axis=(1, 2))
    within = np.stack(
        [digits.sum(axis=2) @ np.arange(14), digits.sum(axis=1) @ np.arange(14)], axis=-1
    ) / box[:, None]  # fmt: skip
    assert np.abs(centre - corners - within[:, None]).max() < 0.02  # of rounding to grey levels


def test_a_digit_on_a_whole_pixel_is_drawn_as_it_is():
    digit = moving.enlarge(load_split()[0][:1])
    (frame,) = moving.render(digit, np.array([[[3.0, 18.0]]]))[0]
    assert np.array_equal(frame[3:17, 18:], np.uint8(digit[0] + 0.5))
    frame[3:17, 18:] = 0
    assert not frame.any()


# ---- the set ----


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "moving"
    flags = ["--output", str(folder), "--clips", "30", "--heldout", "12", "--frames", "5"]
    make_moving_digits.main(flags)
    return folder, flags


def test_the_set_has_folders_of_classes_without_loss_and_other_digits_held_out(made):
    train, labels, heldout, heldout_labels = load_split()
    for part, seed, digits, digit_labels, count in (
        ("train", 0, train, labels, 30), ("heldout", 1, heldout, heldout_labels, 12),
    ):  # fmt: skip
        listing = list_clips(made[0] / part, num_classes=10)
        assert len(listing.paths) == count
        for path, label in zip(listing.paths, listing.labels):
            number = int(path[-9:-4])
            clip = read_clip(path)
            assert clip.frames.shape == (5, 32, 32, 3) and clip.rate == 10
            assert int(listing.classes[label]) == digit_labels[number]
            digit = moving.enlarge(digits[number : number + 1])[0]
            wanted = make_moving_digits.make_clip(digit, 5, [0, seed, number])
            assert np.array_equal(clip.frames, np.repeat(wanted[..., None], 3, axis=-1))


def test_a_second_run_makes_what_is_missing_and_overwrites_nothing(made, capsys):
    files = sorted(made[0].rglob("*.gif"))
    kept, lost = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(b"mine")
    files[1].unlink()
    make_moving_digits.main(made[1])
    assert files[0].read_bytes() == b"mine" and files[1].read_bytes() == lost
    files[0].write_bytes(kept)
    make_moving_digits.main([*made[1], "--clips", "31"])  # more of the same
    assert len(sorted(made[0].rglob("*.gif"))) == len(files) + 1
    with pytest.raises(SystemExit):
        make_moving_digits.main([*made[1], "--seed", "1"])
    assert "give another folder" in capsys.readouterr().err
    assert files[0].read_bytes() == kept


# ---- the judge's arithmetic ----


def test_straight_lines_and_known_bounces_have_no_residual():
    starts, velocities = moving.draw_motion(60, np.random.default_rng(0))
    ways = moving.places(starts, velocities, 16) + [5.5, 8.25]
    off, speed = tracks.straightness(ways)
    assert off.max() < 1e-9 and np.abs(speed - np.hypot(*velocities.T)).max() < 1e-9
    assert tracks.straightness(moving.places(starts, velocities, 40))[0].max() < 1e-9  # windows
    one = np.stack([np.arange(16) * 0.5, np.full(16, 9.0)], axis=-1)[None]
    assert tracks.straightness(one)[1] == pytest.approx([0.5])


def test_noise_is_what_is_left_and_jumps_are_seen():
    source = np.random.default_rng(0)
    ways = moving.places(*moving.draw_motion(300, source), 16)
    for size in (0.05, 0.4):
        off, _ = tracks.straightness(ways + source.normal(0, size, ways.shape))
        rms = np.sqrt(np.mean(off**2)) / size
        assert np.sqrt(2 * 11 / 16) < rms < np.sqrt(2 * 14 / 16)  # 2 to 5 numbers are fitted
    jumped = ways + 3.0 * (np.arange(16) == 8)[:, None]
    assert np.median(tracks.straightness(jumped)[0]) > 0.7
    turned = ways.copy()
    turned[:, 8:] = ways[:, 8:9] - (ways[:, 8:] - ways[:, 8:9])  # back, in the middle of the field
    middle = (ways[:, 8] > 4).all(axis=1) & (ways[:, 8] < 14).all(axis=1)
    assert middle.sum() > 50 and np.median(tracks.straightness(turned[middle])[0]) > 1


def test_centres_are_those_of_squares_and_empty_frames_have_the_middle():
    clips = np.zeros((1, 2, 32, 32), np.uint8)
    clips[0, 0, 4:7, 10:20] = 200
    clips[0, 1] = tracks.FAINT
    assert np.allclose(tracks.centres(clips), [[[5, 14.5], [15.5, 15.5]]])


def test_going_on_by_closed_forms():
    frames = np.arange(10)
    way = np.stack([10 + 0.5 * frames, 20 - 0.25 * frames], axis=-1)[None]
    assert np.allclose(tracks.straight_on(way, 4), way)
    bounced = moving.fold(np.array([12, 3]) + 1.5 * frames[:, None])[None] + tracks.MIDDLE
    assert np.allclose(tracks.straight_on(bounced, 4), bounced)
    assert tracks.place_error(way, way, 4) == 0
    assert tracks.place_error(way + [3, 4], way, 4) == pytest.approx(5)
    gone = np.hypot(0.5, 0.25) * np.arange(1, 7)
    assert tracks.place_error(tracks.still(way, 4), way, 4) == pytest.approx(gone.mean())


# ---- the judge ----


@pytest.fixture(scope="module")
def reader():
    return load_extractor(str(EXAMPLE / "classifier"), "cpu")


def test_the_committed_classifier_reads_real_frames(reader):
    clips, digits, _, velocities = heldout_clips(60)
    found = moving_judge.judged(moving_judge.Clips(clips, digits), reader)
    assert found["frames read as the digit asked for"] > 0.97
    assert found["off a straight way, 90th percentile"] < 0.08
    assert found["speed, pixels a frame, median"] == pytest.approx(
        np.median(np.hypot(*velocities.T)), abs=0.02
    )


def test_the_judge_sees_what_is_wrong(reader):
    clips, digits, *_ = heldout_clips(60)
    changed = clips.copy()
    changed[:, 8:] = np.roll(clips, 1, axis=0)[:, 8:]  # halves of other clips
    wrong = moving_judge.judged(moving_judge.Clips(changed, (digits + 1) % 10), reader)
    assert wrong["frames read as the digit asked for"] < 0.25
    assert wrong["clips that keep one digit"] < 0.3 and wrong["off a straight way, median"] > 1
    changed[:, 0] = 0
    assert moving_judge.judged(moving_judge.Clips(changed, None), reader)[
        "frames that show nothing"
    ] == pytest.approx(1 / 16)


def test_the_committed_autoencoder_keeps_digits_and_their_places(reader):
    clips, digits, *_ = heldout_clips(60)
    space = load_vae(str(EXAMPLE / "vae"))
    assert space.shape == (4, 4)  # 32×32 pixels are 4×8×8
    again = moving_judge.through_autoencoder(clips, space, 0)
    off = tracks.centres(tracks.grey(again)) - tracks.centres(tracks.grey(clips))
    assert np.sqrt(np.square(off).mean()) < 0.05
    found = moving_judge.judged(moving_judge.Clips(again, digits), reader)
    assert found["frames read as the digit asked for"] > 0.97
    assert sum(p.stat().st_size for p in (EXAMPLE / "vae").iterdir()) < 3e6


@pytest.mark.parametrize("labels", ["random", "balanced"])
def test_labels_are_those_of_the_manifest(tmp_path, labels):
    clips, *_ = heldout_clips(12)
    np.savez(tmp_path / "some.npz", clips)
    assert moving_judge.read_clips(tmp_path / "some.npz", "samples").digits is None
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "manifest.json").write_text(
        json.dumps({"decides": {"labels": labels, "global_seed": 5}})
    )
    found = moving_judge.read_clips(tmp_path / "some.npz", "samples").digits
    wanted = random_labels(5, range(12), 10) if labels == "random" else torch.arange(12) % 10
    assert found.tolist() == wanted.tolist()


def test_the_door_judges_samples_real_clips_and_continuations(tmp_path, capsys):
    clips, digits, *_ = heldout_clips(20)
    np.savez(tmp_path / "clips.npz", clips)
    (tmp_path / "labels.txt").write_text("\n".join(map(str, digits)))
    shifted = np.concatenate([clips[:, :4], np.roll(clips[:, 4:], 2, axis=3)], axis=1)
    np.savez(tmp_path / "on.npz", shifted)
    output = tmp_path / "judged.json"
    flags = [
        "--samples", tmp_path / "on.npz", "--labels", tmp_path / "labels.txt", "--truth",
        tmp_path / "clips.npz", "--real", tmp_path / "clips.npz", "--output", output,
    ]  # fmt: skip
    judge_clips.main(list(map(str, flags)))
    found = json.loads(output.read_text())
    assert set(found) == {"samples", "real", "real, autoencoder"}
    assert found["samples"]["off the true place"] == pytest.approx(2, abs=0.5)  # but round borders
    assert found["samples"]["standing still"] > 3
    assert found["real"]["off a straight way, median"] < 0.05
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "|  | samples | real | real, autoencoder |"
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--samples or --real are wanted"),
    (["--real", "{}/clips.npz", "--truth", "x"], "--truth goes with --samples"),
    (["--samples", "{}/no.npz"], "cannot be read as an .npz"),
    (["--samples", "{}/small.npz"], "wanted are (N, F, 32, 32, 3), with 4 frames or more"),
    (["--samples", "{}/clips.npz", "--labels", "{}/labels.txt"], "has 2 lines"),
    (["--samples", "{}/clips.npz", "--labels", "{}/words.txt"], "has the line 'seven'"),
    (["--samples", "{}/clips.npz", "--truth", "{}/short.npz"], "give the clips that the samples"),
    (["--samples", "{}/clips.npz", "--truth", "{}/clips.npz", "--given-frames", "16"],
     "give fewer"),
    (["--samples", "{}/clips.npz", "--output", "{}/labels.txt"], "labels.txt exists already"),
])  # fmt: skip
def test_what_cannot_be_judged_is_one_line(tmp_path, capsys, flags, message):
    clips, *_ = heldout_clips(3)
    for name, some in (
        ("clips", clips), ("short", clips[:2]), ("small", clips[:, :, :16]),
    ):  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", some)
    (tmp_path / "labels.txt").write_text("1\n2\n")
    (tmp_path / "words.txt").write_text("1\n2\nseven\n")
    with pytest.raises(SystemExit) as stopped:
        judge_clips.main([flag.replace("{}", str(tmp_path)) for flag in flags])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("error:") == 1


# ---- going on ----


class Echo:
    """A Sampler of clips without a network: what is not given is its noise, shifted by the label.

    Latents (N, 3, F, 32, 32) are pixels / 255.
    """

    frames, makes_clips, image_size = 16, True, 32

    def conditions(self, digits):
        return torch.tensor(digits)

    def give(self, frames, places):
        clip = torch.zeros(1, 3, self.frames, 32, 32)
        clip[0, :, list(places)] = torch.from_numpy(frames).permute(3, 0, 1, 2) / 255
        return Given(clip, torch.isin(torch.arange(self.frames), torch.tensor(places))[None], 0.0)

    def latents(self, labels, noise, noise_fn, given):
        return given.held((noise * 0.05 + labels[:, None, None, None, None] / 10).clamp(0, 1))

    def decode(self, latents):
        return (latents * 255).round().byte().permute(0, 2, 3, 4, 1)  # (N, F, H, W, 3)


def test_clips_go_on_from_their_own_frames_and_digit_however_they_are_split():
    clips, digits, *_ = heldout_clips(7)
    made = continue_clips.go_on(Echo(), moving_judge.Clips(clips, digits), 4, 3, batch_size=3)
    again = continue_clips.go_on(Echo(), moving_judge.Clips(clips, digits), 4, 3, batch_size=7)
    other = continue_clips.go_on(Echo(), moving_judge.Clips(clips, digits), 4, 4, batch_size=7)
    assert np.array_equal(made, again) and not np.array_equal(made, other)
    assert np.array_equal(made[:, :4], clips[:, :4])
    assert np.allclose(np.median(made[:, 4:], axis=(1, 2, 3, 4)) / 25.5, digits, atol=0.2)


def test_the_door_writes_clips_for_the_judge(made, tmp_path, monkeypatch, capsys):
    folder = made[0] / "heldout"
    monkeypatch.setattr(continue_clips, "find_files", lambda *_: None)
    monkeypatch.setattr(continue_clips, "build_sampler", lambda *_: Echo())
    monkeypatch.setattr(Echo, "frames", 5)
    flags = ["--ckpt", "x", "--truth", str(folder), "--num-clips", "6"]
    output = tmp_path / "on.npz"
    continue_clips.main([*flags, "--output", str(output)])
    on = np.load(output)["arr_0"]
    paths = list_clips(folder, num_classes=10).paths[::2]  # 6 of 12
    assert np.array_equal(on[:, :4], [read_clip(path).frames[:4] for path in paths])
    capsys.readouterr()
    judge_clips.main(["--samples", str(output), "--truth", str(folder)])
    assert "frames read as the digit asked for" in capsys.readouterr().out  # the truth's
    for change, message in (
        ([], "exists already"), (["--output", str(tmp_path / "n"), "--given-frames", "5"], "fewer"),
        (["--output", str(tmp_path / "n"), "--truth", str(EXAMPLE)], "holds no clips"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            continue_clips.main([*flags, "--output", str(output), *change])
        assert message in capsys.readouterr().err
    monkeypatch.setattr(Echo, "frames", 16)
    with pytest.raises(SystemExit):
        continue_clips.main([*flags, "--output", str(tmp_path / "n")])
    assert "makes clips of 16 frames, those of --truth have 5" in capsys.readouterr().err
    for change, message in (
        ({"makes_clips": False}, "--ckpt x makes images"),
        ({"frames": 5, "image_size": 64}, "64 pixels, those of --truth have 32; give the --vae"),
    ):  # fmt: skip
        for name, value in change.items():
            monkeypatch.setattr(Echo, name, value)
        with pytest.raises(SystemExit):
            continue_clips.main([*flags, "--output", str(tmp_path / "n")])
        assert message in capsys.readouterr().err
        monkeypatch.setattr(Echo, "makes_clips", True)


# ---- training what is here ----


def test_the_scripts_train_save_and_overwrite_nothing(tmp_path, capsys):
    for script, first in (
        (train_frames_autoencoder, '"step": 3'), (train_frames_classifier, "step 3: loss"),
    ):  # fmt: skip
        folder = tmp_path / script.__name__
        flags = ["--output", str(folder), "--steps", "3"]
        script.main([*flags, *(["--batch-size", "2"] if "auto" in script.__name__ else [])])
        assert first in capsys.readouterr().out and (folder / "config.json").is_file()
        with pytest.raises(SystemExit):
            script.main(flags)
        assert "exists already" in capsys.readouterr().err
    assert load_vae(str(tmp_path / "train_frames_autoencoder")).shape == (4, 4)
    rows = load_extractor(str(tmp_path / "train_frames_classifier"), "cpu")(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    )
    assert rows.features.shape == (2, 64) and rows.logits.shape == (2, 10)


def test_a_frame_is_grey_and_as_networks_take_it():
    frames = moving.random_frames(moving.enlarge(load_split()[0][:4]), np.random.default_rng(0))
    batch = moving.as_batch(frames)
    assert batch.shape == (4, 3, 32, 32) and batch.min() == -1 and batch.max() <= 1
    assert torch.equal(batch[:, 0], batch[:, 2])
    assert Image.fromarray(frames[0]).getextrema()[1] > 150
