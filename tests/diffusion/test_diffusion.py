"""The diffusion process against closed forms in float64, and what its methods promise: randomness,
errors, copies.
"""
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import SMALL, randn, small_dit, smooth_eps, smooth_eps_and_v
from diffusion import create_diffusion, gaussian_diffusion
from diffusion.gaussian_diffusion import (
    GaussianDiffusion, LossType, ModelMeanType, ModelVarType, betas_for_alpha_bar,
    get_named_beta_schedule,
)  # fmt: skip
from diffusion.likelihood import (
    approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl,
)  # fmt: skip
from models import DiT

VARIANCES = {
    "learned": dict(learn_sigma=True), "large": dict(learn_sigma=False),
    "small": dict(learn_sigma=False, sigma_small=True),
}  # fmt: skip
SHAPE = (3, 4, 8, 8)


def assert_near(got, want, atol=1e-13, rtol=0.0):
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


def steps(*numbers):
    return torch.tensor(numbers)


def column(array, t, dim=4):
    """The array's values at steps t as a tensor that broadcasts over samples of that many axes."""
    return torch.from_numpy(np.asarray(array))[t].view(-1, *[1] * (dim - 1))


def network_for(variance):
    return smooth_eps_and_v if variance == "learned" else smooth_eps


def constant(*parts):
    """A network that returns these parts side by side, whatever it is given."""
    return lambda x, t: torch.cat(parts, dim=1)


def bits(nats):
    """The mean over all axes but the first, in bits."""
    return nats.flatten(1).mean(1) / math.log(2)


class Noise:
    """A noise_fn that hands out given noises one by one and remembers what it was called with."""

    def __init__(self, noises):
        self.noises, self.seen = iter(noises), []

    def __call__(self, x):
        self.seen.append(x)
        return next(self.noises)


def plain_diffusion(
    betas=(0.1, 0.2, 0.3), mean=ModelMeanType.EPSILON, variance=ModelVarType.FIXED_SMALL,
    loss=LossType.MSE,
):  # fmt: skip
    """A process without respacing."""
    return GaussianDiffusion(
        betas=betas, model_mean_type=mean, model_var_type=variance, loss_type=loss
    )


# ---- schedules ----

def test_linear_schedule():
    betas = get_named_beta_schedule("linear", 1000)
    assert betas.dtype == np.float64 and betas.shape == (1000,)
    np.testing.assert_allclose(
        betas, [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)], rtol=1e-13
    )
    np.testing.assert_allclose(
        get_named_beta_schedule("linear", 250)[[0, -1]], [4e-4, 0.08], rtol=1e-13
    )


def test_cosine_schedule():
    levels = [math.cos((i / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(51)]
    betas = get_named_beta_schedule("squaredcos_cap_v2", 50)
    assert betas.dtype == np.float64 and betas[-1] == 0.999
    np.testing.assert_allclose(
        betas[:-1], [1 - levels[i + 1] / levels[i] for i in range(49)], rtol=1e-13
    )
    capped = betas_for_alpha_bar(4, lambda s: 1 - s, max_beta=0.4)
    np.testing.assert_allclose(capped, [0.25, 1 / 3, 0.4, 0.4], rtol=1e-13)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_tables_from_their_definitions(schedule):
    d = create_diffusion("", noise_schedule=schedule)
    abar = np.array([math.exp(math.fsum(np.log1p(-d.betas[: i + 1]))) for i in range(1000)])
    before, after = np.append(1, d.alphas_cumprod[:-1]), np.append(d.alphas_cumprod[1:], 0)
    np.testing.assert_allclose(d.alphas_cumprod, abar, rtol=1e-12)
    np.testing.assert_array_equal(d.alphas_cumprod_prev, before)
    np.testing.assert_array_equal(d.alphas_cumprod_next, after)
    abar = d.alphas_cumprod
    for name, expected in dict(
        sqrt_alphas_cumprod=abar**0.5, sqrt_one_minus_alphas_cumprod=(1 - abar) ** 0.5,
        log_one_minus_alphas_cumprod=np.log(1 - abar), sqrt_recip_alphas_cumprod=abar**-0.5,
        sqrt_recipm1_alphas_cumprod=((1 - abar) / abar) ** 0.5,
    ).items():  # fmt: skip
        table = getattr(d, name)
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, expected, rtol=1e-11)


def test_processes_of_another_length():
    full, d = (create_diffusion(respacing, diffusion_steps=100) for respacing in ("", "10"))
    assert (full.num_timesteps, d.num_timesteps, d.original_num_steps) == (100, 10, 100)
    assert d.timestep_map == list(range(0, 100, 11))
    np.testing.assert_allclose(full.betas[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    np.testing.assert_allclose(d.alphas_cumprod, full.alphas_cumprod[::11], rtol=1e-12)


# ---- q ----

def test_q_sample_and_its_moments():
    d, t, x_start, noise = (
        create_diffusion(""), steps(0, 500, 999), randn(*SHAPE), randn(*SHAPE, seed=1),
    )  # fmt: skip
    abar = column(d.alphas_cumprod, t)
    assert_near(
        d.q_sample(x_start, t, noise=noise), abar.sqrt() * x_start + (1 - abar).sqrt() * noise
    )
    mean, variance, log_variance = d.q_mean_variance(x_start, t)
    assert_near(mean, abar.sqrt() * x_start)
    assert_near(variance, (1 - abar).expand(SHAPE))
    assert_near(log_variance, (1 - abar).log().expand(SHAPE))
    torch.manual_seed(3)
    drawn = d.q_sample(x_start, t)
    torch.manual_seed(3)
    assert torch.equal(drawn, d.q_sample(x_start, t, noise=torch.randn_like(x_start)))


@pytest.mark.parametrize("respacing", ["", "20"])
def test_posterior_is_bayes_rule(respacing):
    # q(x_{t-1} | x_t, x_start) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_start), both normal: precisions add
    # up
    d, t, x_start, x_t = (
        create_diffusion(respacing), steps(1, 7, 19), randn(*SHAPE), randn(*SHAPE, seed=1),
    )  # fmt: skip
    beta, before = column(d.betas, t), column(d.alphas_cumprod_prev, t)
    precision = (1 - beta) / beta + 1 / (1 - before)
    bayes = ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x_start) / precision
    mean, variance, log_variance = d.q_posterior_mean_variance(x_start, x_t, t)
    assert_near(mean, bayes, atol=1e-11)  # 1 - alpha_bar has lost four digits at t = 1
    assert_near(variance, (1 / precision).expand(SHAPE), atol=0, rtol=1e-11)
    assert_near(log_variance, -precision.log().expand(SHAPE), atol=1e-11)


def test_posterior_at_the_first_step_is_x_start():
    d, t, x_start = create_diffusion(""), steps(0, 0, 0), randn(*SHAPE)
    mean, variance, log_variance = d.q_posterior_mean_variance(x_start, randn(*SHAPE, seed=1), t)
    assert_near(mean, x_start)
    assert not variance.any()
    assert_near(
        log_variance, torch.full(SHAPE, math.log(d.posterior_variance[1]), dtype=torch.float64)
    )


# ---- likelihood ----

def test_kl_is_that_of_torch():
    mean1, mean2, logvar1, logvar2 = (randn(5, 7, seed=i) for i in range(4))
    normals = [
        torch.distributions.Normal(m, (v / 2).exp())
        for m, v in ((mean1, logvar1), (mean2, logvar2))
    ]
    assert_near(
        normal_kl(mean1, logvar1, mean2, logvar2), torch.distributions.kl_divergence(*normals)
    )
    standard = torch.distributions.Normal(torch.zeros(5, 7).double(), 1.0)
    assert_near(
        normal_kl(mean1, logvar1, 0.0, 0.0), torch.distributions.kl_divergence(normals[0], standard)
    )


def test_normal_distribution_function():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert_near(approx_standard_normal_cdf(x), torch.special.ndtr(x), atol=3e-4)
    # as ½(1 + tanh(z)) = sigmoid(2z)
    closed_form = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    assert_near(approx_standard_normal_cdf(x), closed_form, atol=1e-15)


@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.0, 0.999])
@pytest.mark.parametrize("std", [0.02, 0.3, 3.0])
def test_probabilities_of_the_grey_levels_add_up_to_one(mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_scales = torch.full_like(levels, math.log(std))
    log_p = discretized_gaussian_log_likelihood(
        levels, means=torch.full_like(levels, mean), log_scales=log_scales
    )
    # 256 clamped probabilities of 1e-12 at most
    assert log_p.exp().sum() == pytest.approx(1, abs=1e-9)
    middle, cdf = levels[128], torch.special.ndtr
    exact = cdf((middle + 1 / 255 - mean) / std) - cdf((middle - 1 / 255 - mean) / std)
    assert log_p[128].exp() == pytest.approx(exact.item(), abs=6e-4)


def test_the_outermost_grey_levels_are_open_ended_and_probabilities_clamped():
    x = torch.tensor([-1.0, -0.9995, -0.9985, 0.9985, 0.9995, 1.0, 1.0], dtype=torch.float64)
    means = torch.tensor([-5, -5, -5, 5, 5, 5, -5], dtype=torch.float64)
    log_p = discretized_gaussian_log_likelihood(
        x, means=means, log_scales=torch.full_like(x, math.log(0.3))
    )
    assert_near(log_p[[0, 1, 4, 5]], torch.zeros(4).double(), atol=1e-12)
    assert_near(
        log_p[[2, 3, 6]], torch.full((3,), math.log(1e-12), dtype=torch.float64), atol=1e-12
    )


# ---- p ----

def test_learned_variance_runs_from_the_posterior_to_beta():
    d, t, x = create_diffusion("50"), steps(0, 3, 49), randn(*SHAPE)
    low, high = column(d.posterior_log_variance_clipped, t), column(np.log(d.betas), t)
    for v, expected in ((-1, low), (1, high), (0, (low + high) / 2), (3, 2 * high - low)):
        out = d.p_mean_variance(constant(x, torch.full_like(x, v)), x, t)
        assert_near(out["log_variance"], expected.expand(SHAPE))
        assert_near(out["variance"], expected.exp().expand(SHAPE))


@pytest.mark.parametrize("respacing", ["", "50"])
def test_fixed_variances(respacing):
    x, t = randn(*SHAPE), steps(0, 1, 49)
    large = create_diffusion(respacing, learn_sigma=False)
    expected = large.betas.copy()
    expected[0] = large.posterior_variance[1]
    out = large.p_mean_variance(smooth_eps, x, t)
    assert_near(out["variance"], column(expected, t).expand(SHAPE), atol=1e-16)
    assert_near(out["log_variance"], column(np.log(expected), t).expand(SHAPE))

    small = create_diffusion(respacing, learn_sigma=False, sigma_small=True)
    out = small.p_mean_variance(smooth_eps, x, t)
    assert not out["variance"][0].any()
    assert_near(out["variance"], column(small.posterior_variance, t).expand(SHAPE), atol=1e-16)
    assert_near(out["log_variance"], column(small.posterior_log_variance_clipped, t).expand(SHAPE))


@pytest.mark.parametrize("variance", VARIANCES)
def test_mean_of_the_way_back(variance):
    d, t, x = create_diffusion("50", **VARIANCES[variance]), steps(0, 3, 30), randn(*SHAPE)
    out = d.p_mean_variance(network_for(variance), x, t, clip_denoised=False)
    eps, abar = smooth_eps(x, torch.tensor(d.timestep_map)[t]), column(d.alphas_cumprod, t)
    x_start = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    assert_near(out["pred_xstart"], x_start, atol=1e-11)
    assert_near(out["mean"], d.q_posterior_mean_variance(x_start, x, t)[0], atol=1e-11)
    beta = column(d.betas, t)  # DDPM eq. 11
    assert_near(out["mean"], (x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt(), atol=1e-11)


def test_the_true_noise_leads_back_to_x_start():
    d, t, x_start, noise = (
        create_diffusion(""), steps(0, 500, 999), randn(*SHAPE), randn(*SHAPE, seed=1),
    )  # fmt: skip
    out = d.p_mean_variance(
        constant(noise, noise), d.q_sample(x_start, t, noise), t, clip_denoised=False
    )
    assert_near(out["pred_xstart"], x_start, atol=1e-12)


def test_a_network_may_predict_x_start():
    d, t = create_diffusion("", predict_xstart=True), steps(0, 500, 999)
    x, x_start = randn(*SHAPE), randn(*SHAPE, seed=1)
    out = d.p_mean_variance(constant(x_start, x), x, t, clip_denoised=False)
    assert torch.equal(out["pred_xstart"], x_start)
    assert torch.equal(out["mean"], d.q_posterior_mean_variance(x_start, x, t)[0])
    losses = d.training_losses(constant(x_start, x), randn(*SHAPE, seed=2), t)
    assert_near(losses["mse"], (randn(*SHAPE, seed=2) - x_start).square().flatten(1).mean(1))


@pytest.mark.parametrize("variance", VARIANCES)
def test_means_and_variances_have_the_full_shape(variance):
    d, t, x = create_diffusion("50", **VARIANCES[variance]), steps(0, 3, 49), randn(*SHAPE)
    out = d.p_mean_variance(network_for(variance), x, t)
    assert set(out) == {"mean", "variance", "log_variance", "pred_xstart"}
    moments = [*out.values(), *d.q_mean_variance(x, t), *d.q_posterior_mean_variance(x, x, t)]
    assert all(value.shape == x.shape for value in moments)
    flat = randn(3, 5)
    assert d.p_mean_variance(network_for(variance), flat, t)["variance"].shape == flat.shape


def test_denoised_fn_acts_before_the_clamp():
    d, t, x = create_diffusion("50"), steps(3, 3, 3), randn(*SHAPE)
    for clip, expected in ((True, torch.ones_like(x)), (False, torch.full_like(x, 7.0))):
        asked = dict(clip_denoised=clip, denoised_fn=lambda x_start: torch.full_like(x_start, 7.0))
        out = d.p_mean_variance(smooth_eps_and_v, x, t, **asked)
        assert torch.equal(out["pred_xstart"], expected)
        assert torch.equal(out["mean"], d.q_posterior_mean_variance(expected, x, t)[0])
        for step in (d.p_sample, d.ddim_sample, d.ddim_reverse_sample):
            assert torch.equal(step(smooth_eps_and_v, x, t, **asked)["pred_xstart"], expected)
    loop = functools.partial(
        d.p_sample_loop, smooth_eps_and_v, SHAPE, x, denoised_fn=torch.zeros_like
    )
    assert_near(loop(), torch.zeros(SHAPE).double())


def test_clipping_is_on_by_default_wherever_there_is_a_choice():
    d, t, x = create_diffusion("5"), steps(4, 4, 4), randn(*SHAPE)
    # Takes x for signal, which at this step is faint
    network = constant(torch.zeros_like(x), torch.zeros_like(x))
    methods = [name for name in dir(d) if name.startswith(("p_", "ddim_", "calc_bpd"))]
    assert len(methods) == 9
    for name in methods:
        assert inspect.signature(getattr(d, name)).parameters["clip_denoised"].default is True
    for step in (d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample):
        assert step(network, x, t)["pred_xstart"].abs().max() == 1
        assert step(network, x, t, clip_denoised=False)["pred_xstart"].abs().max() > 10
    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        assert loop(network, SHAPE, x).abs().max() <= 1
        assert loop(network, SHAPE, x, clip_denoised=False).abs().max() > 10


# ---- steps ----

@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_step(variance):
    d, t = create_diffusion("50", **VARIANCES[variance]), steps(0, 3, 49)
    x, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    out = d.p_sample(network_for(variance), x, t, noise_fn=Noise([noise]))
    p = d.p_mean_variance(network_for(variance), x, t)
    expected = p["mean"] + (p["log_variance"] / 2).exp() * noise
    assert_near(out["sample"], torch.cat([p["mean"][:1], expected[1:]]))
    assert torch.equal(out["pred_xstart"], p["pred_xstart"]) and set(out) == {
        "sample",
        "pred_xstart",
    }


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_step(eta, clip):
    d, t, x, noise = (
        create_diffusion("50"), steps(0, 3, 49), 2 * randn(*SHAPE), randn(*SHAPE, seed=1),
    )  # fmt: skip
    out = d.ddim_sample(
        smooth_eps_and_v, x, t, clip_denoised=clip, eta=eta, noise_fn=Noise([noise])
    )
    x_start = d.p_mean_variance(smooth_eps_and_v, x, t, clip_denoised=clip)["pred_xstart"]
    abar, before = column(d.alphas_cumprod, t), column(d.alphas_cumprod_prev, t)
    eps = (x - abar.sqrt() * x_start) / (1 - abar).sqrt()
    # DDIM eq. 16; 0 at t = 0
    sigma = eta * ((1 - before) / (1 - abar)).sqrt() * (1 - abar / before).sqrt()
    mean = before.sqrt() * x_start + (1 - before - sigma**2).sqrt() * eps  # DDIM eq. 12
    assert_near(out["sample"], mean + sigma * noise, atol=1e-11)
    assert torch.equal(out["pred_xstart"], x_start) and set(out) == {"sample", "pred_xstart"}


def test_ddim_with_eta_1_has_the_posterior_variance():
    d, t, x = create_diffusion("50"), steps(0, 3, 49), randn(*SHAPE)
    step = functools.partial(d.ddim_sample, smooth_eps_and_v, x, t, eta=1.0)
    quiet, loud = (
        step(noise_fn=constant_noise)["sample"]
        for constant_noise in (torch.zeros_like, torch.ones_like)
    )
    assert_near((loud - quiet) ** 2, column(d.posterior_variance, t).expand(SHAPE), atol=1e-12)


def test_ddim_backwards_and_forwards_again():
    d, t, eps, x_start = (
        create_diffusion("50"), steps(0, 20, 48), randn(*SHAPE, seed=1), randn(*SHAPE),
    )  # fmt: skip
    x, network = d.q_sample(x_start, t, eps), constant(eps, eps)
    there = d.ddim_reverse_sample(network, x, t, clip_denoised=False)
    # Exact where the noise is one constant
    assert_near(there["sample"], d.q_sample(x_start, t + 1, eps), atol=1e-11)
    assert_near(there["pred_xstart"], x_start, atol=1e-11)
    assert_near(
        d.ddim_sample(network, there["sample"], t + 1, clip_denoised=False)["sample"], x, atol=1e-11
    )
    beyond = d.ddim_reverse_sample(network, x, steps(49, 49, 49), clip_denoised=False)
    assert_near(beyond["sample"], eps, atol=1e-11)  # after the last step there is only noise

    fine = create_diffusion("")  # nearly so where steps are short

    def network(x, t):
        return torch.cat([0.3 * torch.tanh(x), x], dim=1)

    there = fine.ddim_reverse_sample(network, x, steps(300, 500, 900), clip_denoised=False)[
        "sample"
    ]
    back = fine.ddim_sample(network, there, steps(301, 501, 901), clip_denoised=False)["sample"]
    assert (back - x).abs().max() < 0.01 * (there - x).abs().max()


def test_only_the_deterministic_path_goes_backwards():
    with pytest.raises(ValueError, match="eta=0"):
        create_diffusion("50").ddim_reverse_sample(
            smooth_eps_and_v, randn(*SHAPE), steps(1, 2, 3), eta=0.5
        )


# ---- guidance by a gradient ----

def test_gradient_moves_the_ancestral_mean_by_its_variance():
    d, t, x, seen = create_diffusion("50"), steps(1, 3, 49), randn(*SHAPE), []

    def gradient(x, t, scale):
        seen.append(t)
        return scale * x

    def network(x, t, scale):
        return smooth_eps_and_v(x, t)

    asked = dict(model_kwargs=dict(scale=0.7), noise_fn=torch.zeros_like)
    out, plain = (
        d.p_sample(network, x, t, cond_fn=gradient, **asked),
        d.p_sample(network, x, t, **asked),
    )
    p = d.p_mean_variance(smooth_eps_and_v, x, t)
    assert_near(out["sample"], plain["sample"] + p["variance"] * 0.7 * x)
    assert torch.equal(out["pred_xstart"], plain["pred_xstart"])
    assert [t.tolist() for t in seen] == [[d.timestep_map[i] for i in (1, 3, 49)]]


@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_moves_the_noise_of_ddim(reverse):
    d, t, x, seen = create_diffusion("50"), steps(1, 3, 40), randn(*SHAPE), []

    def gradient(x, t):
        seen.append(t)
        return -20 * torch.ones_like(x)

    step, other = (
        (d.ddim_reverse_sample, d.alphas_cumprod_next)
        if reverse
        else (d.ddim_sample, d.alphas_cumprod_prev)
    )
    out, plain = step(smooth_eps_and_v, x, t, cond_fn=gradient), step(smooth_eps_and_v, x, t)
    abar, other = column(d.alphas_cumprod, t), column(other, t)
    eps = (x - abar.sqrt() * plain["pred_xstart"]) / (1 - abar).sqrt() + 20 * (1 - abar).sqrt()
    x_start = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    assert x_start.abs().max() > 1  # and is not clamped again
    assert_near(out["pred_xstart"], x_start, atol=1e-11)
    assert_near(out["sample"], other.sqrt() * x_start + (1 - other).sqrt() * eps, atol=1e-11)
    assert [t.tolist() for t in seen] == [[d.timestep_map[i] for i in (1, 3, 40)]]


def test_condition_score_and_condition_mean_return_consistent_dicts():
    d, t, x = create_diffusion("50"), steps(1, 3, 49), randn(*SHAPE)
    p = d.p_mean_variance(smooth_eps_and_v, x, t)
    scored = d.condition_score(lambda x, t: -x, p, x, t)
    assert set(scored) == set(p) and scored["variance"] is p["variance"]
    assert_near(scored["mean"], d.q_posterior_mean_variance(scored["pred_xstart"], x, t)[0])
    assert (scored["mean"] - p["mean"]).abs().max() > 1e-4
    assert_near(d.condition_mean(lambda x, t: -x, p, x, t), p["mean"] - p["variance"] * x)


# ---- losses ----

def test_losses_are_mse_and_the_bound():
    d, t = create_diffusion(""), steps(0, 1, 700)
    x_start, noise = randn(*SHAPE).clamp(-1, 1), randn(*SHAPE, seed=1)
    eps, v = 3 * randn(*SHAPE, seed=2), randn(*SHAPE, seed=3)
    losses = d.training_losses(constant(eps, v), x_start, t, noise=noise)
    assert set(losses) == {"loss", "mse", "vb"} and all(
        value.shape == (3,) for value in losses.values()
    )
    assert_near(losses["mse"], (noise - eps).square().flatten(1).mean(1))
    assert_near(losses["loss"], losses["mse"] + losses["vb"])

    x_t = d.q_sample(x_start, t, noise)
    p = d.p_mean_variance(constant(eps, v), x_t, t, clip_denoised=False)
    true_mean, _, true_log_variance = d.q_posterior_mean_variance(x_start, x_t, t)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normal(true_mean, (true_log_variance / 2).exp()),
        normal(p["mean"], (p["log_variance"] / 2).exp()),
    )
    assert_near(losses["vb"][1:], bits(kl)[1:], atol=0, rtol=1e-12)
    log_p = discretized_gaussian_log_likelihood(
        x_start, means=p["mean"], log_scales=p["log_variance"] / 2
    )
    assert_near(losses["vb"][:1], bits(-log_p)[:1], atol=0, rtol=1e-12)


def test_gradient_of_the_bound_reaches_the_variance_alone_unless_it_is_the_loss():
    x_start, t = randn(*SHAPE).clamp(-1, 1), steps(0, 1, 7)

    def gradients(loss_name, **options):
        eps, v = (randn(*SHAPE, seed=i).requires_grad_() for i in (1, 2))
        losses = create_diffusion("10", **options).training_losses(constant(eps, v), x_start, t)
        found = torch.autograd.grad(losses[loss_name].sum(), (eps, v), allow_unused=True)
        return [g is not None and bool(g.flatten(1).any(1).all()) for g in found]

    assert (
        gradients("vb") == [False, True]
        and gradients("mse") == [True, False]
        and gradients("loss") == [True, True]
    )
    assert gradients("vb", rescale_learned_sigmas=True) == [False, True]
    assert gradients("loss", use_kl=True) == [True, True]


@pytest.mark.parametrize("respacing, kept", [("", 1000), ("250", 250)])
def test_loss_factors(respacing, kept):
    x_start, t, noise = randn(*SHAPE).clamp(-1, 1), steps(0, 1, 249), randn(*SHAPE, seed=1)
    plain, rescaled, kl = (
        create_diffusion(respacing, **options).training_losses(
            smooth_eps_and_v, x_start, t, noise=noise
        )
        for options in ({}, dict(rescale_learned_sigmas=True), dict(use_kl=True))
    )
    assert_near(rescaled["vb"], plain["vb"] * kept / 1000)
    assert_near(rescaled["loss"], plain["mse"] + plain["vb"] * kept / 1000)
    assert_near(rescaled["mse"], plain["mse"])
    assert set(kl) == {"loss"}
    assert_near(kl["loss"], plain["vb"] * kept, atol=0, rtol=1e-13)
    unscaled = plain_diffusion(
        create_diffusion("").betas, variance=ModelVarType.LEARNED_RANGE, loss=LossType.KL
    )
    if not respacing:
        assert_near(
            unscaled.training_losses(smooth_eps_and_v, x_start, t, noise=noise)["loss"], plain["vb"]
        )


def test_fixed_variance_has_no_bound_in_its_loss():
    losses = create_diffusion("", learn_sigma=False).training_losses(
        smooth_eps, randn(*SHAPE), steps(0, 1, 7)
    )
    assert set(losses) == {"loss", "mse"} and torch.equal(losses["loss"], losses["mse"])


def test_losses_draw_noise_from_the_seed():
    d, x_start, t = create_diffusion(""), randn(*SHAPE), steps(0, 1, 7)
    torch.manual_seed(5)
    drawn = d.training_losses(smooth_eps_and_v, x_start, t)
    torch.manual_seed(5)
    given = d.training_losses(smooth_eps_and_v, x_start, t, noise=torch.randn_like(x_start))
    assert all(torch.equal(drawn[key], given[key]) for key in given)


# ---- bits per dim ----

def test_bits_per_dim_loop_term_by_term():
    d, x_start = create_diffusion("12"), randn(*SHAPE).clamp(-1, 1)
    noises = randn(12, *SHAPE, seed=1)
    noise_fn = Noise(noises)
    out = d.calc_bpd_loop(smooth_eps_and_v, x_start, clip_denoised=False, noise_fn=noise_fn)
    assert len(noise_fn.seen) == 12 and all(x is x_start for x in noise_fn.seen)
    assert {key: tuple(value.shape) for key, value in out.items()} == dict(
        total_bpd=(3,), prior_bpd=(3,), vb=(3, 12), xstart_mse=(3, 12), mse=(3, 12)
    )
    for i, noise in enumerate(noises):
        t = torch.full((3,), 11 - i)
        losses = d.training_losses(smooth_eps_and_v, x_start, t, noise=noise)
        assert_near(out["vb"][:, i], losses["vb"])
        assert_near(out["mse"][:, i], losses["mse"])
        p = d.p_mean_variance(
            smooth_eps_and_v, d.q_sample(x_start, t, noise), t, clip_denoised=False
        )
        assert_near(
            out["xstart_mse"][:, i], (p["pred_xstart"] - x_start).square().flatten(1).mean(1)
        )
    assert_near(out["total_bpd"], out["vb"].sum(1) + out["prior_bpd"])

    abar = d.alphas_cumprod[-1]
    at_the_end = torch.distributions.Normal(math.sqrt(abar) * x_start, math.sqrt(1 - abar))
    standard = torch.distributions.Normal(torch.zeros_like(x_start), 1.0)
    assert_near(out["prior_bpd"], bits(torch.distributions.kl_divergence(at_the_end, standard)))


def test_bits_per_dim_measure_the_noise_implied_by_the_clipped_prediction():
    d, x_start, noises = create_diffusion("4"), randn(*SHAPE).clamp(-1, 1), randn(4, *SHAPE, seed=1)
    out = d.calc_bpd_loop(
        constant(torch.zeros_like(x_start), x_start), x_start, noise_fn=Noise(noises)
    )
    for i, noise in enumerate(noises):
        t = torch.full((3,), 3 - i)
        abar = column(d.alphas_cumprod, t)
        x_t = d.q_sample(x_start, t, noise)
        clipped = (x_t / abar.sqrt()).clamp(-1, 1)
        eps = (x_t - abar.sqrt() * clipped) / (1 - abar).sqrt()
        assert_near(out["mse"][:, i], (eps - noise).square().flatten(1).mean(1), atol=1e-12)
        assert_near(
            out["xstart_mse"][:, i], (clipped - x_start).square().flatten(1).mean(1), atol=1e-12
        )


def test_a_perfect_network_costs_nothing_but_the_last_step():
    d, x_start = (
        create_diffusion("10", learn_sigma=False, sigma_small=True),
        randn(*SHAPE).clamp(-1, 1),
    )
    abar = torch.from_numpy(create_diffusion("").alphas_cumprod)

    def perfect(x, t):
        level = abar[t].view(-1, 1, 1, 1)
        return (x - level.sqrt() * x_start) / (1 - level).sqrt()

    out = d.calc_bpd_loop(perfect, x_start)
    assert_near(out["vb"][:, :-1], torch.zeros(3, 9).double(), atol=1e-10)
    assert (out["vb"][:, -1] > 0.01).all()
    assert_near(out["mse"], torch.zeros(3, 10).double(), atol=1e-10)


def test_bits_per_dim_keep_no_graph_and_pass_arguments_on():
    d, model, x = create_diffusion("3"), small_dit(), randn(2, 4, 8, 8)
    out = d.calc_bpd_loop(model, x, model_kwargs=dict(y=steps(1, 2)))
    assert not any(value.requires_grad for value in out.values()) and torch.is_grad_enabled()


# ---- randomness ----

@pytest.mark.parametrize("name", ["p_sample", "ddim_sample"])
@pytest.mark.parametrize("t", [0, 3])
def test_a_step_draws_once_from_torch_or_from_noise_fn(name, t):
    d, x = create_diffusion("5"), randn(*SHAPE)
    step = functools.partial(getattr(d, name), smooth_eps_and_v, x, torch.full((3,), t))
    noise_fn = Noise(randn(1, *SHAPE, seed=1))
    step(noise_fn=noise_fn)
    assert len(noise_fn.seen) == 1 and noise_fn.seen[0] is x
    torch.manual_seed(1)
    by_default, state = step(), torch.get_rng_state()
    torch.manual_seed(1)
    noise = torch.randn_like(x)
    assert torch.equal(by_default["sample"], step(noise_fn=Noise([noise]))["sample"])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])
def test_a_loop_draws_its_start_and_once_per_step(name):
    d, noises = create_diffusion("5"), randn(6, *SHAPE)
    loop, start = getattr(d, name), noises[0]
    with_start, drawn_start = Noise(noises[1:]), Noise(noises)
    given = loop(smooth_eps_and_v, SHAPE, start, noise_fn=with_start)
    assert len(with_start.seen) == 5 and torch.equal(with_start.seen[0], start)
    drawn = loop(smooth_eps_and_v, SHAPE, device="cpu", noise_fn=drawn_start)
    assert torch.equal(given, drawn) and len(drawn_start.seen) == 6
    assert drawn_start.seen[0].shape == SHAPE and drawn_start.seen[0].dtype == torch.float32

    torch.manual_seed(2)
    first = loop(smooth_eps_and_v, SHAPE, device="cpu")
    torch.manual_seed(2)
    second = loop(smooth_eps_and_v, SHAPE, torch.randn(SHAPE))
    assert torch.equal(first, second) and first.dtype == torch.float32


@pytest.mark.parametrize(
    "name, step_name", [("p_sample_loop", "p_sample"), ("ddim_sample_loop", "ddim_sample")]
)
def test_loops_chain_their_steps(name, step_name):
    d, x = create_diffusion("5"), randn(*SHAPE)
    noises = randn(5, *SHAPE, seed=1)
    outs = list(
        getattr(d, name + "_progressive")(smooth_eps_and_v, SHAPE, x, noise_fn=Noise(noises))
    )
    assert len(outs) == 5
    final = getattr(d, name)(smooth_eps_and_v, SHAPE, x, noise_fn=Noise(noises))
    for i, out in enumerate(outs):
        expected = getattr(d, step_name)(
            smooth_eps_and_v, x, torch.full((3,), 4 - i), noise_fn=Noise([noises[i]])
        )
        assert set(out) == {"sample", "pred_xstart"}
        assert all(torch.equal(out[key], expected[key]) for key in out)
        x = expected["sample"]
    assert torch.equal(final, x)


def test_loops_pass_every_option_on():
    d, x, noises = create_diffusion("3"), 3 * randn(*SHAPE), randn(3, *SHAPE, seed=1)
    halve, gradient, kwargs = lambda x: x / 2, lambda x, t, y: -y * x, dict(y=0.1)
    options = dict(clip_denoised=False, denoised_fn=halve, cond_fn=gradient, model_kwargs=kwargs)
    for loop, step, more in (
        (d.p_sample_loop, d.p_sample, {}),
        (d.ddim_sample_loop, d.ddim_sample, dict(eta=0.7)),
    ):
        at = x
        for i in (2, 1, 0):
            t, noise_fn = torch.full((3,), i), Noise([noises[2 - i]])
            at = step(smooth_eps_and_v, at, t, **options, **more, noise_fn=noise_fn)["sample"]
        assert torch.equal(
            loop(smooth_eps_and_v, SHAPE, x, **options, **more, noise_fn=Noise(noises)), at
        )
        positional = (False, halve, gradient, kwargs, "cpu", False, *more.values())
        assert torch.equal(
            loop(smooth_eps_and_v, SHAPE, x, *positional, noise_fn=Noise(noises)), at
        )


@pytest.mark.parametrize("name", ["p_sample_loop_progressive", "ddim_sample_loop_progressive"])
def test_a_suspended_loop_leaves_the_gradient_mode_alone(name):
    model, modes = small_dit(num_classes=0), []
    model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    for out in getattr(create_diffusion("3"), name)(model, (2, 4, 8, 8), randn(2, 4, 8, 8)):
        assert torch.is_grad_enabled() and not out["sample"].requires_grad
    assert modes == [False] * 3
    with torch.no_grad():
        for _ in getattr(create_diffusion("3"), name)(model, (2, 4, 8, 8), randn(2, 4, 8, 8)):
            assert not torch.is_grad_enabled()


def test_a_progress_bar_changes_nothing_else(capsys):
    d, x, noises = create_diffusion("3"), randn(*SHAPE), randn(3, *SHAPE, seed=1)
    quiet = d.p_sample_loop(smooth_eps_and_v, SHAPE, x, noise_fn=Noise(noises))
    assert not capsys.readouterr().err
    shown = d.p_sample_loop(smooth_eps_and_v, SHAPE, x, progress=True, noise_fn=Noise(noises))
    assert torch.equal(quiet, shown)
    captured = capsys.readouterr()
    assert "3/3" in captured.err and not captured.out


# ---- what the network is, and where it is ----

def test_the_network_and_the_losses_see_original_steps():
    d, seen = create_diffusion("10,5"), []

    def network(x, t):
        seen.append(t.tolist())
        return smooth_eps_and_v(x, t)

    kept = d.timestep_map
    x, t, expected = randn(*SHAPE), steps(0, 7, 14), [0, 388, 999]
    for call in (
        d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample, d.training_losses,
    ):  # fmt: skip
        seen.clear()
        call(network, x, t)
        assert seen == [expected]
    for loop in (lambda: d.p_sample_loop(network, SHAPE, x), lambda: d.calc_bpd_loop(network, x)):
        seen.clear()
        loop()
        assert seen == [[step] * 3 for step in reversed(kept)]


def test_without_respacing_the_steps_are_their_own():
    seen = []
    plain_diffusion().p_sample(
        lambda x, t: seen.append(t.tolist()) or x, randn(3, 2), steps(0, 1, 2)
    )
    assert seen == [[0, 1, 2]]


def test_sampling_happens_where_noise_or_parameters_are():
    d = create_diffusion("2")
    with torch.device("meta"):
        elsewhere = DiT(**{**SMALL, "num_classes": 0}).eval()
        guided = DiT(**SMALL).eval()
        y = torch.zeros(2, dtype=torch.long)
    shape = (2, 4, 8, 8)
    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        assert loop(elsewhere, shape).device.type == "meta"
        assert loop(elsewhere.forward, shape).device.type == "meta"
        out = loop(guided.forward_with_cfg, shape, model_kwargs=dict(y=y, cfg_scale=2.0))
        assert out.device.type == "meta"
        assert (
            loop(smooth_eps_and_v, shape, torch.zeros(shape, device="meta")).device.type == "meta"
        )
        assert loop(smooth_eps_and_v, shape, device="cpu").device.type == "cpu"
        assert loop(elsewhere, shape, torch.zeros(shape), device="meta").device.type == "meta"
        with pytest.raises(ValueError, match="device="):
            loop(smooth_eps_and_v, shape)


@pytest.mark.parametrize("learn_sigma, network", [(True, smooth_eps), (False, smooth_eps_and_v)])
def test_a_network_with_the_wrong_channels_is_refused(learn_sigma, network):
    d, x, t = create_diffusion("5", learn_sigma=learn_sigma), randn(*SHAPE), steps(0, 1, 2)
    for call in (
        d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample, d.training_losses,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="learn_sigma"):
            call(network, x, t)
    with pytest.raises(ValueError, match="learn_sigma"):
        d.calc_bpd_loop(network, x)


@pytest.mark.parametrize("options, message", [
    (dict(sigma_small=True), "sigma_small"),
    (dict(rescale_learned_sigmas=True, use_kl=True), "rescale_learned_sigmas"),
    (dict(rescale_learned_sigmas=True, learn_sigma=False), "rescale_learned_sigmas"),
    (dict(noise_schedule="cosine"), "cosine"), (dict(timestep_respacing="none"), "none"),
    (dict(diffusion_steps=20), "take 21 or more"), (dict(diffusion_steps=0), "0"),
    (dict(diffusion_steps=0, noise_schedule="squaredcos_cap_v2"), "0"),
])  # fmt: skip
def test_options_that_contradict_one_another_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(**{"timestep_respacing": "", **options})


@pytest.mark.parametrize("wrong", [
    dict(mean="EPSILON"), dict(mean=ModelVarType.FIXED_SMALL), dict(variance=None),
    dict(variance=LossType.MSE), dict(loss="mse"), dict(betas=[]), dict(betas=[[0.1, 0.2]]),
    dict(betas=[0.1, 0.0]), dict(betas=[0.1, 1.5]), dict(betas=[-0.1]), dict(betas=[0.1, math.nan]),
    dict(betas=0.1),
])  # fmt: skip
def test_betas_and_types_are_checked(wrong):
    with pytest.raises(ValueError):
        plain_diffusion(**wrong)


def test_enumerations_hold_what_is_supported():
    assert [kind.name for kind in ModelMeanType] == ["START_X", "EPSILON"]
    assert [kind.name for kind in ModelVarType] == ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"]
    assert [kind.name for kind in LossType] == ["MSE", "RESCALED_MSE", "KL", "RESCALED_KL"]


def test_options_choose_the_types():
    def types(**options):
        d = create_diffusion("", **options)
        return d.model_mean_type.name, d.model_var_type.name, d.loss_type.name

    assert types() == ("EPSILON", "LEARNED_RANGE", "MSE")
    assert types(learn_sigma=False) == ("EPSILON", "FIXED_LARGE", "MSE")
    assert types(learn_sigma=False, sigma_small=True) == ("EPSILON", "FIXED_SMALL", "MSE")
    assert types(predict_xstart=True, use_kl=True) == ("START_X", "LEARNED_RANGE", "RESCALED_KL")
    assert types(rescale_learned_sigmas=True) == ("EPSILON", "LEARNED_RANGE", "RESCALED_MSE")


# ---- one step ----

@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_one_step_is_enough_for_everything(variance, schedule):
    d, x = create_diffusion("1", noise_schedule=schedule, **VARIANCES[variance]), randn(*SHAPE)
    network = network_for(variance)
    assert d.num_timesteps == 1 and d.timestep_map == [0]
    t = steps(0, 0, 0)
    results = [d.p_sample_loop(network, SHAPE, x), *d.training_losses(network, x, t).values()]
    results += [d.ddim_sample_loop(network, SHAPE, x, eta=eta) for eta in (0.0, 1.0)]
    for step in (d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample):
        results += step(network, x, t).values()
    results += [*d.calc_bpd_loop(network, x).values(), *d.q_posterior_mean_variance(x, x, t)]
    assert all(value.isfinite().all() for value in results)
    # All bounds are beta where there is one step
    log_variance = d.p_mean_variance(network, x, t)["log_variance"]
    assert_near(log_variance, torch.full(SHAPE, math.log(d.betas[0]), dtype=torch.float64))


# ---- precision, operations and copies ----

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coefficients_are_rounded_once_and_to_float32_at_least(dtype):
    d, t = create_diffusion(""), torch.arange(1000)
    mean, _, log_variance = d.q_mean_variance(torch.ones(1000, 1, dtype=dtype), t)
    assert mean.dtype == log_variance.dtype == torch.float32
    assert torch.equal(mean[:, 0], torch.from_numpy(d.sqrt_alphas_cumprod).float())
    assert torch.equal(log_variance[:, 0], torch.from_numpy(d.log_one_minus_alphas_cumprod).float())
    x, t = randn(*SHAPE).to(dtype), steps(0, 500, 999)
    assert torch.equal(d.q_sample(x, t, x), d.q_sample(x.float(), t, x.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_steps_are_near_those_of_float32(dtype):
    d, t, x = create_diffusion("50"), steps(0, 20, 49), randn(*SHAPE).to(dtype)
    for step in (d.p_sample, d.ddim_sample):
        call = functools.partial(step, smooth_eps_and_v, t=t, noise_fn=torch.zeros_like)
        out, expected = call(x=x)["sample"].float(), call(x=x.float())["sample"]
        assert (out - expected).abs().max() < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("elsewhere", [set(), {"cpu"}])
def test_devices_without_float64_get_a_float32_table(monkeypatch, elsewhere):
    assert "mps" in gaussian_diffusion.WITHOUT_FLOAT64
    monkeypatch.setattr(gaussian_diffusion, "WITHOUT_FLOAT64", elsewhere)
    d, t = create_diffusion(""), torch.arange(1000)
    got, exact = (
        d.q_mean_variance(torch.ones(1000, 1).double(), t)[0][:, 0],
        torch.from_numpy(d.sqrt_alphas_cumprod),
    )
    assert torch.equal(got, exact.float().double() if elsewhere else exact)


class Operations(TorchDispatchMode):
    """Lists the aten operations run inside it: name, and devices of the tensors that go in and come
    out.
    """

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation.namespace == "aten":
            tensors = [
                leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)
            ]
            self.ran.append((operation.name(), {tensor.device.type for tensor in tensors}))
        return out


def count_operations(call, *args):
    call(*args)  # tables reach the device at the first use
    with Operations() as log:
        call(*args)
    return [name for name, _ in log.ran]


def test_a_step_takes_few_operations():
    d, x, t = create_diffusion("50"), randn(*SHAPE), steps(0, 3, 49)

    def network(x, t):
        return torch.cat([x, x], dim=1)  # one operation

    for call, most in ((d.p_sample, 28), (d.ddim_sample, 39), (d.training_losses, 82)):
        ran = count_operations(call, network, x, t)
        assert len(ran) <= most, ran
        # All coefficients at once, and the original step numbers
        assert ran.count("aten::index_select") == 2
    unspaced = count_operations(plain_diffusion().p_sample, lambda x, t: x, x, steps(0, 1, 2))
    assert unspaced.count("aten::index_select") == 1


def test_nothing_is_copied_between_devices_once_warm():
    with FakeTensorMode():
        d = create_diffusion("10")
        with torch.device("cuda"):
            model = DiT(**SMALL)
            x, t, y = torch.randn(4, 4, 8, 8), torch.full((4,), 3), torch.zeros(4, dtype=torch.long)

        def sample(step, **options):
            model.eval()
            with torch.no_grad():
                step(model.forward_with_cfg, x, t, model_kwargs=dict(y=y, cfg_scale=2.0), **options)

        def train():
            d.training_losses(model.train(), x, t, dict(y=y))

        calls = [
            functools.partial(sample, d.p_sample),
            functools.partial(sample, d.ddim_sample, eta=0.5), train,
        ]  # fmt: skip
        for call in calls:
            call()
            with Operations() as log:
                call()
            assert len(log.ran) > 100
            for name, devices in log.ran:
                assert devices <= {"cuda"}, name  # no tensor made of host data, none of the CPU
                assert "_local_scalar_dense" not in name  # no value read back


def test_the_counter_sees_copies():
    """The test above can fail: each of these is what it must catch."""
    with FakeTensorMode(), Operations() as log:
        torch.tensor([1.0, 2.0], device="cuda")
        torch.from_numpy(np.ones(3)).to("cuda")
    assert sum("cpu" in devices for _, devices in log.ran) >= 2


def test_a_network_without_parameters_does_not_tell_the_device():
    class Bare(torch.nn.Module):
        def forward(self, x, t):
            return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match="pass device="):
        create_diffusion("5").p_sample_loop(Bare(), (2, 4, 8, 8))
    assert create_diffusion("5").p_sample_loop(Bare(), (2, 4, 8, 8), device="cpu").shape == (
        2, 4, 8, 8,
    )  # fmt: skip


def test_variances_keep_their_digits_in_float32():
    d, t = create_diffusion(""), steps(0, 1, 2)
    x = randn(3, 4, 8, 8, dtype=torch.float32)
    _, variance, _ = d.q_mean_variance(x, t)
    exact = torch.from_numpy(1 - d.alphas_cumprod[:3])
    torch.testing.assert_close(variance[:, 0, 0, 0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", ["float32", "as the network"])
def test_a_network_in_half_precision_learns_and_samples(dtype, given):
    """The coefficients are float32, and so is x_t whatever the images are; the network gets it as
    it can take it.
    """
    process, halves = create_diffusion("10"), small_dit().to(dtype)
    x, noise = (
        randn(2, 4, 8, 8).to(torch.float32 if given == "float32" else dtype) for _ in range(2)
    )
    t, y = torch.tensor([0, 9]), dict(y=torch.tensor([0, 1]))
    with torch.no_grad():
        losses = process.training_losses(halves, x, t, y, noise)
        full = process.training_losses(halves.float(), x.float(), t, y, noise.float())
        halves.to(dtype)
        for loop in (process.p_sample_loop, process.ddim_sample_loop):
            assert loop(halves, x.shape, noise, model_kwargs=y).isfinite().all()
    for name, loss in losses.items():
        assert torch.allclose(loss.float(), full[name], rtol=0.05, atol=0.05)
