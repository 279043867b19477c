"""Networks that read captions, each of a size that a test can wait for: what both must do, and
MM-DiT with one stream, its flow and its table against formulas written out.
"""

from functools import partial
import math

from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
import numpy as np
import pytest
import torch

from checkpoints.networks import MODELS, sample_condition
from conditions.text import pieces
from conftest import fill_randomly, randn
from layers.text import Text
from processes.table import process_of
from variants.mmdit import MMDiT
from variants.pixart import PixArt

SIZES = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2)
CAPTIONS = ["a thin seven", "", "one leaning left", "a very thick three leaning right"]
KINDS = {
    "mmdit": partial(MMDiT, qk_norm=True), "one stream": partial(MMDiT, streams=1),
    "pixart": PixArt,
}  # fmt: skip
OUTSIDE = {"mmdit": dict(text_width=12, pooled_width=6), "one stream": dict(
    text_width=12, pooled_width=6), "pixart": dict(text_width=12)}  # fmt: skip
EXACT = dict(rtol=1e-12, atol=1e-12)


def built(kind, **changes):
    """A network of KINDS in float64 with random weights."""
    return fill_randomly(KINDS[kind](**SIZES | changes).double(), std=0.2)


def inputs(network, height=8, width=8):
    """x, t and the captions for a network with its own encoder."""
    x = randn(len(CAPTIONS), 3, height, width)
    return x, torch.tensor([0.0, 0.3, 0.9, 1.0]), pieces(CAPTIONS, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_network_returns_0_and_its_blocks_nothing_else_than_they_got(kind):
    network = KINDS[kind](**SIZES)
    x, t, y = inputs(network)
    assert not network(x.float(), t, y).any()
    tokens, words, c = randn(2, 16, 16).float(), randn(2, 5, 16).float(), randn(2, 16).float()
    for block in network.blocks:
        if isinstance(network, PixArt):
            shared = network.shared_modulation(c).unflatten(-1, (6, -1))
            assert torch.equal(block(tokens, words, shared, None), tokens)
        else:
            found = block(tokens, words, c, None)
            assert torch.equal(found[0], tokens) and torch.equal(found[1], words)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_learned(kind):
    """But how the text asks in the last of two streams: its answer would not be seen."""
    network = built(kind)
    network(*inputs(network)).square().sum().backward()
    still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    asks = {"blocks.1.text.q_norm.weight"} if kind == "mmdit" else set()
    assert still == {"pos_embed"} | asks


@pytest.mark.parametrize("own", [True, False], ids=["own", "outside"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, own):
    network = built(kind, **{} if own else OUTSIDE[kind])
    x, t, y = inputs(network)
    if not own:
        y = Text(randn(4, 9, 12), torch.arange(9) < torch.tensor([4, 1, 9, 7])[:, None],
                 randn(4, 6))  # fmt: skip
    longest = int(y.mask.sum(1).max())
    cut = Text(y.tokens[:, :longest], y.mask[:, :longest], y.pooled)
    noise = torch.where(y.mask.unsqueeze(-1), y.tokens, 200 * torch.ones_like(y.tokens))
    whole = network(x, t, y)
    torch.testing.assert_close(network(x, t, cut), whole, **EXACT)
    torch.testing.assert_close(network(x, t, Text(noise, y.mask, y.pooled)), whole, **EXACT)
    for n, length in enumerate(y.mask.sum(1)):
        alone = y[n : n + 1].each(lambda of: of)
        pooled = alone.pooled
        tokens, mask = alone.tokens[:, :length], None if not own else alone.mask[:, :length]
        out = network(x[n : n + 1], t[n : n + 1], Text(tokens, mask, pooled))
        torch.testing.assert_close(out, whole[n : n + 1], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_and_their_order_matter(kind):
    network = built(kind)
    x, t, _ = inputs(network)
    several = ["a thin seven", "thin a seven", "a thick seven", "a thin sevens"]
    out = network(x[:1].expand(4, -1, -1, -1), t[1:2].expand(4), pieces(several, 12))
    for other in out[1:]:
        assert (other - out[0]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_any_grid(kind):
    network = built(kind, input_size=[8, 12])
    for height, width in [(8, 12), (4, 4), (16, 2), (2, 18)]:
        x, t, y = inputs(network, height, width)
        assert network(x, t, y).shape == (4, network.out_channels, height, width)
    for wrong, says in [((4, 3, 7, 8), "do not fill"), ((4, 2, 8, 8), r"takes \(N, 3")]:
        with pytest.raises(ValueError, match=says):
            network(torch.zeros(wrong).double(), t, y)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    network = built(kind).train()
    found = []
    for network.grad_checkpointing in (False, True):
        network.zero_grad()
        out = network(*inputs(network))
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in network.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["mmdit", "pixart"])
def test_one_graph_in_training(kind):
    """torch.compile with fullgraph=True raises where Python has to step in."""
    network = built(kind, depth=1).train()
    compiled = torch.compile(network, fullgraph=True, backend="eager", dynamic=False)
    expected = network(*inputs(network))
    torch.testing.assert_close(compiled(*inputs(network)), expected, **EXACT)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_forward_and_backward(kind):
    network = built(kind, depth=1).train()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for one in (network, compiled):
        network.zero_grad()
        one(*inputs(network)).square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.requires_grad])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_close(kind):
    network = built(kind).float()
    x, t, y = inputs(network)
    expected = network(x.float(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x.float(), t, y)
    out.float().square().sum().backward()
    error = (out.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_variance_has_channels_of_its_own(kind):
    network = built(kind, learn_sigma=True)
    assert network.out_channels == 6 and network(*inputs(network)).shape == (4, 6, 8, 8)
    assert process_of(network).parts == ("loss", "mse", "vb")
    without = built(kind, learn_sigma=False)
    assert without(*inputs(without)).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_between_the_caption_and_the_null_text(kind):
    network = built(kind)
    x, t, y = inputs(network)
    both = Text.join([y[:2], pieces(["", "a seven"], 12)])
    out = network.forward_with_cfg(torch.cat([x[:2]] * 2), t[:2].repeat(2), both, 3.0)
    with_text, without = (network(x[:2], t[:2], of)[:, :3] for of in (y[:2], both[2:]))
    torch.testing.assert_close(out[:2, :3], without + 3 * (with_text - without), **EXACT)


def test_what_is_no_caption_is_refused():
    network, outside = built("mmdit"), built("pixart", **OUTSIDE["pixart"])
    x, t, _ = inputs(network)
    for wrong in (None, torch.zeros(4, dtype=torch.long)):
        with pytest.raises(ValueError, match="pass y=Text"):
            network(x, t, wrong)
    right = pieces(["a", "b", "c", "d"], 12)
    for tokens, mask in (
        (right.tokens.float(), right.mask), (right.tokens[..., :7], right.mask),
        (right.tokens, None), (right.tokens.repeat(1, 3, 1), right.mask.repeat(1, 3)),
        (randn(4, 12), right.mask),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"takes pieces \(N, 32, 8\), torch.int64, with"):
            network(x, t, Text(tokens, mask))
    with pytest.raises(ValueError, match=r"has shape \(4, 5, 11\), the network takes \(N, L, 12"):
        outside(x, t, Text(randn(4, 5, 11)))
    with pytest.raises(ValueError, match="y.pooled is missing"):
        built("mmdit", **OUTSIDE["mmdit"])(x, t, Text(randn(4, 5, 12)))


@pytest.mark.parametrize(("options", "says"), [
    (dict(text_width=8), "text_width is 8 and pooled_width None"),
    (dict(pooled_width=8), "pooled_width is 8 and text_width None"),
    (dict(streams=3), "streams is 3; it must be at most 2"),
    (dict(noise_steps=0), "noise_steps is 0; it must be at least 1"),
    (dict(noise_steps=1.5), "noise_steps is 1.5; it must be a whole number"),
    (dict(text_length=0), "text_length is 0"), (dict(table_side=10**9), "table_side is"),
    (dict(qk_norm=2), "qk_norm is 2"), (dict(hidden_size=18, num_heads=3), "a multiple of num_h"),
])  # fmt: skip
def test_sizes_of_an_mmdit_that_there_are_not(options, says):
    with pytest.raises(ValueError, match=says):
        MMDiT(**SIZES | options)


@pytest.mark.parametrize(("options", "says"), [
    (dict(position_scale=0), "position_scale is 0; it must be above 0"),
    (dict(position_scale="2"), "position_scale is '2'"),
    (dict(extrapolation="ntk"), 'extrapolation is "ntk"'),
    (dict(extrapolation="far"), "extrapolation is 'far'; choose one"),
    (dict(text_width=-1), "text_width is -1"),
])  # fmt: skip
def test_sizes_of_a_pixart_that_there_are_not(options, says):
    with pytest.raises(ValueError, match=says):
        PixArt(**SIZES | options)


@pytest.mark.parametrize(("extrapolation", "rows", "columns"), [
    (None, [0, 1, 2, 3], [i * 4 / 6 for i in range(6)]),
    ("extend", [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]),
])  # fmt: skip
def test_pixarts_positions_are_divided_by_their_scale(extrapolation, rows, columns):
    network = PixArt(**SIZES | dict(position_scale=1.6, extrapolation=extrapolation))
    found = network.placement(torch.float64).of_grid((4, 6), 16)
    frequencies = 10000.0 ** -(np.arange(4) / 4)
    parts = [np.outer(np.array(of) / 1.6, frequencies) for of in (rows, columns)]
    down, across = (np.concatenate([np.sin(of), np.cos(of)], axis=1) for of in parts)
    expected = [np.concatenate([x, y]) for y in down for x in across]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_one_stream_is_the_formula_written_out():
    """DiT's block over the joined sequence, and its final layer over the image alone."""
    network = built("one stream", **OUTSIDE["one stream"])
    x, t, _ = inputs(network)
    y = Text(randn(4, 5, 12), torch.rand(4, 5) > 0.3, randn(4, 6))
    p = {name: value.detach().numpy() for name, value in network.state_dict().items()}

    def linear(name, value):
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def silu(value):
        return value / (1 + np.exp(-value))

    def norm(value):
        centred = value - value.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    waves = network.t_embedder.timestep_embedding(t, 256).double().numpy()
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    c += linear("pooled_embedder.2", silu(linear("pooled_embedder.0", y.pooled.numpy())))
    patches = x.numpy().reshape(4, 3, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5).reshape(4, 16, 12)
    tokens = patches @ p["x_embedder.proj.weight"].reshape(16, 12).T + p["x_embedder.proj.bias"]
    z = np.concatenate([tokens + p["pos_embed"], linear("words_embedder", y.tokens.numpy())], 1)
    seen = np.concatenate([np.ones((4, 16), bool), y.mask.numpy()], 1)
    for i in range(2):
        name = f"blocks.{i}.image"
        vectors = linear(f"{name}.adaLN_modulation.1", silu(c))[:, None]
        shift, scale, gate, shift2, scale2, gate2 = np.split(vectors, 6, -1)
        qkv = linear(f"{name}.qkv", norm(z) * (1 + scale) + shift).reshape(4, 21, 3, 2, 8)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(8)
        scores = np.exp(np.where(seen[:, None, None], scores, -np.inf))
        out = (scores / scores.sum(-1, keepdims=True)) @ v
        z = z + gate * linear(f"{name}.proj", out.transpose(0, 2, 1, 3).reshape(4, 21, 16))
        h = linear(f"{name}.mlp.fc1", norm(z) * (1 + scale2) + shift2)
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        z = z + gate2 * linear(f"{name}.mlp.fc2", h)
    vectors = linear("final_layer.adaLN_modulation.1", silu(c))[:, None]
    shift, scale = np.split(vectors, 2, -1)
    last = linear("final_layer.linear", norm(z[:, :16]) * (1 + scale) + shift)
    last = last.reshape(4, 4, 4, 2, 2, 3).transpose(0, 5, 1, 3, 2, 4).reshape(4, 3, 8, 8)
    np.testing.assert_allclose(network(x, t, y).detach(), last, atol=1e-10)


def test_noise_steps_tell_the_noise_level():
    network, plain = built("mmdit", noise_steps=1000), built("mmdit")
    x, _, y = inputs(network)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = plain(x, torch.tensor([1000.0, 750.0, 500.0, 0.0]), y)
    assert torch.equal(network(x, t, y), expected)
    assert process_of(network, {"name": "flow"}).name == "flow"
    with pytest.raises(ValueError, match="told the noise level of a flow, 1 - t, 1000 times"):
        process_of(network)


def test_published_sizes():
    """The networks that were released: Stable Diffusion 3 medium of 2 billion parameters, PixArt-α
    of 0.6 billion.
    """
    medium = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                  pos_embed_max_size=192)  # fmt: skip
    with torch.device("meta"):
        released = SD3Transformer2DModel(**medium), PixArtTransformer2DModel(
            sample_size=64, caption_channels=4096)  # fmt: skip
        networks = (
            MODELS["MMDiT-24/2"](input_size=128, text_width=4096, pooled_width=2048),
            MODELS["PixArt-XL/2"](input_size=64, text_width=4096),
        )
    counts = [sum(p.numel() for p in network.parameters()) for network in released]
    assert [round(count / 1e9, 1) for count in counts] == [2.0, 0.6]
    assert counts == [
        sum(p.numel() for p in network.parameters() if p.requires_grad) for network in networks
    ]


def test_a_condition_to_count_with_is_taken():
    for name in ("MMDiT-Ti/2", "PixArt-Ti/2"):
        with torch.device("meta"):
            network = MODELS[name](input_size=4, text_width=None)
            shape = (2, *network.latent_shape)
            assert network(torch.zeros(shape), torch.zeros(2), sample_condition(network, 2)).ndim
