"""Images that are not square, and sampling at another size than the trained one, through the doors:
small networks, rectangles from end to end.
"""
from functools import partial
import json

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints import load_pretrained, save_weights
from checkpoints.choice import NetworkChoice
from checkpoints.files import list_checkpoints, newest_checkpoint, read_checkpoint
from checkpoints.loading import build_network
from checkpoints.released import released_name
from checkpoints.weights import Weights
from conftest import fill_randomly
import count
import evaluate
import export
import extract_latents
from models import DiT, DiT_models
import sample
import sample_ddp
from processes.flow import FlowProcess
from sampling import load_sampler
from sampling.sampler import Sampler
from test_train import fresh_accelerator  # noqa: F401
import train
from vae import PixelSpace

MODEL = ["--model", "DiT-Ti/8", "--num-classes", "2"]
TRAIN = [
    *MODEL, "--vae", "none", "--image-size", "16x24", "--global-batch-size", "2", "--num-workers",
    "0", "--device", "cpu", "--lr", "1e-2", "--ema-decay", "0.5", "--resume", "auto",
]  # fmt: skip
TINY = dict(patch_size=8, hidden_size=16, depth=1, num_heads=2)
FEW = ["--vae", "none", "--num-sampling-steps", "2", "--device", "cpu"]
JOB = [*FEW, "--num-fid-samples", "3"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A DiT-Ti/8 that takes milliseconds."""
    monkeypatch.setitem(DiT_models, "DiT-Ti/8", partial(DiT, **TINY))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 2 classes with 3 images each, of several shapes."""
    folder, source = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(6):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = source.integers(0, 256, (30 + 9 * i, 50 - 4 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module", params=["table", "rope"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint of a network of 16×24 pixels, in patches of 8, that says so itself."""
    config = dict(**TINY, input_size=[16, 24], in_channels=3, num_classes=2, learn_sigma=False)
    config |= {} if request.param == "table" else {"positions": "rope"}
    path = tmp_path_factory.mktemp("checkpoint") / f"{request.param}.safetensors"
    network = fill_randomly(DiT(**config), std=0.5)
    save_weights(path, Weights(network.state_dict(), config, None))
    return path


def refused(door, capsys, *flags):
    """The message with which a door refuses these flags."""
    with pytest.raises(SystemExit) as stopped:
        door.main([*map(str, flags)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def trained(images, results, *flags):
    train.main(["--data-path", str(images), "--results-dir", str(results), *TRAIN, *flags])


def array(folder):
    (found,) = folder.glob("*.npz")
    return np.load(found)["arr_0"]


# ---- rectangles from end to end ----


def test_a_rectangle_is_trained_resumed_previewed_and_scored(images, tmp_path, capsys):
    evaluate.main([
        "--make-reference", str(images), "--image-size", "16x24", "--features", "pixels",
        "--output", str(tmp_path / "real.npz"), "--device", "cpu", "--num-workers", "0",
    ])  # fmt: skip
    assert np.load(tmp_path / "real.npz")["arr_0"].shape == (6, 16, 24, 3)
    scoring = ["--eval-reference", str(tmp_path / "real.npz"), "--eval-features", "pixels"]
    scoring += ["--eval-samples", "6", "--eval-every", "2"]
    results = tmp_path / "results"
    trained(images, results, "--max-steps", "2", "--sample-every", "2", *scoring)
    folder = results / "000-DiT-Ti-8"
    assert json.loads((folder / "run.json").read_text())["args"]["image_size"] == [16, 24]
    preview = Image.open(folder / "previews" / "0000002.png")
    assert preview.size == (4 * (24 + 2) + 2, 4 * (16 + 2) + 2)
    assert "fid" in (folder / "metrics.jsonl").read_text()
    trained(images, results, "--max-steps", "3")  # goes on
    assert [path.name for path in results.iterdir() if path.is_dir()] == ["000-DiT-Ti-8"]
    last = read_checkpoint(newest_checkpoint(folder))
    assert last["step"] == 3 and last["config"]["input_size"] == [16, 24]
    trained(images, results, "--max-steps", "1", "--image-size", "24x16")  # another run
    assert len(list_checkpoints(results / "001-DiT-Ti-8")) == 1
    sample.main(["--ckpt", str(folder), *FEW, "--output", str(tmp_path / "o.png")])
    assert "2 images of 16x24 pixels" in capsys.readouterr().out
    trained(images, results, "--max-steps", "1", "--image-size", "16x16")
    args = json.loads((results / "002-DiT-Ti-8" / "run.json").read_text())["args"]
    assert args["image_size"] == 16


def test_weights_are_fine_tuned_at_another_size(images, checkpoint, tmp_path):
    own = ["--positions", checkpoint.stem]
    start = ["--init-from", str(checkpoint), "--max-steps", "1", "--lr", "1e-12", *own]
    start += ["--no-learn-sigma"]
    trained(images, tmp_path, "--image-size", "32x16", *start)
    contents = read_checkpoint(newest_checkpoint(tmp_path / "000-DiT-Ti-8"))
    fine_tuned = DiT(**contents["config"])
    assert fine_tuned.grid == (4, 2)
    before = load_sampler(checkpoint, vae="none", device="cpu").network.state_dict()
    for name, tensor in contents["ema"].items():
        if name == "pos_embed":
            assert torch.equal(tensor, fine_tuned.state_dict()[name])
        else:
            assert torch.allclose(tensor, before[name], atol=1e-6), name


def test_latents_of_rectangles_are_cached_and_trained_on(images, tmp_path, vae, capsys):
    cache, flags = tmp_path / "cache", ["--num-classes", "2", "--vae", vae, "--device", "cpu"]
    common = ["--data-path", str(images), "--num-workers", "0", *flags]
    extract_latents.main([*common, "--output", str(cache), "--image-size", "32x48"])
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["image_size"] == [32, 48] and manifest["shape"] == [2, 4, 16, 24]
    training = ["--latents", cache, *TRAIN, "--vae", vae, "--max-steps", "1"]
    wrong = refused(train, capsys, *training, "--image-size", "48x32", "--results-dir", tmp_path)
    assert "--image-size is 48x32, the latents' 32x48" in wrong
    manifest["image_size"] = [32, 32]
    train.main([*map(str, training), "--image-size", "32x48", "--results-dir", str(tmp_path / "r")])
    contents = read_checkpoint(newest_checkpoint(tmp_path / "r" / "000-DiT-Ti-8"))
    assert contents["config"]["input_size"] == [16, 24]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    wrong = refused(train, capsys, *training, "--image-size", "32", "--results-dir", tmp_path)
    assert "image_size, channels and ratio that do not fit" in wrong


def test_the_cost_of_a_rectangle_is_told(capsys):
    count.main([*MODEL, "--vae", "none", "--image-size", "16x24"])
    network = DiT(input_size=[16, 24], in_channels=3, num_classes=2, **TINY)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    assert capsys.readouterr().out.splitlines()[1].split()[2] == f"{numbers:,}"


# ---- another size than the trained one ----


def test_many_images_of_another_size(checkpoint, tmp_path):
    """Image i depends on seed, i and the size, not on the batch; the size is part of the folder."""
    usual = load_pretrained(checkpoint)[0].extrapolation
    another = "extend" if usual == "interpolate" else "interpolate"
    for name, flags in {
        "own": [], "same": ["--image-size", "16x24"], "other": ["--image-size", "24x32"],
        "alone": ["--image-size", "24x32", "--per-proc-batch-size", "1"],
        "placed": ["--image-size", "24x32", "--extrapolation", another],
    }.items():  # fmt: skip
        job = ["--ckpt", str(checkpoint), *JOB, "--sample-dir", str(tmp_path / name)]
        sample_ddp.main([*job, *flags])
    assert array(tmp_path / "own").shape == (3, 16, 24, 3)
    found = {name: array(tmp_path / name) for name in ("other", "alone", "placed")}
    assert found["other"].shape == (3, 24, 32, 3)
    assert np.abs(found["other"].astype(int) - found["alone"]).max() <= 1
    assert (found["other"] != found["placed"]).any()
    names = {path.parent.name: path.stem for path in tmp_path.glob("*/*.npz")}
    assert names["own"] == names["same"]
    assert len({names["own"], names["other"], names["placed"]}) == 3
    (own,), (other,) = (
        [json.loads(path.read_text()) for path in (tmp_path / name).glob("*/manifest.json")]
        for name in ("own", "other")
    )
    assert "image_size" not in own["decides"] and "extrapolation" not in own["decides"]
    assert other["decides"]["image_size"] == [24, 32]


def test_a_sampler_at_another_size_is_that_of_a_network_with_such_positions():
    """Extended positions of a larger grid are those of a network that is made for it."""
    sizes = dict(patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=2)
    for positions in ("table", "rope", "table+rope"):
        ours, twin = (
            fill_randomly(DiT(size, positions=positions, extrapolation="extend", **sizes), std=0.3)
            for size in (4, [6, 10])
        )
        made = [
            Sampler(network.eval(), PixelSpace(), None, 3, "ddim", latent_shape=shape)
            .numbered_latents(0, range(2), torch.arange(2))
            for network, shape in ((ours, (3, 6, 10)), (twin, None))
        ]  # fmt: skip
        assert made[0].shape == (2, 3, 6, 10)
        assert torch.allclose(*made, atol=1e-5) and made[0].abs().max() > 0.1


def test_one_picture_of_another_size_says_it(checkpoint, tmp_path, capsys):
    flags = ["--ckpt", str(checkpoint), *FEW, "--class-labels", "0", "1"]
    sample.main([
        *flags, "--image-size", "8x40", "--output", str(tmp_path / "o.png"),
        "--trajectory", str(tmp_path / "t.png"),
    ])  # fmt: skip
    assert "2 images of 8x40 pixels" in capsys.readouterr().out
    picture = Image.open(tmp_path / "o.png")
    assert picture.size == (2 * 120 + 12, 24 + 16 + 8)  # three times as large
    assert json.loads(picture.text["settings"])["image_size"] == [8, 40]
    assert Image.open(tmp_path / "t.png").size == (2 * 120 + 12, 2 * (24 + 16) + 12)


def test_bare_weights_have_the_size_that_their_positions_tell(tmp_path, capsys):
    network = fill_randomly(DiT(input_size=24, in_channels=3, num_classes=2, **TINY))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    flags = ["--ckpt", tmp_path / "a.pt", *MODEL, *FEW, "--output", tmp_path / "o.png"]
    for size, told in {None: "24x24", "24": "24x24", "16x24": "16x24", "256": "256x256"}.items():
        if size != "256":
            sample.main([*map(str, flags), *(["--image-size", size] if size else [])])
            assert f"2 images of {told} pixels" in capsys.readouterr().out
    export_to = ["--ckpt", tmp_path / "a.pt", *MODEL, "--vae", "none", "--output", tmp_path / "hub"]
    wrong = refused(export, capsys, *export_to, "--image-size", "256")
    assert "--image-size is 256, but" in wrong and "was trained on 24 pixels" in wrong
    export.main([*map(str, export_to)])
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["input_size"] == 24
    # A learned table that makes no square: only the user knows
    oblong = fill_randomly(DiT(input_size=[16, 24], in_channels=3, num_classes=2, **TINY))
    learned = {"pos_embed": torch.randn(1, 6, 16)}
    weights = Weights(oblong.state_dict() | learned, None, None)
    chosen = partial(NetworkChoice, ckpt="a.pt", vae="none", model="DiT-Ti/8", num_classes=2)
    assert build_network(chosen(image_size=(16, 24)), weights, "none").input_size == [16, 24]
    with pytest.raises(ValueError, match="Give the `model`, `image_size`"):
        build_network(chosen(), weights, "none")


@pytest.mark.parametrize("size, name", [
    (256, "DiT-XL-2-256x256.pt"), (512, "DiT-XL-2-512x512.pt"), ((256, 384), "DiT-XL-2-256x256.pt"),
    ((512, 384), "DiT-XL-2-512x512.pt"), (128, "DiT-XL-2-256x256.pt"),
    (1024, "DiT-XL-2-512x512.pt"),
])  # fmt: skip
def test_the_released_weights_of_the_nearest_size_are_taken(size, name):
    assert released_name("DiT-XL/2", size, 1000) == name


# ---- mistakes ----


@pytest.mark.parametrize("door, flags, message", [
    (train, ["--image-size", "16x20"], "image width 20 is not a multiple of 8"),
    (train, ["--image-size", "12x24"], "image height 12 is not a multiple of 8"),
    (train, ["--image-size", "16*24"], "'16*24' is no size"),
    (train, ["--image-size", "16x0"], "--image-size is 0; it must be at least 1"),
    (train, ["--image-size", "16384x16384", "--global-batch-size", "1048576"],
     "images of 16384x16384 pixels, which are held at a time"),
])  # fmt: skip
def test_a_size_that_does_not_fit_is_refused_before_the_work(
    door, flags, message, images, tmp_path, capsys
):
    given = ["--data-path", images, "--results-dir", tmp_path / "results", *TRAIN, *flags]
    assert message in refused(door, capsys, *given)
    assert not (tmp_path / "results").exists()


def test_a_likelihood_is_of_images_of_the_trained_size(images, tmp_path, capsys):
    config = dict(**TINY, input_size=[16, 24], in_channels=3, num_classes=2, learn_sigma=False)
    network = fill_randomly(DiT(**config), std=0.01)
    weights = Weights(network.state_dict(), config, None, process=FlowProcess().config)
    save_weights(tmp_path / "flow.safetensors", weights)
    flags = ["--likelihood", tmp_path / "flow.safetensors", "--samples", images, "--vae", "none"]
    flags += ["--device", "cpu", "--num-workers", "0"]
    wrong = refused(evaluate, capsys, *flags, "--image-size", "24x16")
    assert "--image-size is 24x16, but" in wrong and "was trained on 16x24 pixels" in wrong
    evaluate.main([*map(str, flags), "--image-size", "16x24"])
    report = json.loads(capsys.readouterr().out)
    assert report["samples"]["dimensions"] == 16 * 24 * 3
    assert 0 < report["scores"]["bits_per_dim"] < 20


# ---- a position table of another grid ----


def bare(path, *grid):
    """A file of weights without a configuration, of a network of DiT-Ti/8 for a grid of tokens."""
    size = [8 * side for side in grid]
    network = DiT(**TINY, input_size=size, in_channels=3, num_classes=2, learn_sigma=False)
    torch.save(fill_randomly(network, std=0.5).state_dict(), path)
    return path


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 16), (16, 1), (4, 4), (3, 2)])
def test_a_bare_table_tells_its_grid_whatever_is_asked_for(tmp_path, grid):
    path = bare(tmp_path / "bare.pt", *grid)
    for size in (None, (24, 8), (8, 128)):
        sampler = load_sampler(
            path, model="DiT-Ti/8", num_classes=2, vae="none", device="cpu", image_size=size
        )
        assert sampler.network.grid == grid


def test_a_configuration_of_another_grid_is_refused(tmp_path, capsys):
    tensors = torch.load(bare(tmp_path / "bare.pt", 2, 8), weights_only=True)
    config = dict(**TINY, in_channels=3, num_classes=2, learn_sigma=False)
    for size in ([64, 16], 32):
        path = tmp_path / "other.safetensors"
        save_weights(path, Weights(tensors, config | {"input_size": size}, None))
        message = refused(sample, capsys, "--ckpt", path, *FEW)
        assert "has the position table of a grid of 2 x 8 tokens, and its network one of" in message


@pytest.mark.parametrize("positions", ["table", "rope"])
def test_a_run_does_not_go_on_at_another_size(images, tmp_path, capsys, positions):
    """Not at the same number of tokens either, nor where no table tells."""
    flags = [*TRAIN, "--data-path", images, "--positions", positions, "--results-dir"]
    train.main([*map(str, [*flags, tmp_path / "results", "--max-steps", "1"])])
    capsys.readouterr()
    (folder,) = (tmp_path / "results").iterdir()
    more = ["--resume", folder, "--max-steps", "2", "--image-size"]
    message = refused(train, capsys, *flags, tmp_path / "more", *more, "24x16")
    assert "was trained on latents of size [16, 24], and those here have [24, 16]; pass" in message
    assert "the same --image-size, or start a new run from its weights with --init-from" in message
    assert not (tmp_path / "more").exists()


def test_a_size_of_too_many_tokens_is_refused_before_memory_ends(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sampling.loading.MOST_IN_TABLE", 16 * 64)
    message = refused(sample, capsys, "--ckpt", checkpoint, *FEW, "--image-size", "80x64")
    assert "--image-size 80x64 makes 80 tokens, and a network of this width takes 64" in message
