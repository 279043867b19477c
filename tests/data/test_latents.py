"""extract_latents.py: what it writes, on one and two processes and after kills, and training from
it.
"""

from dataclasses import replace
import json
import os
from pathlib import Path
import pickle
import shutil
import signal

from diffusers import AutoencoderKL
import numpy as np
import pytest
import torch

from conftest import fill_randomly
import data
from data.cache import CachedLatents
from data.images import ImageDataset
from data.listing import list_images
import extract_latents
from data import cache_format
from data import cache_writer
from data.options import CacheOptions, TextCacheOptions
from training import assembly
from training import loop
from runtime.presence import Presence
from runtime.surroundings import Place
from starts import each_start
from test_runs import without_rates
from test_train import QUICK, fresh_accelerator, images, run, same  # noqa: F401
import train
from processes.gaussian import GaussianProcess
from training.assembly import load_space
from training.options import TrainOptions
from training.state import Window
from vae import from_uint8, load_vae


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A folder with an autoencoder of ratio 2 and random weights."""
    folder = tmp_path_factory.mktemp("vae")
    autoencoder = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=2,
        latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip
    fill_randomly(autoencoder, std=0.2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five images at a time, so that twelve make three chunks."""
    monkeypatch.setattr(cache_writer, "CHUNK", 5)


def extract(images, output, vae, *flags):
    extract_latents.main(
        ["--data-path", str(images), "--output", str(output), "--vae", vae, "--image-size", "16",
         "--num-classes", "3", "--num-workers", "0", "--device", "cpu", *flags]
    )  # fmt: skip
    return Path(output)


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_flags_and_their_defaults():
    assert vars(extract_latents.build_parser().parse_args([])) == dict(
        data_path=None, output=None, verify=None, image_size=256, num_classes=1000, flip=True,
        skip_bad_images=False, vae="ema", latents_dtype="float16", tf32=True, num_workers=4,
        device=None, sizes="square", patch_size=2, text_encoder=None, text_length=77, clips=False,
        frame_rate=None,
    )  # fmt: skip


def test_flags_are_the_options_with_their_defaults():
    flags = vars(extract_latents.build_parser().parse_args([]))
    options = vars(CacheOptions(data_path=None, output=None))
    of_text = vars(TextCacheOptions(data_path=None, output=None, text_encoder=None))
    assert flags == options | of_text | {"verify": None}
    assert {name: of_text[name] for name in options.keys() & of_text.keys()}.items() <= (
        options.items()
    )


def test_caching_from_python_is_caching_by_the_door(images, tmp_path, vae, capsys):
    options = CacheOptions(
        images, tmp_path / "made", image_size=16, num_classes=3, vae=vae, num_workers=0,
        device="cpu",
    )  # fmt: skip
    assert data.cache_latents(options) == tmp_path / "made"
    assert contents_of(tmp_path / "made") == contents_of(extract(images, tmp_path / "door", vae))
    assert data.find_damage(tmp_path / "made") == []
    with pytest.raises(ValueError, match="`output` .* holds latents with other flip; give a new"):
        data.cache_latents(replace(options, flip=False))
    with pytest.raises(ValueError, match="`latents_dtype` is 'int8'; it must be float16 or float3"):
        data.cache_latents(replace(options, latents_dtype="int8"))
    with pytest.raises(ValueError, match="`folder` nowhere holds no finished latents"):
        data.find_damage("nowhere")


def test_a_plan_has_what_a_manifest_must_have(images, tmp_path, vae):
    folder = extract(images, tmp_path / "latents", vae)
    plan = json.loads((folder / "plan.json").read_text())
    cache_format.check_manifest(plan)
    assert tuple(np.load(folder / "moments.npy").shape) == cache_format.moments_shape(plan)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3)])
def test_cached_moments_are_the_autoencoders(images, tmp_path, vae, dtype, tolerance):
    folder = extract(images, tmp_path / "latents", vae, "--latents-dtype", dtype)
    cached, listing = CachedLatents(folder), list_images(images, 3)
    dataset, space = ImageDataset(listing, 16), load_vae(vae)
    assert len(cached) == 12 and cached.classes == ["ape", "bee", "cat"]
    for index in (0, 4, 5, 11):
        for flip in (False, True):
            image, label, _ = dataset[index, flip]
            mean, std = space.moments(from_uint8(image[None]))
            moments, its_label, bad = cached[index, flip]
            torch.testing.assert_close(
                moments.float(), torch.cat([mean, std]), rtol=tolerance, atol=1e-6
            )
            assert moments.dtype == getattr(torch, dtype) and its_label == label and bad == []
        assert not torch.equal(cached[index, False][0], cached[index, True][0])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {
        k: manifest[k]
        for k in ("images", "flip", "scale", "shift", "channels", "ratio", "image_size", "vae")
    } == dict(
        images=12, flip=True, scale=0.5, shift=0.0, channels=4, ratio=2, image_size=16, vae=vae
    )
    assert len(manifest["crc32"]) == 3 and manifest["files_sha256"] == listing.hash(images)


def test_training_draws_from_a_cache_as_from_an_autoencoder_with_statistics(
    images, tmp_path, vae
):
    """latents_mean and latents_std are in the manifest, and a run normalises by them."""
    named = Path(shutil.copytree(vae, tmp_path / "vae"))
    statistics = {"latents_mean": [0.1, -0.2, 0.0, 3.0], "latents_std": [2.0, 0.5, 1.0, 4.0]}
    config = json.loads((named / "config.json").read_text()) | statistics
    (named / "config.json").write_text(json.dumps(config))
    folder = extract(images, tmp_path / "latents", str(named), "--latents-dtype", "float32")
    cached, whole = CachedLatents(folder), load_vae(str(named))
    assert cached.manifest["scale"] == [0.25, 1.0, 0.5, 0.125]
    assert cached.manifest["shift"] == statistics["latents_mean"]
    options = TrainOptions(data_path=None, latents=folder, vae=str(named), image_size=16)
    space = load_space(options, None, cached)
    assert space.autoencoder is None and space.shape == whole.shape
    noise = torch.ones(1, 4, 8, 8)
    mean, std = cached[3, False][0].unsqueeze(1)  # (1, C, h, w) each
    drawn = space.draw(mean, std, noise)
    expected = whole.draw(mean, std, noise)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0)
    by_hand = [
        (mean[0, c] + std[0, c] - m) / s / 2
        for c, (m, s) in enumerate(zip(*statistics.values()))
    ]
    torch.testing.assert_close(drawn[0], torch.stack(by_hand), rtol=1e-5, atol=1e-6)


@each_start
def test_two_processes_write_what_one_does_and_again_changes_nothing(
    images, tmp_path, vae, monkeypatch, start
):
    monkeypatch.setattr(cache_writer, "CHUNK", 64)
    alone = contents_of(extract(images, tmp_path / "one", vae))
    flags = [
        "--data-path", str(images), "--output", str(tmp_path / "two"), "--vae", vae, "--image-size",
        "16",
    ]  # fmt: skip
    flags += ["--num-classes", "3", "--num-workers", "1", "--device", "cpu"]
    done = start("extract_latents.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert contents_of(tmp_path / "two") == alone
    extract(images, tmp_path / "two", vae)
    assert contents_of(tmp_path / "two") == alone


def test_chunks_are_dealt_to_processes(images, tmp_path, vae, monkeypatch):
    alone = contents_of(extract(images, tmp_path / "one", vae))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(cache_writer, "finish", lambda *_: None)
    extract(images, tmp_path / "two", vae)
    assert [p.name for p in sorted((tmp_path / "two" / "chunks").iterdir())] == [
        "0000000.json",
        "0000002.json",
    ]
    monkeypatch.setenv("RANK", "1")
    extract(images, tmp_path / "two", vae)
    monkeypatch.undo()
    monkeypatch.setattr(cache_writer, "CHUNK", 5)
    assert contents_of(extract(images, tmp_path / "two", vae)) == alone


@pytest.fixture
def one_thread():
    """Sums do not depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_extraction_goes_on_to_the_same_files(images, tmp_path, vae, one_thread):
    alone = contents_of(extract(images, tmp_path / "one", vae))
    for end in (1, 2):  # dies after the data of a chunk, before it is noted as done
        child = os.fork()
        if child == 0:
            count, write = iter(range(10)), cache_writer.write_whole

            def dying(path, how):
                if path.parent.name == "chunks" and next(count) == end - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                write(path, how)

            cache_writer.write_whole = dying
            extract(images, tmp_path / "parts", vae)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not (tmp_path / "parts" / "manifest.json").exists()
    with pytest.raises(
        ValueError,
        match="holds no complete latents .*run extract_latents.py --output .* until it ends",
    ):
        CachedLatents(tmp_path / "parts")
    assert contents_of(extract(images, tmp_path / "parts", vae)) == alone


def test_verify_finds_what_changed(images, tmp_path, vae, capsys):
    folder = extract(images, tmp_path / "latents", vae)
    extract_latents.main(["--verify", str(folder)])
    assert "every checksum is right" in capsys.readouterr().out
    for name, at, message in (
        ("moments.npy", -1, "damaged in images 10 to 11"),
        ("labels.npy", -8, "labels.npy is"),
    ):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            extract_latents.main(["--verify", str(folder)])
        assert stopped.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    dict(classes=5), dict(classes=["a"]), dict(scale="x"), dict(scale=0), dict(scale=float("nan")),
    dict(ratio=0), dict(ratio=10**9), dict(channels=10**9), dict(images=13), dict(images=10**30),
    dict(flip=False), dict(flip="yes"), dict(shape=[2]), dict(shape=None), dict(image_size=True),
    dict(vae=None), dict(vae_sha256=[]), dict(shift="0"), dict(scale=[1.0] * 3),
    dict(scale=[1.0, 0.0, 1.0, 1.0]), dict(shift=[0.0, None, 0.0, 0.0]),
])  # fmt: skip
def test_nonsense_in_a_manifest(images, tmp_path, vae, changes, capsys):
    folder = extract(images, tmp_path / "latents", vae)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(SystemExit) as stopped:
        train_on(folder, tmp_path / "r", vae)
    assert stopped.value.code == 2 and "holds no complete latents" in capsys.readouterr().err


@pytest.mark.parametrize("name, change", [
    ("labels.npy", lambda x: x[:-1]), ("labels.npy", lambda x: x - 1),
    ("labels.npy", lambda x: x * 10**9), ("labels.npy", lambda x: x.astype(float)),
    ("labels.npy", lambda x: x.astype(object)), ("moments.npy", lambda x: x[1:]),
    ("moments.npy", lambda x: x.astype(int)),
])  # fmt: skip
def test_arrays_that_do_not_fit_together(images, tmp_path, vae, name, change):
    folder = extract(images, tmp_path / "latents", vae)
    np.save(folder / "new.npy", change(np.load(folder / name)))
    (folder / "new.npy").replace(folder / name)
    with pytest.raises(ValueError, match=f"{name}.*make it again"):
        CachedLatents(folder)


def test_a_process_that_ends_without_its_share_is_not_waited_for(
    images, tmp_path, vae, monkeypatch, capsys
):
    monkeypatch.setattr(cache_writer, "POLL_SECONDS", 0)
    folder = tmp_path / "latents"

    def die_beside(*args):
        with Presence(folder, Place(1, 2)) as presence:  # and leaves what a killed process leaves
            os.utime(presence._path(1))
            presence._path(1).rename(folder / "kept")
        (folder / "kept").rename(presence._path(1))
        encode_share(*args)

    encode_share = cache_writer.encode_share
    monkeypatch.setattr(cache_writer, "encode_share", die_beside)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stopped:
        extract(images, folder, vae)
    assert (
        stopped.value.code == 1
        and "process 1 of 2 has ended without doing its share" in capsys.readouterr().err
    )


def test_a_damaged_note_of_a_chunk(images, tmp_path, vae, capsys):
    folder = extract(images, tmp_path / "latents", vae)
    (folder / "manifest.json").unlink()
    short = json.dumps(
        {**json.loads((folder / "chunks" / "0000001.json").read_text()), "labels": [0]}
    )
    for text in (
        short, "", "5", '{"labels": [0.5], "bad_images": [], "crc32": 1}', '{"labels": 5}',
    ):  # fmt: skip
        (folder / "chunks" / "0000001.json").write_text(text)
        with pytest.raises(SystemExit):
            extract(images, folder, vae)
        assert "chunks/0000001.json" in capsys.readouterr().err


# ---- training ----


def train_flags(vae, *more):
    return [
        *more, "--model", "DiT-Ti/4", "--vae", vae, "--max-steps", "6", "--ckpt-every", "3",
        "--ema-decay", "0.5",
    ]  # fmt: skip


def train_on(latents, results, vae, *flags):
    """Train on cached latents, which were made with this autoencoder."""
    named = ["--latents", str(latents), "--results-dir", str(results)]
    train.main([*named, *QUICK, *train_flags(vae), *flags])


def test_training_from_latents_is_training_from_images(images, tmp_path, vae):
    exact = extract(images, tmp_path / "exact", vae, "--latents-dtype", "float32")
    half = extract(images, tmp_path / "half", vae)
    run(images, tmp_path / "images", *train_flags(vae))
    for folder, results in ((exact, "a"), (half, "b")):
        train_on(folder, tmp_path / results, vae)
    found = [without_rates(tmp_path / results / "000-DiT-Ti-4") for results in ("images", "a", "b")]
    shown = Window(GaussianProcess()).shown
    for row, close, near in zip(*found, strict=True):
        assert {k: close[k] for k in shown} == pytest.approx(
            {k: row[k] for k in shown}, rel=1e-5
        )
        assert {k: near[k] for k in shown} == pytest.approx(
            {k: row[k] for k in shown}, rel=2e-3
        )
    losses = [row["loss"] for row in found[0]]
    assert len(losses) == 3 and len(set(losses)) == 3


def test_each_epoch_draws_afresh(images, tmp_path, vae):
    cached, space = CachedLatents(extract(images, tmp_path / "latents", vae)), load_vae(vae)
    batch = torch.stack([cached[i, False][0] for i in range(3)])
    noises = [
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    first, second = (loop.to_latents(space, batch, noise) for noise in noises)
    mean, std = batch.float().unbind(1)
    torch.testing.assert_close(first, (mean + std * noises[0]) * 0.5)
    assert (first - second).abs().min() > 0


def test_a_run_on_latents_resumes_and_needs_no_autoencoder(
    images, tmp_path, vae, monkeypatch, capsys
):
    folder = extract(images, tmp_path / "latents", vae)

    def forbidden(*_):
        raise AssertionError("the autoencoder was loaded")

    monkeypatch.setattr(assembly, "load_vae", forbidden)
    flags = [
        "--latents", str(folder), "--results-dir", str(tmp_path / "r"), *QUICK, *train_flags(vae),
    ]  # fmt: skip
    train.main([*flags, "--max-steps", "3"])
    train.main([*flags, "--resume", "auto"])
    assert "going on from" in capsys.readouterr().out and len(list((tmp_path / "r").iterdir())) == 1


MISFITS = [
    (["--image-size", "32"], "--image-size is 32, the latents' 16"),
    (["--vae", "mse"], "--vae is mse, the latents'"),
    (["--flip"], "--flip is on, the latents have no mirrored images"),
    (["--num-classes", "2"], "--num-classes is 2, the latents have 3 classes"),
    (["--data-path", "{fewer}"], "holds other files than the latents were made from"),
]


@pytest.mark.parametrize("flags, message", MISFITS, ids=[flags[0] for flags, _ in MISFITS])
def test_latents_that_do_not_fit_are_refused(images, tmp_path, vae, capsys, flags, message):
    folder = extract(images, tmp_path / "latents", vae, "--no-flip")
    for path in images.glob("*/*[0-8].png"):
        target = tmp_path / "fewer" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    flags = [flag.format(fewer=tmp_path / "fewer") for flag in flags]
    with pytest.raises(SystemExit):
        train_on(folder, tmp_path / "r", vae, "--no-flip", *flags)
    assert message in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_latents_without_classes_are_not_for_classes(images, tmp_path, vae, capsys):
    folder = extract(images, tmp_path / "latents", vae, "--num-classes", "0")
    with pytest.raises(SystemExit):
        train_on(folder, tmp_path / "r", vae)
    assert "the latents were made without classes" in capsys.readouterr().err


def test_a_copy_of_the_autoencoder_fits_and_another_does_not(images, tmp_path, vae, capsys):
    folder = extract(images, tmp_path / "latents", vae)
    copied = shutil.copytree(vae, tmp_path / "copy")
    extract(images, folder, str(copied))
    flags = [
        "--latents", str(folder), "--results-dir", str(tmp_path / "r"), *QUICK,
        *train_flags(str(copied)),
    ]  # fmt: skip
    train.main(flags)
    autoencoder = AutoencoderKL.from_pretrained(copied)
    autoencoder.quant_conv.weight.data.mul_(2)
    autoencoder.save_pretrained(copied)
    with pytest.raises(SystemExit):
        train.main(flags)
    assert f"--vae is {copied}, the latents' {vae}" in capsys.readouterr().err


def test_an_array_that_was_cut_is_found_by_all(images, tmp_path, vae, capsys):
    folder = extract(images, tmp_path / "latents", vae)
    os.truncate(folder / "moments.npy", 500)
    calls = [
        (
            lambda: extract(images, folder, vae),
            "has lost its length; remove the folder and make it again",
        ),
        (lambda: extract_latents.main(["--verify", str(folder)]), "holds no finished latents"),
        (
            lambda: train.main(["--latents", str(folder), *QUICK, *train_flags(vae)]),
            "it is damaged: remove it and make it",
        ),
    ]
    for call, message in calls:
        with pytest.raises(SystemExit):
            call()
        assert message in capsys.readouterr().err


def test_images_and_latents_may_be_given_together(images, tmp_path, vae):
    folder = extract(images, tmp_path / "latents", vae)
    run(images, tmp_path / "r", *train_flags(vae), "--latents", str(folder))


# ---- mistakes ----

BAD = [
    (["--output", ""], "--data-path"), (["--vae", "none"], "pixels have no latents to cache"),
    (["--image-size", "15"], "image size 15 is not a multiple of 2"),
    (["--num-classes", "1"], "3 class folders, --num-classes is 1"),
    (["--num-workers", "-1"], "--num-workers is -1"),
    (["--output", "/proc/latents"], "cannot write --output /proc/latents"),
    (["--verify", "nowhere"], "leave out --data-path, or --verify"),
    (["--device", "nonsense"], "--device nonsense cannot be used"),
]  # fmt: skip


def test_verify_of_no_folder(capsys):
    with pytest.raises(SystemExit):
        extract_latents.main(["--verify", "nowhere"])
    assert "--verify nowhere holds no finished latents" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_mistake_gets_one_message(images, tmp_path, vae, capsys, flags, message):
    given = ["--data-path", str(images)] if "--data-path" != message else []
    with pytest.raises(SystemExit) as stopped:
        extract_latents.main(
            [
                *given,
                "--output",
                str(tmp_path / "o"),
                "--vae",
                vae,
                "--image-size",
                "16",
                "--num-classes",
                "3",
                *flags,
            ]
        )
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_latents_of_another_kind_and_foreign_folders_are_left_alone(images, tmp_path, vae, capsys):
    folder = extract(images, tmp_path / "latents", vae)
    before = contents_of(folder)
    for output, flags, message in (
        (folder, ["--no-flip"], "holds latents with other flip"),
        (images, [], "holds something else; give a new folder"),
    ):
        with pytest.raises(SystemExit):
            extract(images, output, vae, *flags)
        assert message in capsys.readouterr().err
    assert contents_of(folder) == before


def test_unreadable_images(images, tmp_path, vae, capsys):
    for path in images.glob("*/*.png"):
        target = tmp_path / "broken" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if path.name != "04.png" else b"")
    with pytest.raises(SystemExit) as stopped:
        extract(tmp_path / "broken", tmp_path / "o", vae)
    assert stopped.value.code == 1 and "04.png" in capsys.readouterr().err
    cached = CachedLatents(extract(tmp_path / "broken", tmp_path / "o2", vae, "--skip-bad-images"))
    assert "skipped unreadable image" in capsys.readouterr().out
    (bad,) = cached.manifest["bad_images"]
    index = list_images(tmp_path / "broken", 3).paths.index(bad.split(" (")[0])
    assert torch.equal(cached[index, False][0], cached[index + 1, False][0])


def test_workers_map_the_file_themselves(images, tmp_path, vae):
    cached = CachedLatents(extract(images, tmp_path / "latents", vae))
    sent = pickle.dumps(cached)
    assert len(sent) < 5000 < cached.moments.nbytes
    assert torch.equal(pickle.loads(sent)[3, True][0], cached[3, True][0])
