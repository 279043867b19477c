"""Clips on disk: what is written comes back, and what cannot be read is told by name."""

import os
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS

from conftest import ROOT
from runtime import clip_files
from runtime.clip_files import (
    CLIP_SUFFIXES, FRAME_SUFFIXES, ClipInfo, natural, probe_clip, probe_clips, read_clip,
    read_frames, walk_clip, write_gif, write_mp4,
)  # fmt: skip


def few_colours(frames=7, height=9, width=11):
    """A clip of random pixels in three colours, two frames of which are alike."""
    draw = np.random.default_rng(0)
    colours = np.array([[0, 0, 0], [255, 10, 3], [40, 90, 255]], np.uint8)
    clip = colours[draw.integers(0, 3, (frames, height, width))]  # (F, H, W, 3)
    clip[3] = clip[2]
    return clip


def smooth(frames=12, height=32, width=48):
    """A clip of slopes that go on a little from frame to frame."""
    y, x = np.mgrid[:height, :width]
    slopes = [np.stack([4 * y + 3 * i, 4 * x, 250 - 2 * x - y], axis=-1) for i in range(frames)]
    return np.clip(slopes, 0, 255).astype(np.uint8)  # (F, H, W, 3)


def folder_of(path, clip, form="{}.png"):
    path.mkdir(parents=True)
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(path / form.format(number))
    return path


def test_a_gif_of_few_colours_comes_back_exactly(tmp_path):
    clip = few_colours()
    write_gif(tmp_path / "a.gif", clip, 10)
    frames, rate = read_clip(tmp_path / "a.gif")
    assert np.array_equal(frames, clip) and rate == 10
    assert probe_clip(tmp_path / "a.gif") == ClipInfo(7, 10, (9, 11))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 7 and image.info["loop"] == 0


def test_a_gif_of_many_colours_is_near(tmp_path):
    clip = smooth()
    write_gif(tmp_path / "a.gif", clip, 10)
    apart = np.abs(read_clip(tmp_path / "a.gif").frames.astype(int) - clip)
    assert 0 < apart.mean() < 4


@pytest.mark.parametrize("rate", [1, 7, 8, 24, 23.976, 30, 50])
def test_a_gif_keeps_time(tmp_path, rate):
    """Each frame ends within half a hundredth of a second of when the rate says."""
    write_gif(tmp_path / "a.gif", few_colours(40), rate)
    ends, now = [], 0.0
    with Image.open(tmp_path / "a.gif") as image:
        for number in range(image.n_frames):
            image.seek(number)
            now += image.info["duration"] / 1000
            ends.append(now)
    assert np.allclose(ends, np.arange(1, 41) / rate, atol=0.00501)
    told = read_clip(tmp_path / "a.gif").rate
    assert told == rate if isinstance(rate, int) else abs(told - rate) < 0.1


def test_a_gif_cannot_be_faster(tmp_path):
    with pytest.raises(ValueError, match="`frame_rate` is 60; a GIF shows at most 50 .*mp4"):
        write_gif(tmp_path / "a.gif", few_colours(), 60)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("write", "side"), [(write_gif, 2**16), (write_mp4, 2**14 + 2)])
def test_a_side_that_the_format_does_not_take_is_told(tmp_path, write, side):
    pytest.importorskip("av", reason="needs PyAV, .[clips]")
    for shape in ((1, 2, side, 3), (1, side, 2, 3)):
        with pytest.raises(ValueError, match="the frames of .* takes at most .* a side; ask for"):
            write(tmp_path / "a.gif", np.zeros(shape, np.uint8), 10)
    write(tmp_path / "a.gif", np.zeros((1, 16, 16, 3), np.uint8), 10)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("h264", [True, False])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_a_video_comes_back_about_right(tmp_path, monkeypatch, h264, height, width):
    av = pytest.importorskip("av", reason="needs PyAV, .[clips]")
    if not h264:
        monkeypatch.setattr(clip_files, "_has_h264", lambda: False)
    clip = smooth(height=height, width=width)
    write_mp4(tmp_path / "a.mp4", clip, 23.976)
    frames, rate = read_clip(tmp_path / "a.mp4")
    assert frames.shape == clip.shape and abs(rate - 23.976) < 1e-3
    assert np.abs(frames.astype(int) - clip).mean() < 3
    assert probe_clip(tmp_path / "a.mp4") == ClipInfo(12, rate, (height, width))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == ("h264" if h264 else "mpeg4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def container_of(path, clip, codec, turned=0):
    """Write frames as whatever container the name says, each frame by itself."""
    av = pytest.importorskip("av", reason="needs PyAV, .[clips]")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(("name", "codec"), [
    ("a.webm", "libvpx-vp9"), ("a.mkv", "mpeg4"), ("a.mov", "libx264"), ("a.AVI", "mpeg4"),
    ("a.mpg", "mpeg1video"),
])  # fmt: skip
def test_other_containers(tmp_path, name, codec):
    clip = smooth()
    try:
        container_of(tmp_path / name, clip, codec)
    except Exception as error:
        pytest.skip(f"this PyAV does not write {name}: {error}")
    frames, _ = read_clip(tmp_path / name)
    info = probe_clip(tmp_path / name)
    assert len(frames) == info.frames == 12 and info.size == (32, 48)
    assert np.abs(frames.astype(int) - clip).mean() < 12


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    clip = smooth()
    for name in ("concat:a.mp4", "http:b.mp4"):
        container_of(tmp_path / name, clip, "mpeg4")
        monkeypatch.chdir(tmp_path)
        assert len(read_clip(name).frames) == 12


def test_a_video_on_its_side_is_set_upright(tmp_path):
    clip = smooth()
    container_of(tmp_path / "flat.mp4", clip, "mpeg4")
    try:
        container_of(tmp_path / "a.mp4", clip, "mpeg4", turned=90)
    except AttributeError:
        pytest.skip("this PyAV cannot write which way is up")
    upright = np.rot90(read_clip(tmp_path / "flat.mp4").frames, 1, axes=(1, 2))
    assert np.array_equal(read_clip(tmp_path / "a.mp4").frames, upright)
    assert probe_clip(tmp_path / "a.mp4").size == (48, 32)


def test_a_folder_of_frames_in_natural_order(tmp_path):
    clip = few_colours(12)
    folder = folder_of(tmp_path / "clip", clip, "frame{}.png")
    (folder / "notes.txt").write_text("none of them")
    (folder / ".frame3.png").write_bytes(b"hidden")
    assert np.array_equal(read_clip(folder).frames, clip) and read_clip(folder).rate is None
    assert probe_clip(folder) == ClipInfo(12, None, (9, 11))
    names = ["a10", "a9", "b", "a", "a09", "10", "9"]
    assert sorted(names, key=natural) == ["9", "10", "a", "a09", "a9", "a10", "b"]


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    pixels = few_colours()[0]
    for name in ("a.png", "a.gif"):
        Image.fromarray(pixels).save(tmp_path / name)
        assert probe_clip(tmp_path / name) == ClipInfo(1, None, (9, 11))
        assert np.array_equal(read_clip(tmp_path / name).frames, pixels[None])
    see_through = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    see_through.save(tmp_path / "b.png")
    assert (read_clip(tmp_path / "b.png").frames == 255).all()


def test_single_frames_are_those_of_the_whole(tmp_path):
    clip = few_colours()
    write_gif(tmp_path / "a.gif", clip, 10)
    folder_of(tmp_path / "folder", clip)
    paths = [tmp_path / "a.gif", tmp_path / "folder"]
    if clip_files.is_installed("av"):
        write_mp4(tmp_path / "a.mp4", clip, 10)
        paths.append(tmp_path / "a.mp4")
    for path in paths:
        whole = read_clip(path).frames
        assert np.array_equal(read_frames(path, [5, 1, 2, 5]), whole[[1, 2, 5]])
        assert sum(1 for _ in walk_clip(path)) == 7
        with pytest.raises(ValueError, match=f"`clip` {path} .*it has no frame 7"):
            read_frames(path, [0, 7])


def broken(tmp_path):
    """Name → a file or folder that is no clip."""
    write_gif(tmp_path / "whole.gif", smooth(), 10)
    gif = (tmp_path / "whole.gif").read_bytes()
    contents = {
        "empty.gif": b"", "cut.gif": gif[: len(gif) // 2], "text.gif": b"no GIF at all",
        "empty.mp4": b"", "text.mp4": b"no video at all", "text.png": b"no picture",
        "what.xyz": b"?",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "bare").mkdir()
    folder = folder_of(tmp_path / "sizes", few_colours()[:2])
    Image.new("RGB", (4, 4)).save(folder / "2.png")
    folder_of(tmp_path / "rotten", few_colours()[:2])
    (tmp_path / "rotten" / "1.png").write_bytes(b"no picture")
    return [*contents, "bare", "sizes", "rotten", "nowhere.mp4", "nowhere.gif"]


def test_broken_clips_are_told_by_name(tmp_path):
    for name in broken(tmp_path):
        with pytest.raises(ValueError, match=f"`given` {tmp_path / name} ") as refused:
            read_clip(tmp_path / name, "given")
        assert len(str(refused.value).splitlines()) == 1, name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", ["pipe.gif", "pipe.mp4"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for look in (read_clip, probe_clip):
        with pytest.raises(ValueError, match="neither a file nor a folder"):
            look(tmp_path / name, "given")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_video_without_its_end_is_refused_before_it_is_decoded(tmp_path, share):
    av = pytest.importorskip("av", reason="needs PyAV, .[clips]")
    with av.open(
        str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}
    ) as container:  # its index comes first
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in smooth(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert probe_clip(tmp_path / "a.mp4").frames == 60
    (tmp_path / "a.mp4").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="a.mp4 cannot be read as a clip"):
        probe_clip(tmp_path / "a.mp4")


def test_many_are_looked_at_in_order(tmp_path):
    paths = []
    for number in range(1, 40):
        paths.append(tmp_path / f"{number}.gif")
        write_gif(paths[-1], few_colours()[:number], 5)
    paths.insert(7, tmp_path / "none.gif")
    found = probe_clips(paths)
    assert found.pop(7)[0] is None
    assert [(info.frames, why) for info, why in found][:6] == [(n, "") for n in range(1, 7)]


def test_without_pyav_a_video_is_refused_and_a_gif_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_files, "is_installed", lambda name: name != "av")
    wanted = r"a.mp4 is a video, which needs PyAV, and .* not installed; pip install .\[clips\]"
    for call in (read_clip, probe_clip, lambda path: probe_clips([path])):
        with pytest.raises(ValueError, match=wanted):
            call(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=wanted):
        write_mp4(tmp_path / "a.mp4", smooth(), 8)
    write_gif(tmp_path / "a.gif", smooth(), 8)
    assert len(read_clip(tmp_path / "a.gif").frames) == 12


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="needs PyAV, .[clips]")
    (tmp_path / "a.mp4").write_text("before")
    with pytest.raises(Exception, match="."):
        write_mp4(tmp_path / "a.mp4", smooth().astype(np.float32), 8)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.mp4", "before")]


def test_frames_are_what_torchvision_calls_images():
    assert set(FRAME_SUFFIXES) == set(IMG_EXTENSIONS) and not {*CLIP_SUFFIXES} & {*FRAME_SUFFIXES}


def test_only_a_video_loads_pyav():
    code = "import sys, runtime.clip_files, data.clips; print('av' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
