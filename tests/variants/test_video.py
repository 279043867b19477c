"""Networks of clips, each of a size that a test can wait for: what all of them must do. What they
compute is compared in test_video_oracles.py.
"""

import copy
import math
import pickle

import pytest
import torch
from torch.nn.functional import conv3d

from checkpoints.networks import MODELS, create_network, makes_clips, sample_condition
from conditions.given import Given
from conditions.text import pieces
from conftest import fill_randomly, randn
from layers.text import Text
from models import DiT, get_2d_sincos_pos_embed
from sampling.loading import extrapolate
from training import cost
from variants.mmdit import MMDiT
from variants.space_time import KINDS
from variants.video import SIZES as PUBLISHED, TextVideo, Video_models, VideoDiT

SIZES = dict(
    input_size=8, frames=4, patch_size=2, in_channels=3, hidden_size=32, depth=4, num_heads=2
)
LABELLED = SIZES | dict(num_classes=5)
CLASSES = {"labels": VideoDiT, "captions": TextVideo}
CAPTIONS = ["a three going left", "", "a seven that goes up"]
NAMES_OF_TI = [name for name in Video_models if "-Ti/" in name]
EXACT = dict(rtol=1e-12, atol=1e-12)


def built(kind="labels", **changes):
    """A network of CLASSES in float64 with random weights."""
    sizes = LABELLED if kind == "labels" else SIZES
    return fill_randomly(CLASSES[kind](**sizes | changes).double().eval())


def inputs(network, frames=4, height=8, width=8):
    """x, t and conditions of three clips."""
    x = randn(3, network.in_channels, frames, height, width)
    y = torch.tensor([2, 0, 5]) if isinstance(network, VideoDiT) else pieces(CAPTIONS, 20)
    return x, torch.tensor([0.0, 410.0, 999.0]), y


both = pytest.mark.parametrize("kind", CLASSES)
all_kinds = pytest.mark.parametrize("attention", KINDS)


# ---- parameters ----


@both
@all_kinds
def test_a_fresh_network_returns_0_and_its_blocks_what_they_got(kind, attention):
    network = CLASSES[kind](**SIZES, attention=attention)
    x, t, y = inputs(network)
    assert not network(x.float(), t, y).any()
    tokens, c, words = (randn(*shape).float() for shape in ((2, 4, 16, 32), (2, 4, 32), (2, 5, 32)))
    for block in network.blocks:
        assert torch.equal(block(tokens, c, None, words, None), tokens)


@both
@all_kinds
def test_every_parameter_is_learned(kind, attention):
    network = built(kind, attention=attention)
    network(*inputs(network)).square().sum().backward()
    still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    tables = {"latte": {"pos_embed", "temp_embed"}, "alternate": {"pos_embed"}, "full": set()}
    assert still == tables[attention]


def test_names_of_weights_are_dits():
    sizes = {name: value for name, value in LABELLED.items() if name != "frames"}
    dit = {name: tensor.shape for name, tensor in DiT(**sizes).state_dict().items()}
    for attention, more, fewer in (
        ("latte", {"temp_embed": (1, 4, 32)}, ()), ("alternate", {}, ()),
        ("full", {}, ("pos_embed",)),
    ):  # fmt: skip
        network = VideoDiT(**LABELLED, attention=attention)
        expected = {name: shape for name, shape in (dit | more).items() if name not in fewer}
        assert {name: tensor.shape for name, tensor in network.state_dict().items()} == expected


@pytest.mark.parametrize("size, millions", [("S", 32.48), ("XL", 673.68)])
def test_published_sizes(size, millions):
    """Of Latte (Ma et al. 2024, table 1), which counts what learns of networks without labels."""
    with torch.device("meta"):
        network = MODELS[f"Latte-{size}/2"](num_classes=0)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert math.floor(count / 1e4) / 100 == millions


def test_tables_are_dits_and_sines_of_the_frames():
    network = VideoDiT(**LABELLED | dict(input_size=[4, 12], frames=6, attention="latte"))
    grid = torch.from_numpy(get_2d_sincos_pos_embed(32, (2, 6))).float()
    torch.testing.assert_close(network.pos_embed[0], grid, rtol=0, atol=1e-6)
    for f in range(6):
        angles = [f * 10000 ** (-k / 16) for k in range(16)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(network.temp_embed[0, f], torch.tensor(expected), rtol=0,
                                   atol=1e-6)  # fmt: skip
    assert not network.pos_embed.requires_grad and not network.temp_embed.requires_grad


# ---- patches of several frames ----


@pytest.mark.parametrize("patch, frames", [(2, 2), (1, 3), (4, 4)])
def test_patches_are_those_of_a_convolution_over_space_and_time(patch, frames):
    network = built(patch_size=patch, patch_frames=frames, frames=12, attention="full")
    x = randn(2, 3, 12, 8, 12)
    kernel = network.x_embedder.proj.weight.view(32, frames, 3, patch, patch).transpose(1, 2)
    expected = conv3d(x, kernel, network.x_embedder.proj.bias, stride=(frames, patch, patch))
    tokens = network.tokens(x)
    assert tokens.shape == (2, 12 // frames, 96 // patch**2, 32)
    torch.testing.assert_close(tokens, expected.flatten(3).permute(0, 2, 3, 1), **EXACT)


@pytest.mark.parametrize("patch, frames", [(2, 1), (2, 2), (1, 3), (4, 4)])
def test_clips_come_back_from_patches(patch, frames):
    """An embedding that copies each patch, undone: by what embeds, not by what is tested."""
    numbers = 3 * patch**2 * frames
    network = built(patch_size=patch, patch_frames=frames, frames=12, hidden_size=4 * numbers,
                    num_heads=1, attention="full", learn_sigma=False)  # fmt: skip
    proj, x = network.x_embedder.proj, randn(2, 3, 12, 8, 12)
    with torch.no_grad():
        proj.weight.zero_(), proj.bias.zero_()
        proj.weight.view(4 * numbers, -1)[:numbers] = torch.eye(numbers)
    found = network.tokens(x)[..., :numbers]  # channels, and then places, of each frame in it
    patches = found.unflatten(-1, (frames, 3, patch, patch)).permute(0, 1, 2, 5, 6, 3, 4).flatten(3)
    assert torch.equal(network.clips(patches, network.box_seen(x)), x)


# ---- times ----


@both
@all_kinds
@pytest.mark.parametrize("patch_frames", [1, 2])
def test_times_of_frames_that_are_all_one_are_the_clips_time(kind, attention, patch_frames):
    network = built(kind, attention=attention, patch_frames=patch_frames)
    x, t, y = inputs(network)
    out = network(x, t, y)
    assert out.abs().max() > 1e-2
    torch.testing.assert_close(network(x, t[:, None].expand(3, 4), y), out, **EXACT)


@all_kinds
def test_a_frames_own_time_modulates_its_own_tokens(attention):
    """Without attention and MLP tokens do not meet; the last layer has each frame's time."""
    network = built(attention=attention)
    for block in network.blocks:
        for parameter in block.adaLN_modulation.parameters():
            torch.nn.init.zeros_(parameter)
    x, _, y = inputs(network)
    t = torch.tensor([[0.0, 100.0, 500.0, 999.0]]).expand(3, 4)
    out = network(x, t, y)
    alone = [network(x, t[:, f], y)[:, :, f] for f in range(4)]
    torch.testing.assert_close(out, torch.stack(alone, dim=2), **EXACT)
    assert (alone[0] - network(x, t[:, 3], y)[:, :, 0]).abs().max() > 1e-4


@all_kinds
def test_given_frames_reach_the_others(attention):
    network = built(attention=attention)
    x, t, y = inputs(network)
    mask = torch.tensor([1, 0, 0, 0]).bool().expand(3, 4)
    given = [Given(randn(3, 3, 4, 8, 8, seed=seed), mask, 0.0) for seed in (1, 2)]
    first, second = (one.asked(network)(x, t, y) for one in given)
    assert not first[:, :, 0].any() and (first - second)[:, :, 1:].abs().max() > 1e-4


def test_a_patch_of_two_frames_has_the_mean_of_their_times():
    network = built(patch_frames=2, attention="full")
    x, _, y = inputs(network)
    t, mean = torch.tensor([[0.0, 100.0, 500.0, 900.0]]), torch.tensor([[50.0, 50.0, 700.0, 700.0]])
    out, expected = (network(x, of.expand(3, 4), y) for of in (t, mean))
    torch.testing.assert_close(out, expected, **EXACT)


# ---- other clips than trained ----


@both
@all_kinds
def test_any_frames_and_grid(kind, attention):
    network = built(kind, attention=attention, input_size=[8, 12])
    assert network.latent_shape == (3, 4, 8, 12) and makes_clips(network)
    for frames, height, width in [(4, 8, 12), (1, 4, 4), (7, 16, 2), (9, 2, 18)]:
        x, t, y = inputs(network, frames, height, width)
        assert network(x, t, y).shape == (3, 6, frames, height, width)


def test_a_longer_clip_has_sines_of_later_frames():
    network = built(attention="latte")
    network.fill_tables()
    longer = VideoDiT(**LABELLED | dict(frames=9, attention="latte")).double()
    longer.fill_tables()
    for count in (1, 3, 4, 9):
        table = network.placed_frames(count)
        assert table.shape == (count, 1, 32)
        torch.testing.assert_close(table[:, 0], longer.temp_embed[0, :count], **EXACT)


def test_another_grid_has_its_table_spread_over_it():
    for attention in ("latte", "alternate"):
        network = built(attention=attention)
        network.fill_tables()
        x = torch.zeros(1, 3, 2, 8, 16).double()
        found = network.tokens(x) - network.x_embedder.proj.bias
        rows = torch.arange(4).double().repeat_interleave(8)
        columns = (torch.arange(8).double() / 2).repeat(4)
        waves = [10000 ** (-k / 8) for k in range(8)]
        angles = [of[:, None] * torch.tensor(waves, dtype=torch.float64) for of in (columns, rows)]
        expected = torch.cat([f(of) for of in angles for f in (torch.sin, torch.cos)], dim=1)
        torch.testing.assert_close(found, expected.expand(1, 2, 32, 32), **EXACT)


def test_where_rotations_tell_places_there_is_nothing_to_choose():
    full, alternate = built(attention="full"), built(attention="alternate")
    with pytest.raises(ValueError, match="by a rule of its own; leave the argument out"):
        extrapolate(full, "interpolate")
    x, t, y = inputs(alternate, 4, 8, 16)
    out = alternate(x, t, y)
    extrapolate(alternate, "extend")
    assert (alternate(x, t, y) - out).abs().max() > 1e-5


def test_frames_in_another_order_make_another_clip():
    """But blocks over space alone, which turn it about as a whole."""
    order = torch.tensor([2, 0, 3, 1])
    for attention in KINDS:
        network = built(attention=attention)
        x, t, y = inputs(network)
        moved = network(x[:, :, order], t, y) - network(x, t, y)[:, :, order]
        assert moved.abs().max() > 1e-6


# ---- captions ----


@all_kinds
@pytest.mark.parametrize("reads", [{}, dict(text_width=12), dict(text_width=12, pooled_width=6)],
                         ids=["own", "outside", "outside and vectors"])  # fmt: skip
def test_padding_of_captions_changes_nothing(attention, reads):
    network = built("captions", attention=attention, **reads)
    x, t, y = inputs(network)
    if reads:
        pooled = randn(3, 6) if network.pooled_width else None
        y = Text(randn(3, 9, 12), torch.arange(9) < torch.tensor([4, 1, 8])[:, None], pooled)
    longest = int(y.mask.sum(1).max())
    cut = Text(y.tokens[:, :longest], y.mask[:, :longest], y.pooled)
    noise = torch.where(y.mask.unsqueeze(-1), y.tokens, 200 * torch.ones_like(y.tokens))
    whole = network(x, t, y)
    torch.testing.assert_close(network(x, t, cut), whole, **EXACT)
    torch.testing.assert_close(network(x, t, Text(noise, y.mask, y.pooled)), whole, **EXACT)
    other = Text(y.tokens.roll(1, 0), y.mask.roll(1, 0), y.pooled)
    assert (network(x, t, other) - whole).abs().max() > 1e-5


@all_kinds
def test_gradients_reach_the_text(attention):
    network = built("captions", attention=attention, text_width=12, pooled_width=6)
    x, t, _ = inputs(network)
    tokens, pooled = randn(3, 9, 12).requires_grad_(), randn(3, 6).requires_grad_()
    mask = torch.arange(9) < torch.tensor([4, 1, 8])[:, None]
    network(x, t, Text(tokens, mask, pooled)).square().sum().backward()
    assert torch.equal(tokens.grad.abs().sum(-1) > 0, mask)
    assert (pooled.grad.abs().sum(-1) > 0).all()


def test_blocks_along_the_frames_read_nothing():
    for attention, reads in (("latte", [1, 0, 1, 0]), ("alternate", [1, 0, 1, 0]),
                             ("full", [1, 1, 1, 1])):  # fmt: skip
        network = TextVideo(**SIZES, attention=attention)
        assert [block.cross_attn is not None for block in network.blocks] == reads


def test_what_is_no_caption_is_refused():
    own = built("captions")
    outside = built("captions", text_width=12, pooled_width=6)
    x, t, y = inputs(own)
    for wrong in (None, torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="pass y=Text"):
            own(x, t, wrong)
    with pytest.raises(ValueError, match=r"has shape \(3, 5, 11\), the network takes \(N, L, 12"):
        outside(x, t, Text(randn(3, 5, 11)))
    with pytest.raises(ValueError, match="y.pooled is missing"):
        outside(x, t, Text(randn(3, 5, 12)))


# ---- running them ----


@both
@all_kinds
def test_gradient_checkpointing_changes_nothing(kind, attention):
    network = built(kind, attention=attention, class_dropout_prob=0.0).train()
    x, t, y = inputs(network)
    y = torch.tensor([2, 0, 1]) if kind == "labels" else y  # there is no null label
    found = []
    for network.grad_checkpointing in (False, True):
        network.zero_grad()
        out = network(x, t, y)
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in network.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@all_kinds
def test_gradient_checkpointing_keeps_less(attention):
    config = built(attention=attention, depth=6).config
    few, many = (cost.kept(config, False, less)[1] for less in (True, False))
    assert few < many / 2


@both
@all_kinds
def test_bf16_is_close(kind, attention):
    network = built(kind, attention=attention).float()
    x, t, y = inputs(network)
    expected = network(x.float(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x.float(), t[:, None].expand(3, 4), y)
    out.float().square().sum().backward()
    error = (out.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05
    half = network.bfloat16()(x.bfloat16(), t, y).float()
    assert (half - expected).norm() / expected.norm() < 0.1


@both
@all_kinds
def test_one_graph_in_training(kind, attention):
    """torch.compile with fullgraph=True raises where Python has to step in."""
    network = built(kind, attention=attention, depth=2).train()
    x, t, y = inputs(network)
    own = t[:, None].expand(3, 4)
    drop = (torch.tensor([0, 1, 0]),) if kind == "labels" else ()
    compiled = torch.compile(network, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x, own, y, *drop), network(x, own, y, *drop), **EXACT)


@both
def test_clips_of_a_batch_do_not_meet(kind):
    for attention in KINDS:
        network = built(kind, attention=attention)
        x, t, y = inputs(network)
        out = network(x, t, y)
        for n in range(3):
            alone = network(x[n : n + 1], t[n : n + 1], y[n : n + 1])
            torch.testing.assert_close(alone, out[n : n + 1], **EXACT)


@both
def test_guidance_is_between_the_condition_and_none(kind):
    network = built(kind)
    x, t, y = inputs(network)
    x, t = x[:2], t[:2]
    if kind == "labels":
        assert network.null_label == 5
        null, doubled = torch.tensor([5, 5]), torch.tensor([2, 0, 5, 5])
    else:
        null = pieces(["", "nothing"], 20)
        doubled = Text.join([y[:2], null])
    out = network.forward_with_cfg(x.repeat(2, 1, 1, 1, 1), t.repeat(2), doubled, 3.0)
    said, unsaid = (network(x, t, of) for of in (y[:2], null))
    expected = unsaid[:, :3] + 3 * (said - unsaid)[:, :3]
    torch.testing.assert_close(out[:2, :3], expected, **EXACT)
    torch.testing.assert_close(out[:, 3:], torch.cat([said, unsaid])[:, 3:], **EXACT)


def test_labels_are_dropped_as_dits_are():
    network = built().train()
    x, t, y = inputs(network)
    null = torch.full((3,), 5)
    dropped = network(x, t, torch.tensor([2, 0, 1]), torch.ones(3))
    assert torch.equal(dropped, network(x, t, null, torch.zeros(3)))
    torch.manual_seed(0)
    always = built(class_dropout_prob=1.0).train()
    assert torch.equal(always(x, t, torch.tensor([2, 0, 1])), always(x, t, null))
    unlabelled = built(num_classes=0)
    assert unlabelled.null_label is None and unlabelled(x, t).shape == (3, 6, 4, 8, 8)
    with pytest.raises(ValueError, match="guidance needs a null label"):
        unlabelled.forward_with_cfg(x[:2], t[:2], y[:2], 2.0)


@both
@all_kinds
def test_a_network_is_built_again_from_its_configuration(kind, attention):
    changes = dict(attention=attention, patch_frames=2, qk_norm=True, input_size=[4, 8],
                   learn_sigma=False, mlp_ratio=2.0)  # fmt: skip
    network = built(kind, **changes)
    again = create_network(network.config).double().eval()
    assert type(again) is type(network) and again.config == network.config
    again.load_state_dict(network.state_dict())
    x, t, y = inputs(network, 4, 4, 8)
    for other in (again, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x, t, y), network(x, t, y))


@pytest.mark.parametrize("name", NAMES_OF_TI)
def test_every_model_makes_clips_of_the_shape_it_is_given(name):
    with torch.device("meta"):
        network = MODELS[name](input_size=8, frames=4)
        x = torch.zeros(2, *network.latent_shape)
        out = network(x, torch.zeros(2), sample_condition(network, 2))
    assert out.is_meta and out.shape == (2, 8, 4, 8, 8)


@pytest.mark.parametrize("name", [name for name in NAMES_OF_TI if "/2" in name])
def test_what_a_model_costs_is_counted_without_contents(name):
    with torch.device("meta"):
        network = MODELS[name](input_size=8, frames=4)
    found = cost.count(network.config)
    assert found.parameters == sum(p.numel() for p in network.parameters())
    half = cost.training_flops(network.config, (2, 8, 8))
    assert 0 < half < found.training_flops == cost.training_flops(network.config, (4, 8, 8))


def test_operations_are_what_arithmetic_says():
    """In a block a token takes 12·D² multiply-adds in Linears, and 2·L·D to attend to the L tokens
    of its row.
    """
    d, depth, frames, places = 128, 6, 8, 16
    sizes = dict(input_size=8, frames=frames, num_classes=0)
    rows = {"Latte-Ti/2": (places, frames), "SpaceTime-Ti/2": (frames * places,) * 2}
    for name, (first, second) in rows.items():
        with torch.device("meta"):
            config = MODELS[name](**sizes).config
        tokens = frames * places
        attended = depth // 2 * tokens * 2 * d * (first + second)
        blocks = depth * (tokens * 12 * d**2 + 6 * d**2) + attended
        ends = tokens * d * (16 + 32) + 2 * d**2 + 256 * d + d**2
        assert cost.training_flops(config) == 6 * (blocks + ends)


def test_every_size_has_its_models():
    designs = {"Latte": "latte", "SpaceTime": "full"}
    for size, sizes in PUBLISHED.items():
        for name in ("Latte", "VideoDiT", "SpaceTime", "TextVideo"):
            row = Video_models[f"{name}-{size}/2"]
            depth = sizes["depth"] * (2 if name == "VideoDiT" else 1)
            own = {"attention": designs[name]} if name in designs else {}  # else the default
            assert row.func is (TextVideo if name == "TextVideo" else VideoDiT)
            assert row.keywords == sizes | dict(depth=depth, patch_size=2) | own
        tubes = Video_models[f"SpaceTime-{size}/2x2"].keywords
        assert tubes == Video_models[f"SpaceTime-{size}/2"].keywords | dict(patch_frames=2)
    assert VideoDiT(**LABELLED).config["attention"] == "alternate"


def test_images_networks_make_no_clips():
    assert makes_clips(VideoDiT) and makes_clips(TextVideo)
    assert not makes_clips(DiT) and not makes_clips(MMDiT)


# ---- what there is not ----


@both
@pytest.mark.parametrize("changes, says", [
    (dict(frames=0), "frames is 0; it must be at least 1"),
    (dict(frames=2.0), "frames is 2.0; it must be a whole number"),
    (dict(frames=True), "frames is True; it must be a whole number"),
    (dict(frames=None), "frames is None; it must be a whole number"),
    (dict(frames=2**14 + 1), "frames is 16385; it must be at most 16384"),
    (dict(patch_frames=0), "patch_frames is 0; it must be at least 1"),
    (dict(frames=5, patch_frames=2),
     "frames 5 is not a multiple of patch_frames 2; choose one that is"),
    (dict(attention="all"), "attention is 'all'; choose one of latte, alternate, full"),
    (dict(attention=None), "attention is None; choose one of latte, alternate, full"),
    (dict(attention=["full"]), "choose one of latte, alternate, full"),
    (dict(num_heads=8), "hidden_size 32 gives each of num_heads 8 4 numbers; rotations over frames "
     "need a multiple of 4, at least 8"),
    (dict(attention="full", num_heads=16), "gives each of num_heads 16 2 numbers"),
    (dict(num_heads=3), r"hidden_size 32 must be a multiple of num_heads \(3\)"),
    (dict(input_size=7), "input_size 7 is not a multiple of patch_size 2"),
    (dict(qk_norm=3), "qk_norm is 3; it is true or false"),
])  # fmt: skip
def test_sizes_that_there_are_not(kind, changes, says):
    with pytest.raises(ValueError, match=says) as refused:
        built(kind, **changes)
    assert "\n" not in str(refused.value)


def test_small_heads_are_enough_without_rotations():
    assert VideoDiT(**LABELLED | dict(num_heads=8, attention="latte"))


@both
@pytest.mark.parametrize("shape, says", [
    ((3, 3, 8, 8), r"takes \(N, 3, frames, height, width\)"),
    ((3, 4, 4, 8, 8), r"takes \(N, 3, frames, height, width\)"),
    ((3, 3, 3, 8, 8), "of 3 frames; the network takes a multiple of 2"),
    ((3, 3, 0, 8, 8), "of 0 frames; the network takes a multiple of 2"),
    ((3, 3, 4, 7, 8), "patches of 2 do not fill; the network takes multiples of 2"),
    ((3, 3, 4, 8, 0), "patches of 2 do not fill; the network takes multiples of 2"),
])  # fmt: skip
def test_clips_that_do_not_fit_are_refused(kind, shape, says):
    network = built(kind, patch_frames=2)
    _, t, y = inputs(network)
    with pytest.raises(ValueError, match=says) as refused:
        network(torch.zeros(shape).double(), t, y)
    assert str(refused.value).startswith(f"x has shape {shape}")


@both
@pytest.mark.parametrize("patch_frames", [1, 2])
@pytest.mark.parametrize("shape", [(3, 3), (3, 1), (3, 8), (3, 4, 1), ()])
def test_times_that_do_not_fit_are_refused(kind, patch_frames, shape):
    network = built(kind, patch_frames=patch_frames)
    x, _, y = inputs(network)
    with pytest.raises(ValueError, match=r"takes \(N,\), or \(N, 4\): a time of each frame"):
        network(x, torch.zeros(shape), y)


def test_labels_missing_or_needless_are_refused():
    x, t, y = inputs(built())
    with pytest.raises(ValueError, match=r"num_classes=5 but y is missing; pass y=labels of shape"):
        built()(x, t)
    with pytest.raises(ValueError, match="num_classes=0 but y is given; pass y=None"):
        built(num_classes=0)(x, t, y)
