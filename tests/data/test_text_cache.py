"""Captions that outside encoders have read, cached beside latents: against the encoders
themselves, on one and two processes, after kills, and damaged.
"""

from dataclasses import replace
import json
import os
import pickle
import shutil
import signal

import numpy as np
from PIL import Image
import pytest
import torch

from conditions.encoders import load_reader
import data
from data import text_writer
from data.text_cache import CachedText, find_text_damage
from data.options import TextCacheOptions
import extract_latents
from small_encoders import CLIP_LENGTH, save_encoders, save_t5
from starts import each_start
from test_latents import contents_of, one_thread, vae  # noqa: F401

LENGTH = 6
SAID = [
    ["a thin three"], ["a thick seven leaning left", "a seven"], [], ["one"], ["a thin three"],
    ["a seven", "a one", "right"], ["a one one one one one one one one one"], ["Übermut"],
]  # fmt: skip
DIFFERENT = [
    "", "a thin three", "a thick seven leaning left", "a seven", "one", "a one", "right",
    "a one one one one one one one one one", "Übermut",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight images, with the captions of SAID beside them."""
    folder, draw = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    for number, several in enumerate(SAID):
        path = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        if several:
            path.with_suffix(".txt").write_text("\n".join(several), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def reader(encoders):
    return load_reader(encoders, LENGTH)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Two captions at a time, so that nine make five chunks."""
    monkeypatch.setattr(text_writer, "CHUNK", 2)


def extract(images, output, vae, encoders, *flags):
    extract_latents.main(
        ["--data-path", str(images), "--output", str(output), "--vae", vae, "--image-size", "16",
         "--num-classes", "0", "--num-workers", "0", "--device", "cpu", "--latents-dtype",
         "float32", "--text-encoder", *encoders, "--text-length", str(LENGTH), *flags]
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def made(images, vae, encoders, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_writer, "CHUNK", 2)
        return extract(images, tmp_path_factory.mktemp("made") / "latents", vae, encoders)


def same_text(ours, theirs, **close):
    for name in ("tokens", "pooled"):
        found, wanted = getattr(ours, name), getattr(theirs, name)
        assert (found is None) == (wanted is None)
        if found is not None:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, **close)
    assert (ours.mask is None) == (theirs.mask is None)
    assert ours.mask is None or torch.equal(ours.mask, theirs.mask)


def test_cached_is_what_the_encoders_give(made, reader):
    cached = CachedText(made)
    assert len(cached) == len(DIFFERENT)
    for index, several in enumerate(SAID):
        rows = cached.rows(index)
        assert [DIFFERENT[row] for row in rows] == (several or [""])
        for row, caption in zip(rows, several or [""], strict=True):
            same_text(cached.text(row), reader.encode([caption]), rtol=1e-5, atol=1e-6)
    same_text(cached.null, reader.null, rtol=1e-5, atol=1e-6)
    assert cached.shares == reader.shares and cached.says == reader.says
    assert cached.notes[0].startswith("1 of 8 different captions are longer than what is read by")


def test_only_tokens_that_are_there_are_kept(made, reader):
    folder = made / "text"
    counts, _ = reader.counts(DIFFERENT)
    assert np.load(folder / "counts.npy").tolist() == counts.tolist()
    assert np.load(folder / "tokens.npy").shape == (int(counts.sum()), reader.width)
    assert np.load(folder / "pooled.npy").shape == (len(DIFFERENT), reader.pooled_width)
    lines = (folder / "captions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == DIFFERENT
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = dict(images=8, captions=10, missing=1, cut=1, rows=9, parts=[CLIP_LENGTH, LENGTH])
    assert {name: manifest[name] for name in wanted} == wanted


@pytest.mark.parametrize("which, pooled", [([2], None), ([0], (1, 8))])
def test_one_encoder_in_half_precision(images, vae, encoders, tmp_path, which, pooled):
    chosen = [encoders[one] for one in which]
    folder = extract(images, tmp_path / "l", vae, chosen, "--latents-dtype", "float16")
    cached, reader = CachedText(folder), load_reader(chosen, LENGTH)
    assert (folder / "text" / "pooled.npy").exists() == (pooled is not None)
    for index in (1, 2):
        text = cached.text(cached.rows(index)[0])
        same_text(text, reader.encode((SAID[index] or [""])[:1]), rtol=1e-3, atol=1e-3)
        assert (None if text.pooled is None else text.pooled.shape) == pooled
    assert cached.tokens.dtype == np.float16


def test_padding_that_was_read_is_kept(images, vae, encoders, made, tmp_path, monkeypatch):
    """As Stable Diffusion 3 reads it: all tokens, and no mask."""
    shutil.copytree(made, tmp_path / "l", ignore=shutil.ignore_patterns("text"))
    full = load_reader(encoders, LENGTH, padding="read")
    monkeypatch.setattr(text_writer, "load_reader", lambda *_, **__: full)
    data.cache_text(data.prepare_text(
        TextCacheOptions(images, tmp_path / "l", encoders, LENGTH, 0, "float32", device="cpu")
    ))  # fmt: skip
    cached = CachedText(tmp_path / "l")
    for row, caption in enumerate(DIFFERENT):
        same_text(cached.text(row), full.encode([caption]), rtol=1e-5, atol=1e-6)
    assert cached.null.mask is None


def test_the_latents_are_as_without_encoders(images, vae, made, tmp_path):
    extract_latents.main(
        ["--data-path", str(images), "--output", str(tmp_path / "l"), "--vae", vae,
         "--image-size", "16", "--num-classes", "0", "--num-workers", "0", "--device", "cpu",
         "--latents-dtype", "float32"]
    )  # fmt: skip
    alone = contents_of(tmp_path / "l")
    assert {path.name for path in (tmp_path / "l").iterdir()} == {
        path.name for path in made.iterdir()
    } - {"text"}
    for name in ("moments.npy", "labels.npy"):
        assert alone[name] == (made / name).read_bytes()


def test_a_worker_maps_the_files_itself(made):
    cached = CachedText(made)
    sent = pickle.dumps(cached)
    assert len(sent) < 12_000
    again = pickle.loads(sent)
    same_text(again.text(2), cached.text(2), rtol=0, atol=0)
    assert again.rows(5) == cached.rows(5) and isinstance(again.tokens, np.memmap)


# ---- goes on, on any number of processes ----

@pytest.mark.long  # processes that import everything: others deal in one process
@each_start
def test_two_processes_write_what_one_does(images, vae, encoders, tmp_path, start, monkeypatch):
    monkeypatch.setattr(text_writer, "CHUNK", 256)
    alone = contents_of(extract(images, tmp_path / "one", vae, encoders))
    done = start(
        "extract_latents.py", "--data-path", str(images), "--output", str(tmp_path / "two"),
        "--vae", vae, "--image-size", "16", "--num-classes", "0", "--num-workers", "0",
        "--device", "cpu", "--latents-dtype", "float32", "--text-encoder", *encoders,
        "--text-length", str(LENGTH), processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("captions, 8 of them different, read by clip") == 1
    assert contents_of(tmp_path / "two") == alone


def test_kills_and_shares_change_nothing(images, vae, encoders, made, tmp_path, monkeypatch,
                                         one_thread):  # fmt: skip
    alone = contents_of(extract(images, tmp_path / "one", vae, encoders))
    shutil.copytree(made, tmp_path / "parts", ignore=shutil.ignore_patterns("text"))
    for end in (1, 2):  # dies after the data of a chunk, before it is noted as done
        child = os.fork()
        if child == 0:
            write = text_writer.write_json

            def dying(path, contents, indent=1):
                if path.parent.name == "chunks" and path.stem == f"000000{end}":
                    os.kill(os.getpid(), signal.SIGKILL)
                write(path, contents, indent)

            text_writer.write_json = dying
            extract(images, tmp_path / "parts", vae, encoders)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with pytest.raises(ValueError, match="run extract_latents.py .* until it ends"):
            CachedText(tmp_path / "parts")
    notes = tmp_path / "parts" / "text" / "chunks"
    assert sorted(path.stem for path in notes.iterdir()) == ["0000000", "0000001"]
    read = text_writer.encoded
    begun = []
    monkeypatch.setattr(
        text_writer, "encoded", lambda *given: begun.append(given[-1]) or read(*given)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    extract(images, tmp_path / "parts", vae, encoders)
    assert begun == [6]
    monkeypatch.setenv("RANK", "0")
    extract(images, tmp_path / "parts", vae, encoders)
    assert begun == [6, 4, 8]
    assert contents_of(tmp_path / "parts") == alone
    extract(images, tmp_path / "parts", vae, encoders)
    assert len(begun) == 3


def test_an_image_in_place_of_another_keeps_its_captions(images, vae, encoders, tmp_path):
    """As its latents are the next image's, so are the captions."""
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "3.png").write_bytes(b"")
    folder = extract(tmp_path / "images", tmp_path / "l", vae, encoders, "--skip-bad-images")
    cached = CachedText(folder)
    assert cached.rows(3) == cached.rows(4) and DIFFERENT[cached.rows(4)[0]] == "a thin three"


# ---- mistakes ----

def message(capsys, images, folder, vae, encoders, *flags):
    with pytest.raises(SystemExit) as stopped:
        extract(images, folder, vae, encoders, *flags)
    assert stopped.value.code in (1, 2)
    return capsys.readouterr().err


def test_another_text_is_left_alone(images, vae, encoders, made, tmp_path, capsys):
    before = contents_of(made)
    flags = ["--text-length", "7"]
    assert "(7 tokens), and the captions of" in message(capsys, images, made, vae, encoders, *flags)
    assert "read by clip" in message(capsys, images, made, vae, encoders[:2])
    other = [*encoders[:2], save_t5(tmp_path / "t5", seed=8)]
    assert "has other files than the encoders that read" in message(
        capsys, images, made, vae, other
    )
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "0.txt").write_text("a thin one")
    with pytest.raises(ValueError, match="what the encoders made with other captions; remove"):
        encode(tmp_path / "images", made, encoders)
    with pytest.raises(ValueError, match="what the encoders made with other dtype; remove"):
        encode(images, made, encoders, latents_dtype="float16")
    assert contents_of(made) == before


def test_a_length_without_encoders(images, vae, tmp_path, capsys):
    with pytest.raises(SystemExit):
        extract_latents.main(["--data-path", str(images), "--output", str(tmp_path / "l"), "--vae",
                              vae, "--text-length", "9"])  # fmt: skip
    assert "--text-length is for --text-encoder; give" in capsys.readouterr().err
    assert not (tmp_path / "l").exists()


def encode(images, folder, encoders, **changes):
    options = TextCacheOptions(images, folder, encoders, LENGTH, 0, "float32", device="cpu")
    return data.cache_text(data.prepare_text(replace(options, **changes)))


def test_what_cannot_be_encoded(images, vae, encoders, made, tmp_path, capsys):
    assert "--text-encoder nowhere: there is no such folder" in message(
        capsys, images, tmp_path / "l", vae, ["nowhere"]
    )
    assert "--text-length is 1; it must be from 2" in message(
        capsys, images, tmp_path / "l", vae, encoders, "--text-length", "1"
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    for number in range(2):
        shutil.copy(images / f"{number}.png", bare)
    assert "none of the 2 images has a caption" in message(
        capsys, bare, tmp_path / "m", vae, encoders
    )
    with pytest.raises(ValueError, match="holds no latents yet"):
        encode(images, tmp_path / "nothing", encoders)
    (bare / "0.txt").write_text("one")
    with pytest.raises(ValueError, match="holds latents of other images than those of `data_path`"):
        encode(bare, made, encoders)
    shutil.copytree(made, tmp_path / "other", ignore=shutil.ignore_patterns("text"))
    (tmp_path / "other" / "text").mkdir()
    (tmp_path / "other" / "text" / "letter").write_text("mine")
    with pytest.raises(ValueError, match="text holds something else; give a new `output`"):
        encode(images, tmp_path / "other", encoders)


def test_numbers_beyond_half_precision(images, encoders, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "l", ignore=shutil.ignore_patterns("text"))
    large = load_reader(encoders, LENGTH)
    encode_ = large.encode
    large.encode = lambda texts: encode_(texts).each(
        lambda one: one if one.dtype == torch.bool else one * 1e8
    )
    monkeypatch.setattr(text_writer, "load_reader", lambda *_, **__: large)
    with pytest.raises(ValueError, match="beyond float16; pass `latents_dtype=float32`"):
        encode(images, tmp_path / "l", encoders, latents_dtype="float16")


def test_damage_is_found(made, tmp_path, capsys):
    folder = shutil.copytree(made, tmp_path / "l")
    extract_latents.main(["--verify", str(folder)])
    assert "every checksum is right" in capsys.readouterr().out
    for name, at, told in (
        ("tokens.npy", -1, "the text of captions 8 to 8 is damaged"),
        ("pooled.npy", -1, "the text of captions 8 to 8 is damaged"),
        ("pooled.npy", -(16 * 4 * 9), "the text of captions 0 to 1 is damaged"),
        ("captions.jsonl", 8, "text/captions.jsonl is damaged"),
        ("rows.npy", -16, "text/rows.npy is damaged"),
    ):
        content = bytearray((folder / "text" / name).read_bytes())
        content[at] ^= 1
        (folder / "text" / name).write_bytes(content)
        assert find_text_damage(folder) == [told]
        content[at] ^= 1
        (folder / "text" / name).write_bytes(content)
    (folder / "text" / "tokens.npy").write_bytes(content)
    with pytest.raises(ValueError, match="tokens.npy is .*its manifest says.*encode the captions"):
        CachedText(folder)


@pytest.mark.parametrize("changes", [
    dict(images=9), dict(images=True), dict(images=10**30), dict(rows=8), dict(rows=0),
    dict(tokens=3), dict(width=27), dict(width=-1), dict(pooled_width=0.0), dict(pooled_width=15),
    dict(parts=[]), dict(parts=[CLIP_LENGTH]), dict(parts=[CLIP_LENGTH, "6"]),
    dict(parts=[10**12, LENGTH]), dict(masked=1), dict(dtype="float64"), dict(dtype=None),
    dict(encoders=[]), dict(encoders=[{"kind": "t5"}]), dict(shares=[]), dict(shares=[[], [], []]),
    dict(shares=3 * [[[0, 10], [0, 16], [0, 17]]]), dict(shares=3 * [[[0, 10], [0, 16], [9, 8]]]),
    dict(shares=3 * [[[0, 10], [0, 16], ["0", 8]]]), dict(files_sha256="x"), dict(cut=-1),
])  # fmt: skip
def test_nonsense_in_a_manifest(made, tmp_path, changes):
    folder = shutil.copytree(made, tmp_path / "l")
    path = folder / "text" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="has no output of text encoders that can be used"):
        CachedText(folder)


@pytest.mark.parametrize("name, change", [
    ("counts.npy", lambda a: a + 1), ("counts.npy", lambda a: a * 0), ("rows.npy", lambda a: a + 9),
    ("rows.npy", lambda a: a - 9), ("rows.npy", lambda a: a.astype(np.float64)),
    ("firsts.npy", lambda a: a + 1), ("firsts.npy", lambda a: a[::-1]),
    ("firsts.npy", lambda a: a[:-1]), ("tokens.npy", lambda a: a.astype(np.float16)),
    ("pooled.npy", lambda a: a[:-1]), ("counts.npy", lambda a: np.array([None])),
])  # fmt: skip
def test_nonsense_in_an_array(made, tmp_path, name, change):
    folder = shutil.copytree(made, tmp_path / "l")
    path = folder / "text" / name
    np.save(path, change(np.load(path)))
    with pytest.raises(ValueError, match=f"{name} (is|cannot)"):
        CachedText(folder)


def test_text_of_other_images_or_captions(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "l")
    for name, what in (("files_sha256", "images"), ("captions_sha256", "captions")):
        path = folder / "manifest.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {name: "0"}))
        with pytest.raises(ValueError, match=f"they are of other {what} than the latents"):
            CachedText(folder)
        path.write_text(before)
    with pytest.raises(ValueError, match="run extract_latents.py --output .* --text-encoder"):
        CachedText(tmp_path)
