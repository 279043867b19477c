"""examples/shapes: drawings against areas in closed form, and the data set that is made of them."""

from collections import Counter
import itertools
import json
import math
import sys

import numpy as np
from PIL import Image
import pytest

from conftest import ROOT

sys.path[:0] = [str(ROOT / "examples" / name) for name in ("shapes", "emoji")]

from colours import main_colour, name_of  # noqa: E402
from data.captions import read_captions  # noqa: E402
from data.listing import list_images  # noqa: E402
import drawing  # noqa: E402
from drawing import COLOURS, PLACES, SHAPES, SIZES, UNSEEN, Shape  # noqa: E402
import make_shapes  # noqa: E402

# Area of a shape whose half is 1. The heart's curve, 16 sin³ a and 13 cos a - 5 cos 2a - 2 cos 3a
# - cos 4a, encloses 180 π; a star's ten corners are ten triangles of 36 degrees at the middle.
AREAS = {
    "circle": math.pi, "square": (2 * 0.88) ** 2, "heart": 180 * math.pi / 16**2,
    "triangle": 1.8, "star": 5 * 0.45 * math.sin(math.pi / 5), "diamond": 2 * 0.75,
}  # fmt: skip


def shoelace(corners):
    """(area, perimeter) of a polygon."""
    x, y = np.transpose(corners)
    ahead = np.roll(x, -1), np.roll(y, -1)
    return abs((x * ahead[1] - y * ahead[0]).sum()) / 2, np.hypot(ahead[0] - x, ahead[1] - y).sum()


def coverage(image, colour):
    """How much of each pixel of a drawing is covered, (64, 64) from 0 to 1, by the blue channel."""
    return (255 - np.asarray(image, np.float64)[..., 2]) / (255 - COLOURS[colour][2])


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_enclose_what_their_formulas_say(shape):
    area, _ = shoelace(drawing.outline(shape, 3.0, -2.0, 7.0))
    assert area == pytest.approx(AREAS[shape] * 7**2, rel=2e-3)  # a circle of 100 corners


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_cover_what_the_outline_encloses(shape, size):
    """Up to the outline itself: it is drawn as well, which adds half of one of the finer pixels."""
    half = drawing.SIDE * SIZES[size]
    area, perimeter = shoelace(drawing.outline(shape, 0, 0, half))
    covered = coverage(drawing.drawn(Shape(shape, "red", size, "in the middle")), "red").sum()
    assert 0 < covered - area < perimeter / drawing.FINER
    assert covered == pytest.approx(AREAS[shape] * half**2, rel=0.07)


@pytest.mark.parametrize("place", PLACES)
def test_what_lies_where_it_is_said_to_lie(place):
    covered = coverage(drawing.drawn(Shape("circle", "blue", "small", place)), "blue")
    pixels = np.arange(drawing.SIDE) + 0.5
    x, y = ((covered.sum(axis=axis) * pixels).sum() / covered.sum() for axis in (0, 1))
    assert x < 26 if "left" in place else x > 38 if "right" in place else abs(x - 32) < 0.1
    assert y < 26 if "top" in place else y > 38 if "bottom" in place else abs(y - 32) < 0.1


def test_a_drawing_is_moved_and_enlarged_as_asked():
    shape = Shape("square", "green", "small", "in the middle")
    before = coverage(drawing.drawn(shape), "green")
    moved = coverage(drawing.drawn(shape, (0.125, -0.25)), "green")  # 8 to the right and 16 up
    assert np.abs(np.roll(before, (-16, 8), (0, 1)) - moved).max() < 0.02
    larger = coverage(drawing.drawn(shape, larger=2.0), "green")
    assert larger.sum() == pytest.approx(4 * before.sum(), rel=0.05)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_colours_are_what_they_are_called(shape, colour):
    image = np.asarray(drawing.drawn(Shape(shape, colour, "medium", "at the top")))
    assert tuple(main_colour(image)) == COLOURS[colour] and name_of(COLOURS[colour]) == colour
    assert (image[0] == 255).all() and image.shape == (64, 64, 3)  # on white


def test_captions_say_what_is_drawn():
    assert Shape("circle", "orange", "small", "at the top left").captions() == [
        "a small orange circle at the top left", "an orange circle",
        "orange circle at the top left", "a small orange circle",
    ]  # fmt: skip
    assert Shape("star", "red", "big", "on the left").captions()[1] == "a red star"


def test_every_combination_may_be_trained_on_but_the_unseen_pairs():
    seen, unseen = drawing.all_shapes(), drawing.all_shapes(unseen=True)
    assert {(shape.shape, shape.colour) for shape in unseen} == UNSEEN and len(UNSEEN) == 6
    assert Counter(shape for shape, _ in UNSEEN) == {"heart": 2, "circle": 2, "square": 2}
    every = itertools.product(SHAPES, COLOURS, SIZES, PLACES)
    assert sorted(seen + unseen) == sorted(every)


def test_no_unseen_pair_is_made(monkeypatch):
    monkeypatch.setattr(make_shapes, "drawn", lambda *_: None)
    names = [name for name, *_ in make_shapes.shape_images(copies=2)]
    pairs = {tuple(name.partition("-")[0].split("/")) for name in names}
    assert pairs == set(itertools.product(SHAPES, COLOURS)) - UNSEEN
    assert len(set(names)) == len(names) == 2 * len(drawing.all_shapes())


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder that the door has made of a few of all shapes."""
    monkeypatch.setattr(make_shapes, "all_shapes", lambda: drawing.all_shapes()[::31])
    make_shapes.main(["--output", str(tmp_path / "shapes")])
    return tmp_path / "shapes"


def test_the_door_makes_folders_of_classes_with_captions(made):
    images = {}
    for part in ("train", "heldout"):
        rows = map(json.loads, (made / part / "metadata.jsonl").read_text().splitlines())
        images[part] = {row["file_name"]: row["text"] for row in rows}
        files = {path.relative_to(made / part).as_posix() for path in (made / part).rglob("*.png")}
        assert files == images[part].keys()
        assert {path.name for path in (made / part).iterdir()} == {*SHAPES, "metadata.jsonl"}
    assert not images["train"].keys() & images["heldout"].keys()
    assert len(images["heldout"]) == math.ceil(sum(map(len, images.values())) / 5)
    for name, captions in images["train"].items():
        shape, colour = name.partition("-")[0].split("/")
        assert all(f"{colour} {shape}" in caption for caption in captions)
        image = np.asarray(Image.open(made / "train" / name).convert("RGB"))
        assert tuple(main_colour(image)) == COLOURS[colour]


@pytest.mark.parametrize("num_classes", [0, len(SHAPES)])
def test_training_finds_classes_and_captions(made, num_classes):
    listing = list_images(made / "train", num_classes)
    captions = read_captions(listing, made / "train")
    assert captions.missing == 0 and listing.classes == (sorted(SHAPES) if num_classes else None)
    for path, said in zip(listing.paths, captions):
        shape, colour = path.partition("train/")[2].partition("-")[0].split("/")
        assert said[1] == f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def test_a_second_run_leaves_files_alone_and_makes_what_is_missing(made, capsys):
    files = {path: path.stat().st_mtime_ns for path in made.rglob("*.*")}
    lost = sorted(made.rglob("*.png"))[3]
    content = lost.read_bytes()
    lost.unlink()
    capsys.readouterr()
    make_shapes.main(["--output", str(made)])
    now = {path: path.stat().st_mtime_ns for path in made.rglob("*.*")}
    assert now.keys() == files.keys()
    assert {path for path in now if now[path] != files[path]} == {lost}
    assert lost.read_bytes() == content
    assert f"shapes in {made / 'train'}" in capsys.readouterr().out


def test_a_file_in_the_way_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_shapes, "all_shapes", lambda: drawing.all_shapes()[:1])
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stopped:
        make_shapes.main(["--output", str(tmp_path / "taken")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and line.startswith("make_shapes.py: error: ")
    assert str(tmp_path / "taken") in line and (tmp_path / "taken").is_file()
