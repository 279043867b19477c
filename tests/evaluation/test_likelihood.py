"""evaluate.py --likelihood and evaluation.likelihood: bits per dimension of images under a flow."""

import json
import math
import shutil

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.weights import Weights, save_weights
from conditions.text import pieces
from conftest import fill_randomly
import evaluate
import extract_latents
from models import DiT
from runtime.team import Team
from evaluation.likelihood import WITHOUT_TEXT, LikelihoodOptions, labels_of, load_measured
from variants.mmdit import MMDiT
from variants.video import VideoDiT
from vae import from_uint8, load_vae

SMALL = dict(patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
LATENT = dict(SMALL, input_size=4, in_channels=4, learn_sigma=False)
PIXELS = dict(SMALL, input_size=8, in_channels=3, learn_sigma=False)
CLASSES = ["cat", "dog", "eel"]
FLOW = {"name": "flow", "path": "linear", "prediction": "velocity"}
QUICK = ["--device", "cpu", "--num-workers", "0"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of two classes of three, and checkpoints: fresh ones, which return 0
    everywhere, and random ones.
    """
    root, source = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for name, count in {"cat": 3, "eel": 4}.items():
        (root / "images" / name).mkdir(parents=True)
        for i in range(count):
            rough = Image.fromarray(source.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            rough.resize((8, 8)).save(root / "images" / name / f"{i}.png")
    for name, config in {"latent": LATENT, "pixels": PIXELS}.items():
        for kind, fill in {"zero": lambda network: network, "random": fill_randomly}.items():
            weights = Weights(fill(DiT(**config)).state_dict(), config, CLASSES, None, FLOW)
            save_weights(root / f"{name}-{kind}.safetensors", weights)
    diffusion = Weights(fill_randomly(DiT(**PIXELS)).state_dict(), PIXELS, CLASSES)
    save_weights(root / "diffusion.safetensors", diffusion)
    return root


def run(capsys, *flags):
    """evaluate.main with these flags: what it reports."""
    evaluate.main([*QUICK, *map(str, flags)])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *flags):
    """The message that these flags get."""
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*QUICK, *map(str, flags)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.split("error: ")[1]


def measured(place, name, vae, **options):
    choice = NetworkChoice(place / f"{name}.safetensors", vae=vae)
    how = LikelihoodOptions(place / "images", num_workers=0, **options)
    return load_measured(choice, how, torch.device("cpu"))


def read(place):
    """Pixels uint8 (7, 3, 8, 8), the classes in their order."""
    paths = sorted((place / "images").glob("*/*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(
        0, 3, 1, 2
    )


def normal_bits(x):
    """Bits per dimension (N,) of a standard normal density at x."""
    return math.log2(2 * math.pi) / 2 + (x**2).flatten(1).mean(dim=1) / math.log(4)


# ---- what is reported ----


def test_a_network_that_moves_nothing_says_what_a_normal_density_says(place, vae, capsys):
    flags = ["--likelihood", place / "latent-zero.safetensors", "--samples", place / "images"]
    report = run(capsys, *flags, "--vae", vae)
    space = load_vae(vae)
    mean, _ = space.moments(from_uint8(read(place)))
    bits = normal_bits((mean - space.shift) * space.scale)
    assert report["scores"]["bits_per_dim"] == pytest.approx(bits.mean().item(), rel=1e-5)
    assert report["samples"] == {"path": str(place / "images"), "images": 7, "dimensions": 64}
    assert report["settings"]["unit"] == "density of latents"
    assert "compare networks behind the same autoencoder" in report["notes"][0]
    assert report["network"]["process"]["path"] == "linear"


def test_pixels_are_spread_over_the_width_of_their_grey_level(place, capsys):
    flags = ["--likelihood", place / "pixels-zero.safetensors", "--samples", place / "images"]
    report = run(capsys, *flags, "--vae", "none")
    x = from_uint8(read(place))
    # The mean of a square grows by the variance of the spread, width²/12
    expected = normal_bits(x) + (2 / 255) ** 2 / 12 / math.log(4) + math.log2(255 / 2)
    assert report["scores"]["bits_per_dim"] == pytest.approx(expected.mean().item(), abs=1e-3)
    error = expected.std().item() / 7**0.5
    assert report["scores"]["standard_error"] == pytest.approx(error, rel=0.02) and error > 5e-3
    assert report["settings"]["unit"] == "grey levels" and not report["notes"]
    network = measured(place, "pixels-zero", "none")
    (first, finer), (other, _) = (
        network.seen(read(place), lambda x, seed=seed: torch.randn(
            x.shape, generator=torch.Generator().manual_seed(seed)
        ))
        for seed in (0, 1)
    )  # fmt: skip
    spread = (first - x) * 255 / 2
    assert finer == math.log2(255 / 2) and not torch.equal(first, other)
    assert -0.5 <= spread.min() < -0.45 and 0.45 < spread.max() <= 0.5
    assert spread.var() == pytest.approx(1 / 12, rel=0.1)


def test_cached_latents_are_as_likely_as_their_images(place, vae, capsys, tmp_path):
    extract_latents.main([
        "--data-path", str(place / "images"), "--output", str(tmp_path / "latents"), "--vae", vae,
        "--image-size", "8", "--num-classes", "3", "--no-flip", "--latents-dtype", "float32",
        "--device", "cpu", "--num-workers", "0",
    ])  # fmt: skip
    capsys.readouterr()
    flags = ["--likelihood", place / "latent-random.safetensors"]
    cached = run(capsys, *flags, "--samples", tmp_path / "latents")
    fresh = run(capsys, *flags, "--samples", place / "images", "--vae", vae)
    assert cached["scores"] == pytest.approx(fresh["scores"], rel=1e-4)
    shutil.rmtree(tmp_path / "latents" / "chunks", ignore_errors=True)
    (tmp_path / "latents" / "manifest.json").unlink()
    message = refused(capsys, *flags, "--samples", tmp_path / "latents")
    assert message.startswith("--samples ") and "holds no complete latents" in message


def test_an_image_is_as_likely_in_any_batch_and_process(place):
    alone, whole = (
        measured(place, "pixels-random", "none", batch_size=size) for size in (2, 64)
    )
    expected = whole.bits()
    assert expected.shape == (7,) and expected.std() > 0.01
    torch.testing.assert_close(alone.bits(), expected, rtol=0, atol=1e-4)
    told = []
    for rank in range(2):
        alone.bits(Team(rank, 2, lambda rows: told.extend(rows) or rows))
    assert [int((row == 0).sum()) for row in told] == [3, 4]
    torch.testing.assert_close(sum(told)[0], expected, rtol=0, atol=1e-4)


def test_the_seed_decides_the_probes_and_the_spread(place):
    first, again, other = (
        measured(place, "pixels-random", "none", seed=seed).bits() for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and (first - other).abs().min() > 0


def test_labels_follow_the_names_of_folders(place):
    """eel is the second folder, and the network's third class. An exact trace takes no probe."""
    found, told = measured(place, "pixels-zero", "none", exact=True), []

    def log_likelihood(network, x, *, model_kwargs, exact, probe):
        assert exact and probe is None
        told.extend(model_kwargs["y"].tolist())
        return x.new_zeros(len(x))

    found.process.flow.log_likelihood = log_likelihood
    assert torch.equal(found.bits(), torch.full((7,), math.log2(255 / 2)))
    assert told == [0, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("names, classes, number, labels", [
    (["b", "c"], ["a", "b", "c"], 3, [1, 2]),
    (["a", "b"], None, 2, [0, 1]),
    (["n01", "n02"], ["tench", "shark"], 2, [0, 1]),
    (None, None, 0, [0]),
    (["a", "b"], None, 0, [0, 0]),
])  # fmt: skip
def test_labels_of_classes(names, classes, number, labels):
    assert labels_of(names, classes, number) == labels


@pytest.mark.parametrize("names, classes", [
    (["a", "x"], ["a", "b"]), (["x"], ["a", "b"]), (["a"], None),
])  # fmt: skip
def test_labels_that_are_in_doubt_are_refused(names, classes):
    with pytest.raises(ValueError, match=r"`samples` have . classes, .*none is called [ax]"):
        labels_of(names, classes, 2)


# ---- what is refused ----


@pytest.mark.parametrize("flags, message", [
    (["--cfg-scale", "4"], "--cfg-scale is 4.0, and a likelihood is that of the network without"),
    (["--reference", "x"], "--reference does not go with --likelihood"),
    (["--features", "pixels"], "--features does not go with --likelihood"),
    (["--seed", "-1"], "--seed is -1; it must be at least 0"),
    (["--weights", "best"], "'best' is none of ema, raw"),
    (["--num-classes", "7"], "--num-classes is 7, but"),
])  # fmt: skip
def test_flags_that_there_is_no_likelihood_with(place, capsys, flags, message):
    ckpt = place / "pixels-random.safetensors"
    told = refused(
        capsys, "--likelihood", ckpt, "--samples", place / "images", "--vae", "none", *flags
    )
    assert message in told


def test_flags_of_a_likelihood_go_with_it_alone(place, capsys):
    sides = ["--samples", place / "images", "--reference", place / "images"]
    assert "--exact goes with --likelihood" in refused(capsys, *sides, "--exact")
    assert "--seed goes with --likelihood" in refused(capsys, *sides, "--seed", "0")
    told = refused(capsys, "--likelihood", place / "pixels-zero.safetensors")
    assert told.startswith("--samples are wanted with --likelihood")


def test_a_diffusion_network_is_refused_by_name(place, capsys):
    ckpt = place / "diffusion.safetensors"
    flags = ["--likelihood", ckpt, "--samples", place / "images", "--vae", "none"]
    told = refused(capsys, *flags)
    assert told.startswith(f"--likelihood {ckpt} has learned diffusion") and "calc_bpd" in told


def test_a_network_of_clips_is_refused_by_name(place, capsys):
    network = VideoDiT(**PIXELS, frames=2)
    ckpt = place / "clips.safetensors"
    save_weights(ckpt, Weights(network.state_dict(), network.config, CLASSES, None, FLOW))
    flags = ["--likelihood", ckpt, "--samples", place / "images", "--vae", "none"]
    assert refused(capsys, *flags).startswith(f"--likelihood {ckpt} makes clips, and a likelihood")


def test_an_exact_trace_of_many_dimensions_is_refused(place, capsys, tmp_path):
    config = PIXELS | {"input_size": 40, "patch_size": 8}
    large = tmp_path / "large.safetensors"
    save_weights(large, Weights(DiT(**config).state_dict(), config, CLASSES, None, FLOW))
    flags = ["--likelihood", large, "--samples", place / "images", "--vae", "none"]
    assert "--exact takes one pass back for each of 4,800" in refused(capsys, *flags, "--exact")


def test_damaged_images_are_refused(place, capsys, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "eel" / "9.png").write_bytes(b"no image")
    flags = ["--samples", tmp_path / "images", "--vae", "none"]
    told = refused(capsys, "--likelihood", place / "pixels-zero.safetensors", *flags)
    assert "9.png cannot be read" in told and "take it out" in told


def test_a_network_that_reads_text_is_asked_without_any(place, capsys, tmp_path):
    """Each image has the empty prompt, and the report says so."""
    sizes = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=1, num_heads=2)
    network = fill_randomly(MMDiT(**sizes, text_length=8))
    weights = Weights(network.state_dict(), network.config, None, None, FLOW)
    save_weights(tmp_path / "words.safetensors", weights)
    (tmp_path / "images").mkdir()
    shutil.copy(place / "images" / "cat" / "0.png", tmp_path / "images")
    flags = ["--vae", "none", "--samples", tmp_path / "images"]
    report = run(capsys, "--likelihood", tmp_path / "words.safetensors", *flags)
    assert WITHOUT_TEXT in report["notes"]
    found = measured(tmp_path, "words", "none")
    given = found.condition(torch.tensor([0, 2]))["y"]
    assert torch.equal(given.tokens, pieces(["", ""], 8).tokens) and given.mask.sum() == 2
    assert report["scores"]["bits_per_dim"] == pytest.approx(float(found.bits().mean()), abs=1e-5)
