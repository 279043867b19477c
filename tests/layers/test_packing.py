"""Images of many sizes packed in rows: equal to each alone; nothing is learned from empty places.
"""

import pytest
import torch

from conftest import SMALL, fill_randomly, randn
from layers.packing import EMPTY, EMPTY, pack, rows_for
from models import DiT

SHAPES = [(8, 8), (4, 12), (12, 4), (2, 2), (6, 10), (10, 6)]  # of images; tokens 16 12 12 1 15 15
LENGTH = 20
OPTIONS = {
    "table": {}, "rope": dict(positions="rope"),
    "all": dict(positions="table+rope", norm="rms", mlp="swiglu", qk_norm=True),
}  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def built(**options):
    sizes = SMALL | dict(hidden_size=48, num_heads=3)
    return fill_randomly(DiT(**sizes, **options), std=0.2).double().eval()


def batch():
    """Images of SHAPES, steps and labels."""
    images = [randn(4, *shape, seed=i) for i, shape in enumerate(SHAPES)]
    return images, torch.arange(len(images)) * 150 + 7, torch.arange(len(images))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("block", ["adaln_zero", "adaln", "adaln_single"])
@every_option
def test_packed_is_each_image_alone_in_outputs_and_gradients(block, options):
    model, (images, t, y) = built(block=block, **options), batch()
    packed = pack(images, 2, LENGTH)
    assert len(packed.tokens) < len(images) and (packed.image == EMPTY).any()
    out = packed.unpacked(model(packed, t, y))
    alone = [model(image[None], t[i : i + 1], y[i : i + 1])[0] for i, image in enumerate(images)]
    for ours, expected in zip(out, alone, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    found, wanted = (
        gradients(model, sum(image.square().mean() for image in part)) for part in (out, alone)
    )
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@every_option
def test_empty_places_change_nothing(options):
    """Whatever stands there, outputs of images and gradients have the same bits."""
    model, (images, t, y) = built(**options), batch()
    packed = pack(images, 2, LENGTH)
    noise = randn(*packed.tokens.shape, seed=9) * 100
    empty = (packed.image == EMPTY)[:, :, None, None, None]
    filled = packed._replace(tokens=torch.where(empty, noise, packed.tokens))
    assert not torch.equal(filled.tokens, packed.tokens)
    outs = [packed.taken(model(part, t, y)) for part in (packed, filled)]
    assert torch.equal(*outs)
    first, second = (
        gradients(model, packed.mean(out.square().mean(dim=(1, 2, 3))).sum()) for out in outs
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_per_token_mean_and_placed_undo_one_another():
    packed, values = pack(batch()[0], 2, LENGTH), randn(len(SHAPES))
    spread = packed.per_token(values)
    assert spread.shape == (71,)
    torch.testing.assert_close(packed.mean(spread), values)
    placed = packed.placed(spread)
    assert placed.shape == packed.image.shape and torch.equal(packed.taken(placed), spread)
    assert not placed[packed.image == EMPTY].any()


def test_images_come_back_from_their_patches():
    images = batch()[0]
    packed = pack(images, 2, LENGTH)
    for image, back in zip(images, packed.unpacked(packed.tokens), strict=True):
        assert torch.equal(image, back)


def test_rows_are_filled_first_fit_largest_first():
    assert rows_for([3, 7, 2, 5, 4], 8) == [[1], [3, 0], [4, 2]]
    with pytest.raises(ValueError, match="an image has 9 tokens, and a packed row `pack` 8; give"):
        rows_for([9], 8)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="an image of 3 x 4 is not filled by patches of 2"):
        pack([torch.zeros(4, 3, 4)], 2, 8)
    for block in ("in_context", "cross_attention"):
        with pytest.raises(ValueError, match=f"blocks of {block} do not take packed images"):
            built(block=block)(pack([randn(4, 4, 4)], 2, 8), torch.ones(1), torch.ones(1).long())


@pytest.mark.parametrize("block", ["adaln_zero", "adaln", "cross_attention", "in_context"])
@every_option
def test_a_network_of_that_grid_sees_a_trained_grid_as_this_one_does(block, options):
    """extend: places are counted as a network that was trained on the grid counts them."""
    model = built(block=block, extrapolation="extend", **options)
    x, t, y = randn(2, 4, 4, 12), torch.tensor([3, 600]), torch.tensor([1, 2])
    config = model.config | {"input_size": [4, 12]}
    other = DiT(**config).double().eval()
    weights = model.state_dict() | (
        {"pos_embed": other.pos_embed} if other.positions.has_table else {}
    )
    other.load_state_dict(weights)
    with torch.no_grad():
        out, expected = model(x, t, y), other(x, t, y)
    assert out.shape == (2, 8, 4, 12) and expected.abs().max() > 0.1
    # The table of a network is float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (2, 4, 8, 5), (2, 4, 0, 8), (2, 3, 8, 8)])
def test_sides_that_patches_do_not_fill_are_refused(shape):
    with pytest.raises(ValueError, match=r"the network takes \(N, 4, height, width\)"):
        built()(torch.zeros(shape).double(), torch.ones(2), torch.ones(2).long())


def test_a_crop_beyond_the_table_is_refused_by_the_network():
    with pytest.raises(ValueError, match="4 x 6 tokens is beyond the trained grid of 4 x 4"):
        built(extrapolation="crop")(randn(1, 4, 8, 12), torch.ones(1), torch.ones(1).long())
