"""The ODE's solvers: exact ends, SciPy's DOP853 and diffusers' schedulers as the truth, batches."""

from functools import partial
import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp
import torch

from closed_forms import PATHS, PREDICTIONS, Oracle
from conftest import fill_randomly, randn
from flow import adaptive, create_flow
from flow.prediction import Prediction
from flow.solvers import ode
from models import DiT
from processes.flow import FlowProcess

each = pytest.mark.parametrize(
    "path, prediction", [(path, prediction) for path in PATHS for prediction in PREDICTIONS]
)


def bent(x, t, **_):
    """A smooth velocity without symmetries, for x (N, D)."""
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    return 0.8 * torch.sin(2 * x + 3 * t) - x * t + torch.cos(5 * t)


def truth(x, function=bent, start=0.0, end=1.0):
    """Where function takes each row of x (N, D), by SciPy to 1e-12."""
    ends = []
    for row in x:
        found = solve_ivp(
            lambda t, y: function(torch.from_numpy(y)[None], torch.tensor([t]))[0].numpy(),
            (start, end), row.numpy(), "DOP853", rtol=1e-12, atol=1e-12,
        )  # fmt: skip
        ends.append(torch.from_numpy(found.y[:, -1]))
    return torch.stack(ends)


def solved(x, steps, method, tolerance=1e-6, model=bent, flow=None):
    """(the end, the number of calls)."""
    calls = []

    def network(x, t):
        calls.append(t)
        return model(x, t)

    end = (flow or create_flow()).ode_sample_loop(
        network, x.shape, x, num_steps=steps, method=method, atol=tolerance, rtol=tolerance
    )
    return end, len(calls)


def off(got, want):
    return (got - want).abs().max().item()


# ---- the truth ----


@each
def test_dopri5_takes_normal_noise_to_normal_data(path, prediction):
    flow = create_flow(path, prediction)
    oracle, x, (start, end) = Oracle(path), randn(6, 5), flow.interval()
    got, _ = solved(x, 1, "dopri5", 1e-12, oracle.network(prediction), flow)
    assert off(got, oracle.end(x, start, end)) < 1e-10


@pytest.mark.parametrize("method, order, bound", [("euler", 1, 3e-2), ("heun", 2, 3e-3)])
@each
def test_steps_of_given_length_have_their_order_on_normal_data(
    path, prediction, method, order, bound
):
    flow, x = create_flow(path, prediction, sample_eps=0.05), randn(3, 5)
    oracle, (start, end) = Oracle(path), flow.interval()
    model, want = oracle.network(prediction), oracle.end(x, start, end)
    coarse, fine = (off(solved(x, n, method, model=model, flow=flow)[0], want) for n in (80, 160))
    assert fine < bound and coarse / fine == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("method, order, calls", [("euler", 1, 1), ("heun", 2, 2)])
def test_steps_of_given_length_come_to_scipy_s_end_in_their_order(method, order, calls):
    x = randn(3, 4)
    want, errors = truth(x), []
    for n in (40, 80, 160):
        got, asked = solved(x, n, method)
        assert asked == calls * n
        errors.append(off(got, want))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.08)


def test_dopri5_comes_to_scipy_s_end_in_fifth_order():
    """The error falls with the fifth power of the calls as tolerances become smaller; a little
    faster, for some calls choose the first step.
    """
    x = randn(3, 4)
    want, logs = truth(x), []
    for tolerance in (1e-8, 1e-9, 1e-10, 1e-11, 1e-12):
        got, calls = solved(x, 1, "dopri5", tolerance)
        error = off(got, want)
        assert error < 3 * tolerance
        logs.append((math.log(calls), math.log(error)))
    slope, _ = np.polyfit(*np.array(logs).T, 1)
    assert -5.9 < slope < -4.7


def test_dopri5_s_default_tolerances_are_kept():
    x = randn(3, 4)
    got = create_flow().ode_sample_loop(bent, x.shape, x, num_steps=1, method="dopri5")
    assert 1e-7 < off(got, truth(x)) < 1e-3 * (1 + truth(x).abs().max())


# ---- diffusers, whose sigma is 1 - t and whose velocity points back ----


def turned(x, sigma):
    return -bent(x, 1 - torch.full((len(x),), float(sigma)))


def trajectory(x, times, method):
    return list(ode(Prediction("linear", "velocity"), lambda x, t, i: bent(x, t), x, times, method))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_diffusers_scheduler(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    x, n = randn(3, 4).float(), 12
    scheduler, want = FlowMatchEulerDiscreteScheduler(shift=shift), x
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n).tolist())  # shifted there
    process = FlowProcess(time_shift=shift)
    steps = process.trajectory(lambda x, t, i: bent(x, t), x, "euler", n)
    for step, sigma, time in zip(steps, scheduler.sigmas, scheduler.timesteps):
        assert step["t"] == pytest.approx(1 - sigma.item(), abs=1e-6)
        data = want - sigma * turned(want, sigma)
        assert off(step["pred_xstart"], data) < 1e-6
        want = scheduler.step(turned(want, sigma), time, want).prev_sample
        assert off(step["sample"], want) < 1e-6
    assert scheduler.step_index == n


def test_heun_is_diffusers_scheduler_but_for_its_last_step():
    """Theirs is Euler's there; they divide by sigma, which is 0."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    x, times = randn(3, 4).float(), [0.0, 0.05, 0.2, 0.45, 0.7, 0.9, 1.0]
    scheduler, want = FlowMatchHeunDiscreteScheduler(), x
    scheduler.set_timesteps(len(times) - 1)
    sigmas = 1 - torch.tensor(times)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.set_begin_index(0)
    for step in trajectory(x, times, "heun")[:-1]:
        for sigma in (1 - step.t, sigmas[times.index(step.t) + 1]):
            want = scheduler.step(turned(want, sigma), scheduler.timesteps[0], want).prev_sample
        assert off(step.sample, want) < 1e-6
    last = trajectory(want, times[-2:], "euler")[-1].sample
    want = scheduler.step(turned(want, 1 - times[-2]), scheduler.timesteps[0], want).prev_sample
    assert off(last, want) < 1e-6


# ---- dopri5 chooses its steps for each sample ----


def stiff(x, t):
    """Harder to follow where x is larger."""
    return torch.sin(x.abs().mean(1, keepdim=True) * 3 * x + 2 * t[:, None])


def test_an_image_does_not_depend_on_the_others_in_its_batch(monkeypatch):
    import torchode

    easy, hard = 0.1 * randn(1, 6), 6 * randn(3, 6, seed=1)
    batch = torch.cat([easy, hard])

    def apart(tolerance=1e-4):
        alone, calls = solved(easy, 1, "dopri5", tolerance, stiff)
        together, more_calls = solved(batch, 1, "dopri5", tolerance, stiff)
        assert more_calls > 2 * calls  # they are harder
        return off(alone, together[:1])

    assert apart() < 1e-12
    # A norm over the batch, as others have, would not do
    over_all = partial(
        torchode.IntegralController,
        norm=lambda error: (error**2).mean().sqrt().expand(len(error)),
    )
    monkeypatch.setattr(torchode, "IntegralController", over_all)
    assert apart() > 1e-8


def test_a_network_s_images_by_dopri5_do_not_depend_on_the_batch():
    network = fill_randomly(
        DiT(input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=5, learn_sigma=False),
        std=0.3,
    ).double().eval()  # fmt: skip
    x, y = randn(3, 4, 4, 4), torch.tensor([0, 3, 4])

    def sample(i):
        return create_flow().ode_sample_loop(
            network, x[i].shape, x[i], num_steps=1, method="dopri5", model_kwargs=dict(y=y[i])
        )

    whole = sample([0, 1, 2])
    # The network sees t, and so its rounding, in float32
    assert all(off(sample([i])[0], whole[i]) < 1e-10 for i in range(3))


def test_solutions_are_told_between_the_ends_and_backwards():
    x = randn(2, 4)
    slope = partial(adaptive.solve, lambda t, y: bent(y, t), atol=1e-11, rtol=1e-11)
    times = [0.0, 0.3, 0.300001, 1.0]
    states = slope(x, times)
    assert states.shape == (4, 2, 4) and torch.equal(states[0], x)
    for state, end in zip(states[1:], times[1:]):
        assert off(state, truth(x, end=end)) < 1e-8
    assert off(slope(states[-1], times[::-1])[-1], x) < 1e-8


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 50, 500])
def test_dopri5_s_predicted_data_are_those_of_its_slopes(path, steps):
    oracle, process = Oracle(path), FlowProcess(path)
    network = oracle.network("velocity")
    for dtype, bound in ((torch.float64, 2e-3), (torch.float32, 3e-2)):
        x = randn(2, 4).to(dtype)
        for moment in process.trajectory(
            lambda x, t, i: network(x, t), x, "dopri5", steps, atol=1e-7, rtol=1e-7
        ):
            exact = oracle.data(oracle.end(x, 0.0, moment["t"]).double(), moment["t"])
            assert off(moment["pred_xstart"], exact) < bound


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_returns_nan_ends_dopri5_with_a_sentence(shape, prediction):
    def broken(x, t, since):
        late = (t > since).reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(late, math.nan, x)

    flow = create_flow(prediction=prediction)
    for since in (-1, 0.5):
        with pytest.raises(ValueError, match="dopri5 met a number that is not finite; see whether"):
            flow.ode_sample_loop(
                broken, shape, torch.ones(shape), num_steps=1, method="dopri5",
                model_kwargs=dict(since=since),
            )  # fmt: skip


def test_dopri5_gives_up_where_it_does_not_come_to_an_end(monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_STEPS", 200)
    with pytest.raises(ValueError, match="is not at the end after 200 steps with `atol=1e-08` and"):
        solved(randn(2, 3), 1, "dopri5", 1e-8, lambda x, t: torch.sign(torch.sin(50 * x)))
