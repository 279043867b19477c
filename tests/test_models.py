"""The network: sizes, state-dict keys, closed forms of its parts, initialisation, guidance, errors.
"""
from functools import cache
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import SMALL, fill_randomly, randn, small_dit
import models
from models import (
    DiT, DiTBlock, DiT_models, FinalLayer, LabelEmbedder, TimestepEmbedder, get_2d_sincos_pos_embed,
    modulate,
)  # fmt: skip

# name → parameters, billions of multiply-adds at 256 px; the paper's Table 1 and its Gflops.
PAPER = {
    "DiT-S/8": (33_148_160, 0.358), "DiT-S/4": (32_945_024, 1.413), "DiT-S/2": (32_963_360, 6.056),
    "DiT-B/8": (130_881_536, 1.418), "DiT-B/4": (130_475_648, 5.565),
    "DiT-B/2": (130_512_416, 23.005), "DiT-L/8": (458_594_816, 5.011),
    "DiT-L/4": (458_053_760, 19.696), "DiT-L/2": (458_102_816, 80.698),
    "DiT-XL/8": (675_683_072, 7.392), "DiT-XL/4": (675_074_432, 29.044),
    "DiT-XL/2": (675_129_632, 118.621),
}  # fmt: skip
# depth, width, heads
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def inputs(n=3, seed=1, dtype=torch.float64):
    """x, t and y for small_dit."""
    x = randn(n, 4, 8, 8, seed=seed, dtype=dtype)
    return x, torch.arange(n) * 331 + 7, torch.arange(n) * 4 % SMALL["num_classes"]


@cache
def parameters_and_macs(build, side=32, **kwargs):
    """Number of parameters and billions of multiply-adds of one sample, counted without allocating
    anything.
    """
    with torch.device("meta"), torch.no_grad():
        model = build(input_size=side, **kwargs).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


# ---- sizes and names ----

@pytest.mark.parametrize("name", PAPER)
def test_size_of_each_configuration(name):
    count, macs = parameters_and_macs(DiT_models[name])
    assert count == PAPER[name][0]
    assert macs == pytest.approx(PAPER[name][1], rel=1e-3, abs=5e-4)  # the table has three decimals


def test_size_at_512_pixels():
    count, macs = parameters_and_macs(DiT_models["DiT-XL/2"], side=64)
    assert count == 676_014_368
    assert macs == pytest.approx(524.5, rel=1e-3)


@pytest.mark.parametrize("num_classes", [10, 1000])
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_tiny_sizes_have_one_to_three_million_parameters(patch, num_classes):
    count, _ = parameters_and_macs(DiT_models[f"DiT-Ti/{patch}"], num_classes=num_classes)
    assert 1e6 < count < 3e6


def test_every_name_has_its_factory():
    assert set(PAPER) < set(DiT_models)
    ours = {name for name in DiT_models if name.startswith(("DiT-Ti/", "DiT-XS/"))}
    assert set(DiT_models) - ours == set(PAPER)
    for name in DiT_models:
        assert getattr(models, name.replace("-", "_").replace("/", "_")) is DiT_models[name]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_factories_build_the_size_in_their_name(size, patch):
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        model = getattr(models, f"DiT_{size}_{patch}")(num_classes=7, learn_sigma=False)
    assert (len(model.blocks), model.pos_embed.shape[-1], model.blocks[0].attn.num_heads) == (
        depth, width, heads,
    )  # fmt: skip
    assert model.config == dict(
        input_size=32, patch_size=patch, in_channels=4, hidden_size=width, depth=depth,
        num_heads=heads, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=7, learn_sigma=False,
        block="adaln_zero",
    )  # fmt: skip


def test_state_dict_keys_and_shapes():
    shapes = {
        "pos_embed": (1, 16, 384), "x_embedder.proj.weight": (384, 4, 8, 8),
        "x_embedder.proj.bias": (384,), "t_embedder.mlp.0.weight": (384, 256),
        "t_embedder.mlp.0.bias": (384,), "t_embedder.mlp.2.weight": (384, 384),
        "t_embedder.mlp.2.bias": (384,), "y_embedder.embedding_table.weight": (1001, 384),
        "final_layer.linear.weight": (512, 384), "final_layer.linear.bias": (512,),
        "final_layer.adaLN_modulation.1.weight": (768, 384),
        "final_layer.adaLN_modulation.1.bias": (768,),
    }  # fmt: skip
    for i in range(12):
        for name, rows, columns in (
            ("attn.qkv", 1152, 384), ("attn.proj", 384, 384), ("mlp.fc1", 1536, 384),
            ("mlp.fc2", 384, 1536), ("adaLN_modulation.1", 2304, 384),
        ):  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = (
                (rows, columns),
                (rows,),
            )
    with torch.device("meta"):
        model = models.DiT_S_8()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes


def test_without_label_dropout_the_table_has_no_null_row():
    with torch.device("meta"):
        model = models.DiT_S_8(class_dropout_prob=0)
        assert model.state_dict()["y_embedder.embedding_table.weight"].shape == (1000, 384)
        assert model.null_label is None and models.DiT_S_8().null_label == 1000


def test_config_builds_the_same_network():
    model = small_dit(learn_sigma=False, class_dropout_prob=0.3, mlp_ratio=2.0)
    again = DiT(**model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*inputs()), model(*inputs()))
    assert again.config == model.config and again.y_embedder.dropout_prob == 0.3
    assert again.blocks[0].mlp.fc1.out_features == 2 * SMALL["hidden_size"]


# ---- parts ----

def test_modulate_scales_by_one_plus_scale():
    x, shift, scale = randn(2, 5, 3), randn(2, 3, seed=1), randn(2, 3, seed=2)
    out = modulate(x, shift, scale)
    for n in range(2):
        for token in range(5):
            torch.testing.assert_close(
                out[n, token], x[n, token] * (1 + scale[n]) + shift[n], rtol=0, atol=1e-15
            )


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    closed_form = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    for block in small_dit().blocks:
        torch.testing.assert_close(block.mlp.act(x), closed_form, rtol=0, atol=1e-14)


def test_layer_norms_have_no_weights_and_eps_1e_6():
    model = small_dit()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * SMALL["depth"] + 1
    x = randn(7, SMALL["hidden_size"]) * 1e-3  # so little variance that eps shows
    expected = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    for norm in norms:
        assert not list(norm.parameters())
        torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


def test_block_takes_shift_scale_gate_for_attention_and_then_for_the_mlp():
    block = fill_randomly(DiTBlock(8, 2), std=0.5).double()
    x, c = randn(3, 5, 8), randn(3, 8, seed=1)
    regress = block.adaLN_modulation[1]
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        regress(nn.functional.silu(c)).reshape(3, 6, 1, 8).unbind(1)
    )
    norm = nn.functional.layer_norm
    middle = x + gate1 * block.attn(norm(x, (8,), eps=1e-6) * (1 + scale1) + shift1)
    expected = middle + gate2 * block.mlp(norm(middle, (8,), eps=1e-6) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, c), expected, rtol=0, atol=1e-12)


def test_final_layer_takes_shift_then_scale():
    layer = fill_randomly(FinalLayer(8, 2, 3), std=0.5).double()
    x, c = randn(3, 5, 8), randn(3, 8, seed=1)
    shift, scale = layer.adaLN_modulation[1](nn.functional.silu(c)).reshape(3, 2, 1, 8).unbind(1)
    expected = layer.linear(nn.functional.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift)
    assert expected.shape == (3, 5, 12)
    torch.testing.assert_close(layer(x, c), expected, rtol=0, atol=1e-12)


def test_unpatchify_puts_each_number_in_its_place():
    model, p, side, channels = small_dit(in_channels=3, learn_sigma=False), 2, 4, 3
    patches = torch.arange(2 * side * side * p * p * channels).view(
        2, side * side, p * p * channels
    )
    image = model.unpatchify(patches)
    assert image.shape == (2, channels, 8, 8)
    for n, channel, row, column in (
        (0, 0, 0, 1), (0, 1, 0, 0), (0, 2, 1, 0), (1, 0, 2, 7), (1, 2, 7, 3), (1, 1, 5, 5),
    ):  # fmt: skip
        token, within = row // p * side + column // p, row % p * p + column % p
        assert image[n, channel, row, column] == patches[n, token, within * channels + channel]


def test_tokens_run_row_by_row():
    model, x = small_dit(), randn(1, 4, 8, 8)
    weight, bias = model.x_embedder.proj.weight.flatten(1), model.x_embedder.proj.bias
    tokens = model.x_embedder(x)
    for row, column in ((0, 1), (1, 0), (3, 2)):
        patch = x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
        torch.testing.assert_close(
            tokens[0, row * 4 + column], weight @ patch + bias, rtol=0, atol=1e-13
        )


def test_position_table_closed_form():
    width, side = 24, 5
    table = get_2d_sincos_pos_embed(width, side)
    assert table.shape == (side * side, width) and table.dtype == "float64"
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                frequency = math.exp(-math.log(10000) * i / quarter)
                expected = [f(z * frequency) for z in (column, row) for f in (math.sin, math.cos)]
                assert table[row * side + column, i::quarter] == pytest.approx(
                    expected, rel=0, abs=1e-14
                )
    with pytest.raises(ValueError, match="multiple of 4"):
        get_2d_sincos_pos_embed(6, 2)


def test_position_table_in_the_network_is_frozen():
    model = DiT(**SMALL)
    table = torch.from_numpy(get_2d_sincos_pos_embed(SMALL["hidden_size"], 4)).float()
    assert torch.equal(model.pos_embed[0], table) and not model.pos_embed.requires_grad
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


# ---- timesteps and labels ----

def test_timestep_embedding_closed_form():
    t = torch.tensor([0.0, 1.0, 17.3, 998.7])
    waves = TimestepEmbedder.timestep_embedding(t, 256)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = t.double()[:, None] * frequencies
    assert waves.dtype == torch.float32
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    # float32 angles up to 999
    torch.testing.assert_close(waves.double(), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(waves[:2].double(), expected[:2], rtol=0, atol=1e-6)
    assert torch.equal(TimestepEmbedder.timestep_embedding(t[1:2].long(), 256), waves[1:2])
    odd = TimestepEmbedder.timestep_embedding(t, 7)
    assert odd.shape == (4, 7) and not odd[:, 6].any() and odd[1, 5] != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_timestep_embedding_is_computed_in_float32(dtype):
    t, seen = torch.tensor([3, 500, 999]), []
    embedder = TimestepEmbedder(16).to(dtype)
    embedder.mlp.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    waves = TimestepEmbedder.timestep_embedding(t, 256)
    embedder(t)
    assert torch.equal(seen[0], waves.to(dtype)) and seen[0].dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(TimestepEmbedder.timestep_embedding(t, 256), waves)


def test_whole_and_fractional_steps():
    model = small_dit()
    x, t, y = inputs()
    out = model(x, t, y)
    assert torch.equal(model(x, t.double(), y), out)
    moved = (model(x, t + 0.5, y) - out).abs().amax(dim=(1, 2, 3))
    assert (moved > 1e-6).all()


def test_only_ids_equal_to_1_drop_a_label():
    embedder = fill_randomly(LabelEmbedder(10, 6, 0.1))
    labels = torch.tensor([3, 4, 5, 6])
    for train in (False, True):
        out = embedder(labels, train, force_drop_ids=torch.tensor([1, 0, 2, -1]))
        assert torch.equal(out, embedder.embedding_table.weight[[10, 4, 5, 6]])


def test_labels_drop_at_the_rate_in_training_and_never_in_evaluation():
    torch.manual_seed(0)
    n, rate = 20_000, 0.3
    embedder, labels = LabelEmbedder(10, 4, rate), torch.arange(n) % 10
    dropped = (embedder(labels, True) == embedder.embedding_table.weight[10]).all(dim=1)
    assert abs(dropped.float().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
    assert torch.equal(embedder(labels, False), embedder.embedding_table(labels))


def test_the_network_drops_labels_in_training_mode_alone():
    model, (x, t, y) = small_dit(class_dropout_prob=1.0), inputs()
    null = torch.full_like(y, model.null_label)
    kept, dropped = model(x, t, y), model(x, t, null)
    assert (kept - dropped).abs().amax(dim=(1, 2, 3)).min() > 1e-6
    assert torch.equal(model.train()(x, t, y), dropped)
    assert torch.equal(model(x, t, y, force_drop_ids=torch.zeros_like(y)), kept)
    mixed = model.eval()(x, t, y, force_drop_ids=torch.tensor([0, 1, 0]))
    torch.testing.assert_close(
        mixed, torch.stack([kept[0], dropped[1], kept[2]]), rtol=0, atol=1e-12
    )


def test_a_network_without_dropout_keeps_its_labels():
    model, (x, t, y) = small_dit(class_dropout_prob=0), inputs()
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, y))
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        model(x, t, y, force_drop_ids=torch.ones_like(y))


# ---- initialisation ----

@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return DiT(**{**SMALL, "hidden_size": 96, "num_classes": 200}).requires_grad_(False)


def assert_xavier(weight, fan_in, fan_out):
    """Uniform within ±√(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.97 * bound < weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_linears_start_xavier_uniform(fresh):
    for block in fresh.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert_xavier(linear.weight, linear.in_features, linear.out_features)


def test_patch_projection_starts_as_a_xavier_linear(fresh):
    assert_xavier(fresh.x_embedder.proj.weight, 4 * 2 * 2, 96)


def test_label_table_and_timestep_linears_start_with_deviation_002(fresh):
    for module in (
        fresh.y_embedder.embedding_table, fresh.t_embedder.mlp[0], fresh.t_embedder.mlp[2],
    ):  # fmt: skip
        weight = module.weight
        assert weight.std() == pytest.approx(0.02, rel=0.05)
        # normal: some beyond three deviations
        assert abs(weight.mean()) < 0.001 and weight.abs().max() > 0.06


def test_biases_adaln_and_the_final_linear_start_at_zero(fresh):
    biases = [p for name, p in fresh.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 1 + 2 + 2 * 5 + 2
    zeros = [fresh.final_layer.linear.weight, fresh.final_layer.adaLN_modulation[1].weight]
    zeros += [block.adaLN_modulation[1].weight for block in fresh.blocks]
    assert not any(p.any() for p in (*biases, *zeros))


def test_at_the_start_blocks_are_the_identity_and_the_output_is_zero(fresh):
    x, t, y = inputs(dtype=torch.float32)
    tokens, c = randn(3, 16, 96, dtype=torch.float32), randn(3, 96, dtype=torch.float32)
    for block in fresh.blocks:
        assert torch.equal(block(tokens, c), tokens)
    out = fresh(x, t, y)
    assert out.shape == (3, 8, 8, 8) and not out.any()


# ---- the whole network ----

def test_samples_do_not_see_one_another():
    model, (x, t, y) = small_dit(), inputs()
    out = model(x, t, y)
    for i in range(len(x)):
        torch.testing.assert_close(
            model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], out[i], rtol=0, atol=1e-12
        )


def test_every_parameter_but_the_table_gets_a_gradient():
    model = small_dit()
    (model(*inputs()) * randn(3, 8, 8, 8, seed=5)).sum().backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert parameter.grad is None
        else:
            # a key's bias cancels in the softmax, the other two thirds of this bias do not
            assert parameter.grad.abs().max() > 1e-8, name


def test_without_learn_sigma_the_output_is_the_noise_alone():
    assert small_dit(learn_sigma=False)(*inputs()).shape == (3, 4, 8, 8)
    assert small_dit()(*inputs()).shape == (3, 8, 8, 8)


def test_a_network_without_classes():
    model, (x, t, y) = small_dit(num_classes=0), inputs()
    assert model.null_label is None and not any(
        name.startswith("y_embedder") for name in model.state_dict()
    )
    out = model(x, t)
    assert out.abs().max() > 1e-6 and torch.equal(out, model.train()(x, t, None))
    with pytest.raises(ValueError, match="num_classes=0"):
        model(x, t, y)
    with pytest.raises(ValueError, match="null label"):
        model.forward_with_cfg(x[:2], t[:2], None, 2.0)


def test_labels_are_required_where_there_are_classes():
    x, t, _ = inputs()
    with pytest.raises(ValueError, match="y is missing"):
        small_dit()(x, t)


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (2, 4, 9, 8), (2, 4, 8, 7), (2, 4, 0, 8), (4, 8, 8), (2, 4, 8, 8, 1)]
)
def test_x_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="x has shape"):
        small_dit()(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("wrong", [
    dict(input_size=9), dict(patch_size=0), dict(input_size=0), dict(hidden_size=36, num_heads=8),
    dict(hidden_size=6, num_heads=2), dict(class_dropout_prob=1.5), dict(class_dropout_prob=-0.1),
    dict(num_classes=-1),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}.* {value}\\b"):
        DiT(**{**SMALL, **wrong})


# ---- guidance ----

@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("channels, guided", [
    ({}, 3), ({"cfg_channels": 1}, 1), ({"cfg_channels": 3}, 3), ({"cfg_channels": "all"}, 4),
    ({"cfg_channels": 99}, 4),
])  # fmt: skip
def test_guidance_formula(channels, guided, learn_sigma):
    model, (x, t, y) = small_dit(learn_sigma=learn_sigma), inputs()
    null = torch.full_like(y, model.null_label)
    with torch.no_grad():
        cond, uncond = model(x, t, y), model(x, t, null)
        second_half = torch.full_like(x, math.nan)  # is not looked at
        out = model.forward_with_cfg(
            torch.cat([x, second_half]), torch.cat([t, t]), torch.cat([y, null]), 2.5, **channels
        )
    noise = uncond[:, :guided] + 2.5 * (cond[:, :guided] - uncond[:, :guided])
    assert out.shape == (6, *cond.shape[1:])
    for half, own in ((out[:3], cond), (out[3:], uncond)):
        torch.testing.assert_close(half[:, :guided], noise, rtol=0, atol=1e-12)
        torch.testing.assert_close(half[:, guided:], own[:, guided:], rtol=0, atol=1e-12)


def test_guidance_needs_a_null_label_and_an_even_batch():
    x, t, y = inputs()
    with pytest.raises(ValueError, match="even"):
        small_dit().forward_with_cfg(x, t, y, 2.0)
    with pytest.raises(ValueError, match="null label"):
        small_dit(class_dropout_prob=0).forward_with_cfg(x[:2], t[:2], y[:2], 2.0)


# ---- ways to build and run it ----

def test_built_without_memory_and_filled_later():
    model = small_dit()
    with torch.device("meta"):
        first, second = DiT(**SMALL).double().eval(), DiT(**SMALL).double().eval()
    assert all(p.is_meta for p in first.parameters())
    first.to_empty(device="cpu").load_state_dict(model.state_dict())
    second.load_state_dict(model.state_dict(), assign=True)
    for again in (first, second):
        assert torch.equal(again(*inputs()), model(*inputs()))
        assert not again.pos_embed.requires_grad


def test_compiles_as_one_graph():
    model, (x, t, y) = small_dit(), inputs(n=2)
    with torch.no_grad():
        forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        guided = torch.compile(model.forward_with_cfg, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(forward(x, t, y), model(x, t, y), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            guided(x, t, y, 2.0), model.forward_with_cfg(x, t, y, 2.0), rtol=0, atol=1e-12
        )
        model.train()
        assert forward(x, t, y).isfinite().all()  # with label dropout


@pytest.mark.long
def test_compiles_with_the_default_backend():
    model, (x, t, y) = small_dit(), inputs(n=2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        # The waves of the timestep are float32 in a float64 network too, and the compiler rounds
        # them its own way.
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y), rtol=0, atol=1e-6)


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in DiT(**SMALL).parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("channels", [0, -1, None, 2.5, "three"])
def test_guided_channels_are_a_number_or_all(channels):
    with pytest.raises(ValueError, match="cfg_channels is .*give a number of channels"):
        small_dit().forward_with_cfg(
            randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 10]), 2.0,
            cfg_channels=channels,
        )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"]
)
@pytest.mark.parametrize("size", [0, -4])
def test_sizes_are_positive(name, size):
    with pytest.raises(ValueError, match=f"{name} is {size}; it must be at least 1"):
        DiT(**{**SMALL, name: size})
