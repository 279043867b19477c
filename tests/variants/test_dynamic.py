"""A DiT with routers: against DiT, against loops and masks written by hand, and sliced against
masked.
"""

import math

import pytest
import torch

from checkpoints.networks import NETWORKS, create_network
from conftest import SMALL, fill_randomly, generator, randn, small_dit
from layers.schedule import Scheduled, at_step
from models import DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from sampling.sampler import Sampler
from sampling.speed import prepare
from training.cost import counted
from checkpoints.networks import DynamicDiT
from variants.dynamic import multiply_adds, sorted_by_magnitude, switched
from vae import PixelSpace

N, HEADS, TOKENS = 5, SMALL["num_heads"], 16
TIMES = [3, 500, 999]


def with_routers(seed=1, on=0.0, std=1.0, **changes):
    """A small DynamicDiT of random weights in float64, in evaluation mode, some of it on."""
    network = fill_randomly(DynamicDiT(**{**SMALL, **changes}), seed, std=0.2)
    source = generator(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".router_" in name:
                parameter.normal_(on * name.endswith("bias"), std, generator=source)
    return network.double().eval()


def asked(network, count=N, dtype=torch.float64):
    """Latents, times and labels for a network."""
    x = randn(count, *network.latent_shape, dtype=dtype)
    return x, torch.tensor([3, 500, 999, 7, 7])[:count], torch.arange(count) % 10


def dit_and_dynamic():
    """A DiT of random weights and the fresh DynamicDiT that goes on from it, in float32."""
    dit, dynamic = small_dit().float(), DynamicDiT(**SMALL)
    dynamic.load_state_dict(dynamic.state_dict() | dit.state_dict())
    return dit.train(), dynamic.train()


# ---- all on ----


def test_its_weights_are_those_of_dit_and_of_routers():
    torch.manual_seed(3)
    dit = DiT(**SMALL).state_dict()
    torch.manual_seed(3)
    found = DynamicDiT(**SMALL).state_dict()
    assert all(torch.equal(found[name], value) for name, value in dit.items())
    assert {name.split(".")[2] for name in found.keys() - dit.keys()} == {
        "router_heads", "router_groups", "router_tokens",
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_all_on_it_is_dit_to_the_bit(checkpointing):
    """Outputs and gradients, as it is asked in sampling, and in training with nothing left out."""
    dit, dynamic = dit_and_dynamic()
    dynamic.grad_checkpointing = checkpointing
    x, t, y = asked(dit, dtype=torch.float32)
    drop = torch.zeros(N, dtype=torch.long)
    want = dit(x, t, y, drop)
    want.square().sum().backward()
    everything = torch.full((N, *dynamic.routes), math.inf)
    outputs = dynamic(x, t, y, drop), dynamic(x, t, y, drop, everything)[1]
    for out in outputs:
        assert torch.equal(out, want)
    outputs[0].square().sum().backward()
    for name, parameter in dit.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(dynamic.get_parameter(name).grad, parameter.grad), name


def test_training_without_noise_left_out_changes_no_gradient():
    """The first output too, with infinite noise: the routers then get a gradient of exactly 0."""
    dit, dynamic = dit_and_dynamic()
    x, t, y = asked(dit, dtype=torch.float32)
    drop = torch.zeros(N, dtype=torch.long)
    dit(x, t, y, drop).square().sum().backward()
    drawn, _, share = dynamic(x, t, y, drop, torch.full((N, *dynamic.routes), math.inf))
    assert torch.equal(share, torch.ones(N))
    drawn.square().sum().backward()
    for name, parameter in dynamic.named_parameters():
        if ".router_" in name:
            assert not parameter.grad.any()
        elif parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, dit.get_parameter(name).grad)


# ---- what is off ----


def written_out(network, x, t, y, heads, groups, tokens):
    """The output for switches (N, depth, H) and (N, depth, T), of a network of which what is off is
    taken out of the weights, image by image.
    """
    outputs = []
    for n in range(len(x)):
        plain = DiT(**{k: v for k, v in network.config.items() if k != "_class_name"})
        own = plain.state_dict()
        plain.load_state_dict({name: network.state_dict()[name] for name in own})
        plain = plain.double().eval()
        for number, block in enumerate(plain.blocks):
            width = block.attn.proj.in_features // HEADS
            hidden = block.mlp.fc1.out_features // HEADS
            for h in range(HEADS):
                if not heads[n, number, h]:
                    block.attn.proj.weight.data[:, h * width : (h + 1) * width] = 0
                if not groups[n, number, h]:
                    block.mlp.fc2.weight.data[:, h * hidden : (h + 1) * hidden] = 0
            of = tokens[n, number, :, None]
            block.mlp.register_forward_hook(lambda _, __, out, of=of: out * of)
        outputs.append(plain(x[n : n + 1], t[n : n + 1], y[n : n + 1]))
    return torch.cat(outputs)


def test_what_is_off_is_as_if_its_weights_were_zero():
    """By noise of ±infinity any switches can be had, whatever the routers say; the shares are those
    that count.py's arithmetic has, summed by hand.
    """
    network = with_routers()
    x, t, y = asked(network)
    depth, routes = network.routes
    on = torch.rand(N, depth, routes, generator=generator(4)) < 0.6
    noise = torch.where(on, math.inf, -math.inf).double()
    first = torch.ones(N, depth, 1, dtype=torch.bool)
    heads, groups, tokens = on.split([HEADS - 1, HEADS - 1, TOKENS], dim=2)
    heads, groups = (torch.cat([first, one], dim=2) for one in (heads, groups))
    drawn, complete, share = network(x, t, y, noise=noise)
    want = written_out(network, x, t, y, heads, groups, tokens)
    torch.testing.assert_close(drawn, want, rtol=1e-10, atol=1e-10)
    everything = written_out(network, x, t, y, heads | True, groups | True, tokens | True)
    torch.testing.assert_close(complete, everything, rtol=1e-10, atol=1e-10)
    assert (drawn - complete).abs().max() > 1e-3
    d, hidden = SMALL["hidden_size"], 4 * SMALL["hidden_size"]
    attention, mlp = 4 * TOKENS * d * d + 2 * TOKENS**2 * d, 2 * TOKENS * d * hidden
    for n in range(N):
        left = sum(
            attention * heads[n, i].double().mean()
            + mlp * groups[n, i].double().mean() * tokens[n, i].double().mean()
            for i in range(depth)
        )
        assert share[n].item() == pytest.approx((left / depth / (attention + mlp)).item(), rel=1e-6)


def test_a_block_counts_as_many_operations_as_it_takes():
    """With all on: against what PyTorch counts of the block's matrix products."""
    network = with_routers().float()
    block, width = network.blocks[0], SMALL["hidden_size"]
    x, every = torch.zeros(1, TOKENS, width), block.sliced(range(HEADS), range(HEADS))
    with counted() as counter:
        every.attend(x)
        block.mlp(x)
    assert counter.get_total_flops() == 2 * sum(multiply_adds(TOKENS, width, 4 * width))


def test_the_gradient_of_a_switch_is_that_of_the_formula():
    logits = randn(200, seed=1).mul_(8).requires_grad_()
    noise = randn(200, seed=2) * 3
    found = switched(logits, noise)
    assert torch.equal(found.detach(), (logits.detach() + noise > 0).double())
    weights = randn(200, seed=3)
    (found * weights).sum().backward()
    soft = 1 / (1 + torch.exp(-(logits.detach() + noise) / 5))
    torch.testing.assert_close(logits.grad, weights * soft * (1 - soft) / 5, rtol=1e-12, atol=0)
    assert torch.equal(switched(logits).detach(), (logits.detach() > 0).double())


def test_in_float32_a_switch_is_exactly_0_or_1():
    logits = randn(10_000, dtype=torch.float32) * 10
    assert switched(logits, torch.zeros(())).unique().tolist() == [0, 1]


# ---- a step that is told ----


def test_sliced_and_gathered_equals_masked():
    network = with_routers()
    assert isinstance(network, Scheduled)
    network.schedule(TIMES)
    assert len({str(step) for step in network.widths}) > 1  # they depend on t
    x, _, y = asked(network)
    for step, time in enumerate(TIMES):
        t = torch.full((N,), time)
        want = network(x, t, y)
        for _ in range(2):  # also from what is kept
            with at_step(network, step):
                torch.testing.assert_close(network(x, t, y), want, rtol=1e-10, atol=1e-10)
    assert torch.equal(network(x, t, y), want)


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_no_token_and_every_token(bias):
    network = with_routers()
    for block in network.blocks:
        block.router_tokens[2].bias.data.fill_(bias)
    x, _, y = asked(network)
    t = torch.full((N,), 500)
    network.schedule([500.0])
    want = network(x, t, y)
    with at_step(network, 0):
        torch.testing.assert_close(network(x, t, y), want, rtol=1e-10, atol=1e-10)


def test_a_schedule_forgets_weights_that_were():
    network = with_routers()
    x, _, y = asked(network)
    t = torch.full((N,), 500)
    network.schedule([500.0])
    with at_step(network, 0):
        network(x, t, y)
    network.load_state_dict(with_routers(seed=7).state_dict())
    network.schedule([500.0])
    with at_step(network, 0):
        torch.testing.assert_close(network(x, t, y), with_routers(seed=7)(x, t, y))


def test_what_is_off_is_not_computed_and_little_is_kept():
    """Operations of a told step are the share that the masked one says; of a block one slice lies
    in memory.
    """
    network, count = with_routers().float(), 3
    x, _, y = asked(network, count, torch.float32)
    network.schedule(TIMES)
    depth = SMALL["depth"]
    whole = depth * sum(multiply_adds(TOKENS, SMALL["hidden_size"], 4 * SMALL["hidden_size"]))
    blocks = sum(p.numel() for p in network.blocks.parameters())
    for step, time in enumerate(TIMES):
        t, shares = torch.full((count,), time), []
        hooks = [
            block.register_forward_hook(lambda _, __, out: shares.append(out[1].mean()))
            for block in network.blocks
        ]
        with counted() as masked:
            network(x, t, y)
        for hook in hooks:
            hook.remove()
        with at_step(network, step), counted() as told:
            network(x, t, y)
        # Routers of width are not asked in a told step
        routers = 2 * count * depth * SMALL["hidden_size"] * (HEADS - 1)
        left = count * whole * torch.stack(shares).mean().item()
        saved = (masked.get_total_flops() - told.get_total_flops()) / 2
        assert saved == pytest.approx(count * whole - left + routers, rel=1e-5)
        kept = sum(
            part.numel() for _, found in network.slices.values()
            for pair in found[1:] for part in pair
        )  # fmt: skip
        assert 0 < kept <= blocks and len(network.slices) == depth


SOLVERS = [
    (process, name) for process in (GaussianProcess, FlowProcess) for name in process.solvers
]


@pytest.mark.parametrize("cfg_scale", (1.0, 2.0))
@pytest.mark.parametrize("process, solver", SOLVERS, ids=[name for _, name in SOLVERS])
def test_samples_are_those_without_a_schedule(process, solver, cfg_scale, monkeypatch):
    network = with_routers(learn_sigma=process.learns_sigma, depth=1).float()

    def latents():
        sampler = Sampler(
            network, PixelSpace(), None, 4, solver, cfg_scale=cfg_scale,
            process=process.of(network, {}),
        )  # fmt: skip
        return sampler.numbered_latents(0, [0, 1], torch.tensor([1, 2]))

    told = latents()
    monkeypatch.setattr(Sampler, "schedule", lambda _: None)
    torch.testing.assert_close(told, latents(), rtol=1e-3, atol=1e-3)


def test_an_image_does_not_depend_on_the_others():
    network = with_routers(depth=1).float()
    sampler = Sampler(network, PixelSpace(), None, 4, "ddim", cfg_scale=1.5)
    together = sampler.numbered_latents(0, [0, 1, 2], torch.tensor([1, 2, 3]))
    alone = sampler.numbered_latents(0, [1], torch.tensor([2]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)


def test_in_half_precision_it_samples_as_in_float():
    network = with_routers(depth=1).float()
    network.blocks[0].router_tokens[2].bias.data.fill_(1e4)  # rounding then switches no token
    images = {}
    for precision in ("no", "bf16"):
        prepare(network, precision)
        sampler = Sampler(network, PixelSpace(), None, 3, "ddim", mixed_precision=precision)
        images[precision] = sampler.numbered_latents(0, [0, 1], torch.tensor([1, 2])).float()
    assert network.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    error = (images["bf16"] - images["no"]).square().mean() / images["no"].square().mean()
    assert 0 < error < 0.02


# ---- a DiT's weights ----


def test_sorting_changes_nothing_but_the_order():
    dit = small_dit()
    x, t, y = asked(dit)
    want = dit(x, t, y)
    found = sorted_by_magnitude(dit.state_dict(), HEADS)
    assert not torch.equal(found["blocks.0.mlp.fc1.weight"], dit.blocks[0].mlp.fc1.weight)
    other = DiT(**SMALL).double().eval()
    other.load_state_dict(found)
    torch.testing.assert_close(other(x, t, y), want, rtol=1e-12, atol=1e-12)
    for block in other.blocks:
        into, out = block.mlp.fc1.weight, block.mlp.fc2.weight
        groups = (into.square().sum(1) + out.square().sum(0)).unflatten(0, (HEADS, -1)).sum(1)
        heads = block.attn.qkv.weight.unflatten(0, (3, HEADS, -1)).square().sum((0, 2, 3))
        heads = heads + block.attn.proj.weight.unflatten(1, (HEADS, -1)).square().sum((0, 2))
        for strengths in (groups, heads):
            assert torch.equal(strengths, strengths.sort(descending=True).values)


# ---- what is refused ----


def test_bad_arguments_are_refused():
    for changes, words in [
        ({"num_heads": 1}, "num_heads is 1, .*2 heads or more"),
        ({"mlp_ratio": 0.55}, "17 hidden channels"),
        ({"depth": 0}, "depth is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            DynamicDiT(**{**SMALL, **changes})
    with pytest.raises(TypeError, match="positions"):
        DynamicDiT(**SMALL, positions="rope")


def test_compiling_is_refused():
    with pytest.raises(ValueError, match="a DynamicDiT computes something else at each step"):
        prepare(with_routers(), compile=True)


def test_a_configuration_makes_it_again():
    network = DynamicDiT(**SMALL, extrapolation="extend")
    assert network.config["_class_name"] == "DynamicDiT" and "block" not in network.config
    again = create_network(network.config)
    assert type(again) is DynamicDiT is NETWORKS["DynamicDiT"] and again.config == network.config
    assert again.extrapolation == "extend"
