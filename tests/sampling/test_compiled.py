"""Compiled networks that do less at some steps: what is given to the compiler, and that they draw
what they draw without it.
"""
from functools import partial

import pytest
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.loading import find_files
from checkpoints.networks import DynamicDiT, ExitDiT
from checkpoints.weights import Weights, save_weights
from conftest import ROOT, fill_randomly
from models import DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from sampling import SamplingOptions
from sampling.loading import build_sampler, load_sampler
from sampling.sampler import Sampler
from sampling.speed import prepare
from vae import PixelSpace

DIGITS = ROOT / "examples" / "digits"
SIZES = dict(
    input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=3
)
KINDS = {"plain": DiT, "exits": partial(ExitDiT, exits=[[2, 0.3], [1, 0.6]]), "dynamic": DynamicDiT}


def network(kind="plain", seed=0, process=GaussianProcess, **changes):
    times = {} if kind != "exits" or process is GaussianProcess else dict(t_clean=1.0, t_noise=0.0)
    made = KINDS[kind](**SIZES | times | dict(learn_sigma=process.learns_sigma) | changes)
    made.process = process.of(made, {}).config
    return fill_randomly(made, seed, std=0.2).eval().requires_grad_(False)


def saved(path, made):
    save_weights(path, Weights(made.state_dict(), made.config, None, process=made.process))
    return str(path)


@pytest.fixture
def given(monkeypatch):
    """What is given to torch.compile, which gives it back."""
    found = []

    def record(function, **options):
        found.append((getattr(function, "__self__", None), options))
        return function

    monkeypatch.setattr(torch, "compile", record)
    return found


# ---- what is compiled ----


ON_A_CPU = {"dynamic": True, "fullgraph": True}


def built(tmp_path, kind="plain", high=None, **options):
    choice = NetworkChoice(
        saved(tmp_path / "a.safetensors", network(kind)), vae="none",
        ckpt_high=None if high is None else saved(tmp_path / "b.safetensors", network(high, 1)),
    )  # fmt: skip
    how = SamplingOptions(compile=True, num_sampling_steps=9, sampler="ddim", **options)
    return build_sampler(choice, find_files(choice, "mse"), how, torch.device("cpu"))


def test_a_network_with_exits_is_compiled_block_by_block(tmp_path, given):
    sampler = built(tmp_path, "exits")
    assert given[1:] == [(block, ON_A_CPU) for block in sampler.network.blocks]
    assert "forward" not in vars(sampler.network)


def test_with_a_cache_blocks_are_compiled(tmp_path, given):
    sampler = built(tmp_path, cache="taylor:3,1")
    assert given[1:] == [(block, ON_A_CPU) for block in sampler.network.blocks]
    assert "forward" not in vars(sampler.network)


def test_both_networks_of_a_pair_are_compiled_each_in_its_way(tmp_path, given):
    sampler = built(tmp_path, "exits", "plain", high_from=0.5)
    compiled = [(one, options) for one, options in given if one is not None]
    assert compiled == [
        *((block, ON_A_CPU) for block in sampler.network.blocks), (sampler.high, ON_A_CPU)
    ]  # fmt: skip
    assert "forward" in vars(sampler.high)


def test_a_dynamic_network_is_refused_alone_and_in_a_pair(tmp_path, given):
    for kind, high in (("dynamic", None), ("plain", "dynamic"), ("dynamic", "plain")):
        level = {} if high is None else {"high_from": 0.5}
        with pytest.raises(ValueError, match="`compile=True`: a DynamicDiT computes something"):
            built(tmp_path, kind, high, **level)


# ---- what it draws ----


def farthest(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def drawn(sampler, count):
    return sampler.numbered_latents(0, range(count), torch.arange(count) % 3)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Unclipped(PixelSpace):
    clip_denoised = False


def both(make, **options):
    """The Sampler of what make() returns, a network and perhaps a second one, and of the same
    compiled.
    """
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        net, *high = make()
        if compiled:
            for one in (net, *high):
                prepare(one, compile=True, by_blocks="cache" in options)
        second = dict(high=high[0], high_from=0.5) if high else {}
        found.append(Sampler(
            net, Unclipped(), None, 9, cfg_scale=2.0, cfg_interval=(0.2, 0.7), **second, **options
        ))  # fmt: skip
    torch._dynamo.utils.counters.clear()
    return found


MADE = {
    "exits": (lambda: [network("exits")], {}),
    "pair": (lambda: [network(), network(seed=1, depth=2)], {}),
    "pair with exits": (lambda: [network(), network("exits", 1)], {}),
    "cache": (lambda: [network()], {"cache": "taylor:3,1"}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MADE)
def test_compiled_networks_draw_the_same(name):
    """Guidance comes and goes, batches have several sizes, and nothing remains of one in the next:
    not of samples, nor what was compiled.
    """
    make, options = MADE[name]
    plain, fast = both(make, sampler="ddim", **options)
    first = drawn(fast, 6)
    for count in (6, 4, 1, 2, 6):
        assert farthest(drawn(fast, count), drawn(plain, count)) < 1e-5
    known = graphs()
    assert torch.equal(drawn(fast, 6), first)
    for count in (3, 5, 7, 1):
        assert farthest(drawn(fast, count), drawn(plain, count)) < 1e-5
    assert graphs() == known


@pytest.mark.long
def test_more_blocks_than_a_function_may_have_graphs():
    """Dynamo's limit is 8 of one function, unless it is told otherwise."""
    plain, fast = both(lambda: [network("exits", depth=10, exits=[[9, 0.5]])], sampler="ddim")
    assert farthest(drawn(fast, 3), drawn(plain, 3)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_samples_of_different_depths_in_a_batch(solver):
    """Solvers that ask within a step, dopri5 at times that differ from sample to sample."""
    process = FlowProcess.of(network("exits", process=FlowProcess), {})
    plain, fast = both(
        lambda: [network("exits", process=FlowProcess)], sampler=solver, process=process
    )
    for count in (5, 2, 1):
        assert farthest(drawn(fast, count), drawn(plain, count)) < 1e-4


@pytest.mark.long
def test_the_digits_are_the_same_in_half_precision_with_a_cache():
    torch._dynamo.reset()
    images = [
        load_sampler(
            DIGITS / "dit.safetensors", vae=DIGITS / "vae", device="cpu", steps=12, sampler="ddim",
            cfg_scale=1.5, mixed_precision="bf16", cache="taylor:2,1", compile=compiled,
        ).images([3, 1, 4])
        for compiled in (False, True)
    ]  # fmt: skip
    assert abs(images[0].astype(float) - images[1]).mean() < 2
