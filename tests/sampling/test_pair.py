"""Two networks that are asked as one: high noise levels by one, low ones by the other."""
from dataclasses import replace
import json
from pathlib import Path
import shutil
from unittest.mock import patch

from PIL import Image

import pytest
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.weights import Weights, save_weights
from conftest import fill_randomly
from models import DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from runtime.disk import file_hash
import sample
from sampling.loading import load_sampler
from sampling.many import open_job
from sampling.options import ManyOptions, SamplingOptions
from sampling.pair import Pair
from sampling.sampler import Sampler
from variants.video import VideoDiT
from vae import PixelSpace

SIZES = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=16, num_heads=2, num_classes=3)
STEPS, LEVEL = 6, 0.5


def network(seed, process=GaussianProcess, depth=2, **changes):
    made = DiT(**{**SIZES, "depth": depth, "learn_sigma": process.learns_sigma} | changes)
    made.process = process.of(made, {}).config
    return fill_randomly(made, seed, std=0.2).eval().requires_grad_(False)


def pair_of(process=GaussianProcess):
    return network(0, process), network(1, process, depth=1)


def sampler_of(low, high=None, process=GaussianProcess, solver=None, level=LEVEL, **options):
    return Sampler(
        low, PixelSpace(), None, STEPS, solver or process.usual, process=process.of(low, {}),
        high=high, high_from=None if high is None else level, **options,
    )  # fmt: skip


SOLVERS = [
    (process, name) for process in (GaussianProcess, FlowProcess) for name in process.solvers
]


@pytest.mark.parametrize("guidance", [{}, {"cfg_scale": 2.0, "cfg_interval": (0.2, 0.7)}])
@pytest.mark.parametrize("process, solver", SOLVERS, ids=[name for _, name in SOLVERS])
def test_each_step_is_of_one_network(process, solver, guidance):
    """A loop over the pieces, written by hand: each call of the network goes to the one whose level
    it has, and nothing else differs, bit for bit.
    """
    low, high = pair_of(process)
    labels = torch.tensor([0, 2])
    found = sampler_of(low, high, process, solver, **guidance).numbered_latents(0, [0, 1], labels)
    asked = {"low": 0, "high": 0}

    class ByHand(DiT):
        """Looks at the level of each call, whose samples all have one."""

        def forward(self, x, t, y=None, force_drop_ids=None):
            level = t[0] / 1000 if process is GaussianProcess else 1 - t[0]
            name = "high" if level >= LEVEL else "low"
            asked[name] += 1
            assert len(t.unique()) == 1 or solver == "dopri5"
            return (high if name == "high" else low)(x, t, y, force_drop_ids)

    by_hand = ByHand(**low.config)
    if solver == "dopri5":  # whose samples have times of their own: one at a time
        wanted = torch.cat([
            sampler_of(by_hand, None, process, solver, **guidance).numbered_latents(
                0, [i], labels[i : i + 1]
            ) for i in (0, 1)
        ])  # fmt: skip
        assert torch.allclose(found, wanted, rtol=0, atol=1e-4)
    else:
        wanted = sampler_of(by_hand, None, process, solver, **guidance).numbered_latents(
            0, [0, 1], labels
        )
        assert torch.equal(found, wanted)
    assert min(asked.values()) > 0
    alone = sampler_of(low, None, process, solver, **guidance).numbered_latents(0, [0, 1], labels)
    assert not torch.allclose(found, alone, atol=1e-3)


@pytest.mark.parametrize("process", [GaussianProcess, FlowProcess])
@pytest.mark.parametrize("level, name", [(0.0, "high"), (1.0, "low")])
def test_at_the_ends_one_network_does_all(process, level, name):
    """A flow's first step is at level 1 itself, which is high's."""
    low, high = pair_of(process)
    solver = {"solver": "ddim" if process is GaussianProcess else "sde"}
    with patch.object(Pair, "is_high", autospec=True, side_effect=Pair.is_high) as seen:
        pair = sampler_of(low, high, process, level=level, **solver)
        found = pair.numbered_latents(0, [0], torch.tensor([1]))
    assert seen.call_count == 1  # the steps are known before the first
    planned = pair.asked.planned
    wanted = [name == "high"] * STEPS
    if process is FlowProcess:
        wanted[0] = True
    assert planned == wanted
    if len(set(planned)) == 1:
        one = sampler_of(low if name == "low" else high, None, process, **solver)
        assert torch.equal(found, one.numbered_latents(0, [0], torch.tensor([1])))


@pytest.mark.parametrize("process", [GaussianProcess, FlowProcess])
def test_samples_of_mixed_times_go_each_to_its_network(process):
    """In float64 and in any split of the batch, guided or not."""
    low, high = (one.double() for one in pair_of(process))
    pair = Pair(low, high, LEVEL, process.of(low, {}))
    x = torch.randn(4, *low.latent_shape, dtype=torch.float64)
    levels, y = torch.tensor([0.1, 0.9, 0.5, 0.3]), torch.tensor([0, 1, 2, 0])
    t = levels * 1000 if process is GaussianProcess else 1 - levels
    wanted = torch.cat([
        (low, high, high, low)[i](x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)
    ])  # fmt: skip
    assert torch.allclose(pair(x, t, y=y), wanted, rtol=0, atol=1e-12)
    doubled = dict(y=torch.cat([y, torch.full_like(y, 3)]), cfg_scale=1.7, cfg_channels=2)
    x2, t2 = torch.cat([x, x]), torch.cat([t, t])
    guided = pair.forward_with_cfg(x2, t2, **doubled)
    for i, one in enumerate((low, high, high, low)):
        own = [i, i + 4]
        alone = one.forward_with_cfg(
            x2[own], t2[own], doubled["y"][own], cfg_scale=1.7, cfg_channels=2
        )
        assert torch.allclose(guided[own], alone, rtol=0, atol=1e-12)


def test_clips_go_to_the_network_of_their_noisiest_frame():
    low, high = pair_of(FlowProcess)
    pair = Pair(low, high, LEVEL, FlowProcess.of(low, {}))
    t = torch.tensor([[1.0, 1.0, 0.6], [1.0, 0.2, 0.2], [0.9, 0.5, 1.0]])  # 1: given
    assert pair.is_high(t).tolist() == [False, True, True]


def video(**changes):
    sizes = dict(SIZES, frames=2, depth=2, learn_sigma=False) | changes
    made = VideoDiT(**sizes)
    made.process = FlowProcess.of(made, {}).config
    return fill_randomly(made, 3).eval().requires_grad_(False)


def test_two_networks_of_clips():
    low, high = video(), video(attention="full")
    sampler = sampler_of(low, high, FlowProcess, "euler")
    assert sampler.images([0, 1]).shape == (2, 2, 4, 4, 3)
    assert sampler.asked.planned.count(True) == STEPS // 2 + 1  # levels 1 to 0.5


WRONG = {
    "latents of the shape": lambda: network(1, in_channels=4),
    "a number of classes": lambda: network(1, num_classes=4),
    "the null label": lambda: network(1, class_dropout_prob=0.0),
    "learn_sigma": lambda: network(1, learn_sigma=False),
    "samples that are clips": lambda: video(),
    "has learned": lambda: network(1, FlowProcess, learn_sigma=True),
}


@pytest.mark.parametrize("what", WRONG)
def test_networks_that_do_not_go_together_are_refused(what):
    with pytest.raises(ValueError, match=what) as error:
        sampler_of(network(0), WRONG[what]())
    assert "choose another `ckpt_high`" in str(error.value)


def test_what_does_not_go_together_is_told_before_shapes():
    with pytest.raises(ValueError, match="samples that are images"):
        sampler_of(video(), network(1, FlowProcess), FlowProcess, latent_shape=(3, 4, 4, 4))


@pytest.mark.parametrize("level, note", [
    (1.0, "below the noise level 1, so the network for higher ones is not asked"),
    (0.0, "at or above the noise level 0, so the network for lower ones is not asked"),
    (0.5, None),
])  # fmt: skip
def test_a_network_that_is_never_asked_is_told(level, note):
    found = sampler_of(*pair_of(), level=level, solver="ddim").notes([0])
    assert found == ([] if note is None else [f"all {STEPS} steps are {note}"])


@pytest.mark.parametrize("given", [dict(high=network(1)), dict(high_from=0.5)])
def test_the_two_arguments_go_together(given):
    with pytest.raises(ValueError, match="go together"):
        Sampler(network(0), PixelSpace(), None, **given)


@pytest.mark.parametrize("level", [-0.1, 1.5, float("nan")])
def test_a_level_is_from_0_to_1(level):
    with pytest.raises(ValueError, match="`high_from` is"):
        SamplingOptions(high_from=level)
    with pytest.raises(ValueError, match="`high_from` is"):
        sampler_of(*pair_of(), level=level)


def saved(folder, name, seed, **changes):
    made = network(seed, **changes)
    weights = Weights(made.state_dict(), made.config, None, process=made.process)
    save_weights(folder / f"{name}.safetensors", weights)
    return str(folder / f"{name}.safetensors")


COMMON = ["--vae", "none", "--steps", "4", "--device", "cpu"]


def test_the_door_draws_what_the_sampler_does(tmp_path, capsys):
    low, high = saved(tmp_path, "low", 0), saved(tmp_path, "high", 1, depth=1)
    output = tmp_path / "a.png"
    sample.main([
        "--ckpt", low, "--ckpt-high", high, "--high-from", "0.4", *COMMON, "--output", str(output),
        "--cfg-scale", "1.5", "--class-labels", "2", "--sampler", "ddim",
    ])  # fmt: skip
    settings = json.loads(Image.open(output).text["settings"])
    assert settings["ckpt_high"] == high and settings["high_from"] == 0.4
    loaded = load_sampler(
        low, vae="none", steps=4, ckpt_high=high, high_from=0.4, cfg_scale=1.5, sampler="ddim",
        device="cpu",
    )  # fmt: skip
    assert isinstance(loaded.asked, Pair) and loaded.high.config["depth"] == 1
    two = [loaded.images([2], seed) for seed in (0, 0)]
    assert (two[0] == two[1]).all()


def test_another_second_checkpoint_is_another_job(tmp_path):
    """In a folder of its own, whose manifest tells it; its path does not matter."""
    low = saved(tmp_path, "low", 0)
    names = [saved(tmp_path, name, seed, depth=1) for name, seed in (("a", 1), ("b", 2))]
    names += [shutil.copy(names[0], tmp_path / "c.safetensors")]
    how = SamplingOptions(num_sampling_steps=4, high_from=0.5)
    many = ManyOptions(2, 2, tmp_path / "samples")
    choices = [NetworkChoice(low, vae="none", ckpt_high=name) for name in names]
    jobs = [open_job(choice, how, many, device="cpu") for choice in choices]
    other = open_job(choices[0], replace(how, high_from=0.4), many, device="cpu")
    alone = open_job(NetworkChoice(low, vae="none"), SamplingOptions(num_sampling_steps=4), many)
    a, b, c = (job.folder for job in jobs)
    assert a == c and len({a, b, other.folder, alone.folder}) == 4
    manifest = jobs[0].manifest
    assert manifest["options"]["ckpt_high"] == names[0]
    assert manifest["decides"]["high_sha256"] == file_hash(Path(names[0]))
    assert manifest["decides"]["high_from"] == 0.5
    assert not {"high_sha256", "high_from", "ckpt_high"} & alone.manifest["decides"].keys()


@pytest.mark.parametrize("flags, message", [
    (["--high-from", "0.4"], "--ckpt-high and --high-from"),
    (["--ckpt-high", "HIGH"], "--ckpt-high and --high-from"),
    (["--ckpt-high", "HIGH", "--high-from", "1.2"], "--high-from is 1.2"),
    (["--ckpt-high", "BARE", "--high-from", "0.5"], "does not say how its network is built"),
    (["--ckpt-high", "OTHER", "--high-from", "0.5"], "a number of classes of 5"),
    (["--ckpt-high", "missing.pt", "--high-from", "0.5"], "missing.pt"),
])  # fmt: skip
def test_what_the_door_refuses(tmp_path, capsys, flags, message):
    low, high = saved(tmp_path, "low", 0), saved(tmp_path, "high", 1, depth=1)
    other, bare = saved(tmp_path, "other", 1, num_classes=5), str(tmp_path / "bare.pt")
    torch.save(network(1).state_dict(), bare)
    flags = [{"HIGH": high, "OTHER": other, "BARE": bare}.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as end:
        sample.main(["--ckpt", low, *COMMON, "--output", str(tmp_path / "a.png"), *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "a.png").exists()
