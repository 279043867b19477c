"""The benchmark of calibrated schedules: against numbers by hand and diffusers' FirstBlockCache."""

import pytest
import torch

from benchmarks import caching, calibrated
from conftest import fill_randomly
from models import DiT, DiTBlock
from processes.table import process_of
from sampling.caching import Taylor
from vae import PixelSpace

TOY = dict(
    input_size=4, patch_size=2, in_channels=3, hidden_size=16, num_heads=2, depth=3, num_classes=5
)


class Unclipped(PixelSpace):
    clip_denoised = False


@pytest.fixture
def filled():
    """What is sampled from: a network of random weights, and 12 steps of it without a cache."""
    network = fill_randomly(DiT(**TOY)).eval().requires_grad_(False)
    ground = caching.Ground(network, process_of(network), Unclipped())
    return ground, caching.Way("ddim", 12)


def drawn(sampler):
    return sampler.numbered_latents(0, (0, 1, 2), torch.tensor([0, 1, 2]))


def test_a_schedule_asks_where_what_was_kept_is_too_far_off():
    values = torch.tensor([4.0, 4.4, 5.0, 5.2, 5.2]).outer(torch.tensor([1.0, -1.0])).unsqueeze(1)
    assert calibrated.change(values[2], values[0], values[0]) == 0.25
    for threshold, wanted in ((0.0, "xxxxx"), (0.05, "xxx.x"), (0.2, "x.x.x"), (0.3, "x...x")):
        plan = calibrated.schedule(values, [4.0, 3.0, 2.0, 1.0, 0.0], threshold)
        assert "".join(".x"[ask] for ask in plan) == wanted
    # No two steps in turn are left out; a straight line goes on from 4 and 4.4 to 4.8, 0.2 of 4.4
    assert calibrated.schedule(values, range(5), 0.3, longest=1) == [True, False, True, False, True]
    assert calibrated.schedule(values, range(5), 0.05, 1) == [True, True, False, False, True]
    assert calibrated.schedule(values, range(5), 0.04, 1) == [True, True, True, True, True]


def test_what_is_seen_of_a_network_is_what_its_parts_do(filled, monkeypatch):
    monkeypatch.setattr(calibrated, "CALIBRATION", 2)
    sampler, given, out = caching.sampler_of(*filled), [[], [], []], []
    blocks, last = sampler.network.blocks, sampler.network.final_layer
    hooks = [
        part.register_forward_pre_hook(lambda _, x, i=i: given[i].append(x[0].flatten()))
        for i, part in enumerate((blocks[0], blocks[1], last))
    ]
    hooks.append(blocks[2].mlp.register_forward_hook(lambda _, __, x: out.append(x.flatten())))
    values = calibrated.seen(sampler)
    for hook in hooks:
        hook.remove()
    entered, second, left = map(torch.stack, given)
    assert {kind: len(value[0]) for kind, value in values.items()} == {
        "attn": 3, "mlp": 3, "first": 1, "blocks": 1,
    }  # fmt: skip
    assert torch.equal(values["first"][:, 0], second - entered)
    assert torch.equal(values["blocks"][:, 0], left - entered)
    assert torch.equal(values["mlp"][:, 2], torch.stack(out)) and len(out) == 12
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in blocks.modules())


def test_schedules_that_ask_at_all_steps_change_no_bit(filled):
    options, want = caching.options_of(*filled), drawn(caching.sampler_of(*filled))
    asked, elsewhere = [True] * 12, Taylor(1, 0)
    for sampler in (
        calibrated.Planned(**options, plan=calibrated.Plan(asked, 2)),
        calibrated.OfKinds(**options, elsewhere=elsewhere, kinds={"attn": asked, "mlp": asked}),
        calibrated.OfFirstBlock(**options, asks=lambda: calibrated.Rule(0.0)),
    ):
        assert torch.equal(drawn(sampler), want)
    # The same steps as taylor:3,1 are the same samples; less of the blocks are others
    taylor = caching.sampler_of(filled[0], filled[1]._replace(cache="taylor:3,1"))
    plan = calibrated.Plan(Taylor(3, 1).computed([True] * 12), 1)
    assert torch.equal(drawn(calibrated.Planned(**options, plan=plan)), drawn(taylor))
    assert not torch.equal(drawn(taylor), want)


@pytest.mark.parametrize("threshold, whole", [(0.0, 12), (0.1, 7), (0.3, 3)])
def test_the_first_block_decides_as_in_diffusers(filled, threshold, whole):
    hooks = pytest.importorskip("diffusers.hooks")
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models import CacheMixin

    counted, network = [], filled[0].network
    network.blocks[1].mlp.register_forward_pre_hook(lambda *_: counted.append(1))
    options, plain = caching.options_of(*filled), caching.sampler_of(*filled)
    ours = drawn(calibrated.OfFirstBlock(**options, asks=lambda: calibrated.Rule(threshold)))
    assert len(counted) == whole
    # Its registry is asked for `hidden_states` by that name: of our block the first argument
    TransformerBlockRegistry.register(
        DiTBlock, TransformerBlockMetadata(0, _cached_parameter_indices={"hidden_states": 0})
    )
    hooks.apply_first_block_cache(network, hooks.FirstBlockCacheConfig(threshold=threshold))
    with CacheMixin.cache_context(network, "cond"):
        theirs = drawn(plain)
    assert len(counted) == 2 * whole
    assert (theirs - ours).abs().max() < 1e-5
