"""Captions beside images: from texts and from metadata, what is wrong with them, which of several
is taken, and with cached latents.
"""

import json
import os
from os.path import normpath
import pickle

import numpy as np
from PIL import Image
import pytest
import torch

from conditions.text import PieceReader, pieces
from data import captioned, captions, opening
from data.batches import StepBatches, collate
from data.cache import find_damage
from data.captions import Captions, read_captions, stand_ins
from data.listing import list_images
from data.loader import make_loader
from data.options import DataOptions
import extract_latents
from layers.text import Text


def images(folder, *names):
    """Images with these names below a folder; the Listing."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / name)
    return list_images(folder, 0)


def rows(*several):
    return "".join(json.dumps(row) + "\n" for row in several)


@pytest.fixture
def folder(tmp_path):
    """Five images of which two have texts, and two rows of metadata, in two folders."""
    images(tmp_path / "data", "a.png", "b.png", "sub/c.png", "sub/d.jpg", "sub/e.png")
    folder = tmp_path / "data"
    (folder / "a.txt").write_bytes("\ufeffa first one\r\n\n  a second  \n".encode())
    (folder / "b.txt").write_text(" \n\n")
    (folder / "metadata.jsonl").write_text(rows({"file_name": "sub/c.png", "text": "from above"}))
    (folder / "sub" / "metadata.jsonl").write_text(
        rows({"file_name": "d.jpg", "captions": ["größer", "", "日本"], "other": 1}) + "\n"
    )
    return folder


FOUND = [["a first one", "a second"], [], ["from above"], ["größer", "日本"], []]


def test_captions_are_found_beside_images_and_in_metadata(folder):
    listing = list_images(folder, 0)
    found = read_captions(listing, folder)
    assert list(found) == FOUND and [found.of(i) for i in range(5)] == FOUND
    assert len(found) == 5 and found.count == 5 and found.missing == 2
    assert found.notes == (
        f"2 of 5 images have no caption, such as {folder / 'b.png'}; the empty caption stands for "
        "theirs",
    )
    assert list(pickle.loads(pickle.dumps(found))) == FOUND
    assert list(found.chosen([3, 3, 0])) == [FOUND[3], FOUND[3], FOUND[0]]


def test_a_hash_tells_captions_and_whose_they_are():
    hashes = [
        Captions.made(several).hash
        for several in ([["ab", "c"], []], [["a", "bc"], []], [["ab"], ["c"]], [["abc"], []])
    ]
    assert len({*hashes}) == 4
    assert Captions.made([["ab", "c"], []], ("note",)).hash == hashes[0]


def test_a_link_out_of_the_folder_and_dots_are_followed(tmp_path):
    images(tmp_path / "other", "x.png")
    (tmp_path / "other" / "x.txt").write_text("far away")
    images(tmp_path / "data", "in/y.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "in" / "metadata.jsonl").write_text(
        rows({"file_name": "./../in//y.png", "text": "near"})
    )
    found = read_captions(list_images(tmp_path / "data", 0), tmp_path / "data")
    assert list(found) == [["near"], ["far away"]]


def test_only_folders_are_listed(folder, monkeypatch):
    """No image, and no text that may be there, is looked at by itself."""
    listing, before = list_images(folder, 0), os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: pytest.fail(f"stat of {path}"))
    assert list(read_captions(listing, folder)) == FOUND
    monkeypatch.setattr(os, "stat", before)


# ---- what is wrong ----


WRONG = [
    ("a.txt", b"\xff\xfe", "a.txt is no UTF-8 .at byte 0.; save it as UTF-8"),
    ("a.txt", b"x" * (2**20 + 1), "a.txt has more than 1,048,576 bytes, which is no caption"),
    ("metadata.jsonl", b'{"file_name": "a.png"', "metadata.jsonl, line 1, is no JSON"),
    ("metadata.jsonl", b'\n\n["a.png"]', "line 3, is no JSON object with a text for file_name"),
    ("metadata.jsonl", b'{"file_name": 3, "text": ""}', "line 1, is no JSON object with a text"),
    ("metadata.jsonl", b"[" * 100_000, "line 1, is no JSON"),
    ("metadata.jsonl", b"\xe9", r"line 1, is no UTF-8"),
    ("metadata.jsonl", b'"' + b"x" * 2**20, "line 1, has more than 1,048,576 bytes; shorten it"),
    (
        "metadata.jsonl", b'{"file_name": "b.png", "text": 3}',
        "line 1, has text that is neither a text nor a list of texts",
    ),
    (
        "metadata.jsonl", b'{"file_name": "b.png", "captions": ["x", null]}',
        "line 1, has captions that is neither a text nor a list of texts",
    ),
    (
        "metadata.jsonl", b'{"file_name": "b.png", "text": "x", "captions": "y"}',
        "line 1, has text and captions; keep one of them",
    ),
    ("metadata.jsonl", b'{"file_name": "b.png", "text": "\\ud800"}', "half of a surrogate pair"),
    (
        "metadata.jsonl", b'{"file_name": "a.png", "text": "x"}',
        r"line 1, has captions of .*a.png, and so has .*a.txt; keep one of them",
    ),
    (
        "metadata.jsonl",
        b'{"file_name": "b.png", "text": "x"}\n{"file_name": "b.png", "text": "y"}',
        "line 2, has captions of .*b.png, and so has .*metadata.jsonl, line 1; keep one of them",
    ),
]  # fmt: skip


@pytest.mark.parametrize("name, content, message", WRONG)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, name, content, message):
    listing = images(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("right")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_captions(listing, tmp_path)
    assert str(refused.value).startswith(f"`data_path`: {tmp_path / name}")
    assert "\n" not in str(refused.value)


def test_rows_of_no_image_are_told(tmp_path):
    listing = images(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        rows(*({"file_name": name, "text": "x"} for name in ("gone.png", "a.png", "a.gif")))
    )
    assert read_captions(listing, tmp_path).notes == (
        f"{tmp_path}/metadata.jsonl: 2 row(s) are of files that are not among the images, such as "
        "gone.png in line 1",
    )


def test_images_are_numbered_once_for_all_files_of_metadata(tmp_path, monkeypatch):
    """A folder for each class may have one, and there may be a million images."""
    listing, normed, norm = images(tmp_path, *(f"{i}/{i}.png" for i in range(9))), [], normpath
    for i in range(9):
        row = {"file_name": f"{i}.png", "text": f"no. {i}"}
        (tmp_path / str(i) / "metadata.jsonl").write_text(rows(row))
    monkeypatch.setattr(
        captions.os.path, "normpath", lambda path: normed.append(path) or norm(path)
    )
    found = read_captions(listing, tmp_path)
    assert sorted(found) == [[f"no. {i}"] for i in range(9)]
    assert len(normed) == 9 + 9  # one for each image and each row


def test_images_without_any_caption_are_refused(tmp_path):
    listing = images(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "c.txt").write_text("of nobody")
    (tmp_path / "metadata.jsonl").write_text(rows({"file_name": "c.png", "label": 3}))
    with pytest.raises(
        ValueError,
        match=r"`data_path` .*: none of the 2 images has a caption; .*c.png in line 1. Wanted is "
        "NAME.txt beside an image, or metadata.jsonl with file_name and text",
    ):
        read_captions(listing, tmp_path)


def test_a_text_that_cannot_be_read_and_a_pipe(tmp_path):
    listing = images(tmp_path, "a.png", "b.png")
    os.mkfifo(tmp_path / "a.txt")  # nobody waits for what comes out of it
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match="none of the 2 images has a caption"):
        read_captions(listing, tmp_path)


# ---- one of several ----


def test_chances_are_drawn_beside_the_draws_of_labels():
    """Which images, and flips, stay as they were; shares are those of the whole."""
    plain = list(StepBatches(12, 4, 3, 1, 6))
    with_chances = list(StepBatches(12, 4, 3, 1, 6, chances=True))
    assert [[key[:2] for key in batch] for batch in with_chances] == plain
    chances = np.array([[key[2] for key in batch] for batch in with_chances])
    assert len(np.unique(chances)) == 20 and 0 <= chances.min() and chances.max() < 1
    for rank in range(2):
        share = list(StepBatches(12, 4, 3, 1, 6, rank, 2, chances=True))
        assert share == [batch[2 * rank : 2 * rank + 2] for batch in with_chances]


def source_of(folder, **more):
    return opening.open_source(
        DataOptions(
            data_path=folder, image_size=8, num_classes=0, condition="text", text_length=6, **more
        )
    )


def test_a_chance_chooses_and_an_image_without_captions_has_the_empty_one(folder):
    source = source_of(folder)
    for chance, said in ((0.0, "a first one"), (0.499, "a first one"), (0.5, "a second")):
        image, text, bad = source[0, False, chance]
        assert image.shape == (3, 8, 8) and bad == []
        assert torch.equal(text.tokens, pieces([said], 6).tokens)
        assert torch.equal(text.mask, pieces([said], 6).mask)
    assert torch.equal(source[1, False, 0.9][1].mask, pieces([""], 6).mask)
    assert source.classes is None and source.notes == read_captions(
        list_images(folder, 0), folder
    ).notes


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_are_batched_in_the_loaders_workers(folder, workers):
    source, batches = source_of(folder), StepBatches(5, 2, 0, 0, 2, chances=True)
    for (batch, text, _), keys in zip(make_loader(source, batches, workers), batches, strict=True):
        assert batch.shape == (2, 3, 8, 8) and isinstance(text, Text) and len(text) == 2
        assert text.tokens.is_shared() == (workers > 0)
        for number, key in enumerate(keys):
            _, alone, _ = source[key]
            assert torch.equal(text.tokens[number : number + 1], alone.tokens)
            assert torch.equal(text.mask[number : number + 1], alone.mask)


def test_an_image_that_stands_in_brings_its_own_caption(folder):
    (folder / "sub" / "c.png").write_bytes(b"no image")
    image, text, bad = source_of(folder, skip_bad_images=True)[2, False, 0.0]
    assert len(bad) == 1 and torch.equal(text.tokens, pieces(["größer"], 6).tokens)
    image, text, bad = source_of(folder)[2, False, 0.0]
    assert image is None and isinstance(text, Text)
    assert collate([(image, text, bad)] * 2)[0] is None


def test_captions_drawn_for_samples_depend_on_seed_and_index(folder):
    source = source_of(folder)
    several = source.drawn(5, range(20))
    assert torch.equal(source.drawn(5, [7, 3]).tokens, several.tokens[[7, 3]])
    assert not torch.equal(source.drawn(6, range(20)).tokens, several.tokens)
    assert len(several.tokens.unique(dim=0)) >= 5


def test_captions_that_are_cut_are_counted():
    said = Captions.made([["a b c d e"], ["a b c d e f", "Donaudampfschifffahrt a b c d"], []])
    (note,) = captioned.notes_on_length(said, PieceReader(6), 6)
    assert note == (
        "2 of 3 captions are longer than `text_length` 6; the longest, of 29 characters, is cut "
        "after 'Donaudampfschifffahrt a b'"
    )
    assert captioned.notes_on_length(said, PieceReader(10), 10) == ()


# ---- cached latents ----


def extract(folder, output, vae, *flags):
    extract_latents.main(
        ["--data-path", str(folder), "--output", str(output), "--vae", vae, "--image-size", "16",
         "--num-workers", "0", "--device", "cpu", "--no-flip", *flags]
    )  # fmt: skip
    return json.loads((output / "manifest.json").read_text())


def of_latents(latents, vae, **more):
    return opening.open_source(
        DataOptions(
            latents=latents, image_size=16, num_classes=0, flip=False, vae=vae, condition="text",
            text_length=6, **more,
        )
    )  # fmt: skip


def texts_of(source):
    return [source.texts.captions.of(index) for index in range(len(source))]


def test_captions_are_kept_with_latents(folder, vae, tmp_path, capsys):
    manifest = extract(folder, tmp_path / "latents", vae, "--num-classes", "0")
    found = read_captions(list_images(folder, 0), folder)
    assert manifest["captions_sha256"] == found.hash and manifest["captions_missing"] == 2
    assert "2 of 5 images have no caption" in capsys.readouterr().out
    alone, both = (of_latents(tmp_path / "latents", vae, **m) for m in ({}, {"data_path": folder}))
    assert texts_of(alone) == texts_of(both) == FOUND and alone.hash == both.hash
    moments, text, _ = alone[3, False, 0.7]
    assert moments.shape == (2, 4, 8, 8)
    assert torch.equal(text.tokens, pieces(["日本"], 6).tokens)
    assert find_damage(tmp_path / "latents") == []
    (folder / "b.txt").write_text("new")
    assert of_latents(tmp_path / "latents", vae, data_path=folder).hash != alone.hash
    stored = tmp_path / "latents" / captions.STORED
    stored.write_text(stored.read_text().replace("above", "below"))
    assert find_damage(tmp_path / "latents") == ["captions.jsonl is damaged"]
    with pytest.raises(ValueError, match="`latents` .*: captions.jsonl is damaged; remove"):
        of_latents(tmp_path / "latents", vae)


def test_what_stands_in_for_an_unreadable_image_keeps_its_caption(folder, vae, tmp_path):
    (folder / "sub" / "c.png").write_bytes(b"no image")
    (folder / "a.png").write_bytes(b"no image")
    extract(folder, tmp_path / "latents", vae, "--num-classes", "0", "--skip-bad-images")
    wanted = [FOUND[1], FOUND[1], FOUND[3], FOUND[3], FOUND[4]]
    for more in {}, {"data_path": folder}:
        assert texts_of(of_latents(tmp_path / "latents", vae, **more)) == wanted
    assert stand_ins(["x", "x (1)", "y", "z"], ["x (1) (bad (so))", "z (w)"]) == [0, 2, 2, 0]
    with pytest.raises(ValueError, match="in place of z .bad., which is not among those of"):
        stand_ins(["x"], ["z (bad)"])


def test_latents_of_classes_with_captions_keep_their_order(vae, tmp_path):
    folder = tmp_path / "data"
    images(folder, "b/1.png", "a.b/2.png", "b.c/3.png")
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    extract(folder, tmp_path / "latents", vae, "--num-classes", "3")
    for more in {}, {"data_path": folder}:
        assert texts_of(of_latents(tmp_path / "latents", vae, **more)) == [["2"], ["1"], ["3"]]


def test_latents_without_captions(folder, vae, tmp_path, capsys):
    """Whoever trains with labels is not stopped by captions; whoever wants them is."""
    (folder / "metadata.jsonl").write_text("nonsense")
    manifest = extract(folder, tmp_path / "latents", vae, "--num-classes", "0")
    assert "captions_sha256" not in manifest
    assert "no captions are cached: data_path: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="`latents` .* have no captions; give the folder of their"):
        of_latents(tmp_path / "latents", vae)
    with pytest.raises(ValueError, match="metadata.jsonl, line 1, is no JSON"):
        of_latents(tmp_path / "latents", vae, data_path=folder)
