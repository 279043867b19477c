"""Networks of clips against others in float64, outputs and gradients: formulas written out,
models.DiT and its blocks, diffusers' blocks, and torch's Conv3d.
"""

import math

from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import conv3d, linear, silu

from checkpoints.diffusers_format import config_to_diffusers, to_diffusers
from conftest import fill_randomly, randn
from layers.layout import ALONE
from layers.parts import Parts
from layers.text import Text
from models import DiT, DiTBlock, FinalLayer
from variants.space_time import KINDS
from variants.video import TextVideo, VideoDiT

EXACT = dict(rtol=1e-10, atol=1e-10)
SIZES = {
    "square": dict(
        input_size=8, frames=4, patch_size=2, in_channels=3, hidden_size=32, depth=4, num_heads=2
    ),
    "tubes": dict(
        input_size=[3, 5], frames=6, patch_size=1, patch_frames=2, in_channels=2, hidden_size=48,
        depth=3, num_heads=3, mlp_ratio=2.0, learn_sigma=False, qk_norm=True,
    ),
}  # fmt: skip
T_OF_CLIPS = torch.tensor([0.0, 417.5, 999.0])
LABELS = torch.tensor([2, 0, 5])  # the last one is "no class"


def built(size, attention, kind=VideoDiT, **changes):
    """A network in float64, its tables too, with random weights."""
    labels = dict(num_classes=5) if kind is VideoDiT else {}
    network = kind(**SIZES[size] | labels | dict(attention=attention) | changes).double().eval()
    network.fill_tables()
    return fill_randomly(network)


def clips(network, seed=0):
    """Three clips of the trained shape that ask for gradients."""
    return randn(3, *network.latent_shape, seed=seed).requires_grad_()


def times_of_frames(network):
    """Times (3, F), each its own."""
    return 1000 * torch.rand(3, network.frames, generator=torch.Generator().manual_seed(4))


def gradients(out, leaves, network):
    """Of a weighted sum of an output: those of the leaves and of all parameters that learn, zeros
    where one is not used.
    """
    learned = [p for p in network.parameters() if p.requires_grad]
    total = (out * randn(*out.shape, seed=9)).sum()
    return torch.autograd.grad(total, [*leaves, *learned], materialize_grads=True)


def assert_same(mine, theirs, leaves, network):
    """Outputs, and gradients of leaves and of the network's parameters, are equal."""
    assert theirs.abs().max() > 1e-2
    torch.testing.assert_close(mine, theirs, **EXACT)
    both = (gradients(out, leaves, network) for out in (mine, theirs))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


# ---- written out ----


def normed(x, weight=1.0, bias=0.0):
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def frequencies(pairs):
    return torch.tensor([10000.0 ** (-k / pairs) for k in range(pairs)], dtype=torch.float64)


def sines(places, width):
    """Sines and then cosines of places (L,), (L, width)."""
    angles = torch.as_tensor(places).double()[:, None] * frequencies(width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def angles_of(kind, box, head):
    """{axis: by which angles (L, head / 2) pairs of queries and keys are turned}."""
    count, rows, columns = box
    if kind == "alternate":
        return {"time": torch.arange(count)[:, None] * frequencies(head // 2)}
    if kind == "latte":
        return {}
    plane = 3 * head // 16
    of_frame = frequencies(head // 2 - 2 * plane)
    both = [
        torch.cat([s * of_frame, i * frequencies(plane), j * frequencies(plane)])
        for s in range(count) for i in range(rows) for j in range(columns)
    ]  # fmt: skip
    return {"both": torch.stack(both)}


def attended(w, name, rows, heads, angles):
    """Multi-head attention of rows (R, L, D), pairs of queries and keys turned as complex numbers.
    """
    split = linear(rows, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
    q, k, v = split.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (R, heads, L, d)
    if f"{name}.q_norm.weight" in w:
        q, k = (
            normed(part, w[f"{name}.{which}_norm.weight"], w[f"{name}.{which}_norm.bias"])
            for which, part in (("q", q), ("k", k))
        )
    if angles is not None:
        turn = torch.exp(1j * angles)
        q, k = (
            torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
                               * turn).flatten(-2) for part in (q, k)
        )  # fmt: skip
    share = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    mixed = (share @ v).transpose(1, 2).flatten(2)
    return linear(mixed, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"])


def along(axis, tokens, do):
    """Tokens (N, S, T, D) with `do` (R, L, D) → (R, L, D) done to each frame, each place, or all.
    """
    if axis == "space":
        return torch.stack([do(tokens[:, s]) for s in range(tokens.shape[1])], dim=1)
    if axis == "time":
        return torch.stack([do(tokens[:, :, p]) for p in range(tokens.shape[2])], dim=2)
    return do(tokens.reshape(len(tokens), -1, tokens.shape[-1])).reshape(tokens.shape)


def read(w, name, tokens, words, mask, heads):
    """Cross-attention of each clip's tokens (N, S, T, D) to those of its words that are there."""
    found = []
    for row, said, there in zip(tokens.flatten(1, 2), words, mask):
        q = linear(row, w[f"{name}.q.weight"], w[f"{name}.q.bias"]).unflatten(-1, (heads, -1))
        kv = linear(said[there], w[f"{name}.kv.weight"], w[f"{name}.kv.bias"])
        k, v = (half.unflatten(-1, (heads, -1)) for half in kv.chunk(2, dim=-1))
        scores = torch.einsum("thd,lhd->htl", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("htl,lhd->thd", scores.softmax(-1), v).flatten(1)
        found.append(linear(mixed, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"]))
    return torch.stack(found).view_as(tokens)


def embedded(w, config, x):
    """Patches of space and time (N, S, T, D) with their places in the frame, by one Conv3d."""
    p, f, channels = config["patch_size"], config["patch_frames"], config["in_channels"]
    kernel = w["x_embedder.proj.weight"].unflatten(1, (f, channels)).transpose(1, 2)
    found = conv3d(x, kernel, w["x_embedder.proj.bias"], stride=(f, p, p))  # (N, D, S, h, w)
    box, width = found.shape[2:], found.shape[1]
    tokens = found.flatten(3).permute(0, 2, 3, 1)  # (N, S, T, D)
    if config["attention"] != "full":
        by_row = sines([i for i in range(box[1]) for _ in range(box[2])], width // 2)
        by_column = sines([j for _ in range(box[1]) for j in range(box[2])], width // 2)
        tokens = tokens + torch.cat([by_column, by_row], dim=1)
    return tokens, tuple(box)


def condition(w, config, t, of_y):
    """The vectors c (N, S, D) of the frames, from times (N, F)."""
    t = t.double().unflatten(1, (-1, config["patch_frames"])).mean(-1)
    waves = get_timestep_embedding(t.flatten(), 256, True, 0).double()
    hidden = silu(linear(waves, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"]))
    of_t = linear(hidden, w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])
    return of_t.unflatten(0, t.shape) + of_y[:, None]


def modulations(w, name, c, count):
    vectors = linear(silu(c), w[f"{name}.adaLN_modulation.1.weight"],
                     w[f"{name}.adaLN_modulation.1.bias"])  # fmt: skip
    return vectors[:, :, None].chunk(count, dim=-1)  # (N, S, 1, D) each


def written(network, x, t, of_y, words=None, mask=None):
    """The output for clips x, times t (N, F) and vectors of_y (N, D), from formulas alone."""
    w, config = dict(network.named_parameters()), network.config
    heads, axes = config["num_heads"], KINDS[config["attention"]].axes
    tokens, box = embedded(w, config, x)
    c = condition(w, config, t, of_y)
    turns = angles_of(config["attention"], box, tokens.shape[-1] // heads)
    for i in range(config["depth"]):
        name, axis = f"blocks.{i}", axes[i % len(axes)]
        if i == 1 and config["attention"] == "latte" and box[0] > 1:
            tokens = tokens + sines(range(box[0]), tokens.shape[-1])[:, None]
        shift, scale, gate, shift2, scale2, gate2 = modulations(w, name, c, 6)
        tokens = tokens + gate * along(
            axis, normed(tokens) * (1 + scale) + shift,
            lambda rows: attended(w, f"{name}.attn", rows, heads, turns.get(axis)),
        )  # fmt: skip
        if words is not None and axis != "time":
            tokens = tokens + read(w, f"{name}.cross_attn", tokens, words, mask, heads)
        hidden = linear(normed(tokens) * (1 + scale2) + shift2, w[f"{name}.mlp.fc1.weight"],
                        w[f"{name}.mlp.fc1.bias"])  # fmt: skip
        hidden = hidden / 2 * (1 + torch.tanh(
            math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        ))  # fmt: skip
        tokens = tokens + gate2 * linear(
            hidden, w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"]
        )
    shift, scale = modulations(w, "final_layer", c, 2)
    last = linear(normed(tokens) * (1 + scale) + shift, w["final_layer.linear.weight"],
                  w["final_layer.linear.bias"])  # fmt: skip
    p, f = config["patch_size"], config["patch_frames"]
    last = last.reshape(len(x), *box, p, p, f, -1)
    return torch.einsum("nshwabfc->ncsfhawb", last).reshape(
        len(x), -1, box[0] * f, box[1] * p, box[2] * p
    )


@pytest.mark.parametrize("own_times", [False, True], ids=["t of clips", "t of frames"])
@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_network_is_its_formulas(size, attention, own_times):
    network = built(size, attention)
    x = clips(network)
    t = times_of_frames(network) if own_times else T_OF_CLIPS
    of_frames = t if own_times else t[:, None].expand(3, network.frames)
    of_y = network.y_embedder.embedding_table.weight[LABELS]
    assert_same(network(x, t, LABELS), written(network, x, of_frames, of_y), [x], network)


@pytest.mark.parametrize("frames, shape", [(2, (8, 8)), (8, (8, 8)), (6, (4, 12)), (1, (8, 8))])
def test_other_clips_than_trained_go_by_the_same_formulas(frames, shape):
    """Those with a table are trained on the frame's shape: it would be spread over another."""
    for attention in KINDS:
        network = built("square", attention, input_size=shape if attention != "full" else 8)
        x, t = randn(2, 3, frames, *shape), T_OF_CLIPS[:2]
        out = network(x, t, LABELS[:2])
        of_y = network.y_embedder.embedding_table.weight[LABELS[:2]]
        expected = written(network, x, t[:, None].expand(2, frames), of_y)
        torch.testing.assert_close(out, expected, **EXACT)


def captions(network):
    """Three captions of 7 tokens that are partly there, and leaves that ask for gradients."""
    tokens = randn(3, 7, network.text_width, seed=5).requires_grad_()
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    pooled = network.pooled_width and randn(3, network.pooled_width, seed=6).requires_grad_()
    return Text(tokens, mask, pooled), [tokens] + ([pooled] if pooled is not None else [])


@pytest.mark.parametrize("pooled", [None, 10])
@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_network_of_captions_is_its_formulas(size, attention, pooled):
    network = built(size, attention, TextVideo, text_width=12, pooled_width=pooled)
    x, t = clips(network), times_of_frames(network)
    text, leaves = captions(network)
    of_y = torch.zeros(3, network.config["hidden_size"]).double()
    if pooled:
        of_y = network.pooled_embedder(text.pooled)
    expected = written(network, x, t, of_y, network.words_embedder(text.tokens), text.mask)
    assert_same(network(x, t, text), expected, [x, *leaves], network)


# ---- DiT and its blocks ----


def turned_line(count, head):
    """How timm's attention is told to rotate a line of tokens: sines, then cosines."""
    angles = (torch.arange(count)[:, None] * frequencies(head // 2)).repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def by_dit_blocks(network, x, t, y):
    """The output by models.DiT's embedders, blocks and last layer, a frame or a place at a time."""
    config = network.config
    width, heads, ratio = config["hidden_size"], config["num_heads"], config["mlp_ratio"]
    w = dict(network.named_parameters())

    def part(name):
        found = {key.partition(f"{name}.") for key in w if key.startswith(f"{name}.")}
        return {rest: w[first + rest] for _, first, rest in found}

    frames = [network.x_embedder(x[:, :, f]) + network.pos_embed for f in range(x.shape[2])]
    tokens = torch.stack(frames, dim=1)  # (N, F, T, D)
    c = network.t_embedder(t) + network.y_embedder.embedding_table.weight[y]
    turns = config["attention"] == "alternate"
    for i in range(config["depth"]):
        axis = ("space", "time")[i % 2]
        rotates = turns and axis == "time"
        block = DiTBlock(width, heads, ratio, Parts("rope" if rotates else "table", qk_norm=config[
            "qk_norm"])).double()  # fmt: skip
        layout = ALONE.rotated(turned_line(x.shape[2], width // heads) if rotates else None)
        if i == 1 and not turns:
            tokens = tokens + sines(range(x.shape[2]), width)[:, None]
        tokens = along(
            axis, tokens,
            lambda rows: functional_call(block, part(f"blocks.{i}"), (rows, c, layout)),
        )  # fmt: skip
    last = FinalLayer(width, config["patch_size"], network.out_channels).double()
    own = part("final_layer")
    done = [functional_call(last, own, (frame, c)) for frame in tokens.unbind(1)]
    dit = DiT(**{key: config[key] for key in ("input_size", "patch_size", "in_channels")}, depth=1)
    return torch.stack([dit.unpatchify(patches) for patches in done], dim=2)


@pytest.mark.parametrize("attention", ["latte", "alternate"])
@pytest.mark.parametrize("size", SIZES)
def test_taking_turns_is_dits_blocks_frame_by_frame_and_place_by_place(size, attention):
    network = built(size, attention, patch_frames=1)
    x = clips(network)
    out = by_dit_blocks(network, x, T_OF_CLIPS, LABELS)
    assert_same(network(x, T_OF_CLIPS, LABELS), out, [x], network)


def dit_of(network, blocks):
    """models.DiT with the network's weights and those of its blocks that the slice names."""
    config = network.config
    depth = len(range(config["depth"])[blocks])
    left_out = {"_class_name", "frames", "patch_frames", "attention", "depth"}
    arguments = {key: value for key, value in config.items() if key not in left_out}
    dit = DiT(**arguments, depth=depth).double().eval()
    numbers = {str(old): str(new) for new, old in enumerate(range(config["depth"])[blocks])}
    kept = {}
    for name, tensor in network.state_dict().items():
        first, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if first == "blocks" and number in numbers:
            kept[f"blocks.{numbers[number]}.{rest}"] = tensor
        elif first not in ("blocks", "temp_embed"):
            kept[name] = tensor
    dit.load_state_dict(kept)
    return dit


def without_time(network):
    """The network with blocks along the frames that return what they get."""
    for block in network.blocks[1::2]:
        for parameter in block.adaLN_modulation.parameters():
            torch.nn.init.zeros_(parameter)
    return network


@pytest.mark.parametrize("attention, frames", [("latte", 1), ("alternate", 1), ("alternate", 4)])
@pytest.mark.parametrize("size", SIZES)
def test_without_blocks_along_the_frames_each_is_what_dit_makes_of_it(size, attention, frames):
    network = without_time(built(size, attention, patch_frames=1))
    dit = dit_of(network, slice(0, None, 2))
    x = randn(3, network.in_channels, frames, *network.latent_shape[2:])
    out = network(x, T_OF_CLIPS, LABELS)
    expected = [dit(x[:, :, f], T_OF_CLIPS, LABELS) for f in range(frames)]
    torch.testing.assert_close(out, torch.stack(expected, dim=2), rtol=1e-12, atol=1e-12)
    drop = torch.tensor([1, 0, 0])
    dropped = network(x, T_OF_CLIPS, LABELS, drop)
    assert (dropped - out)[0].abs().max() > 1e-6 and torch.equal(dropped[1:], out[1:])


def test_with_blocks_along_the_frames_they_are_not_each_for_itself():
    for attention in KINDS:
        network = built("square", attention)
        x = clips(network)
        seen = torch.autograd.grad(network(x, T_OF_CLIPS, LABELS)[:, :, 0].sum(), x)[0]
        assert (seen.abs().amax(dim=(0, 1, 3, 4)) > 1e-7).all()


# ---- diffusers ----


@pytest.mark.parametrize("width, heads, frames", [(32, 2, 4), (48, 3, 5)])
def test_latte_is_diffusers_blocks_frame_by_frame_and_place_by_place(width, heads, frames):
    sizes = dict(hidden_size=width, num_heads=heads, frames=frames)
    network = built("square", "latte", **sizes)
    x, w = clips(network), dict(network.named_parameters())
    dit = dit_of(network, slice(None))
    theirs = DiTTransformer2DModel.from_config(config_to_diffusers(dit.config)).double().eval()
    tensors = to_diffusers({name: w[name] for name in dit.state_dict()}, dit.config)
    tokens = torch.stack([network.x_embedder(x[:, :, f]) for f in range(frames)], dim=1)
    tokens = tokens + network.pos_embed
    labels = torch.where(LABELS == 5, 1000, LABELS)
    for i, block in enumerate(theirs.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        if i == 1:
            tokens = tokens + sines(range(frames), width)[:, None]
        name = f"transformer_blocks.{i}."
        own = {key[len(name) :]: of for key, of in tensors.items() if key.startswith(name)}
        said = dict(timestep=T_OF_CLIPS, class_labels=labels)
        tokens = along(
            ("space", "time")[i % 2], tokens,
            lambda rows: functional_call(block, own, (rows,), said),
        )  # fmt: skip
    c = network.t_embedder(T_OF_CLIPS) + w["y_embedder.embedding_table.weight"][LABELS]
    vectors = linear(silu(c), tensors["proj_out_1.weight"], tensors["proj_out_1.bias"])
    shift, scale = vectors[:, None, None].chunk(2, dim=-1)
    last = linear(theirs.norm_out(tokens) * (1 + scale) + shift, tensors["proj_out_2.weight"],
                  tensors["proj_out_2.bias"])  # fmt: skip
    last = torch.einsum("nfhwabc->ncfhawb", last.reshape(3, frames, 4, 4, 2, 2, -1))
    out = last.reshape(3, -1, frames, 8, 8)
    assert_same(network(x, T_OF_CLIPS, LABELS), out, [x], network)
