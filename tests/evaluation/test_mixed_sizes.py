"""Sets of images of several sizes: scored where features bring each to one size, else refused."""

import json

import numpy as np
from PIL import Image
import pytest
import torch

from evaluation.features import Inception, Extractor, load_extractor
from evaluation.image_sets import FolderImages, read_batches
from evaluation.metrics import frechet_distance
from evaluation.options import EvaluationOptions
from evaluation.report import evaluate, make_reference
from evaluation.summaries import summarize
from test_evaluate import CLASSIFIER, CPU, fresh_accelerator, pictures  # noqa: F401

SIZES = [(8, 8), (8, 12), (20, 16)]  # height and width
COUNT = 90  # more than the classifier has features


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder whose images take turns in SIZES."""
    folder = tmp_path_factory.mktemp("mixed")
    for i, image in enumerate(pictures(COUNT, 24)):
        height, width = SIZES[i % 3]
        Image.fromarray(image).resize((width, height)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A folder of images of one size."""
    folder = tmp_path_factory.mktemp("square")
    for i, image in enumerate(pictures(COUNT, 8, seed=1)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def options(samples, reference, **others):
    quick = dict(features=CLASSIFIER, device="cpu", num_workers=0, batch_size=16)
    return EvaluationOptions(samples=samples, reference=reference, **quick | others)


def summary(folder, batch_size):
    """The Summary of the images below a folder by the classifier."""
    images = FolderImages(folder, "samples")
    images.mixed = bool(images.strange)
    batches = read_batches(images, batch_size, CPU)
    return summarize(load_extractor(CLASSIFIER, "cpu"), batches, len(images), with_logits=True)[0]


def test_features_are_those_of_each_image_by_itself_whatever_the_batch(mixed):
    extractor = load_extractor(CLASSIFIER, "cpu")
    one_by_one = torch.cat([
        extractor(torch.from_numpy(np.array(Image.open(path)))[None].permute(0, 3, 1, 2)).features
        for path in sorted(mixed.iterdir())
    ])  # fmt: skip
    for batch_size in (1, 7, COUNT):
        found = summary(mixed, batch_size)
        assert found.spatial is None
        assert torch.allclose(found.features, one_by_one, atol=1e-4)
    assert len(found.logits) == COUNT


def test_a_report_has_the_scores_that_remain_and_says_why(mixed, square):
    report = evaluate(options(mixed, square))
    expected = frechet_distance(summary(mixed, 5).statistics, summary(square, 5).statistics)
    assert report["scores"]["fid"] == pytest.approx(expected, rel=1e-3)
    assert report["scores"]["sfid"] is None and report["scores"]["precision"] is not None
    assert report["samples"]["size"] is None and report["reference"]["size"] == [8, 8]
    assert sum("samples are of several sizes" in note for note in report["notes"]) == 1
    other = evaluate(options(square, mixed, batch_size=7))
    assert other["scores"]["fid"] == pytest.approx(expected, rel=1e-3)
    assert any(note.startswith("reference images are of several") for note in other["notes"])
    assert json.dumps(report)


def test_inception_takes_them_without_spatial_features(inception_weights):
    network = Inception(inception_weights)
    extractor = Extractor(network, "inception", resizes=True)
    images = [
        torch.from_numpy(pictures(1, 9, seed=seed)[0]).permute(2, 0, 1)[:, :, :width]
        for seed, width in enumerate((9, 5, 9))
    ]
    together = extractor(images)
    for i, image in enumerate(images):
        alone = extractor(image[None])
        assert torch.allclose(together.features[i], alone.features[0], rtol=1e-3, atol=1e-4)
        assert torch.allclose(together.logits[i], alone.logits[0], rtol=1e-3, atol=1e-3)
        assert alone.spatial is not None
    assert together.spatial is None
    assert not torch.allclose(together.features[0], together.features[2], rtol=1e-2)


def test_features_of_one_size_and_reference_files_refuse_them(mixed, square, tmp_path):
    wanted = "002.png is 16x20, .*000.png is 8x8|001.png is .*, .*000.png is 8x8"
    for sides in ((mixed, square), (square, mixed)):
        with pytest.raises(ValueError, match=wanted) as found:
            evaluate(options(*sides, features="pixels"))
        assert "`features=pixels` takes images of one size alone" in str(found.value)
    making = EvaluationOptions(
        make_reference=mixed, output=tmp_path / "r.npz", features=CLASSIFIER, device="cpu",
        num_workers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a reference has images of one size: pass `image_size`"):
        make_reference(making)
    assert not (tmp_path / "r.npz").exists()
