"""Cached latents of clips: what is written, on one and two processes and after kills, and windows
of it.
"""

import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch

import data
from data import cache_writer
from data.cache import CachedLatents, find_damage
from data.images import channels_first
from data.listing import list_clips
from data.options import DataOptions
from data.windows import Windows
import extract_latents
from runtime.clip_files import read_clip
from test_clips import SIZE, clip_of, folder, place  # noqa: F401
from test_latents import (  # noqa: F401
    contents_of, extract as extract_images, one_thread, small_chunks, vae,
)  # fmt: skip
from vae import from_uint8, load_vae

FRAMES = [7, 6, 5, 9, 5, 1, 1, 1]  # of the clips of the fixture `folder`, as they are listed


def extract(clips, output, vae, *flags):
    return extract_images(
        clips, output, vae, "--clips", "--image-size", str(SIZE), "--num-classes", "2", *flags
    )


def opened(latents, vae, **changes):
    settings = dict(latents=latents, image_size=SIZE, num_classes=2, frames=4, vae=vae)
    return data.open_source(DataOptions(**settings | changes))


@pytest.mark.parametrize("flags", [[], ["--frame-rate", "16"], ["--frame-rate", "4", "--no-flip"]])
def test_cached_moments_are_the_autoencoders(folder, tmp_path, vae, flags, capsys):
    """Those of each frame by itself, brought to the rate."""
    latents = extract(folder, tmp_path / "latents", vae, "--latents-dtype", "float32", *flags)
    cached, space, listing = CachedLatents(latents), load_vae(vae), list_clips(folder, 2)
    step = {0: 1, 2: 0.5, 3: 2}[len(flags)]
    row = 0
    for clip, path in enumerate(listing.paths):
        frames, rate = read_clip(path)
        step_here = step if rate else 1
        shown = [int(i * step_here) for i in range(100) if int(i * step_here) < len(frames)]
        shown = shown if len(frames) > 1 else [0]
        first, count, label, stored_rate = cached.clips[clip].tolist()
        assert (first, count, label) == (row, len(shown), listing.labels[clip])
        assert stored_rate == (rate or 0) / step_here
        for flip in range(1 if "--no-flip" in flags else 2):
            pixels = frames[shown][:, :, 2:-2]  # (F, H, W, 3)
            pixels = pixels[:, :, ::-1] if flip else pixels
            batch = torch.stack([channels_first(one) for one in pixels])
            wanted = torch.stack(space.moments(from_uint8(batch)), dim=1)  # (F, 2, C, h, w)
            found = torch.tensor(cached.moments[first : first + count, flip])
            assert torch.allclose(found, wanted, atol=1e-5)
        row += count
    assert row == len(cached) and find_damage(latents) == []
    assert f"8 clips, {row} frames, in {latents}" in capsys.readouterr().out


def test_windows_are_of_the_frames(folder, tmp_path, vae):
    latents = extract(folder, tmp_path / "latents", vae)
    source = opened(latents, vae, frame_stride=1)
    stored, labels = np.load(latents / "moments.npy"), list_clips(folder, 2).labels
    windows = Windows(FRAMES, FRAMES, [None] * 8, 4)
    firsts = np.cumsum(FRAMES) - FRAMES
    assert source.lengths == windows.lengths == [4] * 5 + [1] * 3 and source.sizes is None
    for index in range(8):
        for flip in (False, True):
            for chance in (0.0, 0.5, 0.99):
                moments, label, bad = source[index, flip, chance]
                rows = firsts[index] + windows.of(index, chance)
                wanted = stored[rows, int(flip)].transpose(1, 2, 0, 3, 4)  # (2, C, F, h, w)
                assert np.array_equal(moments.numpy(), wanted)
                assert label == labels[index] and bad == []
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again[3, True, 0.7][0], source[3, True, 0.7][0])
    assert len(pickle.dumps(source)) < 20_000 and again.hash == source.hash
    assert opened(latents, vae, data_path=folder).hash == source.hash


def test_a_cache_may_be_brought_to_a_lower_rate(folder, tmp_path, vae):
    latents = extract(folder, tmp_path / "latents", vae)
    slow = opened(latents, vae, frames=3, frame_rate=4)
    fast = opened(latents, vae, frames=3, frame_stride=2)
    assert torch.equal(slow[0, False, 0.0][0], fast[0, False, 0.0][0])


def test_the_cache_is_the_same_on_two_processes(folder, tmp_path, vae, monkeypatch):
    alone = contents_of(extract(folder, tmp_path / "one", vae))
    assert {"clips.npy", "labels.npy", "moments.npy", "manifest.json"} <= alone.keys()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        with monkeypatch.context() as patch:
            if rank == "0" and not (tmp_path / "two").exists():
                patch.setattr(cache_writer, "finish", lambda *_: None)
            extract(folder, tmp_path / "two", vae)
    assert contents_of(tmp_path / "two") == alone


def test_killed_extraction_goes_on_to_the_same_files(folder, tmp_path, vae, one_thread):
    alone = contents_of(extract(folder, tmp_path / "one", vae, "--frame-rate", "8"))
    for end in (1, 3):
        child = os.fork()
        if child == 0:
            count, write = iter(range(10)), cache_writer.write_whole

            def dying(path, how):
                if path.parent.name == "chunks" and next(count) == end - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                write(path, how)

            cache_writer.write_whole = dying
            extract(folder, tmp_path / "parts", vae, "--frame-rate", "8")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not (tmp_path / "parts" / "manifest.json").exists()
    assert contents_of(extract(folder, tmp_path / "parts", vae, "--frame-rate", "8")) == alone


def test_loader_processes_change_nothing(folder, tmp_path, vae, one_thread):
    place(folder / "bee" / "long.gif", clip_of(0, 12))  # chunks begin inside it
    alone = contents_of(extract(folder, tmp_path / "one", vae))
    assert contents_of(extract(folder, tmp_path / "two", vae, "--num-workers", "2")) == alone


def test_another_plan_is_refused(folder, tmp_path, vae, capsys):
    latents = extract(folder, tmp_path / "latents", vae)
    for flags, other in ((["--frame-rate", "4"], "frame_rate"), (["--no-flip"], "flip")):
        with pytest.raises(SystemExit):
            extract(folder, latents, vae, *flags)
        assert "holds latents with other" in (told := capsys.readouterr().err) and other in told
    with pytest.raises(SystemExit):
        extract_images(folder, latents, vae, "--image-size", str(SIZE), "--num-classes", "2")
    assert "clips" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    (["--sizes", "buckets"], "--sizes is buckets; --clips are squares: leave one out"),
    (["--text-encoder", "t5"], "--text-encoder reads the captions of images; leave it out with"),
    (["--frame-rate", "0"], "--frame-rate is 0.0; it must be from 0.01 to 1000"),
])  # fmt: skip
def test_flags_that_do_not_fit(folder, tmp_path, vae, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        extract(folder, tmp_path / "latents", vae, *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()


def test_a_rate_is_for_clips(folder, tmp_path, vae, capsys):
    with pytest.raises(SystemExit):
        extract_images(folder, tmp_path / "latents", vae, "--frame-rate", "8")
    assert "--frame-rate is for clips; pass --clips too" in capsys.readouterr().err


def test_unreadable_clips(folder, tmp_path, vae, capsys):
    broken = folder / "ape" / "broken.gif"
    broken.write_bytes(b"no GIF")
    with pytest.raises(SystemExit):
        extract(folder, tmp_path / "latents", vae)
    assert f"cannot read {broken}" in capsys.readouterr().err
    latents = extract(folder, tmp_path / "latents", vae, "--skip-bad-images")
    assert f"note: skipped unreadable clip {broken}" in capsys.readouterr().out
    assert len(opened(latents, vae)) == 8


def test_a_frame_that_cannot_be_read_stops_the_work(folder, tmp_path, vae, capsys):
    frame = folder / "ape" / "1" / "3.png"
    whole = frame.read_bytes()
    frame.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        extract(folder, tmp_path / "latents", vae)
    told = capsys.readouterr().err
    assert stopped.value.code == 1 and f"cannot read {frame.parent} (" in told
    assert "pass --skip-bad-images with a new --output" in told and "Traceback" not in told
    frame.write_bytes(whole)
    assert len(opened(extract(folder, tmp_path / "latents", vae), vae)) == 8


@pytest.mark.parametrize("flags", [[], ["--num-workers", "2"]])
def test_clips_that_break_off_are_skipped(folder, tmp_path, vae, capsys, one_thread, flags):
    """A frame of a folder, the rest of a GIF, and all of another, with their captions."""
    whole = CachedLatents(extract(folder, tmp_path / "whole", vae))
    listing = list_clips(folder, 2)
    for path in listing.paths:
        with open(f"{path.removesuffix('.gif').removesuffix('.png')}.txt", "w") as file:
            file.write(f"caption of {path[-8:]}\n")
    (folder / "ape" / "1" / "3.png").write_bytes(b"no picture")
    place(long := folder / "bee" / "long.gif", clip_of(0, 12))
    content = long.read_bytes()
    long.write_bytes(content[: len(content) * 2 // 3])
    (folder / "bee" / "none.gif").write_bytes(b"")
    bad = [folder / "ape" / "1", long, folder / "bee" / "none.gif"]
    latents = extract(folder, tmp_path / "latents", vae, "--skip-bad-images", *flags)
    told = capsys.readouterr().out
    cached = CachedLatents(latents)
    assert find_damage(latents) == [] and cached.manifest["clips"] == len(cached.clips) == 7
    assert [image.split(" (")[0] for image in cached.manifest["bad_images"]] == [*map(str, bad)]
    assert all(f"skipped unreadable clip {path} (" in told for path in bad)
    left = [number for number, path in enumerate(listing.paths) if path != str(bad[0])]
    for row, number in zip(cached.clips.tolist(), left, strict=True):
        for frame in range(row[1]):
            wanted = whole[int(whole.clips[number]["first"]) + frame, True][0]
            torch.testing.assert_close(cached[row[0] + frame, True][0], wanted)
    assert len(opened(latents, vae, data_path=folder)) == 7
    said = [json.loads(line) for line in (latents / "captions.jsonl").read_text().splitlines()]
    assert [text[0] for text in said] == [f"caption of {listing.paths[i][-8:]}" for i in left]
    texts = dict(condition="text", text_length=32)
    for index in range(7):
        one, other = (
            opened(latents, vae, **texts, **more)[index, False, 0.5][1].tokens
            for more in ({}, {"data_path": folder})
        )
        assert torch.equal(one, other)


def test_no_clip_at_all_is_refused(tmp_path, vae, capsys):
    for name in ("ape", "bee"):
        place(tmp_path / "clips" / name / "0", clip_of(0, 3))
        (tmp_path / "clips" / name / "0" / "2.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        extract(tmp_path / "clips", tmp_path / "latents", vae, "--skip-bad-images")
    assert "nor any other clip; mend one" in capsys.readouterr().err
    assert not (tmp_path / "latents" / "manifest.json").exists()


def test_clips_of_which_one_frame_is_left_are_told(folder, tmp_path, vae, capsys):
    extract(folder, tmp_path / "latents", vae, "--frame-rate", "1")
    told = capsys.readouterr().out
    assert "note: 3 clips have one frame at this rate, and training takes them for images" in told


def test_what_does_not_fit_training(folder, tmp_path, vae):
    latents = extract(folder, tmp_path / "latents", vae)
    images = extract_images(
        folder, tmp_path / "images", vae, "--image-size", str(SIZE), "--num-classes", "2"
    )
    with pytest.raises(ValueError, match="do not fit: the latents are of clips, for training with"):
        opened(latents, vae, frames=None)
    with pytest.raises(ValueError, match="`latents` .*: the latents are of images, for train"):
        opened(images, vae)
    with pytest.raises(ValueError, match=r"5 of 8 clips have fewer than the 19 .*: number 0 \(7\)"):
        opened(latents, vae, frame_stride=6)
    place(folder / "ape" / "new.gif", clip_of(0, 5))
    with pytest.raises(ValueError, match="`data_path` .* holds other files than the latents were"):
        opened(latents, vae, data_path=folder)


def test_damage_is_found(folder, tmp_path, vae):
    latents = extract(folder, tmp_path / "latents", vae)
    rows = np.load(latents / "clips.npy")
    for change in (lambda x: x[1:], lambda x: x[::-1], lambda x: x["first"]):
        np.save(latents / "clips.npy", change(rows.copy()))
        assert "clips.npy" in "; ".join(find_damage(latents))
        with pytest.raises(ValueError, match="clips.npy .*remove it and make it again"):
            CachedLatents(latents)
    (latents / "clips.npy").unlink()
    assert "clips.npy cannot be read" in "; ".join(find_damage(latents))


def test_captions_are_cached_with_clips(folder, tmp_path, vae):
    for path in folder.glob("*/*.png"):
        path.rename(folder / path.name)
    for path in list_clips(folder, 0).paths:
        with open(f"{path.removesuffix('.gif').removesuffix('.png')}.txt", "w") as file:
            file.write(f"caption of {path[-8:]}\n")
    latents = extract(folder, tmp_path / "latents", vae, "--num-classes", "0")
    lines = (latents / "captions.jsonl").read_text().splitlines()
    assert len(lines) == 8 and find_damage(latents) == []
    wanted = dict(num_classes=0, condition="text", text_length=32)
    source = opened(latents, vae, **wanted)
    plain = opened(folder and latents, vae, **wanted, data_path=folder)
    for index in range(8):
        moments, text, _ = source[index, False, 0.5]
        assert moments.shape[2] == source.lengths[index]
        assert torch.equal(text.tokens, plain[index, False, 0.5][1].tokens)
        said = json.loads(lines[index])
        assert torch.equal(text.tokens, source.texts.reader.encode(said).tokens)


def test_python_is_the_door(folder, tmp_path, vae):
    options = data.CacheOptions(
        folder, tmp_path / "made", image_size=SIZE, num_classes=2, vae=vae, num_workers=0,
        device="cpu", clips=True, frame_rate=8,
    )  # fmt: skip
    data.cache_latents(options)
    door = extract(folder, tmp_path / "door", vae, "--frame-rate", "8")
    assert contents_of(tmp_path / "made") == contents_of(door)
    extract_latents.main(["--verify", str(door)])
