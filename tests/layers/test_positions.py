"""Positions against timm, diffusers, complex numbers and closed forms."""

from diffusers.models import embeddings
import pytest
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat, build_rotary_pos_embed
import torch

from conftest import SMALL, fill_randomly, randn
from layers.layout import ALONE
from layers.positions import EXTRAPOLATIONS, check_grid, grid_index, rotation, table
from models import DiT, get_2d_sincos_pos_embed
from written_out import coordinates_of, turned

GRIDS = [(4, 4), (3, 7), (6, 2), (1, 1)]
D = 16  # of a head


def of_grid(what, grid, trained, extrapolation="extend", width=D, index=None):
    """A table or a rotation of a whole grid, in float64."""
    index = grid_index(*grid) if index is None else index
    sizes = torch.tensor(grid).expand(len(index), 2)
    return what(index, sizes, trained, width, extrapolation, torch.float64)


@pytest.mark.parametrize("grid", GRIDS)
def test_rotation_is_timms(grid):
    bands = 10000.0 ** (-torch.arange(D // 4).double() / (D // 4))
    sizes = dict(feat_shape=list(grid), dim=D, in_pixels=False)
    exact = torch.cat(build_rotary_pos_embed(**sizes, bands=bands, dtype=torch.float64), dim=-1)
    ours = of_grid(rotation, grid, grid)
    torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=0, atol=1e-12)
    # and with its own frequencies, in float32
    rough = torch.cat(build_rotary_pos_embed(**sizes), dim=-1)
    torch.testing.assert_close(ours.float(), rough, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_rotated_queries_are_complex_numbers_multiplied(grid):
    x = randn(2, 3, grid[0] * grid[1], D)
    ours = apply_rot_embed_cat(x, of_grid(rotation, grid, (4, 4)))
    torch.testing.assert_close(ours, turned(x, coordinates_of(*grid)), rtol=0, atol=1e-12)


def test_attention_sees_differences_of_places_alone():
    layer = fill_randomly(AttentionRope(32, 2, num_prefix_tokens=0), std=0.5).double()
    x, index = randn(2, 15, 32), grid_index(3, 5).double()
    outs = [
        layer(x, of_grid(rotation, (3, 5), (4, 4), index=index + torch.tensor(shift)))
        for shift in ([0.0, 0.0], [40.0, -7.5])
    ]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-10)
    mirrored = of_grid(rotation, (3, 5), (4, 4), index=index * torch.tensor([1.0, -1.0]))
    assert (layer(x, mirrored) - outs[0]).abs().max() > 1e-4


@pytest.mark.parametrize("grid", GRIDS)
def test_table_of_the_trained_grid_is_the_networks_own(grid):
    expected = torch.from_numpy(get_2d_sincos_pos_embed(D, grid))
    for extrapolation in EXTRAPOLATIONS:
        found = of_grid(table, grid, grid, extrapolation)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [4, 6, 9])
def test_an_interpolated_table_is_that_of_diffusers(side):
    found = of_grid(table, (side, side), (6, 6), "interpolate")
    expected = embeddings.get_2d_sincos_pos_embed(D, side, base_size=6)
    assert expected.dtype == torch.float64
    # Their coordinates are float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), (6, 2), (2, 2)])
def test_a_cropped_table_is_that_of_sd3_in_diffusers(grid):
    theirs = embeddings.PatchEmbed(6, 6, 1, 4, D, pos_embed_max_size=6)
    found = of_grid(table, grid, (6, 6), "crop")
    expected = theirs.cropped_pos_embed(*grid)[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def angles_of(grid, trained, extrapolation):
    """Angles (rows, columns, D / 2) of a rotation, where they are below π."""
    sin, cos = of_grid(rotation, grid, trained, extrapolation).chunk(2, dim=-1)
    return torch.atan2(sin, cos)[:, ::2].unflatten(0, grid)


@pytest.mark.parametrize("name, coordinate", [
    ("interpolate", lambda i, n, side: i * side / n), ("extend", lambda i, n, side: i),
    ("crop", lambda i, n, side: (side - n) / 2 + i),
])  # fmt: skip
def test_coordinates_in_closed_form_on_each_axis_alone(name, coordinate):
    grid, trained = (2, 3), (3, 4)
    found = angles_of(grid, trained, name)
    for k in range(D // 4):
        frequency = 10000 ** (-k / (D // 4))
        for i in range(grid[0]):
            for j in range(grid[1]):
                by_row = coordinate(i, 2, 3) * frequency
                by_column = coordinate(j, 3, 4) * frequency
                assert found[i, j, k].item() == pytest.approx(by_row, abs=1e-12)
                assert found[i, j, D // 4 + k].item() == pytest.approx(by_column, abs=1e-12)


def test_ntk_raises_the_base_of_each_axis_by_its_own_stretch():
    """base·s^(d/(d - 2)), d numbers of an axis: the fastest frequency stays, the slowest is divided
    by s. An axis that is not longer is as it was.
    """
    grid, trained, d = (4, 3), (2, 4), D // 2
    found, plain = angles_of(grid, trained, "ntk"), angles_of(grid, trained, "extend")
    base = 10000 * 2 ** (d / (d - 2))
    expected = [base ** (-2 * k / d) for k in range(d // 2)]
    assert found[1, 0, : d // 2].tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[-1] == pytest.approx(10000 ** (-2 * (d // 2 - 1) / d) / 2, rel=1e-12)
    torch.testing.assert_close(found[..., d // 2 :], plain[..., d // 2 :], rtol=0, atol=1e-15)
    # A table has no base to raise: it is interpolated
    tables = [of_grid(table, grid, trained, name) for name in ("ntk", "interpolate")]
    assert torch.equal(*tables)


def test_a_crop_beyond_the_table_is_refused():
    check_grid("crop", (4, 6), (4, 6))
    for name in EXTRAPOLATIONS.keys() - {"crop"}:
        check_grid(name, (40, 60), (4, 6))
    with pytest.raises(ValueError, match="4 x 7 tokens is beyond .* of 4 x 6.*extend"):
        check_grid("crop", (4, 7), (4, 6))


def test_tokens_that_are_appended_are_not_turned():
    rope = of_grid(rotation, (2, 3), (4, 4))
    longer = ALONE.rotated(rope).appended(2).attention["rope"]
    x = randn(1, 2, 8, D)
    turned_x = apply_rot_embed_cat(x, longer)
    assert torch.equal(turned_x[:, :, 6:], x[:, :, 6:])
    assert torch.equal(turned_x[:, :, :6], apply_rot_embed_cat(x[:, :, :6], rope))
    assert ALONE.appended(2) is ALONE


@pytest.mark.parametrize("positions, usual", [
    ("table", "interpolate"), ("rope", "extend"), ("table+rope", "interpolate"),
])  # fmt: skip
def test_other_grids_unless_told_otherwise(positions, usual):
    """And a network that was told keeps that in its configuration."""
    network = DiT(**SMALL, positions=positions)
    assert network.extrapolation == usual and "extrapolation" not in network.config
    told = DiT(**network.config, extrapolation="crop")
    assert told.extrapolation == "crop" == DiT(**told.config).extrapolation
