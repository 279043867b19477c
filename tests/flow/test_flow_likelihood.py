"""Flow.log_likelihood against Gaussians and mixtures of them, whose densities are known."""

import math

import pytest
import torch
from torch.distributions import (
    Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal,
)  # fmt: skip

from conftest import randn, small_dit
from flow import create_flow
from flow.flow import Flow
from flow.likelihood import MOST_EXACT, bits_per_dim
from flow.paths import PATHS
from flow.prediction import PREDICTIONS

SHAPE, DIMS = (2, 3), 6
TIGHT = dict(atol=1e-8, rtol=1e-8)
KINDS = [(path, said) for path in PATHS for said in PREDICTIONS]
OPEN = [("linear", "velocity"), ("gvp", "velocity")]  # from t = 0 to 1


class Gaussian:
    """Data N(mean, covariance) of DIMS dimensions, shaped (2, 3), and what a network that knows
    them would say.
    """

    def __init__(self, flow):
        self.flow, self.mean, rough = flow, randn(DIMS, seed=1), randn(DIMS, DIMS, seed=2)
        self.covariance = rough @ rough.T / DIMS + 0.1 * torch.eye(DIMS, dtype=torch.float64)
        self.spectrum, self.axes = torch.linalg.eigh(self.covariance)

    def along(self, values, x):
        """The matrix with these eigenvalues (N, D), or (D,), on the covariance's axes, times x."""
        return (x @ self.axes * values) @ self.axes.T

    def variances(self, at):
        return at.alpha**2 * self.spectrum + at.sigma**2

    def __call__(self, x, t):
        at = self.flow.coefficients(t[:, None])
        off, variances = x.flatten(1) - at.alpha * self.mean, self.variances(at)
        score = -self.along(1 / variances, off)
        growth = (at.alpha * at.d_alpha * self.spectrum + at.sigma * at.d_sigma) / variances
        said = {
            "score": score, "noise": -at.sigma * score,
            "velocity": at.d_alpha * self.mean + self.along(growth, off),
        }[self.flow.prediction]  # fmt: skip
        return said.reshape(x.shape)

    def data(self, count, seed=0):
        off = randn(count, DIMS, seed=seed)
        return (self.mean + self.along(self.spectrum.sqrt(), off)).reshape(count, *SHAPE)

    def log_prob(self, x):
        return MultivariateNormal(self.mean, self.covariance).log_prob(x.flatten(1))

    def ends(self, shape):
        times = torch.tensor(self.flow.interval(), dtype=torch.float64)
        return self.flow.coefficients(times.reshape(shape))

    def stretch(self):
        """Half the log of how many times the variances are larger at the end of the interval."""
        ends = self.ends((2, 1))
        first, last = self.variances(ends)
        return torch.log(last / first) / 2

    def found(self, x):
        """What the ODE makes of x at the interval's end, exactly: it is linear."""
        ends = self.ends((2,))
        noise = ends.alpha[0] * self.mean + self.along(
            torch.exp(-self.stretch()), x.flatten(1) - ends.alpha[1] * self.mean
        )
        return Normal(0.0, 1.0).log_prob(noise).sum(dim=1) - self.stretch().sum()


def gaussian(path="linear", prediction="velocity"):
    return Gaussian(create_flow(path, prediction))


@pytest.mark.parametrize("path, prediction", OPEN)
def test_the_density_of_a_gaussian_to_1e_5_bits(path, prediction):
    data = gaussian(path, prediction)
    x = data.data(5)
    found = data.flow.log_likelihood(data, x, exact=True, **TIGHT)
    assert found.shape == (5,) and found.dtype == torch.float64
    torch.testing.assert_close(found, data.log_prob(x), rtol=0, atol=1e-5 * math.log(2))


@pytest.mark.parametrize("path, prediction", KINDS)
def test_ends_that_are_not_reached_cost_what_they_must(path, prediction):
    """All that is lost is lost at the ends, and it is little."""
    data = gaussian(path, prediction)
    x = data.data(4)
    found = data.flow.log_likelihood(data, x, exact=True, **TIGHT)
    torch.testing.assert_close(found, data.found(x), rtol=0, atol=1e-5 * math.log(2))
    lost = bits_per_dim(found - data.log_prob(x), DIMS).abs().max()
    assert lost < 1e-6 if (path, prediction) in OPEN else 1e-5 < lost < 0.02


def test_the_usual_tolerances_give_four_digits():
    data = gaussian()
    x = data.data(5)
    found = data.flow.log_likelihood(data, x, exact=True)
    assert bits_per_dim(found - data.log_prob(x), DIMS).abs().max() < 1e-4


def test_a_density_that_is_no_gaussian():
    """Two classes of two Gaussians each: the divergence changes from place to place."""
    flow, centres = create_flow(), torch.tensor([[-1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    width = 0.3

    def density(y):  # independent in each of two dimensions
        means = centres[y][:, None].expand(-1, 2, -1)  # (N, 2, 2)
        equal = Categorical(torch.ones_like(means))
        return Independent(MixtureSameFamily(equal, Normal(means, width)), 1)

    def model(x, t, y):
        at = flow.coefficients(t.view(-1, 1, 1))
        means, variance = at.alpha * centres[y][:, None], at.alpha**2 * width**2 + at.sigma**2
        off = x[:, 0, :, None] - means  # (N, 2, 2)
        share = torch.softmax(-(off**2) / (2 * variance), dim=-1)
        data = centres[y][:, None] + at.alpha * width**2 / variance * off
        return (share * (data - at.sigma / variance * off)).sum(-1)[:, None]

    x, y = randn(6, 1, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    found = flow.log_likelihood(model, x, exact=True, model_kwargs={"y": y}, **TIGHT)
    torch.testing.assert_close(found, density(y).log_prob(x[:, 0]), rtol=0, atol=1e-6)
    others = flow.log_likelihood(model, x, exact=True, model_kwargs={"y": 1 - y}, **TIGHT)
    assert (found - others).abs().min() > 0.1


def test_an_estimate_is_unbiased_and_of_one_probe_throughout():
    """Its variance is that of one probe; new probes on the way would have a smaller one."""
    data, count = gaussian(), 4000
    x = data.data(1).expand(count, *SHAPE)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(2, x.shape, generator=generator).double() * 2 - 1
    found = data.flow.log_likelihood(data, x, probe=probe)
    exact = data.flow.log_likelihood(data, x[:1], exact=True)
    # The integral of the Jacobian is symmetric: of probe·A·probe the part off the diagonal varies
    integral = data.axes * data.stretch() @ data.axes.T
    variance = 2 * (integral**2).sum() - 2 * (integral.diagonal() ** 2).sum()
    assert abs(found.mean() - exact) < 2 * (variance / count).sqrt()
    assert found.var() == pytest.approx(float(variance), rel=0.1)


def test_drawn_probes_are_signs():
    """Of a Jacobian that is diagonal they make no error."""
    flow = create_flow()

    def model(x, t):
        at = flow.coefficients(t.view(-1, 1, 1))
        return (at.alpha * 4 - at.sigma) / (at.alpha**2 * 4 + at.sigma**2) * x

    x = randn(3, *SHAPE)
    found = flow.log_likelihood(model, x, **TIGHT)
    torch.testing.assert_close(found, Normal(0.0, 2.0).log_prob(x).sum((1, 2)), rtol=0, atol=1e-6)


def test_the_exact_trace_is_the_mean_of_estimates_by_unit_probes():
    """√D times a unit vector is a probe, too: all of them together are the trace."""
    network, x = small_dit(input_size=4), randn(1, 4, 4, 4)
    flow, told = create_flow(), {"y": torch.tensor([3])}
    exact = flow.log_likelihood(network, x, exact=True, model_kwargs=told, **TIGHT)
    units = 8 * torch.eye(64, dtype=torch.float64).reshape(64, 4, 4, 4)
    found = flow.log_likelihood(
        network, x.expand(64, 4, 4, 4), probe=units,
        model_kwargs={"y": told["y"].expand(64)}, **TIGHT,
    )  # fmt: skip
    torch.testing.assert_close(found.mean(), exact[0], rtol=0, atol=1e-6)
    assert found.std() > 0.1


def test_an_image_does_not_depend_on_its_batch():
    network, flow = small_dit(), create_flow("gvp")
    x, y = randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    probe = randn(3, 4, 8, 8, seed=5).sign()
    x[1] *= 3  # steps of other lengths
    together = flow.log_likelihood(network, x, probe=probe, model_kwargs={"y": y})
    for i in range(3):
        one = slice(i, i + 1)
        alone = flow.log_likelihood(network, x[one], probe=probe[one], model_kwargs={"y": y[one]})
        torch.testing.assert_close(alone, together[one], rtol=1e-10, atol=0)


def test_no_parameter_gets_a_gradient():
    network = small_dit(input_size=4, learn_sigma=True)  # of its 8 channels 4 count
    assert network.blocks[0].attn.qkv.weight.requires_grad
    x, told = randn(1, 4, 4, 4).requires_grad_(), {"y": torch.tensor([0])}
    probe = torch.ones(1, 4, 4, 4)
    with torch.no_grad():
        quiet = create_flow().log_likelihood(network, x, probe=probe, model_kwargs=told)
    loud = create_flow().log_likelihood(network, x, probe=probe, model_kwargs=told)
    assert torch.equal(quiet, loud) and not loud.requires_grad and loud.isfinite().all()
    assert x.grad is None and all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize("wrong, message", [
    (dict(probe=torch.ones(1, 2, 3)), r"`probe` is \(1, 2, 3\), and x \(2, 2, 3\)"),
    (dict(probe=torch.ones(2, 2, 3), exact=True), "`probe` is for an estimate"),
    (dict(atol=0), "`atol` is 0; it must be above 0"),
    (dict(rtol=-1.0), "`rtol` is -1.0; it must be above 0"),
])  # fmt: skip
def test_what_is_refused(wrong, message):
    data = gaussian()
    with pytest.raises(ValueError, match=message):
        data.flow.log_likelihood(data, data.data(2), **wrong)


def test_too_many_dimensions_for_the_trace_are_refused():
    x = torch.zeros(1, 1, MOST_EXACT + 1)
    with pytest.raises(ValueError, match=r"`exact` takes .* 4,097 dimensions .* leave it out"):
        create_flow().log_likelihood(Flow, x, exact=True)
