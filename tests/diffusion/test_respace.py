"""Which steps a respacing keeps, and the process over them."""
import re

import numpy as np
import pytest
import torch

from conftest import randn, smooth_eps_and_v
from diffusion import create_diffusion
from diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from diffusion.respace import SpacedDiffusion, space_timesteps

KINDS = dict(
    model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.LEARNED_RANGE,
    loss_type=LossType.MSE,
)  # fmt: skip


def rounded_running_sum(size, count):
    """`count` of `size` positions by adding the stride up, as the steps of published samples were
    chosen.
    """
    position, chosen = 0.0, []
    while len(chosen) < count:
        chosen.append(round(position))
        position += (size - 1) / (count - 1) if count > 1 else 0
    return chosen


def rounded_multiples(size, count):
    stride = (size - 1) / (count - 1) if count > 1 else 0
    return [round(i * stride) for i in range(count)]


def test_a_running_sum_for_every_count():
    for count in range(1, 1001):
        kept = space_timesteps(1000, count)
        assert sorted(kept) == rounded_running_sum(1000, count)
        assert len(kept) == count and min(kept) == 0 and (count == 1 or max(kept) == 999)


def test_multiplying_would_keep_other_steps_for_278_counts():
    other = [
        n for n in range(1, 1001) if sorted(space_timesteps(1000, n)) != rounded_multiples(1000, n)
    ]
    assert len(other) == 278 and other[0] == 21


@pytest.mark.parametrize("everything", ["", None, "1000", 1000, [1000]])
def test_every_step(everything):
    assert space_timesteps(1000, everything) == set(range(1000))


@pytest.mark.parametrize("four_of_ten", [4, "4", [4], (4,), " 4", np.int64(4)])
def test_a_number_in_any_form(four_of_ten):
    kept = space_timesteps(10, four_of_ten)
    assert kept == {0, 3, 6, 9}
    assert all(type(step) is int for step in kept)


@pytest.mark.parametrize("counts", ["10,15,20", [10, 15, 20], "10, 15, 20"])
def test_sections_of_equal_length(counts):
    expected = [
        start + i
        for start, n in ((0, 10), (100, 15), (200, 20))
        for i in rounded_running_sum(100, n)
    ]
    kept = space_timesteps(300, counts)
    assert sorted(kept) == expected and {99, 100, 199, 200, 299} < kept


def test_the_first_sections_are_longer_where_the_length_does_not_divide():
    assert space_timesteps(10, [2, 2, 2]) == {0, 3, 4, 6, 7, 9}
    assert space_timesteps(11, "2,2,2") == {0, 3, 4, 7, 8, 10}
    assert space_timesteps(10, [1, 1, 1]) == {0, 4, 7}  # one step: the section's first
    assert space_timesteps(10, "4,3,3") == set(range(10))


@pytest.mark.parametrize("total", [1000, 97, 1])
def test_ddim_strides(total):
    smallest_stride = {}
    for stride in range(1, total + 1):
        smallest_stride.setdefault(len(range(0, total, stride)), stride)
    for wanted in range(total + 3):
        if wanted in smallest_stride:
            assert space_timesteps(total, f"ddim{wanted}") == set(
                range(0, total, smallest_stride[wanted])
            )
        else:
            with pytest.raises(ValueError, match="ddim") as error:
                space_timesteps(total, f"ddim{wanted}")
            nearest = int(re.search(r"nearest is 'ddim(\d+)'", str(error.value)).group(1))
            assert nearest in smallest_stride
            assert abs(nearest - wanted) == min(abs(n - wanted) for n in smallest_stride)


def test_ddim_examples():
    assert space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert space_timesteps(1000, "ddim1") == {0} and len(space_timesteps(1000, "ddim1000")) == 1000
    assert space_timesteps(1000, "ddim34") == set(range(0, 1000, 30))


@pytest.mark.parametrize("wrong", [
    "fast", "ddim", "ddimfast", "ddim-5", "ddim5.0", "5,", "5;5", "2.5", 0, -1, "0", "-1", [5, 0],
    1001, "1001", [5, 501], "600,400", {}, [[5]], [None],
])  # fmt: skip
def test_what_is_not_understood_or_not_possible_is_refused(wrong):
    with pytest.raises(ValueError, match=f"respacing {re.escape(repr(wrong))}"):
        space_timesteps(1000, wrong)


@pytest.mark.parametrize("respacing", ["50", "ddim50", "10,15,20", "1", "2", ""])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_alpha_bar_at_kept_steps_stays(respacing, schedule):
    full, d = (
        create_diffusion("", noise_schedule=schedule),
        create_diffusion(respacing, noise_schedule=schedule),
    )
    assert (
        d.timestep_map == sorted(space_timesteps(1000, respacing)) and type(d.timestep_map) is list
    )
    assert d.use_timesteps == set(d.timestep_map) and type(d.use_timesteps) is set
    assert d.num_timesteps == len(d.betas) == len(d.timestep_map) and d.original_num_steps == 1000
    np.testing.assert_allclose(
        d.alphas_cumprod, full.alphas_cumprod[d.timestep_map], rtol=1e-10, atol=1e-15
    )
    np.testing.assert_allclose(
        np.cumprod(1 - d.betas), full.alphas_cumprod[d.timestep_map], rtol=1e-10, atol=1e-15
    )
    if not respacing:
        np.testing.assert_allclose(d.betas, full.betas, rtol=1e-10)


def test_one_kept_step_falls_back_to_beta():
    d = create_diffusion("1", learn_sigma=False)
    assert d.posterior_variance.tolist() == [0.0]
    np.testing.assert_allclose(d.posterior_log_variance_clipped, np.log(d.betas), rtol=1e-13)
    x = randn(1, 4, 8, 8)
    variance = d.p_mean_variance(lambda x, t: x, x, torch.tensor([0]))["variance"]
    np.testing.assert_allclose(variance, np.full(x.shape, d.betas[0]), rtol=1e-13)


def test_steps_may_come_in_any_order_and_the_network_sees_them():
    d, seen = (
        SpacedDiffusion(use_timesteps=[7, 2, 7, 4], betas=np.linspace(0.01, 0.2, 10), **KINDS),
        [],
    )
    assert d.timestep_map == [2, 4, 7] and d.num_timesteps == 3 and d.original_num_steps == 10

    def network(x, t):
        assert t.dtype == torch.int64
        seen.append(t.tolist())
        return smooth_eps_and_v(x, t)

    d.p_sample(network, randn(3, 4, 2, 2), torch.tensor([2, 0, 1]))
    assert seen == [[7, 2, 4]]


@pytest.mark.parametrize("wrong", [[], [10], [-1], [0, 3, 12]])
def test_steps_the_original_lacks_are_refused(wrong):
    with pytest.raises(ValueError, match="0 to 9"):
        SpacedDiffusion(use_timesteps=wrong, betas=np.linspace(0.01, 0.2, 10), **KINDS)


@pytest.mark.parametrize("wrong", [[], 2.7, [10.5], float("inf"), [[2]]], ids=repr)
def test_fractions_and_nothing_are_no_counts(wrong):
    with pytest.raises(ValueError, match="is not understood; give '250'"):
        space_timesteps(1000, wrong)
