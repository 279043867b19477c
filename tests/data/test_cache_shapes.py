"""Cached latents of images that keep their shape: what is written, and training from it."""

import json
import os
import pickle
import shutil
import signal
import zlib

import numpy as np
from PIL import Image
import pytest
import torch

from data import cache_writer
from data.cache import CachedLatents, find_damage
from data.cache_format import Extents
from data.images import channels_first, cover
from data.listing import list_images
from data.opening import misfits
from data.options import DataOptions
from data.shapes import size_for
import extract_latents
from test_latents import (  # noqa: F401
    contents_of, extract, one_thread, small_chunks, train_flags, vae,
)  # fmt: skip
from test_runs import without_rates
from test_train import QUICK, fresh_accelerator  # noqa: F401
import train
from vae import from_uint8, load_vae

KINDS = ("buckets", "own")
SHAPES = [(20, 30), (64, 16), (7, 9), (17, 16), (24, 40), (16, 37), (30, 20)]  # (height, width)
COUNT = 14


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of 3 classes with images of seven shapes, each twice."""
    folder, draw = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / "train" / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (*SHAPES[i % len(SHAPES)], 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder / "train"


@pytest.fixture(scope="module")
def made(mixed, vae, tmp_path_factory):
    """Kind → a cache of it, float32, in chunks of five images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writer, "CHUNK", 5)
        return {
            kind: extract(
                mixed, tmp_path_factory.mktemp(kind) / "latents", vae, "--sizes", kind,
                "--latents-dtype", "float32",
            )
            for kind in KINDS
        }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_each_image_by_itself(mixed, made, vae, kind):
    cached, listing, space = CachedLatents(made[kind]), list_images(mixed, 3), load_vae(vae)
    sized, row, begin = size_for(kind, 16, 4), np.load(made[kind] / "moments.npy"), 0
    assert row.ndim == 1 and len(cached) == COUNT == len(cached.sizes) and cached.kind == kind
    assert len(set(cached.sizes)) >= 3
    for index, path in enumerate(listing.paths):
        with Image.open(path) as image:
            size = sized((image.height, image.width))
            pixels = channels_first(np.array(cover(image, size)))  # (3, H, W)
        assert cached.sizes[index] == size
        for flip in (False, True):
            shown = pixels.flip(2) if flip else pixels
            wanted = torch.cat(space.moments(from_uint8(shown[None])))  # (2, C, h, w)
            moments, label, bad = cached[index, flip]
            assert wanted.shape == (2, 4, size[0] // 2, size[1] // 2)
            torch.testing.assert_close(moments, wanted, rtol=1e-5, atol=1e-6)
            assert label == listing.labels[index] and bad == []
            # One after another, nothing between them
            stored = row[begin : begin + wanted.numel()].reshape(wanted.shape)
            np.testing.assert_array_equal(stored, moments)
            begin += wanted.numel()
    assert begin == len(row)
    assert torch.equal(cached[-1, True][0], cached[COUNT - 1, True][0])


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_and_shapes_say_what_there_is(made, kind):
    manifest = json.loads((made[kind] / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("sizes", "image_size", "unit", "shape")} == dict(
        sizes=kind, image_size=16, unit=4, shape=[2, 4]
    )
    shapes = np.load(made[kind] / "shapes.npy")
    assert shapes.shape == (COUNT, 2) and (shapes.prod(axis=1) <= 64).all()
    assert shapes.tolist() == [[h // 2, w // 2] for h, w in CachedLatents(made[kind]).sizes]
    assert len(manifest["crc32"]) == 3 and find_damage(made[kind]) == []


def test_squares_are_kept_as_before(mixed, tmp_path, vae):
    folder = extract(mixed, tmp_path / "latents", vae, "--sizes", "square")
    names = {"manifest.json", "plan.json", "moments.npy", "labels.npy"}
    assert {path.name for path in folder.iterdir()} == names | {"chunks"}
    assert not {"sizes", "unit", "shapes_crc32"} & json.loads(
        (folder / "manifest.json").read_text()
    ).keys()
    cached, moments = CachedLatents(folder), np.load(folder / "moments.npy")
    assert moments.shape == (COUNT, 2, 2, 4, 8, 8) and cached.sizes is None
    for index in (0, 3, COUNT - 1):
        for flip in (False, True):
            np.testing.assert_array_equal(cached[index, flip][0], moments[index, int(flip)])


def test_extents_end_with_the_last_image():
    manifest = {"flip": True, "channels": 3, "images": 3}
    extents = Extents(manifest, np.array([[1, 2], [4, 1], [3, 3]], np.int32))
    assert extents.starts.tolist() == [0, 24, 72, 180]
    assert extents.of(1, 3) == extents.of(1, 64) == slice(72 - 48, 180)
    assert extents.shape(1) == (2, 2, 3, 4, 1)
    large = Extents({"flip": True, "channels": 32}, np.full((10**5, 2), 128, np.int32))
    assert large.starts[-1] == 10**5 * 128**2 * 4 * 32 > 2**31


@pytest.mark.parametrize("kind", KINDS)
def test_processes_and_kills_change_nothing(
    mixed, made, tmp_path, vae, monkeypatch, one_thread, kind
):
    flags = ["--sizes", kind, "--latents-dtype", "float32"]
    alone = contents_of(extract(mixed, tmp_path / "one", vae, *flags))
    child = os.fork()
    if child == 0:  # dies after the data of its second chunk, before it is noted as done
        write = cache_writer.write_whole

        def dying(path, how):
            if path.parent.name == "chunks" and path.stem == "0000001":
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, how)

        cache_writer.write_whole = dying
        extract(mixed, tmp_path / "parts", vae, *flags)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "parts" / "shapes.npy").exists()
    finish, read = cache_writer.finish, cache_writer.planned_sizes
    monkeypatch.setattr(cache_writer, "planned_sizes", lambda *_: pytest.fail("read twice"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cache_writer, "finish", lambda *_: None)
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        extract(mixed, tmp_path / "parts", vae, *flags)
    monkeypatch.setattr(cache_writer, "finish", finish)
    extract(mixed, tmp_path / "parts", vae, *flags)
    monkeypatch.setattr(cache_writer, "planned_sizes", read)
    assert contents_of(tmp_path / "parts") == alone


def test_damage_is_found(made, tmp_path, mixed, vae, capsys):
    folder = shutil.copytree(made["own"], tmp_path / "latents")

    def change(name, at):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    starts = CachedLatents(folder).extents.starts
    whole = (folder / "moments.npy").stat().st_size
    first = whole - int(starts[-1] - starts[5]) * 4  # the first byte of image 5
    change("moments.npy", first)
    assert find_damage(folder) == ["moments.npy is damaged in images 5 to 9"]
    change("moments.npy", first)
    change("moments.npy", first - 1)
    assert find_damage(folder) == ["moments.npy is damaged in images 0 to 4"]
    change("moments.npy", first - 1)
    change("moments.npy", -1)
    assert find_damage(folder) == ["moments.npy is damaged in images 10 to 13"]
    change("shapes.npy", -8)
    with pytest.raises(ValueError, match=r"shapes\.npy is damaged"):
        find_damage(folder)
    with pytest.raises(ValueError, match=r"shapes\.npy is damaged.*make it again"):
        CachedLatents(folder)
    with pytest.raises(SystemExit):
        extract(mixed, folder, vae, "--sizes", "own", "--latents-dtype", "float32")
    assert "shapes.npy is damaged; remove the folder" in capsys.readouterr().err
    (folder / "shapes.npy").unlink()
    with pytest.raises(ValueError, match=r"shapes\.npy cannot be read"):
        CachedLatents(folder)


@pytest.mark.parametrize("sign", [-1, 0])
def test_sides_that_no_latent_has(made, tmp_path, sign):
    """Though their checksum, and how many numbers they make, be right."""
    folder = shutil.copytree(made["own"], tmp_path / "latents")
    shapes = np.load(folder / "shapes.npy") * np.int32(sign)
    np.save(folder / "shapes.npy", shapes)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"shapes_crc32": zlib.crc32(shapes.tobytes())}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"shapes\.npy is damaged"):
        CachedLatents(folder)


@pytest.mark.parametrize("changes", [
    dict(sizes="round"), dict(sizes=None), dict(sizes=[]), dict(sizes="square"), dict(unit=0),
    dict(unit="4"), dict(shapes_crc32=None), dict(shape=[2, 4, 8, 8]), dict(channels=2),
    dict(channels=10**30, shape=[2, 10**30]), dict(images=13), dict(images=10**30),
    dict(flip=False), dict(image_size=[16, 16]),
])  # fmt: skip
def test_nonsense_in_a_manifest(made, tmp_path, changes):
    folder = shutil.copytree(made["buckets"], tmp_path / "latents")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(ValueError, match="holds no complete latents"):
        CachedLatents(folder)


@pytest.mark.parametrize("size", [[16], [16, 16, 16], ["a", 16], [16.0, 16]])
def test_no_size_in_a_manifest_is_not_laid_on_the_flag(made, mixed, tmp_path, vae, size):
    folder = extract(mixed, tmp_path / "latents", vae)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"image_size": size}))
    with pytest.raises(ValueError, match=r"manifest\.json has .* for image_size\)"):
        CachedLatents(folder)


def test_a_worker_maps_the_file_itself(made):
    cached = CachedLatents(made["own"])
    sent = pickle.dumps(cached)
    assert len(sent) < 5000 < cached.moments.nbytes
    again = pickle.loads(sent)
    assert torch.equal(again[3, True][0], cached[3, True][0]) and again.sizes == cached.sizes


@pytest.mark.parametrize("flags", [
    ["--sizes", "square"], ["--sizes", "own"], ["--sizes", "buckets", "--patch-size", "4"],
    ["--sizes", "buckets", "--no-flip"],
])  # fmt: skip
def test_a_folder_of_another_plan_is_left_alone(made, mixed, vae, capsys, flags):
    before = contents_of(made["buckets"])
    with pytest.raises(SystemExit):
        extract(mixed, made["buckets"], vae, "--latents-dtype", "float32", *flags)
    assert "holds latents with other " in capsys.readouterr().err
    assert contents_of(made["buckets"]) == before


@pytest.mark.parametrize("flags, message", [
    (["--patch-size", "3"], "16 is not a multiple of 6"),
    (["--patch-size", "0"], "--patch-size is 0; it must be at least 1"),
    (["--patch-size", "16"], "16 is not a multiple of 32"),
])  # fmt: skip
def test_a_mistake_gets_one_message(mixed, tmp_path, vae, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        extract(mixed, tmp_path / "o", vae, "--sizes", "own", *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_foreign_folder_is_refused_before_headers_are_read(
    mixed, tmp_path, vae, capsys, monkeypatch
):
    monkeypatch.setattr(cache_writer, "planned_sizes", lambda *_: pytest.fail("read"))
    (tmp_path / "letter").write_text("mine")
    with pytest.raises(SystemExit):
        extract(mixed, tmp_path, vae, "--sizes", "own")
    assert "holds something else; give a new folder" in capsys.readouterr().err


def test_unreadable_images(mixed, tmp_path, vae, capsys):
    broken = shutil.copytree(mixed, tmp_path / "broken")
    paths = list_images(broken, 3).paths
    open(paths[4], "wb").close()
    with open(paths[6], "r+b") as file:  # its header can be read, the rest cannot
        file.truncate(100)
    with pytest.raises(SystemExit) as stopped:
        extract(broken, tmp_path / "o", vae, "--sizes", "own")
    assert stopped.value.code == 2 and paths[4] in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    cached = CachedLatents(
        extract(broken, tmp_path / "o", vae, "--sizes", "own", "--skip-bad-images")
    )
    assert [bad.split(" (")[0] for bad in cached.manifest["bad_images"]] == [paths[4], paths[6]]
    assert cached.sizes[4] == (16, 16) and cached[4, False][0].shape == (2, 4, 8, 8)
    with Image.open(list_images(mixed, 3).paths[6]) as image:
        size = size_for("own", 16, 4)((image.height, image.width))
    with Image.open(paths[7]) as image:
        pixels = channels_first(np.array(cover(image, size)))
    wanted = torch.cat(load_vae(vae).moments(from_uint8(pixels[None])))
    torch.testing.assert_close(cached[6, False][0].float(), wanted, rtol=1e-3, atol=1e-4)


# ---- training ----

ASKED = {"square": [], "buckets": ["--aspect-buckets"], "own": ["--pack", "20"]}


@pytest.mark.parametrize("kind", KINDS)
def test_training_from_latents_is_training_from_images(
    mixed, made, tmp_path, vae, kind
):
    flags = [*QUICK, *train_flags(vae), "--model", "DiT-Ti/2", *ASKED[kind]]
    for results, named in (
        ("images", ["--data-path", str(mixed)]), ("latents", ["--latents", str(made[kind])]),
    ):  # fmt: skip
        train.main([*named, "--results-dir", str(tmp_path / results), *flags])
    theirs, ours = (
        without_rates(tmp_path / results / "000-DiT-Ti-2") for results in ("images", "latents")
    )
    assert len(ours) == 3 == len({row["loss"] for row in ours})
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("kind, asked, message", [
    ("buckets", "square", "the latents are in buckets, for training with --aspect-buckets"),
    ("buckets", "own", "the latents are in buckets, for training with --aspect-buckets"),
    ("own", "square", "the latents have sizes of their own, for training with --pack"),
])  # fmt: skip
def test_latents_of_other_sizes_are_refused(
    made, tmp_path, vae, capsys, kind, asked, message
):
    flags = [*QUICK, *train_flags(vae), "--model", "DiT-Ti/2", *ASKED[asked]]
    with pytest.raises(SystemExit):
        train.main(
            ["--latents", str(made[kind]), "--results-dir", str(tmp_path / "r"), *flags]
        )
    assert message in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_squares_are_not_for_buckets(mixed, tmp_path, vae):
    cached = CachedLatents(extract(mixed, tmp_path / "latents", vae))
    fitting = DataOptions(image_size=16, num_classes=3, vae=vae)
    assert misfits(cached, fitting, None) == []
    (wrong,) = misfits(
        cached, DataOptions(image_size=16, num_classes=3, vae=vae, sizes="buckets"), None
    )
    assert wrong == (
        "the latents are squares, for training with neither `aspect_buckets` nor `pack`"
    )


def test_own_shapes_are_verified_by_the_door(made, capsys):
    extract_latents.main(["--verify", str(made["own"])])
    assert "every checksum is right" in capsys.readouterr().out
