"""The SDE's solvers: the moments of their samples, exactly and by Monte Carlo, and what they ask.

The Oracle's drift is affine in x, so a scheme's end is too, in x and in each step's noise. `law`
reads the coefficients off one run whose batch has a row for each noise.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from closed_forms import PATHS, PREDICTIONS, Oracle, at, form
from conftest import generator, randn
from flow import create_flow, solvers
from flow.flow import even_times
from flow.forms import FORMS

MEAN, STD, EPS, LAST = 0.3, 0.5, 0.05, 0.04
METHODS = tuple(solvers.SDE_STEPS)
LAST_STEPS = tuple(solvers.LAST_STEPS)


def flow_of(path, prediction="velocity"):
    """Away from t = 0, where the form sbdm is infinite, and from t = 1."""
    return create_flow(path, prediction, sample_eps=EPS)


def start_of(flow, name, last):
    return flow.interval(True, name, LAST if last else 0.0).start


def law(flow, steps, method, name, last, norm=1.0):
    """(mean, standard deviation) at the end, of samples that begin with those of the path."""
    drawn = 0

    def noise_fn(x):
        nonlocal drawn
        noise = torch.zeros_like(x)
        noise[2 + drawn] = 1
        drawn += 1
        return noise

    rows = torch.zeros(steps + 2, 1, dtype=torch.float64)
    rows[1] = 1
    oracle = Oracle(flow.path, MEAN, STD)
    ends = flow.sde_sample_loop(
        oracle.network(flow.prediction), rows.shape, rows, num_steps=steps, method=method,
        diffusion_form=name, diffusion_norm=norm, last_step=last, last_step_size=LAST,
        noise_fn=noise_fn,
    )[:, 0]  # fmt: skip
    assert drawn == steps - (last is not None)
    start, slopes = start_of(flow, name, last), ends[1:] - ends[0]
    begins = oracle.variance(start)
    mean = ends[0] + slopes[0] * at(flow.path, start).a * MEAN
    return mean.item(), math.sqrt(slopes[0] ** 2 * begins + (slopes[1:] ** 2).sum())


def want(flow, name, last, norm=1.0):
    """What the SDE itself comes to: the path's own marginal, and from there the last step."""
    oracle = Oracle(flow.path, MEAN, STD)
    end = 1 - LAST if last else flow.interval(True, name).end
    mean, std = at(flow.path, end).a * MEAN, math.sqrt(oracle.variance(end))
    if not last:
        return mean, std
    d = form(name, flow.path, end, norm) if last == "mean" else 0.0

    def finish(x):
        if last == "tweedie":
            return oracle.data(x, end)
        return x + LAST * (oracle.velocity(x, end) + d * oracle.score(x, end))

    return finish(mean), abs(finish(mean + std) - finish(mean))


def distance(got, wanted):
    return max(abs(one - other) for one, other in zip(got, wanted))


# ---- marginals ----


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_samples_have_the_marginals_of_the_path_whatever_the_form(path, name, method):
    """The error of their mean and standard deviation falls as the steps' length does."""
    flow, last = flow_of(path), "mean"
    aim, n = want(flow, name, last, 0.7), 64 if path != "vp" else 128
    coarse, fine = (distance(law(flow, k, method, name, last, 0.7), aim) for k in (n, 2 * n))
    assert fine < 0.01 and (fine < 0.6 * coarse or fine < 1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("last", LAST_STEPS)
def test_each_last_step_and_prediction_comes_to_its_end(prediction, method, last):
    flow = flow_of("linear", prediction)
    aim = want(flow, "sigma", last)
    coarse, fine = (distance(law(flow, k, method, "sigma", last), aim) for k in (50, 100))
    assert fine < 0.01 and fine < 0.6 * coarse


def monte_carlo(name, method, last, count=20_000, steps=100):
    """(how far mean and standard deviation are from those of the path, the bound): five standard
    errors, and 0.02 for the steps' length, twice what the exact moments above are off by.
    """
    flow, source = flow_of("linear"), generator(3)

    def draw(x):
        return torch.randn(x.shape, generator=source, dtype=x.dtype)

    start, oracle = start_of(flow, name, last), Oracle("linear", MEAN, STD)
    x = draw(torch.empty(count, 1, dtype=torch.float64))
    x = at("linear", start).a * MEAN + math.sqrt(oracle.variance(start)) * x
    ends = flow.sde_sample_loop(
        oracle.network("velocity"), x.shape, x, num_steps=steps, method=method,
        diffusion_form=name, last_step=last, last_step_size=LAST, noise_fn=draw,
    )  # fmt: skip
    aim = want(flow, name, last)
    return distance((ends.mean().item(), ends.std().item()), aim), 0.02 + 5 * aim[1] / count**0.5


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_monte_carlo_finds_the_marginals(name, method):
    off, bound = monte_carlo(name, method, "mean")
    assert off < bound


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("last", LAST_STEPS)
def test_monte_carlo_finds_each_last_step_s_end(method, last):
    off, bound = monte_carlo("sigma", method, last)
    assert off < bound


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_noise_of_half_or_twice_the_coefficient_is_found_out(monkeypatch, method, factor):
    right = solvers._spread
    monkeypatch.setattr(solvers, "_spread", lambda *given: factor**0.5 * right(*given))
    off, bound = monte_carlo("sigma", method, "mean")
    assert off > 1.5 * bound
    aim = want(flow_of("linear"), "sigma", "mean")
    assert distance(law(flow_of("linear"), 100, method, "sigma", "mean"), aim) > 0.05


# ---- steps, one by one ----


def by_hand(path, x, times, method, name, noises):
    """Equal steps as published, with two separate networks for velocity and score."""
    oracle = Oracle(path, MEAN, STD)

    def drift(x, t):
        return oracle.velocity(x, t) + form(name, path, t, 0.7) * oracle.score(x, t)

    for t, t_next, noise in zip(times, times[1:], noises):
        dt = t_next - t
        kick = math.sqrt(2 * form(name, path, t, 0.7) * dt) * noise
        if method == "euler":
            x = x + dt * drift(x, t) + kick
        else:
            x = x + kick
            slope = drift(x, t)
            x = x + dt * (slope + drift(x + dt * slope, t_next)) / 2
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_equal_steps_are_the_published_ones(path, name, method):
    flow, x, noises = flow_of(path), randn(3, 2), randn(7, 3, 2, seed=1)
    queue = list(noises)
    got = flow.sde_sample_loop(
        Oracle(path, MEAN, STD).network("velocity"), x.shape, x, num_steps=7, method=method,
        diffusion_form=name, diffusion_norm=0.7, last_step=None,
        noise_fn=lambda x: queue.pop(0),
    )  # fmt: skip
    times = even_times(flow.interval(True, name), 7)
    torch.testing.assert_close(got, by_hand(path, x, times, method, name, noises))


@pytest.mark.parametrize("last", LAST_STEPS)
@pytest.mark.parametrize("method, calls", [("euler", 1), ("heun", 2)])
def test_calls_are_counted_and_noise_is_drawn_before_them(method, calls, last):
    flow, events, n = flow_of("linear"), [], 6

    def network(x, t):
        events.append(round(t[0].item(), 9))
        assert (t == t[0]).all()
        return -x

    def noise_fn(x):
        events.append("noise")
        return torch.zeros_like(x)

    x = randn(2, 3, 4, 4)
    flow.sde_sample_loop(
        network, x.shape, x, num_steps=n, method=method, diffusion_form="sbdm", last_step=last,
        noise_fn=noise_fn,
    )  # fmt: skip
    equal = n if last is None else n - 1
    end = 1 - EPS if last is None else 0.96
    grid = [round(EPS + (end - EPS) * i / equal, 9) for i in range(equal + 1)]
    expected = []
    for i in range(equal):
        expected += ["noise", *grid[i : i + calls]]
    assert events == expected + ([] if last is None else [grid[-1]])
    assert calls == 2 or len(events) - events.count("noise") == n


def test_without_noise_a_step_is_the_ode_s():
    flow, x = create_flow(), randn(2, 3)
    model = Oracle("linear").network("velocity")

    def sde(method):
        return flow.sde_sample_loop(
            model, x.shape, x, num_steps=5, method=method, diffusion_norm=0.0, last_step=None
        )

    ode = {
        name: flow.ode_sample_loop(model, x.shape, x, num_steps=5, method=name) for name in METHODS
    }
    torch.testing.assert_close(sde("euler"), ode["euler"])
    flow = create_flow(sample_eps=1e-6)
    torch.testing.assert_close(sde("heun"), ode["heun"], rtol=1e-4, atol=1e-5)


def test_a_last_step_of_length_0_does_nothing_but_say_the_data():
    flow, x = create_flow("linear", "noise"), randn(2, 3)
    model, seen = Oracle("linear").network("noise"), []

    def end(last, size, steps):
        return flow.sde_sample_loop(
            lambda x, t: seen.append(t) or model(x, t), x.shape, x, num_steps=steps,
            last_step=last, last_step_size=size, noise_fn=torch.zeros_like,
        )  # fmt: skip

    plain = end(None, 0.04, 5)
    assert torch.equal(end("mean", 0.0, 6), plain) and torch.equal(end("euler", 0.0, 6), plain)
    assert len(seen) == 15
    data = Oracle("linear").data(plain, flow.interval(True, "sigma").end)
    torch.testing.assert_close(end("tweedie", 0.0, 6), data)


# ---- nothing is copied or read back ----


class Operations(TorchDispatchMode):
    """Lists the aten operations run inside it: name, and {device: most axes} of its tensors."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out, axes = operation(*args, **(kwargs or {})), {}
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                axes[leaf.device.type] = max(axes.get(leaf.device.type, 0), leaf.dim())
        self.ran.append((operation.name(), axes))
        return out

    def faults(self):
        """The operations that copy between the host and the device, or read a value back.

        A number of the host, a tensor without axes, may be an argument of a device's kernel.
        """
        return [
            name
            for name, axes in self.ran
            if "meta" in axes
            and (axes.get("cpu", 0) > 0 or "copy" in name and "cpu" in axes or "scalar" in name)
        ]


LOOPS = {
    **{f"ode {name}": lambda flow, x, name=name: flow.ode_sample_loop(
        lambda x, t: x * 0.1, x.shape, x, num_steps=3, method=name) for name in solvers.ODE_STEPS},
    **{f"sde {name} {last}": lambda flow, x, name=name, last=last: flow.sde_sample_loop(
        lambda x, t: x * 0.1, x.shape, x, num_steps=3, method=name, last_step=last)
       for name in METHODS for last in LAST_STEPS},
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("path", PATHS)
def test_steps_copy_nothing_between_devices_and_read_nothing_back(loop, path):
    """The device is "meta", whose values cannot be read back at all."""
    flow, x = flow_of(path), torch.empty(2, 3, 4, 4, device="meta")
    with Operations() as log:
        end = LOOPS[loop](flow, x)
    assert end.device.type == "meta" and sum("meta" in axes for _, axes in log.ran) > 10
    assert log.faults() == []


def test_the_counter_sees_copies():
    """The test above can fail."""
    x = torch.empty(3, device="meta")
    for copies in (lambda: torch.ones(3).to("meta"), lambda: torch.tensor(1.0).to("meta")):
        with Operations() as log:
            copies()
        assert log.faults()
    with pytest.raises(RuntimeError):
        x.sum().item()
