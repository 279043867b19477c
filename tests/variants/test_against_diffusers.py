"""variants/mmdit.py and variants/pixart.py against diffusers' networks with random weights: the
same outputs and gradients in float64, on grids of every shape.
"""

from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
import pytest
import torch

from checkpoints import pixart_format, sd3_format
from checkpoints.key_maps import to_ours
from checkpoints.networks import create_network
from conftest import generator, randn
from layers.text import Text

EXACT = dict(rtol=0, atol=1e-10)
SD3 = [
    dict(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=4, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, pos_embed_max_size=6,
    ),
    dict(
        sample_size=6, patch_size=1, num_layers=3, attention_head_dim=4, num_attention_heads=3,
        in_channels=2, out_channels=2, joint_attention_dim=8, caption_projection_dim=12,
        pooled_projection_dim=6, pos_embed_max_size=9,
    ),
]  # fmt: skip
PIXART = [
    dict(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, cross_attention_dim=16, caption_channels=12, interpolation_scale=2,
    ),
    dict(
        sample_size=6, patch_size=1, num_layers=3, attention_head_dim=4, num_attention_heads=3,
        in_channels=2, out_channels=2, cross_attention_dim=12, caption_channels=8,
    ),
]  # fmt: skip
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def filled(network):
    """diffusers' network in float64 with N(0, 0.3²) in every parameter."""
    source = generator(3)
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    return network


def sines(rows, columns, width):
    """The table of these coordinates, written out: (1, rows·columns, width), columns first."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = []
    for y in rows:
        for x in columns:
            angles = [torch.as_tensor(at, dtype=torch.float64) * frequencies for at in (x, y)]
            parts.append(torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)]))
    return torch.stack(parts)[None]


@pytest.fixture
def exact_norms(monkeypatch):
    """diffusers' RMSNorm written out: its own takes the mean in float32, whatever it is given."""

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight

    monkeypatch.setattr(RMSNorm, "forward", forward)


def sd3_pair(options, qk_norm):
    """(diffusers' network, ours with its weights), both in float64, tables too."""
    theirs = filled(SD3Transformer2DModel(**options, qk_norm=qk_norm))
    most, base = options["pos_embed_max_size"], options["sample_size"] // theirs.config.patch_size
    width = options["caption_projection_dim"]
    where = [i * base / most for i in range(most)]
    theirs.pos_embed.pos_embed = sines(where, where, width)
    config = sd3_format.config_from_sd3(dict(theirs.config))
    ours = create_network(config)
    ours.load_state_dict(sd3_format.from_sd3(theirs.state_dict(), config))
    ours.double()
    ours.pos_embed.data = ours.position_table(ours.grid, ours.pos_embed)
    return theirs, ours


def pixart_pair(options, shape):
    """(diffusers' network, ours with its weights), both in float64, tables too: theirs is that of
    latents of this (height, width).
    """
    theirs = filled(PixArtTransformer2DModel(**options, use_additional_conditions=False))
    base = options["sample_size"] // theirs.config.patch_size
    scale = options.get("interpolation_scale", 1)
    grid = [side // theirs.config.patch_size for side in shape]
    where = [[i * base / n / scale for i in range(n)] for n in grid]
    embed = theirs.pos_embed
    embed.height, embed.width = grid
    embed.pos_embed = sines(*where, options["cross_attention_dim"])
    config = pixart_format.config_from_pixart(dict(theirs.config))
    ours = create_network(config)
    ours.load_state_dict(pixart_format.from_pixart(theirs.state_dict(), config))
    ours.double()
    width = config["hidden_size"]
    ours.pos_embed.data = ours.placement(torch.float64).of_grid(ours.grid, width)[None]
    return theirs, ours


def gradients(out, leaves, network):
    """Of a weighted sum of an output: those of the leaves, and {name: that of a parameter}."""
    weights = randn(*out.shape, seed=9)
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((out * weights).sum(), [*leaves, *named.values()])
    return found[: len(leaves)], dict(zip(named, found[len(leaves) :], strict=True))


def assert_same(ours, theirs, links):
    """(output, gradients of leaves, gradients of parameters) of both are the same."""
    assert theirs[0].abs().max() > 0.1
    torch.testing.assert_close(ours[0], theirs[0], **EXACT)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[2], to_ours(theirs[2], links), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("options", SD3, ids=["patches", "pixels"])
@pytest.mark.parametrize("shape", [(1, 1), (1 / 2, 3 / 2)], ids=["trained", "wide"])
def test_mmdit_is_diffusers_sd3(options, qk_norm, shape, exact_norms):
    theirs, ours = sd3_pair(options, qk_norm)
    height, width = (int(options["sample_size"] * share) // 2 * 2 for share in shape)
    x = randn(3, options["in_channels"], height, width).requires_grad_()
    tokens = randn(3, 5, options["joint_attention_dim"], seed=1).requires_grad_()
    pooled = randn(3, options["pooled_projection_dim"], seed=2).requires_grad_()
    t, leaves = torch.tensor([0.0, 0.3, 0.99], dtype=torch.float64), (x, tokens, pooled)
    # Its t is 1,000 times the noise level, and its velocity points to the noise
    out = -theirs(x, tokens, pooled, 1000 * (1 - t)).sample
    mine = ours(x, t, Text(tokens, None, pooled))
    links = sd3_format.links(ours.config)
    assert_same(
        (mine, *gradients(mine, leaves, ours)), (out, *gradients(out, leaves, theirs)), links
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("options", PIXART, ids=["scaled", "pixels"])
@pytest.mark.parametrize("shape", [(1, 1), (1 / 2, 2)], ids=["trained", "wide"])
def test_pixart_is_diffusers_pixart(options, mask, shape):
    height, width = (int(options["sample_size"] * share) // 2 * 2 for share in shape)
    theirs, ours = pixart_pair(options, (height, width))
    x = randn(3, options["in_channels"], height, width).requires_grad_()
    tokens = randn(3, 5, options["caption_channels"], seed=1).requires_grad_()
    t, leaves = torch.tensor([0, 300, 999]), (x, tokens)
    known = {"resolution": None, "aspect_ratio": None}
    there = None if mask is None else mask.double()
    out = theirs(x, tokens, t, known, encoder_attention_mask=there).sample
    mine = ours(x, t, Text(tokens, mask))
    links = pixart_format.links(ours.config)
    assert_same(
        (mine, *gradients(mine, leaves, ours)), (out, *gradients(out, leaves, theirs)), links
    )


def test_their_own_tables_are_ours_up_to_float32():
    """As they come, where the tests above have float64 in their place."""
    sd3, options = SD3Transformer2DModel(**SD3[0]).eval(), PIXART[0]
    pixart = PixArtTransformer2DModel(**options, use_additional_conditions=False).eval()
    for theirs, ours, shape in [(sd3, sd3_pair(SD3[0], None)[1], (4, 12)),
                                (pixart, pixart_pair(options, (4, 12))[1], (6, 10))]:  # fmt: skip
        with torch.no_grad():
            x = torch.zeros(1, 4, *shape)
            table = theirs.pos_embed(x) - theirs.pos_embed.proj(x).flatten(2).transpose(1, 2)
            grid = ours.grid_seen(x)
            if theirs is sd3:
                expected = ours.position_table(grid, ours.pos_embed)
            else:
                expected = ours.placement(torch.float64).of_grid(grid, 16)[None]
        assert table.abs().max() > 0.5
        torch.testing.assert_close(table.double(), expected, rtol=0, atol=2e-6)


def test_their_own_norms_are_ours_up_to_float32():
    theirs, ours = sd3_pair(SD3[0], "rms_norm")
    norm = theirs.transformer_blocks[0].attn.norm_q
    x = randn(5, 8)
    assert (norm(x) - x).abs().max() > 0.1
    mine = ours.blocks[0].image.q_norm(x)
    torch.testing.assert_close(mine, norm(x), rtol=1e-6, atol=0)


def test_their_waves_of_t_are_ours():
    """Bit for bit: with 128 frequencies both divide by a power of two."""
    theirs = SD3Transformer2DModel(**SD3[0]).time_text_embed.time_proj
    t = torch.tensor([0.0, 1.5, 333.25, 1000.0])
    ours = create_network(sd3_format.config_from_sd3(SD3[0])).t_embedder
    assert torch.equal(theirs(t), ours.timestep_embedding(t, 256))
