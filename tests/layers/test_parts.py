"""Norms, MLPs and whole networks of other parts than the paper's, against torch and formulas."""

import pytest
import torch
from torch import nn

from conftest import SMALL, fill_randomly, randn, small_dit
from layers.parts import DEFAULTS, NAMES, Parts
from models import DiT
from test_models import inputs
import written_out

ALL = dict(positions="rope", norm="rms", mlp="swiglu", qk_norm=True)
SIZE = dict(hidden_size=48, num_heads=3)
OPTIONS = {
    "rope": dict(positions="rope"), "both": dict(positions="table+rope"), "rms": dict(norm="rms"),
    "swiglu": dict(mlp="swiglu"), "qk": dict(qk_norm=True), "all": ALL,
}  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def test_the_default_configuration_has_the_keys_that_it_had():
    assert list(DiT(**SMALL).config) == [
        "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
        "mlp_ratio", "class_dropout_prob", "num_classes", "learn_sigma", "block",
    ]  # fmt: skip
    config = DiT(**SMALL, **ALL, extrapolation="ntk").config
    assert {name: config[name] for name in DEFAULTS} == ALL | {"extrapolation": "ntk"}
    assert DiT(**config).config == config


def test_norms():
    x = randn(2, 5, 12) * 3 + 1
    layer, rms = (fill_randomly(Parts(norm=n).make_norm(12)).double() for n in ("layer", "rms"))
    torch.testing.assert_close(
        layer(x), nn.functional.layer_norm(x, (12,), layer.weight, layer.bias, 1e-6)
    )
    torch.testing.assert_close(rms(x), written_out.rms(x, rms.weight), rtol=0, atol=1e-12)
    # adaLN scales what a LayerNorm returns; an RMSNorm has weights all the same
    assert not list(Parts().make_norm(12, own_weights=False).parameters())
    assert [*dict(Parts(norm="rms").make_norm(12, False).named_parameters())] == ["weight"]


@pytest.mark.parametrize("width, hidden, third", [(12, 48, 32), (8, 32, 21), (1152, 4608, 3072)])
def test_swiglu_is_its_formula_and_two_thirds_as_wide(width, hidden, third):
    with torch.device("meta"):
        sizes = {name: tuple(p.shape) for name, p in Parts(mlp="swiglu").make_mlp(
            width, hidden).named_parameters()}  # fmt: skip
    assert sizes == {
        "fc1.weight": (2 * third, width), "fc1.bias": (2 * third,),
        "fc2.weight": (width, third), "fc2.bias": (width,),
    }  # fmt: skip
    if width > 100:
        return
    mlp, x = fill_randomly(Parts(mlp="swiglu").make_mlp(width, hidden)).double(), randn(2, 5, width)
    weights = {f"m.{name}": p for name, p in mlp.state_dict().items()}
    weights = {name.replace("fc1", "w12").replace("fc2", "w3"): p for name, p in weights.items()}
    torch.testing.assert_close(mlp(x), written_out.swiglu(weights, "m", x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", ["table", "rope"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_queries_and_keys_are_normalised_in_each_head(positions, norm):
    attention = fill_randomly(Parts(positions, norm, qk_norm=True).make_attention(32, 2)).double()
    seen = {}
    for name in ("q_norm", "k_norm"):
        part = getattr(attention, name)
        part.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
        assert part.weight.shape == (16,)
    x = randn(2, 6, 32)
    attention(x)
    q, k, _ = attention.qkv(x).view(2, 6, 3, 2, 16).permute(2, 0, 3, 1, 4)
    for name, value in {"q_norm": q, "k_norm": k}.items():
        given, out = seen[name]
        part = getattr(attention, name)
        torch.testing.assert_close(given, value)
        expected = written_out.rms(value, part.weight) if norm == "rms" else (
            nn.functional.layer_norm(value, (16,), part.weight, part.bias, 1e-6)
        )  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions, input_size, qk_norm", [
    ("rope", 8, True), ("rope", [4, 12], False), ("table+rope", [12, 8], True),
])  # fmt: skip
def test_a_whole_network_is_one_written_out(positions, input_size, qk_norm):
    options = ALL | {"positions": positions, "qk_norm": qk_norm}
    model = DiT(**SMALL | SIZE | dict(input_size=input_size), **options)
    model = fill_randomly(model, std=0.2).double().eval()
    _, t, y = inputs()
    x = randn(len(t), *model.latent_shape)
    has_table = "pos_embed" in model.state_dict()
    assert has_table == (positions != "rope")
    tensors = written_out.lightning_names(model.state_dict())
    expected = written_out.network(tensors, 3, x, t, y, absolute=has_table)
    with torch.no_grad():
        out = model(x, t, y)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@every_option
def test_a_fresh_network_returns_zero_and_every_parameter_learns(options):
    model, (x, t, y) = DiT(**SMALL | SIZE, **options).eval(), inputs()
    assert not model(x.float(), t, y).any()
    filled = fill_randomly(model).double()
    filled(x, t, y).square().mean().backward()
    without = [name for name, p in filled.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["pos_embed"] * filled.positions.has_table


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16_by_autocast_and_in_the_weights(options, dtype):
    """Under autocast the tokens stay float32, on the trained grid and others; weights that are
    bf16 keep all in it.
    """
    model, (x, t, y) = fill_randomly(DiT(**SMALL | SIZE, **options), std=0.2).eval(), inputs()
    x = torch.cat([x, x], dim=3).float()  # 8 x 16
    for given in (x[..., :8], x):
        with torch.no_grad():
            exact = model.float()(given, t, y)
            autocast = dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model.to(dtype)(given.to(dtype), t, y)
                tokens = model.tokens(given.to(dtype))[0]
        assert tokens.dtype == dtype
        assert (out - exact).abs().max() < 0.05 * exact.abs().max() and out.isfinite().all()


@pytest.mark.parametrize("wrong, message", [
    (dict(positions="alibi"), "positions is 'alibi'; choose one of table, rope, table.rope"),
    (dict(norm=None), "norm is None; choose one of layer, rms"),
    (dict(mlp="relu"), "mlp is 'relu'; choose one of gelu, swiglu"),
    (dict(qk_norm="yes"), "qk_norm is 'yes'; it is true or false"),
    (dict(extrapolation="ntk"), 'extrapolation is "ntk", which slows rotations down'),
    (dict(extrapolation="yarn"), "extrapolation is 'yarn'; choose one of interpolate"),
    (dict(positions="rope", hidden_size=36, num_heads=6), "each of num_heads 6 6 numbers; .*of 4"),
    (dict(input_size=[8, 9]), r"input_size \[8, 9\] is not a multiple of patch_size 2"),
    (dict(input_size=[8, 8, 8]), r"input_size is \[8, 8, 8\]; .*a height and a width"),
    (dict(input_size=[8]), r"input_size is \[8\]"),
    (dict(input_size=[8, "8"]), "input_size is '8'; it must be a whole number"),
])  # fmt: skip
def test_arguments_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | wrong)


def test_every_name_of_a_part_is_a_row():
    assert {name: list(rows) for name, rows in NAMES.items()} == {
        "positions": ["table", "rope", "table+rope"], "norm": ["layer", "rms"],
        "mlp": ["gelu", "swiglu"], "extrapolation": ["interpolate", "extend", "crop", "ntk"],
    }  # fmt: skip


def compiled(options, **how):
    model = small_dit(**SIZE, **options).float()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return model, torch.compile(model, fullgraph=True, **how)


@pytest.mark.parametrize("name", ["both", "all"])
def test_compiles_as_one_graph(name):
    model, fast = compiled(OPTIONS[name], backend="aot_eager")
    x, t, y = (part.float() if part.is_floating_point() else part for part in inputs())
    with torch.no_grad():
        torch.testing.assert_close(fast(x, t, y), model(x, t, y))


@pytest.mark.long
@every_option
@pytest.mark.parametrize("grids", ["fixed", "dynamic"])
def test_compiles_with_the_default_backend_one_graph_for_all_grids(options, grids):
    """With a table, grids that share a side with the trained one may need another."""
    model, fast = compiled(options, dynamic=False if grids == "fixed" else None)
    _, t, y = inputs()
    count = torch._dynamo.utils.counters["stats"]
    for height, width in [(8, 8)] if grids == "fixed" else [(12, 16), (20, 12), (4, 24)]:
        x = randn(len(t), 4, height, width, dtype=torch.float32)
        if grids == "dynamic":
            torch._dynamo.mark_dynamic(x, 2)
            torch._dynamo.mark_dynamic(x, 3)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-5)
    assert count["unique_graphs"] == 1
