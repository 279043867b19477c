"""Images of their own shape: the sizes that they are brought to, and the order of their steps."""

import math
import pickle

import numpy as np
from PIL import Image
import pytest
import torch

import data
from data.batches import StepBatches, collate_ragged
from data.buckets import BucketBatches, in_buckets, told
from data.images import ImageDataset, sizes_in_headers
from data.listing import Listing
from data.loader import make_loader
from data.options import DataOptions
from data.shapes import bucket_sizes, nearest_bucket, own_size, size_for

# ---- which size ----


def test_buckets_of_sixteen_tokens_a_side():
    standing = [(22, 11), (21, 12), (19, 13), (18, 14), (17, 15)]
    wanted = [*standing, (16, 16), *(size[::-1] for size in reversed(standing))]
    assert bucket_sizes(256, 16) == [(16 * high, 16 * wide) for high, wide in wanted]
    assert bucket_sizes(16, 16) == [(16, 16)]


@pytest.mark.parametrize("side", [2, 3, 4, 7, 16, 32, 37])
def test_buckets_have_about_as_many_tokens_and_none_too_many(side):
    found = bucket_sizes(8 * side, 8)
    assert found == sorted(found, key=lambda size: size[1] / size[0])
    assert set(found) == {size[::-1] for size in found} and len(set(found)) == len(found)
    for height, width in found:
        assert height % 8 == width % 8 == 0 and 1 / 2 <= height / width <= 2
        assert (0.5 if side == 2 else 0.8) * side**2 <= height * width / 64 <= side**2


def test_the_nearest_bucket_is_the_one_of_the_most_similar_aspect():
    buckets, source = bucket_sizes(256, 16), np.random.default_rng(0)
    for size in source.integers(1, 2000, (300, 2)):
        aspect = size[0] / size[1]
        ratios = [max(high / wide / aspect, aspect / high * wide) for high, wide in buckets]
        assert nearest_bucket(tuple(size), buckets) == int(np.argmin(ratios))
    assert [buckets[nearest_bucket(size, buckets)] for size in buckets] == buckets


def test_own_sizes_keep_the_aspect_and_enlarge_nothing():
    for height, width in np.random.default_rng(1).integers(128, 3000, (300, 2)).tolist():
        high, wide = own_size((height, width), 256, 8)
        assert high % 8 == wide % 8 == 0 and high * wide <= 256**2
        assert high <= height + 4 and wide <= width + 4
        if max(height / width, width / height) <= 4:
            assert high * wide > 0.9 * min(256**2, height * width)
            assert abs(math.log(high / wide * width / height)) < 0.1
    assert own_size((90, 61), 256, 8) == (88, 64)
    assert own_size((1, 5000), 256, 8) == (8, 5000) and own_size((3, 2), 256, 8) == (8, 8)
    assert own_size((10**6, 1), 64, 8) == (512, 8)  # 64 tokens, the most that there may be


def test_a_unit_that_does_not_fit_and_a_kind_that_there_is_not():
    for call in (lambda: bucket_sizes(100, 16), lambda: size_for("own", 8, 16)):
        with pytest.raises(ValueError, match="`image_size` .* is not a multiple of 16"):
            call()
    with pytest.raises(ValueError, match="`sizes` is round; choose from square, buckets, own"):
        size_for("round", 256, 16)


# ---- which image at which step ----

SIZES = [(8, 4), (6, 6), (6, 6), (4, 8), (6, 6), (8, 4), (8, 4), (6, 6), (2, 12), (6, 6), (6, 6),
         (8, 4), (8, 4)]  # fmt: skip


def stream(seed=0, start=0, stop=12, batch=2, **share):
    return list(BucketBatches(SIZES, batch, seed, start, stop, **share))


def indices(batches):
    return [[index for index, _ in pairs] for pairs in batches]


def test_a_step_has_one_size_and_an_epoch_each_image_once():
    assert {size: list(images) for size, images in in_buckets(SIZES).items()} == {
        size: [i for i, other in enumerate(SIZES) if other == size] for size in sorted(set(SIZES))
    }
    assert BucketBatches(SIZES, 2, 0, 0, 1).steps_per_epoch == 2 + 3
    seen = indices(stream(stop=200))
    assert all(len(one) == 2 and len({SIZES[i] for i in one}) == 1 for one in seen)
    missed, orders = set(), set()
    for first in range(0, 200, 5):
        epoch = seen[first : first + 5]
        once = sum(epoch, [])
        assert len(set(once)) == len(once) == 10
        missed |= {i for i in range(len(SIZES)) if SIZES[i] == (8, 4)} - set(once)
        orders.add(tuple(SIZES[one[0]] for one in epoch))
    assert len(orders) > 5  # of the 10 that there are
    assert missed == {0, 5, 6, 11, 12}  # none of five in pairs is left out for ever
    assert set(sum(seen, [])) == {i for i in range(len(SIZES)) if SIZES[i] in [(8, 4), (6, 6)]}


def test_the_order_is_of_seed_and_step_alone():
    for start in (1, 4, 5, 11):
        assert stream(start=start) == stream()[start:]
    assert indices(stream(seed=1)) != indices(stream())
    shares = [stream(rank=rank, world_size=2) for rank in range(2)]
    assert [sum(step, []) for step in zip(*shares)] == stream()
    flips = [[flip for _, flip in pairs] for pairs in stream()]
    assert flips == [
        [flip for _, flip in pairs] for pairs in StepBatches(len(SIZES), 2, 0, 0, 12)
    ]


def test_small_buckets_are_told_and_empty_ones_refused():
    assert told(SIZES, 2) == [
        "buckets, height x width and images: 2x12 1, 4x8 1, 6x6 6, 8x4 5",
        "note: 2 images are never seen: their buckets (2x12, 4x8) do not fill a batch of 2",
    ]
    assert len(told(SIZES[:3], 1)) == 1
    with pytest.raises(ValueError, match="no bucket has the 7 images of a batch: the largest of 4"):
        BucketBatches(SIZES, 7, 0, 0, 1)


# ---- images ----

SHAPES = [(20, 12), (40, 24), (16, 16), (12, 20), (50, 90)]


@pytest.fixture
def folder(tmp_path):
    """An image of each of SHAPES, dark above and on the left."""
    for i, (height, width) in enumerate(SHAPES):
        ramp = np.add.outer(np.arange(height), np.arange(width))
        pixels = (255 * ramp / ramp.max()).astype(np.uint8)
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / "images" / "a" / f"{i}.png")
    return tmp_path / "images"


def opened(folder, **more):
    options = {"image_size": 16, "num_classes": 1, "vae": "none", "patch_size": 4, **more}
    return data.open_source(DataOptions(data_path=folder, **options))


def test_images_are_brought_to_their_buckets(folder):
    source = opened(folder, sizes="buckets")
    assert source.sizes == [(20, 12), (20, 12), (16, 16), (12, 20), (12, 20)]
    straight, mirrored = (source[1, flip][0] for flip in (False, True))
    assert straight.shape == (3, 20, 12) and torch.equal(straight.flip(2), mirrored)
    # Scaled and not cropped: from corner to corner it is the image
    assert straight[0, 0, 0] < 12 and straight[0, -1, -1] > 243
    assert [tuple(source[i, False][0].shape[1:]) for i in range(5)] == source.sizes
    assert pickle.loads(pickle.dumps(source)).sizes == source.sizes
    plain = opened(folder)
    assert plain.sizes is None and plain[1, False][0].shape == (3, 16, 16)
    own = opened(folder, sizes="own", image_size=32)
    assert len({source.hash, plain.hash, own.hash}) == 3


def test_images_of_their_own_size_share_a_batch(folder):
    source = opened(folder, sizes="own", image_size=32)
    assert source.sizes == [(20, 12), (40, 24), (16, 16), (12, 20), (24, 40)]
    keys = [[(0, False), (4, True), (1, False)], [(2, False), (3, False), (3, True)]]
    for workers in (0, 1):
        for pairs, (batch, labels, bad) in zip(
            keys, make_loader(source, keys, workers, collate_fn=collate_ragged), strict=True
        ):
            assert labels.tolist() == [0, 0, 0] and bad == []
            for image, key in zip(batch.parts(), pairs, strict=True):
                assert torch.equal(image, source[key][0])
    assert collate_ragged([(None, 0, ["x"]), source[0, False]])[0] is None


def test_an_unreadable_image_is_found_before_the_work_or_replaced_in_its_size(folder):
    (folder / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read .*1.png .*mend it"):
        opened(folder, sizes="buckets")
    source = opened(folder, sizes="buckets", skip_bad_images=True)
    assert source.sizes[1] == (16, 16)
    (folder / "a" / "3.png").unlink()  # which the next one stands in for, in its size
    image, _, bad = source[3, False]
    assert image.shape == (3, 12, 20) and [one.path[-5:] for one in bad] == ["3.png"]


def test_headers_are_read_as_images_are(folder):
    paths = sorted(map(str, (folder / "a").iterdir()))
    assert sizes_in_headers([*paths, "nowhere"])[:-1] == [(shape, "") for shape in SHAPES]
    size, why = sizes_in_headers(["nowhere"])[0]
    assert size is None and "nowhere" in why
    turned = Image.new("RGB", (30, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # lying on its side, which nobody looks at
    turned.save(folder / "turned.jpg", exif=exif)
    assert sizes_in_headers([folder / "turned.jpg"]) == [((10, 30), "")]
    dataset = ImageDataset(Listing([str(folder / "turned.jpg")], [0], None), 8, sizes=[(8, 24)])
    assert dataset[0, False][0].shape == (3, 8, 24)
