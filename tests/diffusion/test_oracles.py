"""The same numbers as diffusers: its DiT with our weights, its DDPM, its first-order DPM-Solver,
which is DDIM.
"""
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from benchmarks.anchors import Plain, diffusers_twin
from conftest import randn, small_dit, smooth_eps, smooth_eps_and_v
from diffusion import create_diffusion


@pytest.mark.parametrize("sizes", [
    dict(input_size=16, patch_size=2, hidden_size=384, num_heads=6, depth=2, num_classes=1000),
    dict(input_size=16, patch_size=4, hidden_size=384, num_heads=6, depth=3, num_classes=10),
    dict(
        input_size=12, patch_size=2, hidden_size=48, num_heads=3, depth=4, num_classes=7,
        in_channels=3,
    ),
])  # fmt: skip
def test_network_equals_that_of_diffusers(sizes):
    ours = small_dit(**sizes)
    theirs = diffusers_twin(ours)
    x = randn(4, ours.in_channels, ours.input_size, ours.input_size)
    t, y = torch.tensor([0.0, 1.0, 500.5, 999.0]), torch.tensor([0, 3, 6, ours.null_label])
    with torch.no_grad():
        out, expected = ours(x, t, y), theirs(x, t, y).sample
        plain = Plain(ours)(x, t, y)
    assert expected.abs().max() > 0.1
    assert (out - expected).abs().max() < 1e-10
    # The waves are of float32, whose angles round otherwise
    assert (out - plain).abs().max() < 1e-4


# ---- samplers ----

def ddpm_scheduler(steps, table=None):
    """diffusers' ancestral sampler over that many steps; with a table, in its place the given
    alphas_cumprod.
    """
    scheduler = DDPMScheduler(
        variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    if table is not None:
        scheduler.alphas_cumprod = torch.from_numpy(table)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000])
def test_steps_are_those_of_diffusers(steps):
    # not so for the counts where rounding a running sum and rounding multiples differ, such as 21:
    # see test_respace
    assert (
        create_diffusion(str(steps)).timestep_map == ddpm_scheduler(steps).timesteps.tolist()[::-1]
    )


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("steps", [5, 50])
def test_ancestral_sampling_equals_that_of_diffusers(monkeypatch, steps, dtype, bar):
    table = create_diffusion("").alphas_cumprod if dtype == torch.float64 else None
    scheduler, diffusion = ddpm_scheduler(steps, table), create_diffusion(str(steps))
    x_last, *noises = randn(steps + 1, 2, 4, 8, 8).to(dtype)
    noises[-1] = torch.full_like(x_last, 1e6)  # the last step adds none

    x, theirs, draws = x_last, [], iter(noises)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(draws))
    for t in scheduler.timesteps:
        x = scheduler.step(smooth_eps_and_v(x, t.repeat(len(x))), t, x).prev_sample
        theirs.append(x)

    draws = iter(noises)
    ours = diffusion.p_sample_loop_progressive(
        smooth_eps_and_v, x_last.shape, x_last, clip_denoised=False, noise_fn=lambda x: next(draws)
    )
    for out, expected in zip(ours, theirs, strict=True):
        assert (out["sample"] - expected).abs().max() < bar
    assert out["sample"].dtype == dtype and 0.1 < out["sample"].abs().max() < 10


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_ddim_equals_first_order_dpm_solver():
    # DPM-Solver++ of order 1 is DDIM; diffusers' own DDIM takes other steps where their number does
    # not divide 1000
    diffusion = create_diffusion("30")
    scheduler = DPMSolverMultistepScheduler(solver_order=1)
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1])
    abar = torch.from_numpy(create_diffusion("").alphas_cumprod)[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])

    x_last = x = randn(2, 4, 8, 8)
    outs = diffusion.ddim_sample_loop_progressive(
        smooth_eps_and_v, x.shape, x_last, clip_denoised=False
    )
    for i, (t, out) in enumerate(zip(scheduler.timesteps, outs, strict=True)):
        scheduler._step_index = i  # its public step() would round to float32
        x_start = scheduler.convert_model_output(smooth_eps(x, t.repeat(len(x))), sample=x)
        x = scheduler.dpm_solver_first_order_update(x_start, sample=x)
        assert (out["sample"] - x).abs().max() < 1e-10
        assert (out["pred_xstart"] - x_start).abs().max() < 1e-10
    assert 0.1 < x.abs().max() < 10


def test_guided_sampling_of_a_network_equals_that_of_diffusers(monkeypatch):
    """The network, its guidance and the sampler at once, against diffusers' network and sampler in
    float64.
    """
    steps, scale, ours = 5, 3.0, small_dit()
    theirs, diffusion = diffusers_twin(ours), create_diffusion(str(steps))
    scheduler = ddpm_scheduler(steps, create_diffusion("").alphas_cumprod)
    x_last, *noises = randn(steps + 1, 2, 4, 8, 8)
    labels, null = torch.tensor([1, 8]), torch.full((2,), ours.null_label)

    x, draws = x_last, iter(noises)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(draws))
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond, uncond = (
                theirs(x, t.repeat(2), labels).sample,
                theirs(x, t.repeat(2), null).sample,
            )
            guided = torch.cat(
                [uncond[:, :4] + scale * (cond[:, :4] - uncond[:, :4]), cond[:, 4:]], dim=1
            )
            x = scheduler.step(guided, t, x).prev_sample

    draws = iter(torch.cat([z, z]) for z in noises)
    out = diffusion.p_sample_loop(
        ours.forward_with_cfg, (4, 4, 8, 8), torch.cat([x_last, x_last]), clip_denoised=False,
        model_kwargs=dict(y=torch.cat([labels, null]), cfg_scale=scale, cfg_channels="all"),
        noise_fn=lambda x: next(draws),
    )  # fmt: skip
    assert (out[:2] - x).abs().max() < 1e-10 * x.abs().max()
