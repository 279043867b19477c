"""The processes behind their interface: the Gaussian one, and that another one is a class and a row
in the table.
"""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoints.files import save_checkpoint
from checkpoints.loading import network_of
from checkpoints.process_marks import check_process
from checkpoints.publish import save_pretrained
from checkpoints.weights import load_weights
from conftest import fill_randomly, generator, randn
from diffusion import create_diffusion
from models import DiT
from processes.gaussian import GaussianProcess
from processes.process import Solver
from processes.table import PROCESSES, process_of
from sampling.sampler import Sampler
from training.state import Recipe, new_state
from training.step import draw, train_step
from vae import PixelSpace

TINY = dict(
    input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4
)


class Straight:
    """Straight ways from data, at t = 0, to noise, at t = 1, with a network that predicts their
    direction: no steps, no variance, other parts of the loss.
    """

    name = word = "straight"
    solvers, usual = {"euler": Solver(10, 100, {"bend": 0.0}, least=2)}, "euler"
    config, parts, told_apart = {"name": "straight", "end": 1.0}, ("loss", "direction"), "direction"

    @classmethod
    def of(cls, network, said):
        return cls()

    def draw_times(self, count, generator):
        return torch.rand(count, generator=generator, device=generator.device)

    def losses(self, network, x_start, t, noise):
        share = t.view(-1, *[1] * (x_start.dim() - 1))
        error = network((1 - share) * x_start + share * noise, t) - (noise - x_start)
        mean = error.square().flatten(1).mean(dim=1)  # (N,)
        return {"loss": mean, "direction": mean}

    def quarter(self, t):
        return (t * 4).long()

    def times(self, solver, steps, bend=0.0):
        if not 0 <= bend < 1:
            raise ValueError(f"`bend` is {bend}")
        return [1 - (i / steps) ** (1 + bend) for i in range(steps)]

    def levels(self, solver, steps, bend=0.0):
        return self.times(solver, steps, bend)

    def trajectory(
        self, network, noise, solver, steps, *, noise_fn, clip, progress, breaks=(), **options
    ):
        x, times = noise, [*self.times(solver, steps, **options), 0.0]
        self.breaks = list(breaks)
        for i, (t, t_next) in enumerate(zip(times, times[1:])):
            with torch.no_grad():
                direction = network(x, torch.full((len(x),), t), i)
            clean, x = x - t * direction, x - (t - t_next) * direction
            yield {"t": t, "sample": x, "pred_xstart": clean}


@pytest.fixture
def straight(monkeypatch):
    """The other process, now a row of the table."""
    monkeypatch.setitem(PROCESSES, Straight.name, Straight)
    return Straight()


def network(**changes):
    return fill_randomly(DiT(**{**TINY, **changes}), std=0.2)


# ---- the Gaussian process ----


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_losses_are_those_of_diffusion_under_the_names_of_the_parts(learn_sigma):
    process, x, t = GaussianProcess(learn_sigma), randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    output = randn(3, 4 if learn_sigma else 2, 4, 4, seed=1)
    noise = randn(3, 2, 4, 4, seed=2)
    got = process.losses(lambda x, t: output, x, t, noise)
    want = create_diffusion("", learn_sigma=learn_sigma).training_losses(
        lambda x, t: output, x, t, noise=noise
    )
    assert set(got) == set(process.parts) and process.parts[0] == "loss"
    assert process.told_apart in process.parts
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_times_are_whole_steps_in_equal_quarters():
    process = GaussianProcess()
    t = process.draw_times(4000, generator())
    assert torch.equal(t, torch.randint(1000, (4000,), generator=generator()))
    assert process.quarter(torch.tensor([0, 249, 250, 749, 750, 999])).tolist() == [
        0, 0, 1, 2, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize("solver", GaussianProcess.solvers)
def test_levels_fall_from_noise_to_clean(solver):
    levels = GaussianProcess().levels(solver, 5)
    assert len(levels) == 5 and levels == sorted(levels, reverse=True)
    assert levels[0] == 0.999 and levels[-1] >= 0


def test_a_trajectory_says_for_which_step_it_asks():
    asked = []

    def predict(x, t, step):
        asked.append((step, t.tolist()))
        return torch.zeros(2, 2, 4, 4)

    process, noise = GaussianProcess(), randn(2, 1, 4, 4).float()
    for solver in process.solvers:
        asked.clear()
        times = [out["t"] for out in process.trajectory(predict, noise, solver, 4)]
        assert asked == [(i, [t, t]) for i, t in enumerate(times)] and len(times) == 4
        assert times == process.times(solver, 4)


# ---- which process ----


def test_files_that_say_nothing_are_of_the_gaussian_process():
    for learn_sigma in (True, False):
        process = process_of(network(learn_sigma=learn_sigma))
        assert isinstance(process, GaussianProcess) and process.learn_sigma == learn_sigma
    again = process_of(network(), process.config)
    assert isinstance(again, GaussianProcess) and again.config == process.config


@pytest.mark.parametrize("said, message", [
    ({"name": "unheard_of"}, "the process unheard_of is not known here; known are gaussian"),
    ({}, "the process None is not known here"),
    ({"name": "gaussian", "diffusion_steps": 500}, "gaussian has diffusion_steps 500; it is known"),
    ({"name": "gaussian", "shift": 3.0}, "gaussian has shift 3.0; it is known"),
])  # fmt: skip
def test_a_process_that_is_not_known_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        process_of(network(), said)


@pytest.mark.parametrize("said, mark", [
    ({"process": {"name": "unheard_of"}}, "process: unheard_of"),
    ({"config": {"process": {"name": "gaussian", "diffusion_steps": 500}}}, "diffusion_steps: 500"),
    ({"config": {"process": {"name": "gaussian", "noise_schedule": "cosine"}}}, "cosine"),
    ({"config": {"process": {"name": "gaussian"}}, "args": {"prediction": "v"}}, "prediction: v"),
])  # fmt: skip
def test_marks_are_found_beside_and_inside_the_name_of_a_process(said, mark):
    with pytest.raises(ValueError, match=f"x is of another process .*{mark}"):
        check_process(said, "x")
    check_process({"config": {"process": GaussianProcess().config}}, "x")


# ---- another process is a class and a row ----


def trained(process, steps=3):
    """A state after some steps towards a process, and the last report."""
    state = new_state(network(learn_sigma=False), Recipe(lr=1e-2), process=process)
    for step in range(steps):
        draws = draw(0, step, 8, (3, 8, 8), 0.5, process, "cpu")
        x = randn(8, 3, 8, 8, dtype=torch.float32)
        report = train_step(state, x, torch.arange(8) % 4, draws)
    return state, report


def test_another_process_is_trained_and_names_its_metrics(straight):
    state, report = trained(straight)
    assert report["bad"] == 0 and report["direction"] == report["loss"] > 0
    assert sum(report[f"samples_q{q}"] for q in range(1, 5)) == 8
    assert state.window.shown == ("loss", "direction", "gradient_norm")
    means = state.window.means(8)
    assert set(means) == {*state.window.shown, *(f"direction_q{q}" for q in range(1, 5))}
    state.begin_window()
    assert set(state.window.means(8).values()) == {None}


def test_another_process_is_told_by_the_checkpoint_and_goes_on(straight, tmp_path):
    state, _ = trained(straight)
    contents = state.to_checkpoint({"global_seed": 0, "process": "straight"}, None, 1)
    save_checkpoint(tmp_path / "a.pt", contents)
    weights = load_weights(tmp_path / "a.pt")
    assert weights.process == straight.config and "process" not in weights.config
    assert isinstance(process_of(network_of(weights, "a"), weights.process), Straight)

    contents["emas"] = {}
    again = new_state(network(learn_sigma=False), Recipe(), process=straight)
    again.load_checkpoint(contents)
    assert again.window.sums == state.window.sums and again.step == 3
    gaussian = new_state(network(learn_sigma=False), Recipe())
    message = "has learned the process straight, and `process` is diffusion"
    with pytest.raises(ValueError, match=message):
        gaussian.check_learned(contents["config"])


def test_another_process_is_told_by_a_pretrained_folder(straight, tmp_path):
    for folder, process in (("a", straight), ("b", None)):
        save_pretrained(network(learn_sigma=False), tmp_path / folder, process=process)
        want = (process or GaussianProcess()).config
        assert load_weights(tmp_path / folder).process == want  # of the .safetensors' metadata
        assert f'"name": "{want["name"]}"' in (tmp_path / folder / "config.json").read_text()


def test_a_file_of_a_process_that_is_not_in_the_table_is_refused(tmp_path, monkeypatch):
    state, _ = trained(Straight())
    save_checkpoint(tmp_path / "a.pt", state.to_checkpoint({"global_seed": 0}, None, 1))
    with pytest.raises(ValueError, match="a.pt is of another process .process: straight"):
        load_weights(tmp_path / "a.pt")
    check_process(Namespace(process="gaussian"), "x")


def test_another_process_is_sampled_with_guidance_inside_an_interval(straight):
    net, sizes = network(learn_sigma=False).eval(), []
    net.register_forward_pre_hook(
        lambda module, args: sizes.append((args[1][0].item(), len(args[0])))
    )
    sampler = Sampler(
        net, PixelSpace(), None, 4, "euler", cfg_scale=2.0, cfg_interval=(0.3, 0.6),
        process=straight,
    )  # fmt: skip
    images = sampler.images([0, 1, 2], seed=1)
    assert images.shape == (3, 8, 8, 3) and sampler.steps() == [1.0, 0.75, 0.5, 0.25]
    assert sizes == [(1.0, 3), (0.75, 3), (0.5, 6), (0.25, 3)] and straight.breaks == [2, 3]
    bent = replace(sampler, solver_options={"bend": 0.5})
    assert bent.steps()[:3] == [1.0, 0.875, 1 - 0.5**1.5] and bent.steps() != sampler.steps()
    assert not np.array_equal(bent.images([0, 1, 2], seed=1), images)
    for changes, message in (
        ({"sampler": "ddim"}, "`sampler` ddim is one of diffusion's; this network has learned the "
         "process straight: choose one of euler"),
        ({"num_sampling_steps": 101}, "`num_sampling_steps` is 101; it must be from 2 to 100"),
        ({"num_sampling_steps": 1}, "`num_sampling_steps` is 1; it must be from 2 to 100"),
        ({"solver_options": {"bend": 1.0}}, "`bend` is 1.0"),
        ({"solver_options": {"atol": 1.0}}, "`atol` is for the sampler dopri5; `sampler` is euler"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            replace(sampler, **changes)
