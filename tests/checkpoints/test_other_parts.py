"""Checkpoints of networks with other parts than the paper's: LightningDiT's, and our own."""

from argparse import Namespace
from functools import partial
import re

import pytest
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.diffusers_format import config_to_diffusers
from checkpoints.files import save_checkpoint
from checkpoints.fitting import adapt, check_design
from checkpoints.lightning_format import LEARNED
from checkpoints.loading import build_network, load_pretrained, network_of, process_learned
from checkpoints.outline import design_of, parts_of
from checkpoints.publish import save_pretrained
from checkpoints.weights import Weights, load_weights, save_weights
from conftest import SMALL, fill_randomly, randn
from layers.parts import DEFAULTS
from models import BLOCKS, DiT, DiT_models
from processes.flow import FlowProcess
from sampling import load_sampler
import written_out

ALL = dict(positions="table+rope", norm="rms", mlp="swiglu", qk_norm=True)
D, HEADS, T = 48, 3, 16


def lightning(qk_norm=False, absolute=True, channels=3, out=3):
    """A state dict by LightningDiT's list of names: 4 x 4 patches of side 1, two blocks."""
    width, hidden = D, 4 * D * 2 // 3
    linears = {"x_embedder.proj": (D, channels), "t_embedder.mlp.0": (D, 256)}
    linears |= {"t_embedder.mlp.2": (D, D), "final_layer.linear": (out, D)}
    linears |= {"final_layer.adaLN_modulation.1": (2 * D, D)}
    shapes = {"y_embedder.embedding_table.weight": (5, D), "final_layer.norm_final.weight": (D,)}
    for i in range(2):
        linears |= {
            f"blocks.{i}.{name}": shape for name, shape in {
                "attn.qkv": (3 * width, width), "attn.proj": (width, width),
                "mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden),
                "adaLN_modulation.1": (6 * width, width),
            }.items()
        }  # fmt: skip
        shapes |= {f"blocks.{i}.norm{n}.weight": (D,) for n in (1, 2)}
        if qk_norm:
            shapes |= {f"blocks.{i}.attn.{q}_norm.weight": (D // HEADS,) for q in "qk"}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    tensors = {
        name: randn(*shape, seed=i, dtype=torch.float32) * 0.2
        for i, (name, shape) in enumerate(sorted(shapes.items()))
    }
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].view(D, channels, 1, 1)
    head = D // HEADS
    exponents = -torch.arange(0, head // 2, 2).double() / (head // 2)
    angles = [
        torch.outer(place, 10000**exponents).repeat_interleave(2, dim=1)
        for place in written_out.coordinates_of(4, 4).unbind(1)
    ]
    angles = torch.cat(angles, dim=1).float()  # (T, width of a head)
    tensors |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    if absolute:
        tensors["pos_embed"] = DiT(4, 1, channels, D, 1, HEADS).pos_embed.data
    return tensors


@pytest.mark.parametrize("qk_norm, absolute, out", [(False, True, 3), (True, False, 6)])
def test_a_state_dict_of_lightningdit_is_the_network_written_out(tmp_path, qk_norm, absolute, out):
    tensors = lightning(qk_norm, absolute, out=out)
    torch.save({"ema": {f"module.{name}": value for name, value in tensors.items()}},
               tmp_path / "a.pt")  # fmt: skip
    network, classes = load_pretrained(tmp_path / "a.pt")
    assert classes is None and network.config == dict(
        input_size=4, patch_size=1, in_channels=3, hidden_size=D, depth=2, num_heads=HEADS,
        mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=4, learn_sigma=out == 6,
        block="adaln_zero", positions="table+rope" if absolute else "rope", norm="rms",
        mlp="swiglu", **{"qk_norm": True} if qk_norm else {},
    )  # fmt: skip
    x, t, y = randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 4])
    weights = {name: tensor for name, tensor in tensors.items() if "feat_rope" not in name}
    expected = written_out.network(weights, HEADS, x, t, y, absolute)
    with torch.no_grad():
        found = network.double()(x, t, y)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_it_is_sampled_as_the_flow_that_it_learned(tmp_path):
    torch.save(lightning(), tmp_path / "a.pt")
    sampler = load_sampler(tmp_path / "a.pt", vae="none", sampler="euler", steps=2, device="cpu")
    assert sampler.process.config == LEARNED
    assert LEARNED == FlowProcess(path="linear", prediction="velocity").config
    assert sampler.images([0, 3], seed=1).shape == (2, 4, 4, 3)


def test_written_again_it_is_ours_and_says_its_flow(tmp_path):
    torch.save(lightning(), tmp_path / "a.pt")
    network, _ = load_pretrained(tmp_path / "a.pt")
    save_pretrained(network, tmp_path / "hub")
    again, _ = load_pretrained(tmp_path / "hub")
    assert again.config == network.config and again.process == LEARNED
    pairs = zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("said", [
    {"args": Namespace(model="LightningDiT-XL/1", path_type="Linear", prediction="velocity")},
    {"config": {"model": {"model_type": "LightningDiT-XL/1"},
                "transport": {"path_type": "Linear", "prediction": "velocity"}}},
])  # fmt: skip
def test_its_own_words_for_its_flow_are_understood(tmp_path, said):
    torch.save({"ema": lightning(), **said}, tmp_path / "a.pt")
    assert load_weights(tmp_path / "a.pt").process == LEARNED


@pytest.mark.parametrize("said", [{"path_type": "VP"}, {"prediction": "noise_v"}])
def test_another_process_than_its_own_is_refused(tmp_path, said):
    torch.save({"ema": lightning(), "args": said}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt is of another process"):
        load_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("change, message", [
    ({"feat_rope.freqs_cos": torch.ones(T, 16)}, "feat_rope.freqs_cos is not of the rotation by"),
    ({"feat_rope.freqs_sin": torch.ones(15, 16)}, r"feat_rope.freqs_sin is \(15, 16\); wanted is"),
    ({"feat_rope.freqs_sin": torch.ones(T, 20)}, r"is \(16, 20\); wanted .* 48 is a multiple"),
    ({"feat_rope.freqs_sin": None}, "feat_rope.freqs_sin and feat_rope.freqs_cos go together"),
    ({"blocks.0.adaLN_modulation.1.weight": torch.ones(4 * D, D)}, "is not of six vectors"),
    ({"x_embedder.proj.weight": None}, "lack.*proj"),
    ({"blocks.1.mlp.w3.weight": None}, "another configuration: blocks.1.mlp.fc2.weight is missing"),
])  # fmt: skip
def test_a_network_that_ours_cannot_be(tmp_path, change, message):
    tensors = {k: v for k, v in (lightning() | change).items() if v is not None}
    torch.save({"ema": {"x_embedder.proj.bias": tensors["x_embedder.proj.bias"], **tensors}},
               tmp_path / "a.pt")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "a.pt")


def test_without_a_rotation_nothing_tells_the_heads(tmp_path):
    tensors = {name: v for name, v in lightning().items() if "feat_rope" not in name}
    torch.save(tensors, tmp_path / "a.pt")
    weights = load_weights(tmp_path / "a.pt")
    assert weights.config is None and weights.process == LEARNED
    assert not any("w12" in name for name in weights.tensors)


# ---- our own ----

def ours(block="adaln_zero", **parts):
    sizes = SMALL | dict(hidden_size=D, num_heads=HEADS)
    return fill_randomly(DiT(**sizes, block=block, **parts)).eval()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("parts", [{}, ALL, dict(positions="rope", norm="rms"),
                                   dict(mlp="swiglu", qk_norm=True)])  # fmt: skip
def test_the_tensors_say_design_and_parts(block, parts):
    tensors = ours(block, **parts).state_dict()
    asked = DEFAULTS | parts
    if asked["positions"] == "table+rope":  # of which no tensor tells
        asked["positions"] = "table"
    found = parts_of(tensors)
    assert design_of(tensors) == block and found == {name: asked[name] for name in found}


def test_bare_weights_need_no_more_than_a_model(tmp_path, monkeypatch):
    small = partial(DiT, **SMALL | dict(hidden_size=D, num_heads=HEADS))
    monkeypatch.setitem(DiT_models, "DiT-Ti/2", small)
    network = fill_randomly(small(in_channels=3, **ALL | {"positions": "rope"}))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    choice = NetworkChoice(tmp_path / "a.pt", model="DiT-Ti/2", image_size=8, num_classes=10)
    found = build_network(choice, load_weights(tmp_path / "a.pt"), "none")
    assert found.config == network.config
    assert process_learned(choice, load_weights(tmp_path / "a.pt"), found).word == "diffusion"


def test_configurations_keep_parts_and_rectangles(tmp_path):
    network = ours(**ALL, extrapolation="ntk")
    wide = DiT(**network.config | {"input_size": [4, 12]})
    save_weights(tmp_path / "a.safetensors", Weights(wide.state_dict(), wide.config, None))
    save_pretrained(wide, tmp_path / "hub")
    save_checkpoint(tmp_path / "a.pt", {"ema": wide.state_dict(), "config": wide.config})
    for name in ("a.safetensors", "hub", "a.pt"):
        found, _ = load_pretrained(tmp_path / name)
        assert found.config == wide.config and found.extrapolation == "ntk"
        assert found.latent_shape == (4, 4, 12)


@pytest.mark.parametrize("size, message", [
    ([4, 4, 4], "a height and a width"), ([4, "4"], "input_size is '4'"), ([4, 5], "a multiple of"),
    ([2**13, 2**13], r"input_size is \[8192, 8192\], far beyond"), ([], "a height and a width"),
])  # fmt: skip
def test_rectangles_that_a_file_cannot_mean(size, message):
    network = ours()
    with pytest.raises(ValueError, match=f"x.pt: .*{message}|in its configuration .*{message}"):
        network_of(
            Weights(network.state_dict(), network.config | {"input_size": size}, None), "x.pt"
        )


@pytest.mark.parametrize("theirs, mine, message", [
    ({}, dict(positions="rope"), 'table, the network here rope; pass `positions="table"`'),
    (dict(positions="table+rope"), {}, 'pass `positions="table+rope"`'),
    (dict(norm="rms"), {}, 'norm rms, the network here layer; pass `norm="rms"`'),
    ({}, dict(mlp="swiglu"), 'mlp gelu, the network here swiglu; pass `mlp="gelu"`'),
    (dict(qk_norm=True), {}, "qk_norm True, the network here False; pass `qk_norm=True`"),
])  # fmt: skip
def test_weights_of_other_parts_start_no_network(theirs, mine, message):
    network, mine = ours(**theirs), ours(**mine)
    weights = Weights(network.state_dict(), network.config, None)
    for call in (
        lambda: adapt(weights, mine, "keep", "`init_from` a.pt"),
        lambda: check_design(mine, weights.tensors, "`resume` a.pt", weights.config),
    ):
        with pytest.raises(ValueError, match=f"a.pt has .*{re.escape(message)}"):
            call()


@pytest.mark.parametrize("parts", [ALL, ALL | {"positions": "rope"}])
def test_weights_start_a_network_of_another_size_with_the_same_parts(parts):
    network = ours(**parts)
    other = DiT(**network.config | {"input_size": [4, 12]})
    for config in (network.config, None):
        tensors = adapt(Weights(network.state_dict(), config, None), other, "keep", "a.pt")
        assert torch.equal(tensors["blocks.0.mlp.fc1.weight"], network.blocks[0].mlp.fc1.weight)
        if other.positions.has_table:
            assert torch.equal(tensors["pos_embed"], other.pos_embed)


@pytest.mark.parametrize("change, reason", [
    (dict(positions="rope"), "its positions is rope"), (dict(norm="rms"), "its norm is rms"),
    (dict(mlp="swiglu"), "its mlp is swiglu"), (dict(qk_norm=True), "its qk_norm is True"),
    (dict(input_size=[4, 12]), r"its latents are \[4, 12\]"),
    (dict(extrapolation="crop"), "its extrapolation is crop"),
])  # fmt: skip
def test_diffusers_cannot_have_such_a_network(change, reason):
    config = DiT(**SMALL | dict(hidden_size=D, num_heads=HEADS) | change).config
    with pytest.raises(ValueError, match=f"diffusers' DiT cannot be this network: {reason}; wante"):
        config_to_diffusers(config)
