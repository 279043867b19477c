"""examples/emoji: what pictures are scored by, against closed forms and SciPy; the judge on a set
that is drawn here; the classifier.
"""

import colorsys
import json
import math
import shutil
import sys

import numpy as np
from PIL import Image
import pytest
from scipy.spatial.distance import cdist
import torch

from conftest import ROOT, fill_randomly
from models import DiT
from written import FLOW, reader, saved

EXAMPLE = ROOT / "examples" / "emoji"
sys.path[:0] = [str(ROOT / "examples" / "shapes"), str(EXAMPLE)]

import drawing  # noqa: E402
import emoji_judge  # noqa: E402
import emoji_scores  # noqa: E402
import judge_emoji  # noqa: E402
from make_shapes import write_images  # noqa: E402
import train_emoji_classifier  # noqa: E402
from evaluation.features import Extractor, Rows, load_extractor  # noqa: E402
from train_emoji_classifier import CLASSES  # noqa: E402
from vae import PixelSpace  # noqa: E402

RANDOM = np.random.default_rng(0)


def shape(name, colour):
    """As large as emoji have it."""
    return drawing.drawn(drawing.Shape(name, colour, "big", "in the middle"), larger=1.5)


def noise(count, random=RANDOM, side=8):
    return random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# ---- scores ----


def test_psnr_of_a_constant_difference():
    pictures = noise(3) // 2
    off = np.array([1, 5, 51], np.uint8)
    found = emoji_scores.psnr(pictures, pictures + off[:, None, None, None])
    assert found == pytest.approx(20 * np.log10(255 / off))
    assert emoji_scores.psnr(pictures, pictures)[0] == math.inf


def test_colour_difference_is_that_of_what_is_shown():
    pictures = np.full((2, 8, 8, 3), 255, np.uint8)
    pictures[0, 2:4, 2:4] = (200, 100, 50)
    others = pictures.copy()
    others[0, 2:4, 2:4] = (206, 97, 50)  # off by 6, 3 and 0
    others[0, 2, 2] += np.array([4, 0, 8], np.uint8)  # a quarter of it by 4 and 8 more
    others[0, 6:] = 0  # on the background, which does not count
    assert emoji_scores.colour_difference(pictures, others) == pytest.approx([(7 + 3 + 2) / 3, 0])


def test_colours_have_names_and_shares():
    pictures = np.stack([np.asarray(shape("heart", colour)) for colour in drawing.COLOURS])
    assert emoji_scores.colour_names(pictures) == list(drawing.COLOURS)
    pink, nothing = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 105, 180), 255))
    assert emoji_scores.colour_names([pink, nothing]) == [None, None]
    asked = ["red", "red", "yellow", "yellow", "blue", "blue", "brown", "black", "white"]
    assert emoji_scores.share_of_colour(pictures, asked) == pytest.approx(6 / 9)
    assert emoji_scores.share([]) is None


def test_nearest_is_that_of_scipy():
    pictures, others = noise(7), noise(300)
    flat = [each.reshape(len(each), -1).astype(float) for each in (pictures, others)]
    wanted = cdist(*flat).min(axis=1) / math.sqrt(8 * 8 * 3)
    assert emoji_scores.nearest(pictures, others) == pytest.approx(wanted, rel=1e-4)
    assert emoji_scores.nearest(others[280:], others).max() < 0.1


def test_what_is_nearer_than_usual_is_counted():
    found = emoji_scores.compared(np.array([0.0, 0.5, 1.5, 90]), np.arange(101.0))
    assert found["share nearer than held-out's 1st percentile"] == 0.5
    assert found["held-out"] == [1, 50, 99] and found["samples"][1] == 1


def test_own_name_is_found_by_the_cosine_with_its_mean():
    known, names = RANDOM.normal(size=(30, 5)) + 1, np.arange(30) % 6
    features, own = RANDOM.normal(size=(200, 5)) + 1, RANDOM.integers(6, size=200)
    means = np.stack([known[names == name].mean(axis=0) for name in range(6)])
    wanted = (1 - cdist(features, means, "cosine")).argmax(axis=1) == own
    assert (emoji_scores.own_first(features, own, known, names) == wanted).all()
    assert 0 < wanted.mean() < 1


def test_a_drawing_is_left_out_of_its_own_names_mean():
    """Two drawings of each name: one is near the other of its name, or near that of another."""
    known = np.array([[1, 0, 0.1], [0.9, 0.1, 0], [0, 1, 0], [0, 0, 1]], float)
    names = [0, 0, 1, 1]
    assert emoji_scores.own_first(known, names, known, names).all()
    found = emoji_scores.own_first(known, names, known, names, left_out=True)
    assert found.tolist() == [True, True, False, False]


# ---- a set, and what knows all of it ----


def group_colour(label):
    return np.uint8([255 * c for c in colorsys.hsv_to_rgb(label / len(CLASSES), 1, 1)])


def by_colour(images):
    """What an extractor makes of images (n, 3, H, W): the group whose colour is in the corner."""
    corner = images[:, :, 0, 0].float()  # (n, 3)
    groups = torch.tensor(np.stack([group_colour(i) for i in range(len(CLASSES))])).float()
    return Rows(images[:, :, ::16, ::16].flatten(1).float(), None, -torch.cdist(corner, groups))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as make_emoji.py writes it: groups with a colour each, shapes, turned drawings."""
    folder, rows = tmp_path_factory.mktemp("made"), {"train": [], "heldout": []}
    random = np.random.default_rng(1)
    for label, group in enumerate(CLASSES):
        for part in rows:
            for number, style in enumerate(("noto", "twemoji")):
                picture = np.broadcast_to(group_colour(label), (64, 64, 3)).copy()
                picture[40:] = noise(1, random, 64)[0, 40:]
                captions = [f"a {part} {group}", f"{part} {group}, {style}"]
                file = f"{group}/{part}-{number}.png"
                rows[part].append((file, Image.fromarray(picture), captions))
    for name in ("heart", "circle", "square"):
        for colour in drawing.COLOURS:
            part = "heldout" if (name, colour) in drawing.UNSEEN else "train"
            captions = [f"{colour} {name}", f"{colour} {name}, noto"]
            rows[part].append((f"symbols/x-{colour}-{name}.png", shape(name, colour), captions))
    words = rows["train"] + [
        (f"animals/cow-{colour}.png", shape("circle", colour),
         [f"a {colour} cow", f"{colour} cow", f"{colour} cow, noto"])
        for colour in ("red", "green", "purple")
    ]  # fmt: skip
    for part, images in (rows | {"words": words}).items():
        write_images(folder / part, images)
    return folder


@pytest.fixture
def judge(made):
    features = Extractor(by_colour, "by colour")
    return emoji_judge.Judge(made, PixelSpace(), features, 48, 0)


def draws(monkeypatch, draw):
    monkeypatch.setattr(emoji_judge.Judge, "drawn", lambda self, _, asked, kind: draw(asked))


def test_the_autoencoder_that_changes_nothing(judge, monkeypatch):
    few = [("", shape("star", "red"), [])] * 12
    monkeypatch.setattr(emoji_judge, "shape_images", lambda copies: few)
    monkeypatch.setattr(emoji_judge, "all_shapes", lambda: few[:2])
    found = emoji_judge.judge_autoencoder(judge)
    assert [part["images"] for part in found.values()] == [30, 2]
    for part in found.values():
        assert part["PSNR in dB"] == math.inf and part["difference of colour, of 255"] == 0


def test_copies_of_training_drawings_are_told(judge, monkeypatch):
    train = judge.train
    of_group = {label: np.flatnonzero(train.labels == label) for label in range(len(CLASSES))}
    draws(monkeypatch, lambda labels: train.pictures[[of_group[i][0] for i in labels]])
    found = emoji_judge.judge_classes(judge)
    copied = found["nearest of train, of 255, all given back"]
    assert found["group named"] == 1 and set(found["group named, by group"].values()) == {1}
    assert copied["share nearer than held-out's 1st percentile"] == 1
    assert max(copied["samples"]) < 0.1 < copied["held-out"][0]


def test_pictures_of_other_groups_and_held_out_drawings_are_told(judge, monkeypatch):
    held, asked = judge.heldout, []
    draws(monkeypatch, lambda labels: asked.extend(labels) or held.pictures)
    monkeypatch.setattr(judge, "count", len(held.pictures))
    found = emoji_judge.judge_classes(judge)
    named = by_colour(emoji_judge.channels_first(held.pictures)).logits.argmax(dim=1).numpy()
    assert found["group named"] == pytest.approx((named == asked).mean())
    of_train = by_colour(emoji_judge.channels_first(judge.train.pictures)).logits.argmax(dim=1)
    known = (of_train.numpy() == judge.train.labels).mean()
    assert found["group named, train given back"] == pytest.approx(known) and 0.5 < known < 1
    assert found["group named, held-out"] == pytest.approx((named == held.labels).mean())
    assert found["Fréchet distance"]["samples to held-out"] == pytest.approx(0, abs=0.1)
    assert found["Fréchet distance"]["train to held-out"] > 1
    assert found["nearest of train, of 255, all given back"]["samples"] == (
        found["nearest of train, of 255, all given back"]["held-out"]
    )


def first_word(prompts):
    """Circles of the colours that prompts begin with, after an article."""
    words = [prompt.removeprefix("an ").removeprefix("a ").split()[0] for prompt in prompts]
    return np.stack([np.asarray(shape("circle", word)) for word in words])


def test_colour_words_that_are_obeyed_and_ignored(judge, monkeypatch):
    draws(monkeypatch, first_word)
    found = emoji_judge.judge_words(judge)
    names = ("seen pairs", "unseen pairs", "real drawings", "real drawings given back")
    assert [found[name] for name in names] == [1] * 4 and len(found["each pair"]) == 27
    draws(monkeypatch, lambda prompts: first_word(["red"] * len(prompts)))
    found = emoji_judge.judge_words(judge)
    assert found["seen pairs"] == pytest.approx(3 / 21) and found["unseen pairs"] == 0
    assert found["each pair"]["red heart"] == 1 and found["each pair"]["blue heart"] == 0


def test_things_are_asked_for_in_colours_that_were_made_and_left_out(judge, monkeypatch):
    prompts = []
    draws(monkeypatch, lambda asked: prompts.append(set(asked)) or first_word(asked))
    monkeypatch.setattr(emoji_judge, "is_left_out", lambda thing, colour: colour in ("blue", "red"))
    judge.count = 60
    found = emoji_judge.judge_things(judge)
    assert prompts == [{"a red cow", "a green cow", "a purple cow"}, {"a blue cow"}]
    assert [found[name] for name in ("seen pairs", "unseen pairs", "real drawings")] == [1] * 3


def test_a_picture_goes_with_its_own_name(judge, monkeypatch):
    first = {text[0]: picture for text, picture in zip(judge.train.captions, judge.train.pictures)}
    judge.count = 10 * len(CLASSES)
    draws(monkeypatch, lambda prompts: np.stack([first[prompt] for prompt in prompts]))
    found = emoji_judge.judge_retrieval(judge)
    assert found["samples"] == len(CLASSES) and found["own name is first"] == 1
    assert found["by chance"] == 1 / len(CLASSES)  # which have several drawings, as shapes have not
    assert found["own name is first, real drawings"] > 0.25
    draws(monkeypatch, lambda prompts: np.stack([first[prompts[i - 1]] for i in range(12)]))
    assert emoji_judge.judge_retrieval(judge)["own name is first"] == 0


@pytest.mark.parametrize(
    "part, spoil, message",
    [
        ("things", lambda set: shutil.rmtree(set / "words"), "is not a folder"),
        ("things", lambda set: shutil.rmtree(set / "words" / "animals"), "put in another colour"),
        ("words", lambda set: [path.unlink() for path in set.rglob("x-*.png")], "no heart, circle"),
        ("retrieval", lambda set: [path.unlink() for path in set.rglob("train-1.png")], "with two"),
        ("classes", lambda set: shutil.rmtree(set / "heldout"), "is not a folder"),
        ("classes", lambda set: (set / "train/sky/own.png").write_bytes(
            (set / "train/sky/train-0.png").read_bytes()), "nothing is said of"),
    ],
)  # fmt: skip
def test_what_a_set_lacks_is_told_before_anything_is_drawn(
    made, judge, monkeypatch, tmp_path, part, spoil, message
):  # fmt: skip
    judge.folder = tmp_path / "set"
    shutil.copytree(made, judge.folder)
    spoil(judge.folder)
    draws(monkeypatch, lambda _: pytest.fail("it draws"))
    monkeypatch.setattr(emoji_judge.Judge, "given_back", lambda *_: pytest.fail("it encodes"))
    with pytest.raises(ValueError, match=message):
        emoji_judge.judged(judge, [*emoji_judge.PARTS][:1] * (part != "classes") + [part])


# ---- the doors ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Flags for two small networks on pixels, of random weights."""
    folder = tmp_path_factory.mktemp("networks")
    sizes = dict(input_size=64, patch_size=16, in_channels=3)
    groups = DiT(
        **sizes, hidden_size=32, depth=1, num_heads=2, num_classes=len(CLASSES), learn_sigma=False
    )
    return [
        "--ckpt", saved(folder / "groups.safetensors", fill_randomly(groups, 0), FLOW),
        "--text-ckpt", saved(folder / "words.safetensors", reader(**sizes)), "--vae", "none",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def classifier(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "new"
    train_emoji_classifier.main(
        ["--data-path", str(made), "--output", str(folder), "--epochs", "1"]
    )
    return folder


def test_classifier_is_what_evaluation_takes(made, classifier, tmp_path, capsys):
    rows = load_extractor(str(classifier), "cpu")(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert rows.features.shape == (2, 128) and rows.logits.shape == (2, len(CLASSES))
    assert (classifier / "model.safetensors").stat().st_size < 1.5e6
    write_images(tmp_path / "train", [("dragons/0.png", shape("star", "red"), [])])
    for data, output, message in (
        (made, classifier, "exists already"), (tmp_path, tmp_path / "new", "no group of emoji"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            train_emoji_classifier.main(["--data-path", str(data), "--output", str(output)])
        assert message in capsys.readouterr().err


def test_drawings_are_varied_by_whole_pixels_and_mirrored():
    torch.manual_seed(0)
    most = train_emoji_classifier.MOST_SHIFT
    images = torch.ones(64, 3, 64, 64)
    images[:, :, 30:34, 10:12] = -1.0
    places = set()
    for image in train_emoji_classifier.varied(images):
        rows, columns = (torch.nonzero((image[0] < 0).any(dim=d)).flatten() for d in (1, 0))
        assert len(rows) == 4 and len(columns) == 2 and (image < 0).sum() == 24
        x = min(int(columns[0]), 62 - int(columns[0]))
        assert abs(int(rows[0]) - 30) <= most and abs(x - 10) <= most
        places.add(int(columns[0]) > 32)
    assert places == {True, False}


def test_judging_tells_what_is_asked_for(made, checkpoints, classifier, tmp_path, capsys):
    path = tmp_path / "judged.json"
    flags = ["--data-path", str(made), *checkpoints, "--features", str(classifier)]
    flags += ["--num-samples", "24", "--num-sampling-steps", "2"]
    judge_emoji.main([*flags, "--parts", "classes", "words", "--output", str(path)])
    out, err = capsys.readouterr()
    found = json.loads(path.read_text())
    assert json.loads(out) == found and list(found) == ["settings", "classes", "words"]
    assert found["classes"]["samples"] == 24 and found["words"]["samples"] == 27
    assert "classes: 24 of 24 drawn" in err
    assert found["settings"]["cfg_scale"] != found["settings"]["text_cfg_scale"]


def test_what_is_no_emoji_is_refused(made, checkpoints, classifier, tmp_path, capsys):
    flags = ["--data-path", str(made), *checkpoints, "--features", str(classifier)]
    digits = str(ROOT / "examples" / "digits" / "classifier")
    cases = [
        (["--num-samples", "3"], "--num-samples is 3; it must be"),
        (["--text-cfg-scale", "nan"], "--text-cfg-scale is nan; it must be"),
        (["--features", digits], "train_emoji_classifier.py wrote"),
        (["--ckpt", checkpoints[3]], "make_emoji.py's train"),
        (["--text-ckpt", checkpoints[1]], "make_emoji.py's words"),
        (["--parts", "faces"], "invalid choice"),
        (["--data-path", str(tmp_path)], "is not a folder"),
    ]
    for more, message in cases:
        with pytest.raises(SystemExit):
            judge_emoji.main([*flags, *more])
        assert message in capsys.readouterr().err, more


def test_committed_classifier_knows_shapes_for_symbols():
    """Without the set, which is not here: hearts, circles and squares are in that group."""
    names = ("heart", "circle", "square")
    pictures = [np.asarray(shape(name, colour)) for name in names for colour in drawing.COLOURS]
    images = emoji_judge.channels_first(np.stack(pictures))
    logits = load_extractor(str(EXAMPLE / "classifier"), "cpu")(images).logits
    assert (logits.argmax(dim=1) == CLASSES.index("symbols")).float().mean() >= 0.9
    assert (EXAMPLE / "classifier" / "model.safetensors").stat().st_size < 1.5e6
