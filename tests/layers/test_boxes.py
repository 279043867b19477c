"""Clips as images and back, and where a token is in a clip: against diffusers and formulas."""

from diffusers.models import embeddings
import pytest
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
import torch

from conftest import randn
from layers.clips import clips_of, frames_of
from layers.positions import line_table, of_box, of_line, turned

BOXES = [(3, 2, 4), (1, 1, 1), (5, 3, 1), (1, 4, 4)]


def test_frames_are_in_the_order_of_clips_and_come_back():
    x = randn(2, 3, 4, 5, 6)
    images = frames_of(x)
    assert images.shape == (8, 3, 5, 6)
    for n in range(2):
        for f in range(4):
            assert torch.equal(images[4 * n + f], x[n, :, f])
    assert torch.equal(clips_of(images, 4), x)


def frequencies(pairs):
    return [10000.0 ** (-k / pairs) for k in range(pairs)]


def angles_of(box, width):
    """By which angles the pairs of numbers of each token are turned, (F·T, width / 2)."""
    plane = width * 3 // 16
    rows = [
        [f * w for w in frequencies(width // 2 - 2 * plane)]
        + [i * w for w in frequencies(plane)] + [j * w for w in frequencies(plane)]
        for f in range(box[0]) for i in range(box[1]) for j in range(box[2])
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("width", [8, 12, 16, 64])
@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_its_formula(box, width):
    ours, angles = of_box(box, width, torch.float64, "cpu"), angles_of(box, width)
    assert ours.shape == (box[0] * box[1] * box[2], 2 * width)
    expected = torch.cat([of.repeat_interleave(2, 1) for of in (angles.sin(), angles.cos())], 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    x = randn(2, 3, len(ours), width)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    by_hand = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)
    torch.testing.assert_close(apply_rot_embed_cat(x, ours), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [16, 48, 64])
@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_turned_as_cogvideox_turns_it(box, width):
    """diffusers' is in float32, and of widths that 16 divides."""
    count, *grid = box
    cos, sin = embeddings.get_3d_rotary_pos_embed(width, ((0, 0), tuple(grid)), tuple(grid), count)
    ours = of_box(box, width, torch.float64, "cpu").float()
    torch.testing.assert_close(ours, torch.cat([sin, cos], dim=1), rtol=0, atol=1e-6)
    x = randn(2, 3, len(ours), width, dtype=torch.float32)
    theirs = embeddings.apply_rotary_emb(x, (cos, sin))
    torch.testing.assert_close(apply_rot_embed_cat(x, ours), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("box", BOXES)
def test_products_of_turned_tokens_see_differences_of_places_alone(box):
    """Of a token and its neighbour in each axis: the same wherever they are."""
    width, more = 32, tuple(side + 1 for side in box)
    q, k = randn(width), randn(width, seed=1)
    rope = of_box(more, width, torch.float64, "cpu")
    queries, keys = (
        apply_rot_embed_cat(x.expand(len(rope), width), rope).unflatten(0, more) for x in (q, k)
    )
    for axis in range(3):
        ahead = (queries * keys.roll(-1, dims=axis)).sum(-1).narrow(axis, 0, box[axis])
        torch.testing.assert_close(
            ahead, ahead.flatten()[0].expand_as(ahead), rtol=1e-12, atol=1e-12
        )
        assert (ahead.flatten()[0] - q @ k).abs() > 1e-3


def test_a_line_is_diffusers_line_and_its_table_adds_it():
    cos, sin = embeddings.get_1d_rotary_pos_embed(
        24, torch.arange(7).double(), use_real=True, freqs_dtype=torch.float64
    )
    angles = of_line(7, 12, torch.float64, "cpu")
    torch.testing.assert_close(turned(angles).float(), torch.cat([sin, cos], 1).float(), rtol=0,
                               atol=1e-6)  # fmt: skip
    theirs = embeddings.get_1d_sincos_pos_embed_from_grid(24, torch.arange(7), output_type="pt")
    table = line_table(7, 24, torch.float64, "cpu")
    torch.testing.assert_close(table, theirs.double(), rtol=0, atol=1e-6)
    longer = line_table(11, 24, torch.float64, "cpu")
    assert torch.equal(longer[:7], table)
