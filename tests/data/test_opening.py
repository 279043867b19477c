"""Which source training's options name, and that another kind is a row in a table."""

from dataclasses import FrozenInstanceError, replace
import pickle

import numpy as np
from PIL import Image
import pytest
import torch

from benchmarks.loading import make_cache
import data
from data import opening
from data.batches import StepBatches
from data.images import ImageDataset, read_pixels
from data.listing import list_images, sample_hash
from data.loader import make_loader
from data.options import DataOptions
from data.source import Source


@pytest.fixture
def folder(tmp_path):
    """Six images in two class folders."""
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (40 * i, 0, 0)).save(path)
    return tmp_path / "images"


class Numbers:
    """A Source that keeps nothing: image i is grey level i, all of one class."""

    classes, notes, hash, sample_hash = ["number"], ("made up",), "numbers", ""

    def __init__(self, options, _):
        self.size, self.count = options.image_size, options.num_classes

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        index, flip = key
        return torch.full((3, self.size, self.size), index + flip, dtype=torch.uint8), 0, []


def test_images_are_opened_and_told_from_others(folder):
    source = data.open_source(DataOptions(data_path=folder, image_size=8, num_classes=2))
    listing = list_images(folder, 2)
    assert len(source) == 6 and source.classes == ["a", "b"] and source.notes == ()
    assert source.hash == listing.hash(folder)
    assert source.sample_hash == sample_hash(listing.paths) != ""
    pixels, label, bad = source[1, True]
    straight = read_pixels(listing.paths[1], 8)  # (8, 8, 3)
    assert torch.equal(pixels, torch.from_numpy(straight[:, ::-1].copy()).permute(2, 0, 1))
    assert label == 0 and bad == []
    assert pickle.loads(pickle.dumps(source)).hash == source.hash


def test_what_all_processes_must_agree_on_is_called_for(folder):
    called = []

    def call(function, *args):
        called.append(function)
        return function(*args)

    opening.open_source(DataOptions(data_path=folder, image_size=8), call)
    assert called == [list_images, sample_hash]


def test_latents_are_opened_before_images(tmp_path, folder):
    make_cache(tmp_path, np.random.default_rng(0), 6)
    options = DataOptions(latents=tmp_path, image_size=32, num_classes=0, vae="none")
    source = opening.open_source(options)
    moments, label, _ = source[5, True]
    assert moments.shape == (2, 4, 32, 32) and label == 0
    assert len(source.hash) == 64 and source.sample_hash == ""
    with pytest.raises(ValueError, match="`data_path` .* holds other files than the latents"):
        opening.open_source(replace(options, data_path=folder))
    wrong = replace(options, image_size=16, num_classes=1, vae="mse")
    with pytest.raises(
        ValueError,
        match="`latents` .* do not fit: `image_size` is 16, the latents' 32; `vae` is mse, .*none; "
        r"`num_classes` is 1, .*\(`num_classes=0`\)",
    ):
        opening.open_source(wrong)


def test_without_a_source_it_is_said_what_is_missing():
    with pytest.raises(ValueError, match="`data_path` is missing; give .*, or `latents`"):
        opening.open_source(DataOptions())


def test_another_kind_of_source_is_a_row(monkeypatch):
    monkeypatch.setattr(opening, "SOURCES", opening.SOURCES | {"data_path": Numbers})
    options = DataOptions(data_path="numbers:", image_size=4, num_classes=9)
    source: Source = opening.open_source(options)
    batches = StepBatches(len(source), 4, seed=0, start=0, stop=2)
    for (images, labels, bad), keys in zip(make_loader(source, batches, 0), batches, strict=True):
        assert images[:, 0, 0, 0].tolist() == [index + flip for index, flip in keys]
        assert labels.tolist() == [0] * 4 and bad == []


def test_options_stay_as_they_were_made():
    with pytest.raises(FrozenInstanceError):
        DataOptions().image_size = 8


def test_an_image_may_be_read_as_it_is(folder):
    path = list_images(folder, 2).paths[2]
    assert read_pixels(path).shape == (10, 12, 3)
    assert torch.equal(
        ImageDataset(list_images(folder, 2), 8)[2, False][0],
        torch.from_numpy(read_pixels(path, 8)).permute(2, 0, 1),
    )
