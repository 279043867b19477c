"""Paths, predictions, losses: against closed forms for normal data, and formulas written out here.
"""

import numpy as np
import pytest
import torch
from torch import nn

from closed_forms import PATHS, PREDICTIONS, Oracle, at, form
from conftest import fill_randomly, randn, small_dit
from flow import create_flow
from flow.forms import FORMS
from flow.prediction import Prediction
from models import DiT

TIMES = (0.02, 0.2, 0.5, 0.77, 0.98)
MEAN, STD = (torch.tensor(v).double().view(3, 1, 1) for v in ([0.3, -1.2, 2.0], [0.5, 1.3, 0.1]))
EACH = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]
each = pytest.mark.parametrize("path, prediction", EACH)


def times(*values):
    return torch.tensor(values or TIMES, dtype=torch.float64)


def far(got, want):
    """The largest difference, as a share of the largest number."""
    return ((got - want).abs().max() / want.abs().max()).item()


# ---- paths ----


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_and_derivatives_are_those_of_the_formulas(path):
    found = torch.stack(create_flow(path).coefficients(times()))
    want = torch.tensor([at(path, t) for t in TIMES], dtype=torch.float64).T
    assert found.shape == (4, 5) and far(found, want) < 1e-13
    turn = create_flow(path).coefficients(times()).turn
    assert (turn > 0).all() and far(turn, want[2] * want[1] - want[0] * want[3]) < 1e-13


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_exact(path):
    start, end = zip(*create_flow(path).coefficients(times(0.0, 1.0)))
    assert end[:2] == (1, 0) and end[2].isfinite() and end[3].isfinite() == (path != "vp")
    assert start[1] == 1 and start[0] == 0 if path != "vp" else 0.0065 < start[0] < 0.0067


@pytest.mark.parametrize("path", PATHS)
def test_float32_near_data_is_as_exact_as_float32(path):
    near = 1 - torch.logspace(-5, -1, 9)  # float32, and the same numbers in float64
    flow = create_flow(path)
    for got, want in zip(flow.coefficients(near), flow.coefficients(near.double())):
        assert got.dtype == torch.float32 and ((got - want) / want).abs().max() < 5e-7


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMS)
def test_diffusion_coefficients(path, name):
    x = randn(len(TIMES), 3, 2, 2)
    got = create_flow(path).diffusion_coefficient(x, times(), name, norm=0.7)
    want = torch.tensor([form(name, path, t, 0.7) for t in TIMES], dtype=torch.float64)
    assert got.shape == (5, 1, 1, 1) and far(got.flatten(), want) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_sbdm_is_the_noise_of_the_process_that_adds_no_drift_but_shrinking(path):
    """Turned round, data to noise, its drift is x·alpha'/alpha alone (Song et al. 2021)."""
    flow, x = create_flow(path), randn(len(TIMES), 3, 2, 2)
    model = Oracle(path, MEAN, STD).network("velocity")
    d = flow.diffusion_coefficient(x, times(), "sbdm")
    back = flow.velocity(model, x, times()) - d * flow.score(model, x, times())
    shrinking = torch.tensor([at(path, t).da / at(path, t).a for t in TIMES], dtype=torch.float64)
    assert far(back, shrinking.view(-1, 1, 1, 1) * x) < 1e-10


# ---- predictions ----


@each
def test_normal_data_have_their_score_velocity_and_mean(path, prediction):
    flow, oracle, x = create_flow(path, prediction), Oracle(path, MEAN, STD), randn(5, 3, 2, 2)
    model = oracle.network(prediction)

    def want(what):
        return torch.stack([getattr(oracle, what)(x[i], t) for i, t in enumerate(TIMES)])

    assert far(flow.velocity(model, x, times()), want("velocity")) < 1e-10
    assert far(flow.score(model, x, times()), want("score")) < 1e-10
    at_x = flow.coefficients(times().view(-1, 1, 1, 1))
    data = flow.said.data(model(x, times()), x, at_x)
    assert far(data, want("data")) < 1e-10
    assert far(at_x.alpha * data + at_x.sigma * want("noise"), x) < 1e-10


@pytest.mark.parametrize("path", PATHS)
def test_a_velocity_turned_into_another_output_and_back_is_the_same(path):
    x, velocity = randn(5, 3, 2, 2), randn(5, 3, 2, 2, seed=1)
    said = {name: Prediction(path, name) for name in PREDICTIONS}
    at_x = said["velocity"].coefficients(times().view(-1, 1, 1, 1))
    score = said["velocity"].score(velocity, x, at_x)
    for out, name in ((score, "score"), (-at_x.sigma * score, "noise")):
        assert far(said[name].velocity(out, x, at_x), velocity) < 1e-10
        assert far(said[name].score(out, x, at_x), score) < 1e-10
        data = said["velocity"].data(velocity, x, at_x)
        assert far(said[name].data(out, x, at_x), data) < 1e-10


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_a_velocity_is_at_home_at_both_ends(path):
    flow, x = create_flow(path), randn(2, 3, 2, 2)
    noise, t = randn(2, 3, 2, 2, seed=1), times(0.0, 1.0)
    losses = flow.training_losses(lambda x, t: x, x, t, noise=noise)
    ends = torch.stack([noise[0], x[1]])
    want = x - noise if path == "linear" else np.pi / 2 * torch.stack([x[0], -noise[1]])
    assert torch.equal(flow.q_sample(x, t, noise), ends)
    torch.testing.assert_close(losses["loss"], ((ends - want) ** 2).mean((1, 2, 3)))
    # At t = 0 x is noise alone, and that is known
    torch.testing.assert_close(flow.score(lambda x, t: x, x, t)[0], -x[0])


# ---- losses ----


def loss_by_hand(path, prediction, weight, out, x_start, noise, t):
    """(5)-(8) of Ma et al. 2024, one sample; the weights as in their code."""
    c = at(path, t)
    if prediction == "velocity":
        return np.mean((out - (c.da * x_start + c.ds * noise)) ** 2)
    error = out - noise if prediction == "noise" else c.s * out + noise
    d = c.da / c.a * c.s**2 - c.s * c.ds
    weights = {None: 1.0, "velocity": (d / c.s) ** 2, "likelihood": d / c.s**2}
    return weights[weight] * np.mean(error**2)


@pytest.mark.parametrize("path, prediction, weight", [
    (path, prediction, weight)
    for path, prediction in EACH
    for weight in (None, "velocity", "likelihood")
    if weight is None or prediction != "velocity"
])  # fmt: skip
def test_losses_are_the_formulas(path, prediction, weight):
    flow = create_flow(path, prediction, weight)
    x_start, noise = randn(5, 3, 2, 2), randn(5, 3, 2, 2, seed=1)
    seen = {}

    def model(x, t, scale):
        seen.update(x=x, t=t)
        return scale * torch.sin(x + t.view(-1, 1, 1, 1))

    got = flow.training_losses(model, x_start, times(), dict(scale=2.0), noise)
    for i, t in enumerate(TIMES):
        c = at(path, t)
        torch.testing.assert_close(seen["x"][i], c.a * x_start[i] + c.s * noise[i])
        out = 2 * np.sin(seen["x"][i].numpy() + t)
        arguments = out, x_start[i].numpy(), noise[i].numpy(), t
        assert got["loss"][i].item() == pytest.approx(
            loss_by_hand(path, prediction, weight, *arguments), rel=1e-10
        )
        assert got["mse"][i].item() == pytest.approx(
            loss_by_hand(path, prediction, None, *arguments), rel=1e-10
        )
    assert seen["t"].tolist() == list(TIMES) and got.keys() == {"loss", "mse"}


def test_a_weight_makes_a_noise_s_error_that_of_a_velocity():
    """That is what the weight "velocity" is for: both networks say the same, in other words."""
    for path in PATHS:
        x_start, noise, t = randn(5, 3, 2, 2), randn(5, 3, 2, 2, seed=1), times()
        weighted, plain = create_flow(path, "noise", "velocity"), create_flow(path)

        def noise_of(x, t):
            return torch.cos(x)

        def velocity_of(x, t):
            return weighted.velocity(noise_of, x, t)

        one = weighted.training_losses(noise_of, x_start, t, noise=noise)["loss"]
        other = plain.training_losses(velocity_of, x_start, t, noise=noise)["loss"]
        assert far(one, other) < 1e-10


@pytest.mark.parametrize("path", PATHS)
def test_the_cosine_is_torch_s_over_channels(path):
    flow = create_flow(path, cosine_loss=True)
    x_start, noise = randn(5, 3, 2, 2), randn(5, 3, 2, 2, seed=1)
    got = flow.training_losses(lambda x, t: torch.sin(x), x_start, times(), noise=noise)
    out = torch.sin(flow.q_sample(x_start, times(), noise))
    target = flow.velocity_target(x_start, times(), noise)
    cosine = 1 - nn.CosineSimilarity(dim=1)(out, target).mean((1, 2))
    torch.testing.assert_close(got["cosine"], cosine)
    torch.testing.assert_close(got["loss"], ((out - target) ** 2).mean((1, 2, 3)) + cosine)
    still = flow.training_losses(lambda x, t: 3 * target, x_start, times(), noise=noise)
    assert still["cosine"].abs().max() < 1e-12  # the direction alone counts


def test_the_cosine_of_a_fresh_network_has_a_slope_that_adam_forgets():
    """It returns 0 everywhere, where the cosine's slope has no bound of its own."""
    flow = create_flow(cosine_loss=True)
    x_start, noise = randn(5, 3, 2, 2), randn(5, 3, 2, 2, seed=1)
    out = torch.zeros_like(x_start, requires_grad=True)
    losses = flow.training_losses(lambda x, t: out, x_start, times(), noise=noise)
    (slope,) = torch.autograd.grad(losses["cosine"].sum(), out)
    assert losses["cosine"].detach().tolist() == [1.0] * 5
    torch.testing.assert_close(slope.norm(dim=1), torch.full((5, 2, 2), 100 / 4).to(slope))


@each
def test_the_channels_of_a_variance_are_dropped_and_learn_nothing(path, prediction):
    wide, narrow = small_dit(), small_dit(learn_sigma=False)
    state = wide.state_dict()
    # A patch's numbers are position by position, the channels innermost
    half = torch.arange(32) % 8 < 4
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = state[name][half]
    narrow.load_state_dict(state)
    flow, x, y = create_flow(path, prediction), randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    t, noise = times(0.1, 0.5, 0.9), randn(3, 4, 8, 8, seed=1)
    kwargs = dict(y=y)
    for method in (flow.velocity, flow.score):
        torch.testing.assert_close(method(wide, x, t, kwargs), method(narrow, x, t, kwargs))
    losses = flow.training_losses(wide, x, t, kwargs, noise)["loss"]
    torch.testing.assert_close(losses, flow.training_losses(narrow, x, t, kwargs, noise)["loss"])
    losses.sum().backward()
    gradient = wide.final_layer.linear.weight.grad
    assert (gradient[~half] == 0).all() and (gradient[half] != 0).any(dim=1).all()


# ---- precision ----


@each
def test_float64_stays_and_float32_too(path, prediction):
    weight = None if prediction == "velocity" else "likelihood"
    flow = create_flow(path, prediction, weight)
    for dtype in (torch.float64, torch.float32):
        x, t = randn(2, 3, 4, 4).to(dtype), times(0.3, 0.6).to(dtype)

        def model(x, t):
            assert x.dtype == t.dtype == dtype
            return torch.tanh(x)

        found = {
            "q": flow.q_sample(x, t), "v": flow.velocity(model, x, t),
            "s": flow.score(model, x, t), "d": flow.diffusion_coefficient(x, t, "sbdm"),
            **flow.training_losses(model, x, t),
            "ode": flow.ode_sample_loop(model, x.shape, x, num_steps=2),
            "dopri5": flow.ode_sample_loop(model, x.shape, x, num_steps=2, method="dopri5"),
            "sde": flow.sde_sample_loop(model, x.shape, x, num_steps=3),
        }  # fmt: skip
        assert {name: one.dtype for name, one in found.items()} == dict.fromkeys(found, dtype)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_network_of_less_precision_is_given_its_own(dtype, bound):
    network = fill_randomly(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=5))
    network, flow = network.eval().requires_grad_(False), create_flow()
    x, y, seen = randn(2, 4, 8, 8), dict(y=torch.tensor([1, 2])), []

    def sample():
        return flow.ode_sample_loop(network, x.shape, x, num_steps=3, model_kwargs=y)

    exact = network.double() and sample()
    network.to(dtype).register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    got = sample()
    assert got.dtype == torch.float64 and {given.dtype for given, _ in seen} == {dtype}
    assert {t.dtype for _, t in seen} == {torch.float64}  # bfloat16 cannot tell times apart
    assert 0 < far(got, exact) < bound
