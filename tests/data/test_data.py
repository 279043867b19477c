"""Folders, the centre crop against a computation of its own, broken files, and which image is seen
at which step.
"""
import collections
from fractions import Fraction
from functools import partial
import multiprocessing
import os
from pathlib import Path
import signal
import struct
import subprocess
import time
import zlib

import numpy as np
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
import pytest
import torch
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from data import images as data_images
from data import listing as data_listing
from data import loader
from data.batches import StepBatches, collate, steps_per_epoch
from data.images import ImageDataset, center_crop_arr, cover, read_all
from data.listing import Listing, list_images
from data.loader import LoaderFailed, make_loader


def noise_picture(width, height, seed=0, channels=3):
    """Noise of moderate contrast, so that no filter overshoots: uint8 (height, width, channels)."""
    levels = np.random.default_rng(seed).normal(128, 25, (height, width, channels))
    return np.clip(levels, 0, 255).astype(np.uint8)


def save(path, array, mode=None):
    """Write an array as an image; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return str(path)


# ---- the centre crop ----

def halve(array, axis):
    """Half as many pixels along an axis, each the mean of those whose centres lie in it (PIL's box
    filter).
    """
    old, new = array.shape[axis], array.shape[axis] // 2
    owner = np.floor((np.arange(old) + 0.5) * new / old).astype(int)
    assert old % 2 == 0 or new % 2, (
        "a centre would lie on an edge, where the last bit decides whose it is"
    )
    return np.stack(
        [array.take(np.flatnonzero(owner == i), axis).mean(axis) for i in range(new)], axis
    )


def crop_in_numbers(array, size):
    """The centre crop as its description has it, in float64 and without PIL: (H, W, 3) →
    (height, width, 3) for a size (height, width).
    """
    picture, (height, width) = array.astype(np.float64), size
    while picture.shape[0] >= 2 * height and picture.shape[1] >= 2 * width:
        picture = halve(halve(picture, 0), 1)
    rows, columns = picture.shape[:2]
    if Fraction(height, rows) >= Fraction(width, columns):
        scaled = (height, round(columns * height / rows))
    else:
        scaled = (round(rows * width / columns), width)
    batch = torch.from_numpy(picture).permute(2, 0, 1)[None]
    batch = F.interpolate(batch, scaled, mode="bicubic", antialias=True, align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return batch[0, :, top : top + height, left : left + width].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("width, height, size", [
    (64, 64, 64), (64, 64, 32), (128, 64, 32), (64, 256, 32), (63, 64, 32), (64, 63, 32),
    (31, 50, 16), (50, 31, 16), (10, 13, 16), (13, 10, 16), (199, 255, 50), (1023, 127, 16),
    (38, 106, 16), (1000, 5, 4), (5, 1000, 4), (7, 1000, 2), (1, 1, 8), (1, 9, 4), (47, 20, 3),
    (300, 260, 256),
])  # fmt: skip
def test_centre_crop_is_halved_scaled_and_cut(width, height, size):
    picture = noise_picture(width, height)
    cropped = np.array(center_crop_arr(Image.fromarray(picture), size))
    assert cropped.shape == (size, size, 3) and cropped.dtype == np.uint8
    # PIL rounds to whole levels after each pass; another filter, size or place is 10 and more away
    expected = crop_in_numbers(picture, (size, size))
    np.testing.assert_allclose(cropped, expected, atol=2.5, rtol=0)


@pytest.mark.parametrize("width, height, size", [
    (64, 64, (32, 64)), (64, 64, (64, 32)), (128, 128, (16, 32)), (100, 40, (24, 48)),
    (40, 100, (24, 48)), (31, 50, (16, 8)), (10, 13, (16, 24)), (256, 160, (32, 64)),
    (7, 1000, (4, 2)), (1, 9, (8, 4)), (300, 260, (200, 256)),
])  # fmt: skip
def test_an_image_covers_a_rectangle(width, height, size):
    picture = noise_picture(width, height)
    covering = np.array(cover(Image.fromarray(picture), size))
    assert covering.shape == (*size, 3) and covering.dtype == np.uint8
    np.testing.assert_allclose(covering, crop_in_numbers(picture, size), atol=2.5, rtol=0)


@pytest.mark.parametrize("most_pixels", [2**40, 300])
def test_nothing_from_outside_an_image_covers_a_size(monkeypatch, most_pixels):
    """A white image stays white: PIL's crop would add black."""
    monkeypatch.setattr(data_images, "MOST_PIXELS", most_pixels)
    draw = np.random.default_rng(0)
    for width, height, wide, high in draw.integers(1, 80, (300, 4)):
        covering = cover(Image.new("L", (width, height), 255), (high, wide))
        assert covering.size == (wide, high) and covering.getextrema() == (255, 255)


@pytest.mark.parametrize("side", [31, 32, 33, 63, 64, 65, 127, 128, 129, 500])
@pytest.mark.parametrize("other", [31, 64, 97, 501])
def test_centre_crop_always_has_the_size_asked_for(side, other):
    for size in (32, 33):
        assert center_crop_arr(Image.new("RGB", (side, other)), size).size == (size, size)
        assert center_crop_arr(Image.new("RGB", (other, side)), size).size == (size, size)


def test_image_of_the_right_size_stays_as_it_is():
    picture = noise_picture(48, 48)
    assert (np.array(center_crop_arr(Image.fromarray(picture), 48)) == picture).all()


# ---- listings ----

def empty_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(listing, root):
    return [path.removeprefix(f"{root}/") for path in listing.paths]


def test_one_folder_per_class(tmp_path):
    empty_files(
        tmp_path, "cat/2.png", "cat/1.JPG", "ant/in/deep.jpeg", "Bee/x.webp", "cat/notes.txt",
        "loose.png",
    )  # fmt: skip
    listing = list_images(tmp_path, 3)
    assert relative(listing, tmp_path) == [
        "Bee/x.webp", "ant/in/deep.jpeg", "cat/1.JPG", "cat/2.png",
    ]  # fmt: skip
    assert listing.labels == [0, 1, 2, 2] and listing.classes == ["Bee", "ant", "cat"]
    assert list_images(str(tmp_path), 1000) == listing  # fewer folders than classes are allowed


def test_without_classes_every_image_below_the_folder(tmp_path):
    empty_files(tmp_path, "b.png", "a/z/1.PNG", "a/2.jpeg", "c.txt", "d.png.bak", "README")
    (tmp_path / "folder.png").mkdir()
    listing = list_images(tmp_path, 0)
    assert relative(listing, tmp_path) == ["a/2.jpeg", "a/z/1.PNG", "b.png"]
    assert listing.labels == [0, 0, 0] and listing.classes is None


@pytest.mark.parametrize("num_classes", [0, 2])
def test_hidden_files_and_folders_are_left_out(tmp_path, num_classes):
    """Jupyter's copies and a Mac's shadows are no classes and no images."""
    hidden = [
        ".ipynb_checkpoints/1.png", "a/.ipynb_checkpoints/1.png", "a/._1.png", "b/.DS_Store",
        ".hidden.png",
    ]  # fmt: skip
    empty_files(tmp_path / ".data", "a/1.png", "b/2.png", *hidden)
    listing = list_images(tmp_path / ".data", num_classes)
    assert relative(listing, tmp_path / ".data") == ["a/1.png", "b/2.png"]
    assert listing.classes == (["a", "b"] if num_classes else None)
    assert [note.split("left out ")[1][:15] for note in listing.notes] == [
        "2 hidden files ",
        "2 hidden folder",
    ]


@pytest.mark.parametrize("num_classes", [0, 3])
def test_no_folder_is_listed_twice_by_links(tmp_path, num_classes):
    empty_files(tmp_path / "data", "a/1.png", "b/2.png")
    empty_files(tmp_path / "elsewhere", "3.png")
    links = {
        "a/up": "..", "b/self": ".", "c": "../elsewhere", "b/a": "../a", "a/b": "../b",
        "d": "../elsewhere",
    }  # fmt: skip
    for link, target in links.items():
        (tmp_path / "data" / link).symlink_to(target)
    listing = list_images(tmp_path / "data", num_classes)
    assert relative(listing, tmp_path / "data") == ["a/1.png", "b/2.png", "c/3.png"]
    assert listing.labels == ([0, 1, 2] if num_classes else [0] * 3)
    assert "left out 5 links to a folder that is listed by itself" in listing.notes[0]


def test_pipes_are_no_images(tmp_path):
    empty_files(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    (tmp_path / "a" / "3.png").symlink_to("2.png")
    listing = list_images(tmp_path, 1)
    assert (
        relative(listing, tmp_path) == ["a/1.png"]
        and "left out 2 pipes, sockets and devices" in listing.notes[0]
    )


@pytest.mark.parametrize("inside", [".", "a", "a/new/folder", "../data/results"])
def test_nothing_is_written_among_the_images(tmp_path, inside, monkeypatch):
    monkeypatch.chdir(empty_files(tmp_path / "data", "a/1.png"))
    with pytest.raises(
        ValueError, match="`results_dir` .* lies inside `data_path` .; .*|lies inside `data_path`"
    ):
        data_listing.check_outside(".", "results_dir", inside)
    data_listing.check_outside("a", "results_dir", "ab")
    Path("loop").symlink_to("loop")
    data_listing.check_outside("a", "results_dir", "loop")  # what makes a folder refuses it


def test_a_folder_as_deep_as_paths_go_and_links_to_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    for depth in range(1, 1500):  # makedirs goes by recursion
        os.mkdir(os.path.join("data", *["a"] * depth))
    (tmp_path / "data/a/loop").symlink_to("loop")
    (tmp_path / "data/a/loop.png").symlink_to("loop.png")
    assert relative(list_images("data", 0), "data") == ["a/loop.png"]
    subprocess.run(["rm", "-rf", "data"], check=True)  # which Python cannot


def test_what_else_is_left_out_is_counted(tmp_path):
    empty_files(tmp_path, "a/1.png", "a/2.HEIC", "a/3.gif", "a/4.gif", "a/notes.txt", "loose.jpg")
    notes = list_images(tmp_path, 1).notes
    assert [note.split("left out ")[1] for note in notes] == [
        "2 .gif files, which are clips and no images (docs/video.md)",
        "1 .heic files, a format that is not read",
        "1 loose images beside the class folders",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="not a folder; give one that holds images$"):
        list_images(tmp_path / "nothing", 0)
    with pytest.raises(
        ValueError, match="no images in b; left out: 1 .gif files.*One folder of images per class"
    ):
        list_images(empty_files(tmp_path / "other", "b/3.gif"), 1)


def test_order_is_that_of_torchvision(tmp_path):
    names = [
        f"{c}/{d}{i}.png"
        for c in ("b", "B", "a b", "é")
        for d in ("", "z/", "z.y/", "Z/q/")
        for i in (10, 9, 1)
    ]
    empty_files(tmp_path, *names)
    theirs, ours = ImageFolder(tmp_path), list_images(tmp_path, 4)
    assert ours.paths == [path for path, _ in theirs.samples] and ours.classes == theirs.classes
    assert ours.labels == [label for _, label in theirs.samples] and ours.notes == ()


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    empty_files(tmp_path, "a/1.png", "a/b/2.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"a/b cannot be read \(Permission denied\)"):
        list_images(tmp_path, 1)


@pytest.mark.parametrize("num_classes", [0, 2])
def test_missing_folder(tmp_path, num_classes):
    empty_files(tmp_path, "file.png")
    for path in (tmp_path / "none", tmp_path / "file.png"):
        with pytest.raises(ValueError, match=f"`data_path` {path} is not a folder; give one"):
            list_images(path, num_classes)


def test_folder_without_images(tmp_path):
    empty_files(tmp_path, "text.txt")
    with pytest.raises(ValueError, match=rf"`data_path` {tmp_path} holds no images \(.*\.jpg"):
        list_images(tmp_path, 0)
    with pytest.raises(
        ValueError,
        match=f"`data_path` {tmp_path}: .*One folder of images per class .*`num_classes=0`",
    ):
        list_images(tmp_path, 2)


def test_folder_of_loose_images_where_classes_are_wanted(tmp_path):
    empty_files(tmp_path, "1.png", "2.png")
    with pytest.raises(ValueError, match="`num_classes=0`"):
        list_images(tmp_path, 2)


def test_class_without_images_is_named(tmp_path):
    empty_files(tmp_path, "full/1.png", "hollow/1.txt")
    with pytest.raises(ValueError, match="hollow"):
        list_images(tmp_path, 2)


def test_more_classes_than_allowed_names_the_surplus(tmp_path):
    empty_files(tmp_path, *(f"{name}/1.png" for name in ["ant", "bee", "cat", "dog"]))
    with pytest.raises(
        ValueError,
        match="4 class folders, `num_classes` is 2: .* for cat, dog; pass `num_classes=4`",
    ):
        list_images(tmp_path, 2)
    assert list_images(tmp_path, 4).classes == ["ant", "bee", "cat", "dog"]


# ---- reading images ----

def listing_of(*paths):
    """A Listing of these files with labels 10, 11, 12 …"""
    return Listing([str(path) for path in paths], [10 + i for i in range(len(paths))], None)


def read(path, size, flip=False):
    """The image (3, size, size) of a readable file."""
    image, label, bad = ImageDataset(listing_of(path), size)[0, flip]
    assert label == 10 and bad == []
    assert image.dtype == torch.uint8 and image.shape == (3, size, size) and image.is_contiguous()
    return image


def test_image_as_red_green_blue_planes(tmp_path):
    picture = noise_picture(20, 20)
    image = read(save(tmp_path / "1.png", picture), 20)
    assert (image.numpy() == np.moveaxis(picture, 2, 0)).all()


def test_image_is_cropped(tmp_path):
    picture = noise_picture(40, 24)
    image = read(save(tmp_path / "1.png", picture), 24)
    assert (image.numpy() == np.moveaxis(picture, 2, 0)[:, :, 8:32]).all()


def test_flip_mirrors_left_and_right(tmp_path):
    path = save(tmp_path / "1.png", noise_picture(20, 20))
    assert torch.equal(read(path, 20, flip=True), read(path, 20).flip(2))
    assert not torch.equal(read(path, 20, flip=True), read(path, 20))


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("LA", "png"), ("1", "png"), ("L", "jpg")])
def test_grey_images(tmp_path, mode, suffix):
    levels = np.kron([[0, 255], [255, 0]], np.ones((8, 8))).astype(np.uint8)
    image = read(save(tmp_path / f"1.{suffix}", levels, mode), 16)
    assert np.abs(image.numpy().astype(int) - levels).max() <= 2  # the JPEG may be off by a little


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_levels(tmp_path, suffix):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257  # 257 = 65535 / 255
    image = read(save(tmp_path / f"1.{suffix}", levels), 16)
    assert np.abs(image.numpy().astype(int) - levels // 257).max() <= 1


def test_palette_image_gives_the_colours_rather_than_the_indices(tmp_path):
    colours = np.array([[250, 10, 20], [30, 200, 40], [50, 60, 255], [9, 9, 9]], dtype=np.uint8)
    indices = (np.arange(256) * 7 % 4).reshape(16, 16).astype(np.uint8)
    image = Image.fromarray(indices, "L")
    image.putpalette(colours.tobytes())
    for name in ("1.png", "1.gif"):
        image.save(tmp_path / name)
        assert (read(tmp_path / name, 16).numpy() == np.moveaxis(colours[indices], 2, 0)).all()


def test_what_is_transparent_is_white(tmp_path):
    """What lies under it is not seen, whatever the mode; half of it shows through by half."""
    picture = noise_picture(16, 16, channels=4)
    picture[:8, :, 3], picture[8:12, :, 3], picture[12:, :, 3] = 0, 255, 128
    image = np.moveaxis(read(save(tmp_path / "1.png", picture), 16).numpy(), 0, 2)
    assert (image[:8] == 255).all() and (image[8:12] == picture[8:12, :, :3]).all()
    assert np.abs(image[12:] - (picture[12:, :, :3] * (128 / 255) + 255 * (127 / 255))).max() <= 1
    grey = read(save(tmp_path / "2.png", picture, "LA"), 16)
    assert (grey[:, :8] == 255).all() and (grey[:, 8:12] < 255).any()


def test_a_transparent_colour_is_white(tmp_path):
    """PNG and GIF may name one colour, or one entry of the palette, that is transparent."""
    levels = np.kron([[10, 200], [200, 10]], np.ones((8, 8))).astype(np.uint8)
    for name, image in (
        ("grey", Image.fromarray(levels)),
        ("palette", Image.fromarray(levels).convert("P")),
    ):
        image.save(tmp_path / f"{name}.png", transparency=10)
        assert (
            read(tmp_path / f"{name}.png", 16).numpy() == np.where(levels == 10, 255, 200)
        ).all()


def png(path, header, rows, transparent):
    """Write a PNG chunk by chunk: Pillow cannot write these kinds."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    parts = [
        chunk(b"IHDR", header), chunk(b"tRNS", transparent), chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_a_transparent_colour_of_sixteen_bits_is_white(tmp_path):
    levels = np.kron([[0x1234, 0xC800], [0xC800, 0x1234]], np.ones((8, 8))).astype(">u2")
    for kind, channels in ((0, 1), (2, 3)):
        rows = b"".join(b"\0" + np.repeat(row, channels).tobytes() for row in levels)
        png(
            tmp_path / "1.png", struct.pack(">IIBBBBB", 16, 16, 16, kind, 0, 0, 0), rows,
            b"\x12\x34" * channels,
        )  # fmt: skip
        assert (read(tmp_path / "1.png", 16).numpy() == np.where(levels == 0x1234, 255, 0xC8)).all()


def test_sixteen_bit_portable_grey_maps(tmp_path):
    levels = np.arange(256, dtype=">u2").reshape(16, 16) * 257
    (tmp_path / "1.pgm").write_bytes(b"P5 16 16 65535\n" + levels.astype(">u2").tobytes())
    assert np.abs(read(tmp_path / "1.pgm", 16).numpy().astype(int) - levels // 257).max() <= 1


def test_opaque_images_with_an_alpha_channel_keep_their_pixels(tmp_path):
    picture = noise_picture(16, 16, channels=4)
    picture[..., 3] = 255
    image = read(save(tmp_path / "1.png", picture), 16)
    assert (image.numpy() == np.moveaxis(picture[..., :3], 2, 0)).all()


def test_a_long_text_in_a_png_is_passed_over(tmp_path):
    text, picture = PngInfo(), noise_picture(16, 16)
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.fromarray(picture).save(tmp_path / "1.png", pnginfo=text)
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert (read(tmp_path / "1.png", 16).numpy() == np.moveaxis(picture, 2, 0)).all()
    assert (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY) == limits


def test_a_strip_is_cropped_before_it_is_enlarged(monkeypatch):
    strip = Image.fromarray(noise_picture(4000, 2))
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a: sizes.append(size) or resize(self, size, *a)
    )
    monkeypatch.setattr(data_images, "MOST_PIXELS", 2**20)
    cropped = np.array(center_crop_arr(strip, 64))
    assert (
        sizes == [[64, 64]]
        and (cropped == np.array(center_crop_arr(strip.crop((1999, 0, 2001, 2)), 64))).all()
    )


def test_cmyk_images(tmp_path):
    inks = noise_picture(16, 16, channels=4)
    Image.fromarray(inks, "CMYK").save(tmp_path / "1.tif")
    cyan_magenta_yellow, black = inks[..., :3].astype(float), inks[..., 3:].astype(float)
    want = (255 - cyan_magenta_yellow) * (255 - black) / 255
    assert np.abs(np.moveaxis(read(tmp_path / "1.tif", 16).numpy(), 0, 2) - want).max() <= 1


# ---- unreadable images ----

BROKEN = {
    "cut.jpg": lambda whole: whole[: len(whole) // 2], "head.jpg": lambda whole: whole[:20],
    "text.png": lambda whole: b"not an image\n", "zero.png": lambda whole: b"",
}  # fmt: skip


@pytest.fixture
def broken(tmp_path):
    """Paths of files that no decoder takes."""
    whole = open(save(tmp_path / "whole.jpg", noise_picture(32, 32)), "rb").read()
    for name, damage in BROKEN.items():
        (tmp_path / name).write_bytes(damage(whole))
    return [str(tmp_path / name) for name in BROKEN] + [str(tmp_path / "gone.png")]


def test_unreadable_image_is_reported_with_its_path(broken):
    dataset = ImageDataset(listing_of(*broken), 16)
    for i, path in enumerate(broken):
        image, _, bad = dataset[i, False]
        assert image is None and [one.path for one in bad] == [path]
        assert bad[0].reason


def test_all_images_are_read_at_once_or_the_broken_one_is_named(tmp_path):
    whole = [save(tmp_path / "whole" / f"{i}.png", noise_picture(8, 8, i)) for i in range(3)]
    listing = list_images(tmp_path / "whole", 0)
    assert listing.paths == whole
    images = read_all(listing, 8)
    assert images.dtype == torch.uint8
    for i, image in enumerate(images):
        assert np.array_equal(image.permute(1, 2, 0), noise_picture(8, 8, i))
    bad = tmp_path / "whole" / "9.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read .*9\.png .*mend or remove it"):
        read_all(list_images(tmp_path / "whole", 0), 8)


def test_next_readable_image_stands_in(tmp_path, broken):
    a, b = (save(tmp_path / f"{seed}.png", noise_picture(16, 16, seed=seed)) for seed in (1, 2))
    dataset = ImageDataset(
        listing_of(broken[0], broken[1], a, broken[2], b, broken[3]), 16, skip_bad=True
    )
    cases = [
        (0, a, 12, [0, 1]), (1, a, 12, [1]), (2, a, 12, []), (3, b, 14, [2]), (5, a, 12, [3, 0, 1]),
    ]  # fmt: skip
    for index, stand_in, label, met in cases:
        image, got, bad = dataset[index, True]
        assert torch.equal(image, read(stand_in, 16, flip=True)) and got == label
        assert [one.path for one in bad] == [broken[i] for i in met]


def test_no_stand_in_unless_asked_for(tmp_path, broken):
    dataset = ImageDataset(
        listing_of(broken[0], save(tmp_path / "a.png", noise_picture(16, 16))), 16
    )
    image, _, bad = dataset[0, False]
    assert image is None and len(bad) == 1


def test_all_images_unreadable(broken):
    image, _, bad = ImageDataset(listing_of(*broken), 16, skip_bad=True)[2, False]
    assert image is None
    assert [one.path for one in bad] == broken[2:] + broken[:2]


def test_a_disk_that_is_gone_is_not_an_image_that_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(data_images, "MOST_UNREADABLE", 3)
    gone = [f"{tmp_path}/{i}.png" for i in range(9)]
    image, _, bad = ImageDataset(listing_of(*gone), 16, skip_bad=True)[2, False]
    assert image is None and [one.path for one in bad] == gone[2:5]
    told = data_images.unreadable(bad, skip_bad=True)
    assert "skip_bad_images" not in told and "none of the 3 images after it" in told
    assert "pass `skip_bad_images=True`" in data_images.unreadable(bad, skip_bad=False)


def test_collate():
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(3)]
    batch, labels, bad = collate(
        [(images[0], 5, []), (images[1], 6, ["x", "y"]), (images[2], 7, ["z"])]
    )
    assert (
        batch.shape == (3, 3, 2, 2)
        and batch.dtype == torch.uint8
        and batch[:, 0, 0, 0].tolist() == [0, 1, 2]
    )
    assert labels.tolist() == [5, 6, 7] and labels.dtype == torch.int64
    assert bad == ["x", "y", "z"]


def test_collate_has_no_images_if_one_is_lacking():
    batch, labels, bad = collate([(torch.zeros(3, 2, 2), 5, []), (None, 0, ["x"])])
    assert batch is None and len(labels) == 2 and bad == ["x"]


# ---- which image at which step ----

def stream(num_images=11, batch=4, seed=0, start=0, stop=10, **share):
    return list(StepBatches(num_images, batch, seed, start, stop, **share))


def indices(batches):
    return [[index for index, _ in pairs] for pairs in batches]


def flips(batches):
    return [[flip for _, flip in pairs] for pairs in batches]


@pytest.mark.parametrize(
    "num_images, batch, per_epoch", [(11, 4, 2), (12, 4, 3), (4, 4, 1), (7, 1, 7)]
)
def test_an_epoch_is_whole_batches_of_different_images(num_images, batch, per_epoch):
    assert steps_per_epoch(num_images, batch) == per_epoch
    seen = indices(stream(num_images, batch, stop=5 * per_epoch))
    assert all(len(one) == batch for one in seen)
    for epoch in range(5):
        once = sum(seen[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        assert len(set(once)) == per_epoch * batch and set(once) <= set(range(num_images))


def test_epochs_are_shuffled_anew():
    seen = indices(stream(64, 64, stop=20))
    assert len({tuple(order) for order in seen}) == 20
    assert list(range(64)) not in seen
    left_out = collections.Counter(
        i for one in indices(stream(5, 4, stop=100)) for i in set(range(5)) - set(one)
    )
    assert sorted(left_out) == [0, 1, 2, 3, 4]  # no image is left out for ever


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_all_processes_make_up_the_batch(world):
    shares = [stream(rank=rank, world_size=world) for rank in range(world)]
    assert [sum(step, []) for step in zip(*shares)] == stream()
    assert all(len(pairs) == 4 // world for share in shares for pairs in share)


@pytest.mark.parametrize("start", [1, 2, 3, 7, 10])
def test_resumed_stream_goes_on_where_it_stopped(start):
    assert stream(start=start) == stream()[start:]
    assert stream(start=start, rank=1, world_size=2) == stream(rank=1, world_size=2)[start:]


def test_number_of_steps():
    assert len(StepBatches(11, 4, 0, 3, 10)) == 7 == len(stream(start=3))
    assert len(StepBatches(11, 4, 0, 10, 10)) == len(StepBatches(11, 4, 0, 12, 10)) == 0


def test_stream_may_be_walked_again():
    batches = StepBatches(11, 4, 0, 1, 8)
    assert list(batches) == list(batches)


def test_seeds_give_other_orders_and_flips():
    orders = {str(indices(stream(64, 16, seed=seed))) for seed in range(5)}
    mirrors = {str(flips(stream(64, 16, seed=seed))) for seed in range(5)}
    assert len(orders) == len(mirrors) == 5
    # (seed, epoch) and (seed, step) are not added up anywhere
    assert indices(stream(64, 64, seed=0, start=1, stop=2)) != indices(
        stream(64, 64, seed=1, start=0, stop=1)
    )
    assert flips(stream(64, 64, seed=0, start=1, stop=2)) != flips(
        stream(64, 64, seed=1, start=0, stop=1)
    )


def test_half_of_the_images_are_mirrored():
    drawn = np.array(flips(stream(100, 100, stop=100)))
    assert drawn.shape == (100, 100) and abs(drawn.mean() - 0.5) < 4 * 0.5 / 100
    assert (np.abs(drawn.mean(0) - 0.5) < 0.25).all() and (np.abs(drawn.mean(1) - 0.5) < 0.25).all()
    assert all(type(flip) is bool and type(index) is int for index, flip in stream()[0])


def test_flips_depend_on_seed_and_step_alone():
    assert flips(stream(11, 4, seed=3)) == flips(stream(500, 4, seed=3, stop=99))[:10]


def test_flips_can_be_left_out():
    plain = stream(flip=False)
    assert indices(plain) == indices(stream()) and not np.any(flips(plain))


def test_too_few_images_for_one_batch():
    for call in (lambda: steps_per_epoch(3, 4), lambda: StepBatches(3, 4, 0, 0, 10)):
        with pytest.raises(
            ValueError, match="3 images do not fill one batch of 4; lower `global_batch_size`"
        ):
            call()


# ---- the loader ----

@pytest.fixture
def folder(tmp_path):
    """A listing of ten images in two classes, one of them unreadable."""
    for i in range(10):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", noise_picture(9, 8, seed=i))
    (tmp_path / "a" / "4.png").write_bytes(b"broken")
    return list_images(tmp_path, 2)


def loaded(listing, num_workers, **share):
    dataset = ImageDataset(listing, 8, skip_bad=True)
    return list(make_loader(dataset, StepBatches(len(dataset), 4, 5, 0, 6, **share), num_workers))


def test_workers_change_nothing(folder):
    alone, helped = loaded(folder, 0), loaded(folder, 2)
    assert len(alone) == len(helped) == 6
    for (images, labels, bad), (images_2, labels_2, bad_2) in zip(alone, helped):
        assert torch.equal(images, images_2) and torch.equal(labels, labels_2) and bad == bad_2
    assert any(bad for _, _, bad in alone)


def test_loader_brings_the_images_that_the_stream_names(folder):
    dataset = ImageDataset(folder, 8, skip_bad=True)
    share = dict(rank=1, world_size=2)
    for (images, labels, _), pairs in zip(
        loaded(folder, 0, **share), stream(10, seed=5, stop=6, **share), strict=True
    ):
        assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
        for image, label, pair in zip(images, labels, pairs, strict=True):
            assert torch.equal(image, dataset[pair][0]) and label == dataset[pair][1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_numbers_alone(folder, num_workers):
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loaded(folder, num_workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


# ---- workers in trouble ----


class Troubled(torch.utils.data.Dataset):
    """Items of numbers; item 3 calls trouble(), in the worker."""

    def __init__(self, trouble):
        self.trouble = trouble

    def __getitem__(self, i):
        if i == 3:
            self.trouble()
        return torch.zeros(4), 0, []


def walk(trouble, waiting=lambda seconds: None):
    return loader.read(make_loader(Troubled(trouble), [[i] for i in range(6)], 1), waiting)


def block(path):
    """Open a pipe into which nobody writes, as one waits for a network's disk."""
    os.open(path, os.O_RDONLY)


def test_a_worker_that_was_killed_is_said_and_not_waited_for():
    with pytest.raises(
        LoaderFailed, match=r"DataLoader worker .*memory is short.*fewer --num-workers"
    ):
        list(walk(kill_myself))


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def no_memory():
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"
    )


def test_workers_that_cannot_start_are_said_and_ended(monkeypatch):
    start, started = multiprocessing.Process.start, []

    def refuse(self):
        if started:
            raise OSError(28, "No space left on device")
        started.append(self)
        start(self)

    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    before = set(multiprocessing.active_children())
    with pytest.raises(LoaderFailed, match="cannot start .No space left on device.*/dev/shm"):
        list(loader.read(make_loader(Troubled(lambda: None), [[i] for i in range(6)], 2)))
    assert not set(multiprocessing.active_children()) - before


def test_waiting_is_said_once_a_minute(capsys):
    for seconds in np.arange(5.0, 200.0, 5.0):
        loader.say_waiting(seconds)
    assert [line.split(" s:")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"no batch for {seconds}" for seconds in (60, 120, 180)
    ]


def test_too_little_shared_memory_is_said():
    with pytest.raises(
        LoaderFailed, match="too little shared memory: /dev/shm .*pass `num_workers=0`"
    ):
        list(walk(no_memory))


def test_workers_put_batches_where_the_trainer_reads_them(monkeypatch):
    """In the worker itself, where a lack of memory is noticed."""
    batches = [batch for batch, _, _ in walk(lambda: None)]
    assert len(batches) == 6 and all(batch.is_shared() for batch in batches)
    assert not collate([(torch.zeros(4), 0, [])])[0].is_shared()


def test_a_blocked_worker_is_told_and_then_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "WAIT", 0.2)
    monkeypatch.setattr(loader, "GRACE", 0.2)
    os.mkfifo(tmp_path / "pipe")
    waited, before = [], set(multiprocessing.active_children())

    def waiting(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(walk(partial(block, tmp_path / "pipe"), waiting))
    assert 0.2 <= waited[0] < waited[1]
    assert not set(multiprocessing.active_children()) - before and time.monotonic() - began < 10
