"""What a flow refuses, in which words: names, numbers, and combinations that would be infinite."""

import math

import pytest
import torch

from flow import create_flow
from flow.forms import FORMS
from flow.solvers import LAST_STEPS
from processes.flow import FlowProcess

PATHS = "choose one of linear, gvp, vp"
NAN, INF = math.nan, math.inf


def refusal(call, *args, **kwargs):
    with pytest.raises(ValueError) as refused:
        call(*args, **kwargs)
    text = str(refused.value)
    assert "\n" not in text and len(text) < 250
    return text


@pytest.mark.parametrize("given, message", [
    (dict(path="straight"), f"`path` is 'straight'; {PATHS}"),
    (dict(path=None), f"`path` is None; {PATHS}"),
    (dict(path=["linear"]), f"`path` is ['linear']; {PATHS}"),
    (dict(prediction="x"), "`prediction` is 'x'; choose one of velocity, score, noise"),
    (dict(loss_weight="snr"), "`loss_weight` is 'snr'; choose one of None, velocity, likelihood"),
    (dict(loss_weight=1), "`loss_weight` is 1; choose one of None, velocity, likelihood"),
    (dict(loss_weight="velocity"), "`loss_weight` is for a score or the noise as the prediction, "
                                   "and `prediction` is velocity; leave `loss_weight` out"),
    (dict(prediction="noise", cosine_loss=True),
     "`cosine_loss` is for a velocity as the prediction, and `prediction` is noise; "
     "leave `cosine_loss` out"),
    (dict(train_eps=0.5), "`train_eps` is 0.5; it must be at least 0 and below 0.5"),
    (dict(train_eps=-1e-9), "`train_eps` is -1e-09; it must be at least 0 and below 0.5"),
    (dict(sample_eps=NAN), "`sample_eps` is nan; it must be at least 0 and below 0.5"),
    (dict(sample_eps=True), "`sample_eps` is True; it must be at least 0 and below 0.5"),
    (dict(sample_eps="0.1"), "`sample_eps` is '0.1'; it must be at least 0 and below 0.5"),
    (dict(sample_eps=INF), "`sample_eps` is inf; it must be at least 0 and below 0.5"),
    (dict(sample_eps=1e-20),
     "`sample_eps` is 1e-20, too near to an end for float32; give at least 1e-06"),
    (dict(path="vp", train_eps=0),
     "`train_eps` is 0, and with the path vp and the prediction velocity a term is infinite at an "
     "end; give one above 0, such as 1e-05"),
    (dict(prediction="score", sample_eps=0.0), "give one above 0, such as 0.001"),
])  # fmt: skip
def test_flows_that_there_are_not(given, message):
    assert message in refusal(create_flow, **given)


X = torch.zeros(2, 3, 4, 4)


def sde(flow=None, **options):
    def asked(x, t):
        raise AssertionError("the network was asked")

    (flow or create_flow()).sde_sample_loop(asked, X.shape, X, **{"num_steps": 4, **options})


HEUN_AT_DATA = (
    "the score is infinite at t = 1, where the last of these steps of Heun asks for it; give "
    "`last_step_size` above 0 and a `last_step`"
)


@pytest.mark.parametrize("options, message", [
    (dict(method="dopri5"), "`method` is 'dopri5'; choose one of euler, heun"),
    (dict(diffusion_form="SBDM"), f"`diffusion_form` is 'SBDM'; choose one of {', '.join(FORMS)}"),
    (dict(diffusion_form=["sigma"]), "`diffusion_form` is ['sigma']; choose one of constant"),
    (dict(diffusion_form=None), "`diffusion_form` is None; choose one of constant"),
    (dict(diffusion_form="sbdm"),
     "the diffusion form sbdm is infinite at t = 0; give another form, or `sample_eps=0.001` to "
     "begin there"),
    (dict(diffusion_norm=-1), "`diffusion_norm` is -1; it must be at least 0, and finite"),
    (dict(diffusion_norm=NAN), "`diffusion_norm` is nan; it must be at least 0, and finite"),
    (dict(diffusion_norm="2"), "`diffusion_norm` is '2'; it must be at least 0, and finite"),
    (dict(last_step="Mean"), "`last_step` is 'Mean'; choose one of mean, euler, tweedie, None"),
    (dict(last_step_size=1), "`last_step_size` is 1; it must be at least 0 and below 1, for the "
                             "steps begin at t = 0"),
    (dict(last_step_size=1.5), "`last_step_size` is 1.5; it must be at least 0 and below 1"),
    (dict(last_step_size=-0.04), "`last_step_size` is -0.04; it must be at least 0 and below 1"),
    (dict(last_step_size=NAN), "`last_step_size` is nan; it must be at least 0 and below 1"),
    (dict(last_step_size="0.04"), "`last_step_size` is '0.04'; it must be at least 0 and below 1"),
    (dict(num_steps=1),
     "`num_steps` is 1; it must be at least 2, and whole, the last step being one of them"),
    (dict(num_steps=0, last_step=None), "`num_steps` is 0; it must be at least 1, and whole"),
    (dict(method="heun", last_step=None), HEUN_AT_DATA),
    (dict(method="heun", last_step_size=0), HEUN_AT_DATA),
])  # fmt: skip
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_sdes_that_there_are_not(path, options, message):
    assert message in refusal(sde, create_flow(path), **options)


def test_a_last_step_leaves_room_after_a_late_start():
    late = create_flow(prediction="noise")
    text = refusal(sde, late, last_step_size=0.9995)
    assert "it must be at least 0 and below 0.999, for the steps begin at t = 0.001" in text
    assert "at least 0 and below 1" in refusal(sde, create_flow("vp"), last_step_size=1.0)


@pytest.mark.parametrize("options, message", [
    (dict(method="rk4"), "`method` is 'rk4'; choose one of euler, heun, dopri5"),
    (dict(method=None), "`method` is None; choose one of euler, heun, dopri5"),
    (dict(num_steps=0), "`num_steps` is 0; it must be at least 1, and whole"),
    (dict(num_steps=2.5), "`num_steps` is 2.5; it must be at least 1, and whole"),
    (dict(num_steps=True), "`num_steps` is True; it must be at least 1, and whole"),
    (dict(num_steps="9"), "`num_steps` is '9'; it must be at least 1, and whole"),
    (dict(method="dopri5", num_steps=0), "`num_steps` is 0; it must be at least 1, and whole"),
    *((dict(method="dopri5", **{name: value}),
       f"`{name}` is {value!r}; it must be above 0, and finite")
      for name in ("atol", "rtol") for value in (0, -1e-6, NAN, INF, "1e-3", True)),
])  # fmt: skip
def test_odes_that_there_are_not(options, message):
    loop = create_flow().ode_sample_loop
    text = refusal(loop, lambda x, t: x, X.shape, X, **{"num_steps": 4, **options})
    assert message in text


def test_noise_of_another_shape_and_a_device_that_nobody_says():
    loop = create_flow().ode_sample_loop
    text = refusal(loop, lambda x, t: x, (1, 3, 4, 4), X, num_steps=1)
    assert text == "noise is (2, 3, 4, 4), and shape (1, 3, 4, 4)"
    assert "pass device, or noise" in refusal(loop, lambda x, t: x, (1, 3), num_steps=1)


def test_coefficients_and_intervals_of_unknown_forms():
    flow, t = create_flow(), torch.tensor([0.5, 0.6])
    for call in (lambda: flow.diffusion_coefficient(X, t, "x"), lambda: flow.interval(True, "x")):
        assert "`diffusion_form` is 'x'; choose one of constant" in refusal(call)


def test_an_eps_where_a_form_begins_is_taken():
    flow, seen = create_flow(sample_eps=1e-3), []
    for last in LAST_STEPS:
        end = flow.sde_sample_loop(
            lambda x, t: seen.append(t[0].item()) or -x, X.shape, X, num_steps=400,
            diffusion_form="sbdm", last_step=last,
        )  # fmt: skip
        assert end.isfinite().all() and seen[0] == pytest.approx(1e-3)
    # vp has no such end, and the ODE of a velocity goes from end to end whatever the eps
    create_flow("vp").sde_sample_loop(
        lambda x, t: -x, X.shape, X, num_steps=5, diffusion_form="sbdm"
    )
    assert flow.interval() == (0, 1)


@pytest.mark.parametrize("options, message", [
    (dict(sample_eps=0.7), "`sample_eps` is 0.7; it must be at least 0 and below 0.5"),
    (dict(time_shift=0), "`time_shift` is 0; it must be from 0.001 to 1000, 1 for none"),
    (dict(time_shift=NAN), "`time_shift` is nan; it must be from 0.001 to 1000, 1 for none"),
    (dict(time_shift="3"), "`time_shift` is '3'; it must be from 0.001 to 1000, 1 for none"),
])  # fmt: skip
@pytest.mark.parametrize("solver", FlowProcess.solvers)
def test_a_process_refuses_before_it_samples(solver, options, message):
    assert message in refusal(FlowProcess().times, solver, 4, **options)


def test_a_process_refuses_tolerances_and_infinite_terms_before_it_samples():
    process = FlowProcess()
    assert "`atol` is 0; it must be above 0" in refusal(process.times, "dopri5", 4, atol=0)
    options = dict(diffusion_form="sbdm")
    assert "sbdm is infinite at t = 0" in refusal(process.times, "sde", 4, **options)
    assert process.times("sde", 4, **options, sample_eps=1e-3)[0] == 1e-3
    assert HEUN_AT_DATA in refusal(process.times, "sde-heun", 4, last_step=None)
    assert "at least 2, and whole" in refusal(process.times, "sde", 1)
