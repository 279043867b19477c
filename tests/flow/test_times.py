"""How t is drawn and shifted: against the densities, diffusers' samplers, and SD3's formulas."""

import math

import numpy as np
import pytest
from scipy import integrate, stats
import torch

from closed_forms import PATHS, PREDICTIONS
from conftest import generator
from flow import TimeSampling, shifted
from flow.flow import Interval, even_times
from processes.flow import FlowProcess

COUNT = 20_000
GRID = np.linspace(0, 1, 20_001)


def drawn(text, count=COUNT, seed=0):
    return TimeSampling.parse(text).draw(count, generator(seed))


def logit_normal(mean, std):
    return lambda t: stats.norm.cdf((np.log(t) - np.log1p(-t) - mean) / std)


def mode(scale):
    """From SD3's map of u to their t = 1 - ours, which falls: P(t < a) is the u mapped to 1 - a."""
    theirs = 1 - GRID - scale * (np.cos(np.pi * GRID / 2) ** 2 - 1 + GRID)
    return lambda t: np.interp(t, 1 - theirs, GRID)


def cosmap(t):
    """The integral of SD3's density, that of t and of 1 - t alike."""
    density = 2 / (np.pi - 2 * np.pi * GRID + 2 * np.pi * GRID**2)
    return np.interp(t, GRID, integrate.cumulative_simpson(density, x=GRID, initial=0))


LAWS = {
    "uniform": lambda t: t,
    "logit-normal": logit_normal(0, 1),
    "logit-normal:0.5,0.6": logit_normal(0.5, 0.6),
    "logit-normal:-1,1.7": logit_normal(-1, 1.7),
    "mode": mode(1.29),
    "mode:0.8": mode(0.8),
    "mode:-0.7": mode(-0.7),
    "mode:1.75": mode(1.75),
    "cosmap": cosmap,
}


@pytest.mark.parametrize("text, distribution", LAWS.items())
def test_times_have_the_distribution_of_their_law(text, distribution):
    t = drawn(text)
    assert t.shape == (COUNT,) and t.dtype == torch.float32 and 0 <= t.min() and t.max() <= 1
    assert stats.kstest(t.numpy(), distribution).pvalue > 0.01
    assert torch.equal(t, drawn(text)) and not torch.equal(t, drawn(text, seed=1))


@pytest.mark.parametrize("text, distribution", LAWS.items())
def test_times_have_the_mean_of_their_law(text, distribution):
    """The integral of what is left above t; five standard errors."""
    inside = GRID[1:-1]
    mean = integrate.trapezoid([1, *(1 - distribution(inside)), 0], GRID)
    t = drawn(text).double()
    assert abs(t.mean().item() - mean) < 5 * t.std().item() / COUNT**0.5
    assert (abs(mean - 0.5) > 0.05) == (text in ("logit-normal:0.5,0.6", "logit-normal:-1,1.7"))


@pytest.mark.parametrize("text, other", [
    ("logit-normal:0.5,0.6", logit_normal(-0.5, 0.6)),
    ("logit-normal:0.5,0.6", logit_normal(0.5, 0.7)),
    ("mode:0.8", mode(1.0)), ("mode:-0.7", mode(0)), ("cosmap", mode(0)),
])  # fmt: skip
def test_another_law_is_told_apart(text, other):
    assert stats.kstest(drawn(text).numpy(), other).pvalue < 1e-4


def theirs(scheme, **numbers):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    return compute_density_for_timestep_sampling(
        scheme, 1000, generator=generator(5), **numbers
    )


def test_diffusers_draw_the_same_from_the_same_numbers():
    """A logit-normal by its formula; mode as SD3 writes it, whose t is 1 - ours."""
    got = drawn("logit-normal:0.5,0.6", 1000, 5)
    assert (got - theirs("logit_normal", logit_mean=0.5, logit_std=0.6)).abs().max() < 1e-6
    got = drawn("mode:0.8", 1000, 5)
    assert (1 - got - theirs("mode", mode_scale=0.8)).abs().max() < 1e-6


def test_in_sd3_s_direction_the_sign_of_the_mean_turns():
    turned = 1 - drawn("logit-normal:-0.5,0.6")  # more noise than data, as SD3 with 0.5
    assert stats.kstest(turned.numpy(), logit_normal(0.5, 0.6)).pvalue > 0.01
    for text in ("mode:0.8", "cosmap", "uniform"):  # these are the same both ways
        assert stats.kstest((1 - drawn(text)).numpy(), LAWS[text]).pvalue > 0.01


# ---- how a law is written ----


@pytest.mark.parametrize("text", [*LAWS, "logit-normal:0.12345678901,1.0000001", "mode:-1"])
def test_a_law_is_written_with_all_its_digits(text):
    law = TimeSampling.parse(text)
    assert TimeSampling.parse(str(law)) == law
    assert str(law) == {"logit-normal": "logit-normal:0,1", "mode": "mode:1.29"}.get(text, text)
    assert FlowProcess(time_sampling=text).config["time_sampling"] == str(law)


@pytest.mark.parametrize("text, message", [
    ("normal", "`time_sampling` is 'normal'; give one of uniform, logit-normal, mode, cosmap, "
               "with its numbers, if any, as in logit-normal:0,1"),
    ("", "`time_sampling` is ''; give one of uniform"),
    (None, "`time_sampling` is None; give one of uniform"),
    (3, "`time_sampling` is 3; give one of uniform"),
    ("uniform:1", "`time_sampling` is uniform:1; uniform takes 0 number(s)"),
    ("uniform:", "`time_sampling` is uniform:; uniform takes 0 number(s)"),
    ("logit-normal:", "is logit-normal:; logit-normal takes 2 number(s), as in logit-normal:0,1"),
    ("logit-normal:0", "logit-normal takes 2 number(s), as in logit-normal:0,1"),
    ("logit-normal:0,1,2", "logit-normal takes 2 number(s), as in logit-normal:0,1"),
    ("mode:a", "`time_sampling` is mode:a; mode takes 1 number(s), as in mode:1.29"),
    ("logit-normal:0,0", "that number of logit-normal must be from 0.001 to 100"),
    ("logit-normal:nan,1", "that number of logit-normal must be from -100 to 100"),
    ("logit-normal:0,inf", "that number of logit-normal must be from 0.001 to 100"),
    ("mode:1.76", "`time_sampling` is mode:1.76; that number of mode must be from -1 to 1.752"),
    ("mode:-1.1", "that number of mode must be from -1 to 1.752"),
])  # fmt: skip
def test_what_is_no_law_is_refused(text, message):
    with pytest.raises(ValueError) as refused:
        TimeSampling.parse(text)
    assert message in str(refused.value)


# ---- shift ----


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0, 10.0])
def test_a_shift_is_sd3_s_and_adds_to_the_log_of_the_signal_to_noise_ratio(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    got, noise = shifted(t, shift), 1 - t
    torch.testing.assert_close(1 - got, shift * noise / (1 + (shift - 1) * noise))
    torch.testing.assert_close(got, (1 / shift) * t / (1 + (1 / shift - 1) * t))  # LightningDiT's
    inside = slice(1, -1)

    def log_ratio(t):
        return 2 * torch.log(t / (1 - t))

    added = log_ratio(got[inside]) - log_ratio(t[inside])
    assert (added + 2 * math.log(shift)).abs().max() < 1e-10
    assert (got[0], got[-1]) == (0, 1) and (shifted(got, 1 / shift) - t).abs().max() < 1e-12


def test_a_shifted_grid_keeps_its_ends_and_is_denser_at_noise():
    assert even_times(Interval(0.1, 0.9), 4) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    grid = even_times(Interval(0.001, 0.96), 10, 3.0)
    steps = np.diff(grid)
    assert (grid[0], grid[-1]) == (0.001, 0.96) and (np.diff(steps) > 0).all()
    share = (np.array(grid) - 0.001) / 0.959
    assert share == pytest.approx(np.arange(11) / (30 - 2 * np.arange(11)))
    assert FlowProcess(time_shift=3.0).times("euler", 10) == pytest.approx(share[:-1])
    assert FlowProcess(time_shift=3.0).times("euler", 10, time_shift=1.0)[5] == 0.5


# ---- in training ----


@pytest.mark.parametrize("path, prediction", [(p, q) for p in PATHS for q in PREDICTIONS])
@pytest.mark.parametrize("law", ["uniform", "logit-normal:8,5", "logit-normal:-8,5", "mode:1.75"])
@pytest.mark.parametrize("shift", [1.0, 100.0, 0.01])
def test_times_of_training_lie_in_its_interval(path, prediction, law, shift):
    process = FlowProcess(path, prediction, time_sampling=law, time_shift=shift)
    start, end = process.flow.train_interval
    eps = 1e-5 if path == "vp" else 0 if prediction == "velocity" else 1e-3
    assert (start, end) == (0 if path == "vp" else eps, 1 - eps)
    t = process.draw_times(2000, generator())
    rounding = 6e-8
    assert t.dtype == torch.float32 and t.min() >= start and t.max() <= end + rounding
    coefficients = torch.stack(process.flow.coefficients(t))
    assert coefficients.isfinite().all() and (eps == 0 or coefficients[1].min() > 0)


def test_a_shift_moves_the_times_of_training():
    plain, moved = (
        FlowProcess(time_shift=shift).draw_times(1000, generator()) for shift in (1.0, 3.0)
    )
    torch.testing.assert_close(moved, plain / (3 - 2 * plain))
    # t / (3 - 2·t), t uniform, is below a with probability 3·a / (1 + 2·a)
    assert stats.kstest(moved.numpy(), lambda t: 3 * t / (1 + 2 * t)).pvalue > 0.01


@pytest.mark.parametrize("path, prediction", [(p, q) for p in PATHS for q in PREDICTIONS])
def test_losses_and_gradients_are_finite_at_both_ends_of_training_in_float32(path, prediction):
    weight = None if prediction == "velocity" else "likelihood"
    flow = FlowProcess(path, prediction, loss_weight=weight).flow
    t, x = torch.tensor(flow.train_interval), torch.randn(2, 3, 4, 4, generator=generator())
    scale = torch.ones((), requires_grad=True)
    losses = flow.training_losses(lambda x, t: scale * x, x, t)
    losses["loss"].sum().backward()
    assert losses["loss"].isfinite().all() and scale.grad.isfinite()
    exact = flow.training_losses(
        lambda x, t: x, x.double(), torch.tensor(flow.train_interval, dtype=torch.float64),
        noise=torch.zeros_like(x).double(),
    )["loss"]  # fmt: skip
    plain = flow.training_losses(lambda x, t: x, x, t, noise=torch.zeros_like(x))["loss"]
    torch.testing.assert_close(plain, exact.float(), rtol=5e-3, atol=0)
