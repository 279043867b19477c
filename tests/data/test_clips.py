"""Clips below a folder: which there are, and the windows of frames that training gets of them."""

from fractions import Fraction
import math
import pickle

import numpy as np
from PIL import Image
import pytest
import torch

import data
from data.buckets import ClipBatches, told_clips
from data.clips import ClipDataset, probed
from data.images import read_pixels
from data.listing import list_clips, list_images, sample_hash
from data.loader import make_loader
from data.options import DataOptions
from data.windows import Windows
from runtime.clip_files import read_clip, write_gif, write_mp4

SIZE = 8
LENGTHS = {"ape": [7, 5, 6], "bee": [9, 5]}  # frames of the clips of each class


def clip_of(number, frames, height=SIZE, width=SIZE + 4):
    """A clip whose frame i is of grey 20·i + number, but for a bright left edge."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[:] = (20 * np.arange(frames) + number)[:, None, None, None]
    clip[:, :, :4] += 5
    return clip


def place(path, clip, rate=8):
    """Write a clip as a GIF, a video, a folder of frames or, if it has one, a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        write_gif(path, clip, rate)
    elif path.suffix == ".mp4":
        write_mp4(path, clip, rate)
    elif path.suffix:
        Image.fromarray(clip[0]).save(path)
    else:
        path.mkdir()
        for number, frame in enumerate(clip):
            Image.fromarray(frame).save(path / f"{number}.png")


@pytest.fixture
def folder(tmp_path):
    """Five clips in two classes, GIFs but for one folder of frames, and three images."""
    for name, lengths in LENGTHS.items():
        for number, frames in enumerate(lengths):
            kind = "" if (name, number) == ("ape", 1) else ".gif"
            place(tmp_path / "clips" / name / f"{number}{kind}", clip_of(number, frames))
    for number in range(3):
        place(tmp_path / "clips" / "bee" / f"still{number}.png", clip_of(100 + number, 1))
    return tmp_path / "clips"


def opened(folder, **changes):
    settings = dict(data_path=folder, image_size=SIZE, num_classes=2, frames=4)
    return data.open_source(DataOptions(**settings | changes))


# ---- the list ----


def test_what_is_a_clip(tmp_path):
    place(tmp_path / "b" / "x.gif", clip_of(0, 2))
    place(tmp_path / "b" / "y.png", clip_of(0, 1))
    place(tmp_path / "b" / "frames10", clip_of(0, 3))
    place(tmp_path / "b" / "deep" / "er", clip_of(0, 3))
    place(tmp_path / "b" / "deep" / "z.GIF", clip_of(0, 1))  # by its ending alone
    place(tmp_path / "a" / "v.gif", clip_of(0, 2))
    for hidden in (tmp_path / "a" / ".w.gif", tmp_path / "a" / "song.svg", tmp_path / "n.gif"):
        hidden.write_bytes(b"left out")
    (tmp_path / "a" / "notes.txt").write_text("not looked at")
    listing = list_clips(tmp_path, 2)
    names = ["a/v.gif", "b/x.gif", "b/y.png", "b/deep/z.GIF", "b/deep/er", "b/frames10"]
    assert listing.paths == [str(tmp_path / name) for name in names]
    assert listing.labels == [0] + [1] * 5 and listing.classes == ["a", "b"]
    told = "; ".join(listing.notes)
    for note in ("1 .svg files", "1 hidden files", "1 loose clips beside the class folders"):
        assert f"left out {note}" in told
    assert len(sample_hash(listing.paths)) == 64


def test_without_classes_images_further_down_are_one_clip(tmp_path):
    place(tmp_path / "y.png", clip_of(0, 1))
    place(tmp_path / "clip", clip_of(0, 3))
    place(tmp_path / "more" / "a.gif", clip_of(0, 3))
    listing = list_clips(tmp_path, 0)
    assert listing.paths == [str(tmp_path / name) for name in ("clip", "more/a.gif", "y.png")]
    assert listing.labels == [0] * 3 and listing.classes is None


def test_wrong_folders_of_clips(tmp_path):
    (tmp_path / "a").mkdir()
    for classes, message in ((2, "no clips in a"), (0, r"holds no clips \(.mp4, .*.gif, .jpg")):
        with pytest.raises(ValueError, match=f"`data_path` {tmp_path}.*{message}"):
            list_clips(tmp_path, classes)
    with pytest.raises(ValueError, match="give one that holds one folder of clips per class"):
        list_clips(tmp_path / "nowhere", 2)


def test_images_are_listed_as_before(folder):
    assert [path.rpartition("/")[2] for path in list_images(folder, 2).paths] == [
        *(f"{number}.png" for number in range(5)), *(f"still{number}.png" for number in range(3)),
    ]  # fmt: skip
    notes = list_images(folder, 2).notes
    assert any(".gif files, which are clips and no images" in note for note in notes)


# ---- windows ----


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_window_is_met_and_no_other(stride):
    windows = Windows("ab", [12, 1], [8.0, None], 4, stride)
    span = 3 * stride + 1
    met = {tuple(windows.of(0, chance)) for chance in np.linspace(0, 1, 1000, endpoint=False)}
    assert met == {tuple(range(first, first + span, stride)) for first in range(12 - span + 1)}
    assert windows.lengths == [4, 1] and windows.of(1, 0.99).tolist() == [0]


@pytest.mark.parametrize(("rate", "wanted"), [(24, 8), (30, 8), (10, 25), (30000 / 1001, 10)])
def test_a_rate_shows_what_is_on_the_screen_then(rate, wanted):
    """Frame i of a clip brought to a rate is the one shown at i/rate seconds."""
    count = 50
    windows = Windows(["a"], [count], [rate], 2, 1, wanted)
    there = windows.counts[0]
    step = Fraction(rate).limit_denominator(10**6) / wanted
    shown = [math.floor(i * step) for i in range(count * 4) if i * step < count]
    assert there == len(shown)
    chances = (np.arange(there - 1) + 0.5) / (there - 1)
    assert [windows.of(0, chance).tolist() for chance in chances] == [
        shown[i : i + 2] for i in range(there - 1)
    ]
    assert bool(windows.notes) == (wanted > rate)


def test_a_rate_that_is_about_the_same_is_the_same():
    assert Windows("ab", [9, 9], [23.976, 24.2], 4).of(0, 0.0).tolist() == [0, 1, 2, 3]
    assert Windows("ab", [9, 9], [23.976, 24.2], 4, 1, 24).counts == [9, 9]


def test_several_rates_need_one():
    rates = [8.0, 24.0, 8.0, None, 30.0]
    with pytest.raises(ValueError, match=r"several rates.*: 8 \(2 clips\), 24 .*; give `fram"):
        Windows("abcde", [9] * 4 + [12], rates, 4)
    windows = Windows("abcde", [9, 27, 9, 9, 34], rates, 4, 1, 8)
    assert windows.counts == [9, 9, 9, 9, 10]
    assert windows.notes == ("1 clips say no frames per second, and are taken as they are",)
    Windows("abcde", [9, 9, 9, 9, 1], [8, 8, 8, None, 30], 4)  # of an image it does not count


def test_short_clips_are_told_by_name():
    names = [f"clip{number}" for number in range(9)]
    with pytest.raises(ValueError) as refused:
        Windows(names, [7, 2, 3, 4, 5, 6, 1, 5, 6], [None] * 9, 4, 2)
    assert str(refused.value) == (
        "7 of 9 clips have fewer than the 7 frames that `frames` 4 and `frame_stride` 2 take: "
        "clip1 (2), clip2 (3), clip3 (4), clip4 (5), clip5 (6), …; take these away, or lower "
        "`frames` or `frame_stride`"
    )
    with pytest.raises(ValueError, match="clip0 .7.; take.*") as refused:
        Windows(names[:1], [21], [24.0], 8, 1, 8)
    assert "at `frame_rate` 8" in str(refused.value)
    with pytest.raises(ValueError, match="`frames` is 4, and all 2 clips have one frame; leave"):
        Windows("ab", [1, 1], [None] * 2, 4)


# ---- pixels ----


def test_pixels_of_a_window_are_those_of_the_file(folder):
    source = opened(folder)
    assert len(source) == 8 and source.classes == ["ape", "bee"]
    assert source.lengths == [4, 4, 4, 4, 4, 1, 1, 1] and source.sizes is None
    paths = list_clips(folder, 2).paths
    for index, path in enumerate(paths):
        whole, length = read_clip(path).frames, source.lengths[index]
        for chance in (0.0, 0.4, 0.999):
            first = int(chance * (len(whole) - length + 1))
            middle = whole[first : first + length, :, 2:-2]  # (F, H, W, 3), cropped centrally
            for flip in (False, True):
                pixels, label, bad = source[index, flip, chance]
                wanted = middle[:, :, ::-1] if flip else middle
                assert pixels.dtype == torch.uint8 and pixels.shape == (3, length, SIZE, SIZE)
                assert np.array_equal(pixels.permute(1, 2, 3, 0).numpy(), wanted)
                assert label == int("bee" in path) and bad == []


def test_an_image_is_as_images_are(folder):
    source = opened(folder)
    path = source.listing.paths[5]
    pixels, *_ = source[5, False, 0.3]
    assert np.array_equal(pixels[:, 0].permute(1, 2, 0).numpy(), read_pixels(path, SIZE))


def test_frames_that_are_repeated_come_twice(folder):
    """At 16 frames per second of clips that have 8, each is there two times."""
    source = opened(folder, frame_rate=16)
    pixels, *_ = source[0, False, 0.0]
    grey = pixels[0, :, 0, -1].tolist()
    assert grey == [0, 0, 20, 20]
    assert any("some of their frames are repeated" in note for note in source.notes)


def test_sources_are_told_apart(folder, tmp_path):
    source = opened(folder)
    again = pickle.loads(pickle.dumps(source))
    assert again.hash == source.hash == opened(folder).hash and source.sample_hash
    assert torch.equal(again[0, True, 0.5][0], source[0, True, 0.5][0])
    place(folder / "ape" / "1" / "x", clip_of(0, 5))  # a folder of frames in a folder of frames
    longer = opened(folder)
    assert longer.hash != source.hash and len(longer) == 9
    (folder / "ape" / "1" / "x" / "4.png").unlink()
    assert opened(folder).hash != longer.hash  # though the names are the same


def test_unreadable_clips(folder):
    whole = len(opened(folder))
    (folder / "ape" / "broken.gif").write_bytes(b"no GIF")
    with pytest.raises(ValueError, match="cannot read .*broken.gif .*`skip_bad_images=True`"):
        opened(folder)
    source = opened(folder, skip_bad_images=True)
    assert len(source) == whole
    assert any("skipped unreadable clip" in note and "broken.gif" in note for note in source.notes)
    for path in folder.rglob("*.gif"):
        path.write_bytes(b"no GIF")
    # what breaks while it is learned from: one of as many frames stands in, here the folder's
    pixels, label, bad = source[0, False, 0.5]
    assert pixels.shape == (3, 4, SIZE, SIZE) and label == 0 and len(bad) == 2
    assert [path[-5:] for path, _ in bad] == ["0.gif", "2.gif"]
    strict = ClipDataset(source.listing, source.windows, SIZE)
    assert strict[0, False, 0.5][0] is None and len(strict[0, False, 0.5][2]) == 1
    for path in folder.rglob("*"):
        if path.suffix:
            path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read .* and 7 other clips; mend it"):
        probed(list_clips(folder, 2)._replace(paths=source.listing.paths), True)


def test_clips_have_one_size(folder):
    for sizes, flag in (("buckets", "aspect_buckets"), ("own", "pack")):
        with pytest.raises(ValueError, match=f"`frames` is 4, .* one size; leave out `{flag}`"):
            opened(folder, sizes=sizes)


def test_videos(tmp_path):
    pytest.importorskip("av", reason="needs PyAV, .[clips]")
    place(tmp_path / "a" / "v.mp4", clip_of(3, 10), 24)
    source = opened(tmp_path, num_classes=1, frame_stride=3)
    pixels, *_ = source[0, False, 0.0]
    apart = pixels[:, :, :, -1].float() - torch.tensor([3.0, 63, 123, 183])[None, :, None]
    assert apart.abs().max() < 12
    place(tmp_path / "a" / "w.mp4", clip_of(50, 12), 24)
    both = opened(tmp_path, num_classes=1)
    batches = ClipBatches(both.lengths, 2, 0, 0, 3)
    for step, (loaded, *_) in zip(batches, make_loader(both, batches, 2), strict=True):
        assert torch.equal(loaded, torch.stack([both[key][0] for key in step]))


# ---- steps ----


def keys(batch=2, seed=0, start=0, stop=40, **share):
    return list(ClipBatches([4, 1, 4, 4, 1, 4, 1, 4], batch, seed, start, stop, **share))


def test_a_step_has_clips_or_images_in_proportion():
    lengths = np.array([4, 1, 4, 4, 1, 4, 1, 4])
    steps = [lengths[[index for index, _, _ in step]] for step in keys()]
    assert all(len(set(step)) == 1 for step in steps)
    # Of five clips and three images an epoch has two steps and one
    epochs = np.array([step[0] for step in steps[:39]]).reshape(13, 3)
    assert (np.sort(epochs, axis=1) == [1, 4, 4]).all() and len(set(epochs[:, 0])) == 2
    lines = told_clips(lengths.tolist(), 4)
    assert lines == [
        "3 images; 5 clips of 4 frames",
        "note: 3 images are never seen: they do not fill a batch of 4",
    ]
    with pytest.raises(ValueError, match="3 and 5 clips .* do not fill one batch of 6; lower"):
        keys(batch=6)


def test_chances_depend_on_seed_step_and_sample_alone():
    whole = keys(seed=3)
    assert whole[17:] == keys(seed=3, start=17)
    assert whole != keys(seed=4)
    shares = [keys(seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert [one + other for one, other in zip(*shares)] == whole
    chances = [chance for step in whole for _, _, chance in step]
    assert len(set(chances)) == 80 and 0.4 < np.mean(chances) < 0.6


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(folder, workers):
    source = opened(folder)
    batches = ClipBatches(source.lengths, 2, 5, 0, 6)
    for step, (pixels, labels, bad) in zip(batches, make_loader(source, batches, workers)):
        items = [source[key] for key in step]
        assert torch.equal(pixels, torch.stack([item[0] for item in items]))
        assert pixels.shape == (2, 3, source.lengths[step[0][0]], SIZE, SIZE) and not bad
        assert labels.tolist() == [item[1] for item in items]


def test_captions_lie_beside_clips(folder):
    for path in folder.glob("*/*.png"):  # which would be the frames of one clip
        path.rename(folder / path.name)
    for path in list_clips(folder, 0).paths:
        stem = path.removesuffix(".gif").removesuffix(".png")
        with open(f"{stem}.txt", "w") as file:
            file.write(f"one of {stem[-3:]}\ntwo of {stem[-3:]}\n")
    source = opened(folder, condition="text", num_classes=0, text_length=16)
    assert source.lengths == [4, 4, 4, 4, 4, 1, 1, 1]
    inner, firsts = source.source, set()
    for chance in np.linspace(0, 1, 40, endpoint=False):
        pixels, text, _ = source[0, False, chance]
        assert torch.equal(text.tokens, source.texts.of(0, chance).tokens)
        firsts.add(int(pixels[0, 0, 0, -1]))
    windows = [inner[0, False, chance][0] for chance in np.arange(0, 1, 0.1)]
    assert firsts == {int(pixels[0, 0, 0, -1]) for pixels in windows} and len(firsts) == 4


def test_images_stay_as_they_were(folder):
    """Without `frames` the same folder is one of images."""
    source = data.open_source(DataOptions(folder, image_size=SIZE, num_classes=2))
    assert source.lengths is None and len(source) == 8 and source[0, False][0].shape == (3, 8, 8)
