"""The committed digits weights, judged against real digits, and the example's own arithmetic."""

import json
import sys

from accelerate.state import AcceleratorState
import numpy as np
from PIL import Image
import pytest
import torch

from conftest import ROOT

EXAMPLE = ROOT / "examples" / "digits"
sys.path.insert(0, str(EXAMPLE))
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install .[digits]")

import judge  # noqa: E402
import make_dataset  # noqa: E402
import plot_scores  # noqa: E402
import train_classifier  # noqa: E402
import train_vae  # noqa: E402
import evaluate  # noqa: E402
from evaluation.features import load_extractor  # noqa: E402
from sampling.loading import load_sampler  # noqa: E402
from vae import from_uint8, load_vae, to_uint8  # noqa: E402

# The README's settings.
SETTINGS = dict(vae=str(EXAMPLE / "vae"), steps=50, cfg_scale=1.5, device="cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder of all digits, which tests read only."""
    folder = tmp_path_factory.mktemp("digits")
    make_dataset.main(["--output", str(folder)])
    return folder


def judged(ckpt, count, **changes):
    sampler = load_sampler(ckpt, **SETTINGS | changes)
    return judge.judge(*judge.sample_digits(sampler, count, seed=0, device=torch.device("cpu")))


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "ckpt, changes",
    [("dit.safetensors", {}), ("flow.safetensors", {"sampler": "heun", "steps": 10})],
    ids=["diffusion", "flow"],
)
def test_committed_weights_draw_the_digits_asked_for_varied_and_new(ckpt, changes, count):
    found = judged(EXAMPLE / ckpt, count, **changes)
    print(json.dumps(found, indent=1))
    assert found["accuracy of the classifier on held-out digits"] >= 0.98
    assert found["agreement with the asked-for class"] >= 0.99
    assert found["within-class variance"] >= 0.6 * found["within-class variance of real digits"]
    assert found["precision"] >= found["precision of as many real training digits"] / 2
    assert found["recall"] >= found["recall of as many real training digits"] / 2
    assert found["share nearer than 2.0 to a training digit"] < 0.01


def test_split_is_stratified_disjoint_and_always_the_same():
    train, train_labels, heldout, heldout_labels = make_dataset.load_split()
    assert len(train) == 1437 and len(heldout) == 360
    assert (
        np.abs(np.bincount(heldout_labels) / 360 - np.bincount(train_labels) / 1437).max() < 0.003
    )
    assert not {d.tobytes() for d in train} & {d.tobytes() for d in heldout}
    assert np.array_equal(heldout_labels[:8], make_dataset.load_split()[3][:8])
    assert heldout[:3].sum(axis=(1, 2)).tolist() == [278, 312, 334]


def test_enlarged_digits_reduce_to_themselves():
    digits = make_dataset.load_split()[0][:50]
    images = np.repeat(make_dataset.enlarge(digits)[..., None], 3, axis=-1)
    assert images.shape == (50, 32, 32, 3) and images.dtype == np.uint8
    error = make_dataset.reduce(images) - digits
    assert np.abs(error).mean() < 0.15 and np.abs(error).max() < 2


def test_dataset_folder_is_written_once(tmp_path, capsys):
    make_dataset.main(["--output", str(tmp_path)])
    files = sorted(tmp_path.glob("*/*/*.png"))
    assert len(files) == 1797 and {p.parent.name for p in files} == {str(i) for i in range(10)}
    Image.new("RGB", (32, 32)).save(files[0])
    kept = files[0].read_bytes()
    make_dataset.main(["--output", str(tmp_path)])
    assert files[0].read_bytes() == kept and "1437 digits" in capsys.readouterr().out


def test_committed_autoencoder_gives_heldout_digits_back():
    digits = make_dataset.load_split()[2]
    images = np.repeat(make_dataset.enlarge(digits)[:, None], 3, axis=1)
    vae = load_vae(str(EXAMPLE / "vae"))
    mean, std = vae.moments(from_uint8(torch.from_numpy(images)))
    latents = vae.draw(mean, std, torch.zeros_like(mean))
    assert 0.8 < latents.std() < 1.2
    error = make_dataset.reduce(to_uint8(vae.decode(latents)).numpy()) - digits
    assert (
        np.sqrt((error**2).mean()) < 1.0 < np.sqrt(((digits - digits.mean(axis=0)) ** 2).mean()) / 3
    )


def test_judge_tells_copies_noise_and_sameness():
    train, labels, _, _ = make_dataset.load_split()
    copies = judge.judge(train[:300], labels[:300])
    assert (
        copies["share nearer than 2.0 to a training digit"] == 1
        and copies["agreement with the asked-for class"] > 0.99
    )
    means = np.stack([train[labels == c].mean(axis=0) for c in labels[:300]])
    same = judge.judge(means, labels[:300])
    assert same["agreement with the asked-for class"] > 0.9 and same["within-class variance"] < 1e-6
    assert same["recall"] < 0.1
    noise = judge.judge(np.random.default_rng(0).uniform(0, 16, (300, 8, 8)), labels[:300])
    assert noise["precision"] == 0 and noise["agreement with the asked-for class"] < 0.3


def test_example_weights_are_small_and_say_what_they_are():
    weights = [EXAMPLE / "dit.safetensors", *(EXAMPLE / "vae").iterdir()]
    assert sum(p.stat().st_size for p in weights) < 16e6
    header = (EXAMPLE / "dit.safetensors").read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert json.loads(metadata["config"])["num_classes"] == 10
    assert json.loads(metadata["classes"]) == [str(i) for i in range(10)]


def test_autoencoder_script_trains_saves_and_overwrites_nothing(tmp_path, capsys):
    for i, image in enumerate(make_dataset.enlarge(make_dataset.load_split()[0][:8])):
        (tmp_path / "some").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "some" / f"{i}.png")
    flags = [
        "--data-path", str(tmp_path / "some"), "--output", str(tmp_path / "vae"), "--batch-size",
        "4", "--steps", "3",
    ]  # fmt: skip
    train_vae.main(flags)
    assert (
        load_vae(str(tmp_path / "vae")).shape == (4, 8)
        and "step 3: squared error" in capsys.readouterr().out
    )
    for wrong, message in (
        (flags, "exists already"),
        ([*flags[:3], str(tmp_path / "new"), "--data-path", "no"], "no is not"),
    ):
        with pytest.raises(SystemExit):
            train_vae.main(wrong)
        assert message in capsys.readouterr().err


# ---- scores ----


def test_committed_classifier_knows_heldout_digits():
    digits, labels = make_dataset.load_split()[2:]
    images = np.repeat(make_dataset.enlarge(digits)[:, None], 3, axis=1)
    logits = load_extractor(str(EXAMPLE / "classifier"), torch.device("cpu"))(
        torch.from_numpy(images)
    ).logits
    assert (logits.argmax(dim=1).numpy() == labels).mean() >= 0.98


def test_committed_scores_of_heldout_digits_can_be_had_again(dataset, capsys):
    evaluate.main([
        "--samples", str(dataset / "heldout"), "--reference", str(dataset / "train"),
        "--features", str(EXAMPLE / "classifier"), "--num-workers", "0", "--device", "cpu",
    ])  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    found, committed = (
        json.loads(capsys.readouterr().out),
        json.loads((EXAMPLE / "logs" / "heldout.json").read_text()),
    )
    for side in ("samples", "reference"):
        assert found[side]["sha256_of_pixels"] == committed[side]["sha256_of_pixels"]
    assert found["features"]["sha256"] == committed["features"]["sha256"]
    assert found["scores"].pop("sfid") is committed["scores"].pop("sfid") is None
    assert found["scores"] == pytest.approx(committed["scores"], rel=1e-3)


def test_committed_scores_fall_with_training_towards_those_of_real_digits():
    rows = plot_scores.read_scores(EXAMPLE / "logs" / "scores.jsonl")
    floor = json.loads((EXAMPLE / "logs" / "heldout.json").read_text())
    fids = [row["eval_fid"] for row in rows]
    assert len(rows) >= 6 and {row["eval_samples"] for row in rows} == {
        floor["samples"]["images"]
    } == {360}
    assert floor["scores"]["fid"] < fids[-1] < fids[len(fids) // 2] < fids[len(fids) // 4] < fids[0]


def test_scores_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg", "c.png"):
        plot_scores.main(["--output", str(tmp_path / name)])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (
        Image.open(tmp_path / "c.png").size[0] > 500 and (ROOT / "docs" / "digits-fid.svg").exists()
    )
    with pytest.raises(SystemExit):
        plot_scores.main(["--scores", "missing.jsonl"])
    assert "cannot read the scores" in capsys.readouterr().err


def test_classifier_script_trains_saves_and_overwrites_nothing(dataset, tmp_path, capsys):
    flags = ["--data-path", str(dataset), "--output", str(tmp_path / "classifier")]
    train_classifier.main([*flags, "--epochs", "1"])
    out = capsys.readouterr().out
    assert "epoch 1: loss" in out and "of the held-out digits are right" in out
    rows = load_extractor(str(tmp_path / "classifier"), torch.device("cpu"))(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    )
    assert rows.features.shape == (2, 64) and rows.logits.shape == (2, 10)
    elsewhere = [*flags[:3], str(tmp_path / "n"), "--data-path", "no"]
    for wrong, message in ((flags, "exists already"), (elsewhere, "no/train is not")):
        with pytest.raises(SystemExit):
            train_classifier.main(wrong)
        assert message in capsys.readouterr().err
