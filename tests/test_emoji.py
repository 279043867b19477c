"""examples/emoji: the set that is made of emoji, their colours, and the autoencoder."""

import colorsys
import gzip
import json
import sys
import tarfile

from diffusers import AutoencoderKL
import numpy as np
from PIL import Image, ImageDraw
import pytest
import torch

from conftest import ROOT
from data.images import read_all
from data.listing import list_images

sys.path[:0] = [str(ROOT / "examples" / "shapes"), str(ROOT / "examples" / "emoji")]

import colours  # noqa: E402
import drawing  # noqa: E402
from emoji_packages import EACH, SUBGROUPS, pack, write_packages  # noqa: E402
import make_emoji  # noqa: E402
import sources  # noqa: E402
import train_autoencoder  # noqa: E402
from vae import load_vae  # noqa: E402

resvg = pytest.importorskip("resvg_py", reason="needs resvg-py, .[emoji]")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder)
    return folder


@pytest.fixture(scope="module")
def made(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "emoji"
    make_emoji.main(["--output", str(folder), "--packages", str(packages)])
    return folder


def said(folder):
    """{file's name: captions}, of metadata.jsonl."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


# ---- the set ----


def test_every_emoji_of_unicode_is_there_in_its_order(packages):
    emojis = sources.all_emoji(packages)
    assert len(emojis) == len(SUBGROUPS) * EACH + 27  # without skin tones, and what has no group
    assert emojis[0].name == "smiling face a" and emojis[-1].name == "white square"
    assert {emoji.group for emoji in emojis} == set(sources.GROUPS)
    flag = next(emoji for emoji in emojis if emoji.group == "flags")
    assert list(flag.drawings) == ["noto", "twemoji"] and len(emojis[0].drawings) == 3


def test_each_subgroup_has_the_group_that_one_would_say():
    wanted = {
        "face-hat": "faces", "cat-face": "faces", "person-symbol": "people", "family": "people",
        "hand-prop": "hands", "hands": "hands", "animal-bug": "animals", "plant-other": "plants",
        "food-vegetable": "plants", "food-asian": "food", "dishware": "food", "hotel": "places",
        "place-map": "places", "transport-air": "transport", "transport-sign": "symbols",
        "sky-weather": "sky", "heart": "symbols", "emotion": "symbols", "keycap": "symbols",
        "country-flag": "flags", "subdivision-flag": "flags", "time": "things", "tool": "things",
        "household": "things", "clothing": "things",
    }  # fmt: skip
    assert {name: sources.group_of(name) for name in wanted} == wanted


def test_one_emoji_is_on_one_side_with_all_its_drawings(made):
    train, heldout = said(made / "train"), said(made / "heldout")
    names = [{name.rsplit("-", 1)[0] for name in part} for part in (train, heldout)]
    assert not names[0] & names[1]
    for part in ("train", "heldout"):
        files = {str(path.relative_to(made / part)) for path in (made / part).glob("*/*.png")}
        assert files == set(said(made / part))
    shares = sum(emoji.held_out for emoji in many_codes()) / len(many_codes())
    assert abs(shares - 0.2) < 0.02


def many_codes():
    return [sources.Emoji(f"1f{i:x}", "", (), "faces", {}) for i in range(5000)]


def test_left_out_colours_are_nowhere_in_training(made):
    for part in ("train", "words"):
        for name, captions in said(made / part).items():
            for shape, colour in drawing.UNSEEN:
                assert not any(f"{colour} {shape}" in caption for caption in captions), name
    held = " ".join(" ".join(captions) for captions in said(made / "heldout").values())
    assert all(f"{colour} {shape}" in held for shape, colour in drawing.UNSEEN)
    # And every other pair is trained on
    shown = " ".join(" ".join(captions) for captions in said(made / "train").values())
    seen = {(s, c) for s in ("heart", "circle", "square") for c in drawing.COLOURS} - drawing.UNSEEN
    assert len(seen) == 21 and all(f"{colour} {shape}" in shown for shape, colour in seen)


def test_words_have_trains_drawings_other_colours_and_shapes(made):
    words, train = said(made / "words"), said(made / "train")
    assert set(train) <= set(words)
    shapes = {name for name in words if name.startswith("shapes/")}
    assert len(shapes) == len(drawing.all_shapes())
    turned = set(words) - set(train) - shapes
    assert len(turned) > 100
    for name in turned:
        colour = name.removesuffix(".png").rsplit("-", 1)[1]
        image = np.asarray(Image.open(made / "words" / name))
        assert colours.name_of(colours.main_colour(image)) == colour
        assert all(colour in caption.split() for caption in words[name])
        thing = words[name][1].removeprefix(f"{colour} ")
        assert not make_emoji.is_left_out(thing, colour)
    groups = {name.split("/")[0] for name in turned}
    assert groups <= set(make_emoji.TURNED_GROUPS)


def test_what_is_shown_as_never_seen_is_left_out():
    assert make_emoji.SHOWN and all(make_emoji.is_left_out(*pair) for pair in make_emoji.SHOWN)
    asked = [make_emoji.is_left_out(f"thing {i}", "red") for i in range(4000)]
    assert abs(np.mean(asked) - 1 / make_emoji.LEFT_OUT) < 0.02


def test_captions_say_name_drawer_keywords_and_colour():
    apple = sources.Emoji("1f34e", "apple", ("fruit", "health", "food", "more"), "plants", {})
    assert make_emoji.captions_of(apple, "noto", "red") == [
        "an apple", "apple, noto", "fruit health food", "a red apple",
    ]  # fmt: skip
    heart = sources.Emoji("1f499", "blue heart", (), "symbols", {})
    assert make_emoji.captions_of(heart, "noto", "blue") == ["blue heart", "blue heart, noto"]
    assert make_emoji.plain("red apple") == "apple"


def test_the_notice_names_each_set_and_its_licence(made):
    notice = (made / "NOTICE.txt").read_text()
    assert notice.count("Some licence (https://example.org/licence)") == 3
    assert all(package in notice for package, _ in sources.SETS.values())


def test_what_is_there_is_left_alone(made, packages):
    path = next((made / "train").glob("*/*.png"))
    path.write_bytes(b"mine")
    make_emoji.main(["--output", str(made), "--packages", str(packages)])
    assert path.read_bytes() == b"mine"


def test_npm_is_asked_for_what_is_missing_alone(packages, tmp_path, monkeypatch):
    asked = []

    def pack(command, cwd, **_):
        asked.append(command)
        write_packages(cwd)
        return sources.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.shutil, "which", lambda _: "/bin/npm")
    monkeypatch.setattr(sources.subprocess, "run", pack)
    folder = tmp_path / "packages"
    sources.fetch(folder)
    wanted = [f"{name}@{version}" for name, version in sources.VERSIONS.items()]
    assert len(wanted) == 4 and asked == [["npm", "pack", "--silent", *wanted]]
    sources.fetch(folder)
    assert len(asked) == 1
    sources.archive(folder, sources.NAMES).unlink()
    sources.fetch(folder)
    assert asked[1] == ["npm", "pack", "--silent", "emojibase-data@17.0.0"]


@pytest.mark.parametrize("has_npm", [False, True])
def test_without_npm_or_network_one_line_says_so(tmp_path, monkeypatch, capsys, has_npm):
    monkeypatch.setattr(sources.shutil, "which", lambda _: "/bin/npm" if has_npm else None)
    failed = sources.subprocess.CompletedProcess([], 1, "", "npm error network is down\n")
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit):
        make_emoji.main(["--output", str(tmp_path / "emoji")])
    wanted = "network is down" if has_npm else "npm is not installed"
    assert wanted in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_package_is_named(tmp_path, capsys):
    write_packages(tmp_path)
    path = sources.archive(tmp_path, "@iconify-json/noto")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit):
        make_emoji.main(["--output", str(tmp_path / "emoji"), "--packages", str(tmp_path)])
    assert f"{path} is damaged" in capsys.readouterr().err.splitlines()[-1]


def refused(capsys, folder, packages):
    """The last line that make_emoji.py ends with, without a traceback."""
    with pytest.raises(SystemExit):
        make_emoji.main(["--output", str(folder), "--packages", str(packages)])
    return capsys.readouterr().err.splitlines()[-1]


def contents(path):
    """{name: contents} of a package."""
    with tarfile.open(path) as files:
        names = [name.removeprefix("package/") for name in files.getnames()]
        return {name: json.load(files.extractfile(f"package/{name}")) for name in names}


def without_bodies(files):
    for icon in files["icons.json"]["icons"].values():
        icon["other"] = icon.pop("body")


def broken_drawing(files):
    files["icons.json"]["icons"]["smiling-face-a"]["body"] = "<rect"


def without_licence(files):
    files["info.json"].pop("license")


def code_that_climbs(files):
    files["en/data.json"][-1]["hexcode"] = "../../1F300"


@pytest.mark.parametrize(
    "package, spoil, wanted",
    [
        ("@iconify-json/noto", without_bodies, "not laid out as"),
        ("@iconify-json/noto", without_licence, "not laid out as"),
        ("@iconify-json/noto", broken_drawing, "smiling face a of @iconify-json/noto cannot be"),
        (sources.NAMES, lambda files: files["en/data.json"].append([]), "not laid out as"),
        (sources.NAMES, code_that_climbs, "'../../1f300', and codes are hexadecimal"),
    ],
)
def test_packages_of_another_layout_are_one_line(tmp_path, capsys, package, spoil, wanted):
    write_packages(tmp_path)
    path = sources.archive(tmp_path, package)
    files = contents(path)
    spoil(files)
    pack(path, files)
    assert wanted in refused(capsys, tmp_path / "emoji", tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_a_package_whose_checksum_is_wrong_is_named(tmp_path, capsys, monkeypatch):
    """gzip's error of it is an OSError, and names no file."""
    write_packages(tmp_path)
    path = sources.archive(tmp_path, "@iconify-json/noto")

    def load(file):
        raise gzip.BadGzipFile("CRC check failed 0x1 != 0x2")

    monkeypatch.setattr(sources.json, "load", load)
    line = refused(capsys, tmp_path / "emoji", tmp_path)
    assert f"{path} is damaged (CRC check failed" in line


def test_without_resvg_nothing_is_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "is_installed", lambda name: name != "resvg_py")
    assert "pip install .[emoji]" in refused(capsys, tmp_path / "emoji", tmp_path / "packages")
    assert not list(tmp_path.iterdir())


def test_a_users_notice_stays_and_a_folder_that_cannot_be_is_told_first(
    packages, tmp_path, capsys, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(make_emoji, "all_images", lambda _: pytest.fail("it draws"))
    (tmp_path / "taken").write_text("")
    assert "taken" in refused(capsys, tmp_path / "taken", packages)
    monkeypatch.setattr(make_emoji, "all_images", lambda _: {})
    (tmp_path / "NOTICE.txt").write_text("mine")
    make_emoji.main(["--output", str(tmp_path), "--packages", str(packages)])
    assert (tmp_path / "NOTICE.txt").read_text() == "mine"


# ---- colours ----


@pytest.mark.parametrize("colour", drawing.COLOURS)
def test_each_colour_has_its_name_through_all_hues(colour):
    assert colours.name_of(drawing.COLOURS[colour]) == colour


def test_hues_have_one_name_each():
    """Full colours, by hand: what anybody calls them."""
    wanted = {0: "red", 30: "orange", 52: "yellow", 120: "green", 220: "blue", 280: "purple"}
    for hue, name in wanted.items():
        assert colours.name_of([255 * c for c in colorsys.hsv_to_rgb(hue / 360, 0.9, 1)]) == name
    assert colours.name_of((255, 105, 180)) is None  # pink
    assert colours.name_of((128, 128, 128)) is None


def disc(fill, side=64):
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).ellipse([8, 8, 56, 56], fill=fill)
    return image


@pytest.mark.parametrize("colour", colours.TURNED)
def test_a_drawing_turns_into_any_colour_and_keeps_the_rest(colour):
    image = disc((221, 46, 68, 255))
    ImageDraw.Draw(image).rectangle([28, 28, 36, 36], fill=(40, 180, 60, 255))
    hue = colours.main_hue(image)
    turned = np.asarray(colours.turned(image, hue, colour))
    before = np.asarray(image)
    assert abs(colours.beyond(hue, 352.5)) <= 2
    assert np.abs(turned[30, 30].astype(int) - before[30, 30]).max() <= 2  # the green square stays
    assert np.array_equal(turned[..., 3], before[..., 3])
    assert colours.name_of(turned[12, 32, :3]) == colour


def test_what_has_two_colours_or_none_has_no_main_hue():
    image = disc((221, 46, 68, 255))
    ImageDraw.Draw(image).rectangle([8, 8, 56, 32], fill=(40, 90, 220, 255))
    assert colours.main_hue(image) is None
    assert colours.main_hue(disc((90, 90, 90, 255))) is None
    assert colours.main_colour(np.full((4, 4, 3), 255, np.uint8)) is None


# ---- the autoencoder ----


def test_an_autoencoder_is_trained_and_loads(made, tmp_path, capsys):
    folder = tmp_path / "vae"
    train_autoencoder.main(
        ["--data-path", str(made / "heldout"), "--output", str(folder), "--steps", "12",
         "--batch-size", "4"]
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out.splitlines()[0])["step"] == 12
    space = load_vae(str(folder))
    images = read_all(list_images(made / "heldout", 0), sources.SIDE)
    config = AutoencoderKL.load_config(str(folder))
    noise = torch.zeros(len(images), 4, 16, 16)
    latents = space.encode(train_autoencoder.from_uint8(images), noise)
    assert latents.shape[1:] == (4, 16, 16)
    # Modes vary less than what is drawn around them, by which the scale is set
    assert abs(latents.mean()) < 0.3 and 0.3 < latents.std() < 1.2
    assert config["scaling_factor"] != 0.18215 and config["shift_factor"] is not None
    assert space.decode(latents).shape == images.shape


def test_an_autoencoder_that_comes_to_nothing_is_told(made, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_autoencoder.main(
            ["--data-path", str(made / "heldout"), "--output", str(tmp_path / "vae"), "--steps",
             "30", "--batch-size", "2", "--lr", "50"]
        )  # fmt: skip
    assert "is not finite; lower --lr 50" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
