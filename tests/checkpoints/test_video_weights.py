"""Weights of networks of clips: begun with a DiT's, of other sizes, and Latte's by names alone."""

import pytest
import torch

from checkpoints import publish
from checkpoints.choice import NetworkChoice
from checkpoints.fitting import adapt, check_design, without_sigma
from checkpoints.loading import build_network, load_pretrained
from checkpoints.networks import MODELS
from checkpoints.outline import class_of, learns_sigma
from checkpoints.weights import Weights, load_weights
from conftest import SMALL, fill_randomly, randn, small_dit
import hubconf
from layers.clips import frames_of
from variants.video import TextVideo, VideoDiT

F, CLASSES = 3, 10


def small_video(**changes):
    """A fresh network of clips with SMALL's DiT for its frames."""
    return VideoDiT(**{**SMALL, "frames": F, "depth": 2 * SMALL["depth"], **changes})


def weights_of(network, config=True):
    """As a file of ours has them, or one without configuration."""
    return Weights(network.state_dict(), dict(network.config) if config else None, None)


# ---- a DiT's ----


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_network_of_clips_begins_as_the_dit_on_every_frame(config, learn_sigma):
    dit, frames = small_dit(qk_norm=True), 5
    video = small_video(qk_norm=True, learn_sigma=learn_sigma).double()
    found = adapt(weights_of(dit, config), video, "keep", "a")
    video.load_state_dict(found)
    x, t = randn(4, 4, frames, 8, 8), torch.tensor([3.0, 999.0, 0.0, 41.0])
    y = torch.randint(0, CLASSES + 1, (4,), generator=torch.Generator().manual_seed(1))
    out = frames_of(video.eval()(x, t, y))  # (N·F, C_out, H, W)
    wanted = dit(frames_of(x), t.repeat_interleave(frames), y.repeat_interleave(frames))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(out, wanted[:, : out.shape[1]], rtol=1e-10, atol=1e-12)


def test_blocks_along_the_frames_are_the_networks_own():
    dit, video = small_dit(), small_video()
    found = adapt(weights_of(dit), video, "keep", "a")
    for name, value in video.state_dict().items():
        if name.startswith(("blocks.1.", "blocks.3.")):
            assert torch.equal(found[name], value)
    for name, value in dit.state_dict().items():
        if name.startswith("blocks.1."):
            assert torch.equal(found[name.replace("blocks.1.", "blocks.2.")], value)


def test_a_dit_of_another_size_of_images_and_of_other_classes():
    dit, video = small_dit(), small_video(input_size=[4, 8], num_classes=3)
    found = adapt(weights_of(dit), video, {0: 7}, "a")
    assert torch.equal(found["pos_embed"], video.pos_embed)
    table, theirs = found["y_embedder.embedding_table.weight"], dit.state_dict()
    theirs = theirs["y_embedder.embedding_table.weight"].to(table.dtype)
    assert torch.equal(table[[0, 3]], theirs[[7, CLASSES]])


LATTE = 'of networks of clips it can begin those alone that have attention alternate and labels'
REFUSED = [
    (small_video(attention="latte"), small_dit(), LATTE),
    (small_video(attention="full"), small_dit(), LATTE),
    (TextVideo(**{k: v for k, v in SMALL.items() if k != "num_classes"}), small_dit(), LATTE),
    (small_video(), small_dit(depth=4), "a is a DiT with depth 4, and .* with 2; no `model` of"),
    (small_video(), small_dit(patch_size=4), "DiT with patch_size 4, and .* from one with 2"),
    (small_video(), small_dit(num_heads=2), "DiT with num_heads 2, and .* from one with 4"),
    (small_video(), small_dit(qk_norm=True), "with qk_norm True, and .*; pass `qk_norm=True`"),
    (small_video(), small_dit(mlp="swiglu"), "with mlp swiglu, .*; no `model` of clips has that"),
    (small_video(), small_dit(positions="rope"), "with positions rope, and .* with table"),
    (small_video(), small_dit(block="in_context"), "with block in_context, and .* adaln_zero"),
    (small_video(frames=4, patch_frames=2), small_dit(), "a is a DiT, whose patches have one fra"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "dit", "message"), REFUSED)
def test_a_dit_that_begins_no_such_network_is_refused(network, dit, message):
    with pytest.raises(ValueError, match=message) as refused:
        adapt(weights_of(dit), network, "keep", "a")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("attention", ["alternate", "full"])
def test_weights_of_clips_without_configuration_begin_none(attention):
    """Nothing in them tells them from a DiT's."""
    video = small_video(attention=attention)
    with pytest.raises(ValueError, match="if it is of a network of clips, give a file of ours wi"):
        adapt(weights_of(video, config=False), video, "keep", "a")
    adapt(weights_of(video), video, "keep", "a")


def test_the_model_that_a_dit_begins_is_named():
    with torch.device("meta"):
        dit, other = (
            MODELS[name](input_size=8, num_classes=CLASSES)
            for name in ("DiT-S/2", "VideoDiT-B/2")
        )
    with pytest.raises(ValueError, match='hidden_size 384, .*; pass `model="VideoDiT-S/2"`'):
        adapt(weights_of(dit), other, "keep", "a")


def test_weights_of_another_class_are_refused():
    video, dit = small_video(), small_dit()
    for here, there, kind in [(dit, video, "VideoDiT"), (video, TextVideo(
        **{k: v for k, v in SMALL.items() if k != "num_classes"}), "TextVideo")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"a has the weights of a {kind}, the network here"):
            adapt(weights_of(there), here, "keep", "a")
    with pytest.raises(ValueError, match="whose name begins with Latte or SpaceTime or VideoDiT"):
        adapt(weights_of(video), dit, "keep", "a")
    with pytest.raises(ValueError, match="a has attention latte, the network here alternate; give"):
        check_design(video, {}, "a", small_video(attention="latte").config)


# ---- its own ----


@pytest.mark.parametrize("attention", ["alternate", "latte", "full"])
def test_weights_of_other_sizes_go_on(attention):
    old = fill_randomly(small_video(attention=attention))
    new = small_video(attention=attention, frames=8, input_size=16, num_classes=4)
    found = adapt(weights_of(old), new, "drop", "a")
    new.load_state_dict(found)
    kept = {"pos_embed", "temp_embed", "y_embedder.embedding_table.weight"}
    assert all(torch.equal(old.state_dict()[n], v) for n, v in found.items() if n not in kept)


def test_outputs_for_a_variance_are_dropped_of_patches_of_several_frames():
    old = fill_randomly(small_video(attention="full", patch_frames=2, frames=4)).double().eval()
    new = small_video(attention="full", patch_frames=2, frames=4, learn_sigma=False).double()
    assert learns_sigma(old.state_dict(), 2, 4, 2) and not learns_sigma(new.state_dict(), 2, 4, 2)
    new.load_state_dict(adapt(weights_of(old), new, "keep", "a"))
    x, t, y = randn(2, 4, 4, 8, 8), torch.tensor([3.0, 7.0]), torch.tensor([1, 2])
    wanted = old(x, t, y)[:, :4]
    torch.testing.assert_close(new.eval()(x, t, y), wanted, rtol=1e-12, atol=1e-12)
    assert without_sigma(new.state_dict(), 2, 4, 2).keys() == new.state_dict().keys()


# ---- Latte's, by names and shapes ----


def small_latte(**changes):
    """A Latte-Ti/2 of random weights, for evaluation."""
    sizes = {"input_size": 8, "frames": F, "num_classes": CLASSES, **changes}
    return fill_randomly(MODELS["Latte-Ti/2"](**sizes)).eval()


def as_file(network, path, kind):
    """A file with the network's tensors and no configuration."""
    tensors = network.state_dict()
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    other = {name: value + 1 for name, value in wrapped.items()}
    both = {"ema": wrapped, "model": other}
    torch.save({"bare": tensors, "wrapped": wrapped, "both": both}[kind], path)
    return path


@pytest.mark.parametrize("kind", ["bare", "wrapped", "both"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_classes": 0}, {"learn_sigma": False, "frames": 5, "input_size": [4, 8]}]
)
def test_a_latte_is_loaded_without_configuration(tmp_path, vae, kind, changes):
    latte = small_latte(**changes)
    path = as_file(latte, tmp_path / "latte.pt", kind)
    found = build_network(NetworkChoice(ckpt=path), load_weights(path), vae)
    assert found.config == latte.config
    height, width = (8, 8) if latte.input_size == 8 else latte.input_size
    x, t = randn(2, 4, 7, height, width).float(), torch.tensor([3.0, 700.0])
    y = torch.tensor([1, CLASSES]) if latte.num_classes else None
    assert torch.equal(found(x, t, y), latte(x, t, y))


def test_a_latte_of_no_known_size_or_another_model_is_refused(tmp_path, vae):
    path = as_file(small_latte(), tmp_path / "latte.pt", "bare")
    weights = load_weights(path)
    for model, message in {
        "DiT-S/2": "`model` is DiT-S/2, but .* is of a Latte; leave the argument out, or give one",
        "VideoDiT-S/2": "is of a Latte", "Latte-Ti/4": "is of another configuration",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build_network(NetworkChoice(ckpt=path, model=model), weights, vae)
    with pytest.raises(ValueError, match="is of another configuration: y_embedder"):
        build_network(NetworkChoice(ckpt=path, num_classes=4), weights, vae)
    fewer = {k: v for k, v in weights.tensors.items() if not k.startswith("blocks.5.")}
    with pytest.raises(ValueError, match="is of a Latte with 5 blocks and x_embedder.proj.weight"):
        build_network(NetworkChoice(ckpt=path), weights._replace(tensors=fewer), vae)


def test_other_networks_of_clips_are_refused_without_configuration(tmp_path, vae):
    twice = fill_randomly(MODELS["VideoDiT-Ti/2"](input_size=8, frames=F, num_classes=CLASSES))
    weights = weights_of(twice, config=False)
    assert class_of(weights.tensors) == "DiT"
    for model, message in {
        "DiT-Ti/2": "a has 12 blocks, twice as many as `model` DiT-Ti/2: it may be of a VideoDiT",
        "VideoDiT-Ti/2": "a is of a DiT, or of clips without its configuration; leave the argument",
    }.items():
        with pytest.raises(ValueError, match=message):
            choice = NetworkChoice(ckpt="a", model=model, num_classes=CLASSES)
            build_network(choice, weights, vae)
    assert build_network(NetworkChoice(ckpt="a"), weights_of(twice), vae).config == twice.config


# ---- for others ----


@pytest.mark.parametrize("attention", ["alternate", "latte", "full"])
def test_our_own_formats_take_networks_of_clips(tmp_path, vae, attention):
    network = fill_randomly(small_video(attention=attention)).eval()
    file = tmp_path / "video.pt"
    torch.save({"ema": network.state_dict(), "config": network.config}, file)
    choice = NetworkChoice(ckpt=file, vae=vae)
    publish.export_checkpoint(choice, tmp_path / "hub")
    publish.export_checkpoint(choice, tmp_path / "video.safetensors", "safetensors")
    x, t, y = randn(1, 4, 5, 8, 8).float(), torch.tensor([3.0]), torch.tensor([1])
    for place in (tmp_path / "hub", tmp_path / "video.safetensors"):
        found, _ = load_pretrained(place)
        assert found.config == network.config
        torch.testing.assert_close(found(x, t, y), network(x, t, y))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "clips of 10 classes" in card and "after Latte" in card and "| frames | 3 |" in card
    with pytest.raises(ValueError, match="a VideoDiT goes into no pipeline of diffusers'; write a"):
        publish.export_checkpoint(choice, tmp_path / "pipeline", "diffusers")
    assert not (tmp_path / "pipeline").exists()


def test_a_card_says_what_a_network_with_captions_makes():
    network = TextVideo(**{k: v for k, v in SMALL.items() if k != "num_classes"})
    assert publish.made_by(network) == ("text-to-video", "clips of captions")
    assert publish.made_by(small_video(num_classes=0)) == ("other", "clips")


def test_the_hub_makes_networks_of_clips():
    network = hubconf.network("Latte-Ti/2", input_size=8, frames=4, num_classes=3)
    assert network.config["attention"] == "latte" and network.latent_shape == (4, 4, 8, 8)
