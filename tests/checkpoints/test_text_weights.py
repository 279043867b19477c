"""Files of networks that read captions: our own, and diffusers' SD3 and PixArt both ways."""

import json
import shutil

import diffusers
from diffusers import (
    DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PixArtAlphaPipeline,
    PixArtTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline,
)  # fmt: skip
import pytest
import safetensors.torch
import torch

from checkpoints import pixart_format, publish, sd3_format
from checkpoints.choice import NetworkChoice
from checkpoints.diffusers_format import OWN, OWN_TEXT
from checkpoints.files import save_checkpoint
from checkpoints.fitting import adapt, check_design
from checkpoints.loading import build_network, import_diffusers, load_pretrained, process_learned
from checkpoints.names import HUB_FILES
from checkpoints.networks import MODELS
from checkpoints.outline import class_of
from checkpoints.weights import Weights, load_weights, save_weights
from conditions.text import pieces
from conftest import SMALL, fill_randomly, generator, randn
import export
from layers.text import Text
from models import DiT
from processes.flow import FlowProcess
from processes.table import process_of
from training.state import Recipe, new_state
from vae import load_vae
from variants.mmdit import MMDiT
from variants.pixart import PixArt

SIZES = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2)
OUTSIDE = dict(text_width=12, pooled_width=10, text_length=5)
KINDS = {
    "own": (MMDiT, dict(SIZES, qk_norm=True)),
    "one stream": (MMDiT, dict(SIZES, streams=1, input_size=[4, 8])),
    "sd3": (MMDiT, dict(SIZES, **OUTSIDE, table_side=6, noise_steps=1000)),
    "normed": (MMDiT, dict(SIZES, **OUTSIDE, noise_steps=1000, qk_norm=True)),
    "own pixart": (PixArt, dict(SIZES, extrapolation="extend", learn_sigma=False)),
    "pixart": (PixArt, dict(SIZES, text_width=12, text_length=5, position_scale=2.0)),
}
TO_DIFFUSERS = ["sd3", "normed", "pixart"]
ENCODERS = [{"name": "clip", "width": 4, "folder": None}, {"name": "t5", "share": 0.5}]
SD3 = dict(
    sample_size=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
    out_channels=4, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
    pos_embed_max_size=6,
)  # fmt: skip
PIXART = dict(
    sample_size=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
    out_channels=8, cross_attention_dim=16, caption_channels=12,
)  # fmt: skip


def network(kind):
    """A network of KINDS with random weights that only samples."""
    build, options = KINDS[kind]
    made = fill_randomly(build(**options), std=0.2).eval().requires_grad_(False)
    made.text = None if made.text_encoder else ENCODERS
    return made


def inputs(of):
    """x, t and captions that a network takes."""
    x, t = randn(3, 4, 4, 6).float(), torch.tensor([0.0, 0.25, 0.75])
    if of.text_encoder is not None:
        return x, t, pieces(["a thin seven", "", "three"], 5)
    return x, t, Text(randn(3, 5, 12).float(), None, randn(3, 10).float())


def filled(theirs):
    """diffusers' network with N(0, 0.2²) in every parameter."""
    source = generator(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    return theirs.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory, vae):
    """(a pipeline's folder as diffusers writes it, its transformer), with a shift of 3."""
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    transformer = filled(SD3Transformer2DModel(**SD3, qk_norm="rms_norm"))
    parts = [None] * 6
    StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), load_vae(vae).autoencoder, *parts
    ).save_pretrained(folder)
    return folder, transformer


@pytest.fixture(scope="module")
def pixart(tmp_path_factory, vae):
    """The same of PixArt."""
    folder = tmp_path_factory.mktemp("pixart") / "pipeline"
    transformer = filled(PixArtTransformer2DModel(**PIXART))
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
    )
    PixArtAlphaPipeline(
        None, None, load_vae(vae).autoencoder, transformer, scheduler
    ).save_pretrained(folder)
    return folder, transformer


def theirs_at(transformer, x, t, y):
    """What diffusers' network of a flow, or of PixArt, says, as ours would."""
    if isinstance(transformer, SD3Transformer2DModel):
        return -transformer(x, y.tokens, y.pooled, 1000 * (1 - t)).sample
    known = {"resolution": None, "aspect_ratio": None}
    return transformer(x, y.tokens, t, known).sample


# ---- our own files ----


def test_a_card_names_the_paper_and_the_encoders():
    sizes = dict(SIZES, **OUTSIDE)
    says = [{"name": "openai/clip"}, {"name": "/home/me/t5"}]
    card = publish.model_card(MMDiT(**sizes, text=says))
    assert "Esser et al. 2024" in card and "| text encoders | openai/clip, t5 |" in card
    card = publish.model_card(PixArt(**SIZES))
    assert "Chen et al. 2023" in card and "text encoders" not in card and "Peebles" not in card
    assert "DiT, [Peebles & Xie 2023]" in publish.model_card(DiT(**SMALL))


def assert_back(found, ours, process, text):
    """A network that was loaded is the one that was saved, and says what was said."""
    assert type(found) is type(ours) and found.config == ours.config
    assert found.process == process.config and found.text == text
    assert torch.equal(found(*inputs(found)), ours(*inputs(ours)))
    state = ours.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_comes_back_from_every_file_of_ours(tmp_path, kind):
    ours, process = network(kind), FlowProcess(time_shift=2.0)
    ours.process = process.config
    publish.save_pretrained(ours, tmp_path / "hub")
    found, classes = load_pretrained(tmp_path / "hub")
    assert classes is None
    assert_back(found, ours, process, ours.text)
    said = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert said["_class_name"] == type(ours).__name__ and said.get("text") == ours.text
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "text-to-image" in card and f"# {type(ours).__name__}" in card and "--prompt" in card
    assert f"| class name | {type(ours).__name__} |" in card and "| None |" not in card

    weights = Weights(ours.state_dict(), ours.config, None, None, process.config, ours.text)
    save_weights(tmp_path / "one.safetensors", weights)
    assert_back(load_pretrained(tmp_path / "one.safetensors")[0], ours, process, ours.text)

    recipe = Recipe(1e-3, 0, 0.0, [0.9], 0.0, 1, False, False)
    ours.requires_grad_(True).pos_embed.requires_grad_(False)
    state = new_state(ours, recipe, process=process)
    save_checkpoint(tmp_path / "run.pt", state.to_checkpoint({"global_seed": 0}, None, 1))
    assert_back(load_pretrained(tmp_path / "run.pt")[0], ours, process, ours.text)


@pytest.mark.parametrize(("change", "says"), [
    ({"_class_name": "MMDiTs"}, "it is of MMDiTs, which is none of DiT, MMDiT, PixArt"),
    ({"_class_name": "DiT"}, "not know|is missing"),
    ({"_class_name": "PixArt"}, "not know|is missing|there are not"),
    ({"depth": 10**9}, "depth is 1000000000"), ({"depth": "2"}, "depth is '2'"),
    ({"depth": 3}, "blocks.1.text.proj.weight is missing;"),
    ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
    ({"text_width": 10**9}, "text_width is 1000000000"),
    ({"text_width": True}, "text_width is True; wanted is a whole number"),
    ({"text_width": 13}, r"words_embedder.weight is \(16, 12\), wanted \(16, 13\)"),
    ({"text_width": None}, "pooled_width is 10 and text_width None"),
    ({"pooled_width": None}, "pooled_width None, but MMDiT takes a vector"),
    ({"pooled_width": [1]}, "pooled_width is a list"), ({"streams": 7}, "streams is 7"),
    ({"text_length": 10**9}, "text_length is 1000000000"), ({"text_length": 1e3}, "text_length"),
    ({"table_side": 10**9}, "table_side is 1000000000"), ({"table_side": 0}, "table_side is 0"),
    ({"noise_steps": -1}, "noise_steps is -1"), ({"noise_steps": "x" * 10**6}, "noise_steps is 'x"),
    ({"qk_norm": "yes"}, "qk_norm is 'yes'"), ({"far": 1}, "this version does not know"),
    ({"text": 5}, "text is 5; wanted is a list of a dict for each encoder"),
    ({"text": [1]}, "text is a list; wanted is"), ({"text": [{}] * 17}, "text is a list; wanted"),
    ({"text": [{"a": [1]}]}, "a is a list; wanted is a number or a text"),
    ({"text": [{"a": 10**30}]}, "a is 10000"),
])  # fmt: skip
def test_a_hostile_configuration_ends_in_one_message(tmp_path, change, says):
    publish.save_pretrained(network("sd3"), tmp_path / "hub", process=FlowProcess())
    file = tmp_path / "hub" / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps(config))
    weights = tmp_path / "hub" / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights)  # no metadata
    with pytest.raises(ValueError, match=says) as raised:
        load_pretrained(tmp_path / "hub")
    assert len(str(raised.value)) < 1000 and str(tmp_path) in str(raised.value)


def test_the_class_of_a_state_dict_is_told():
    for kind, (build, _) in KINDS.items():
        assert class_of(network(kind).state_dict()) == build.__name__
    for block in ("adaln_single", "cross_attention", "adaln_zero"):
        assert class_of(DiT(**SMALL, block=block).state_dict()) == "DiT"


def test_weights_of_another_class_are_refused():
    mine, other = network("own"), network("own pixart")
    for here, there, says in [
        (mine, other, "a has the weights of a PixArt, the network here is a MMDiT; pass a `model`"),
        (other, mine, "a has the weights of a MMDiT, the network here is a PixArt"),
        (DiT(**SMALL), mine, "the network here is a DiT; pass a `model` whose name begins with MM"),
        (mine, DiT(**SMALL), "a has the weights of a DiT, the network here is a MMDiT"),
    ]:
        with pytest.raises(ValueError, match=says):
            check_design(here, there.state_dict(), "a")
    check_design(mine, mine.state_dict(), "a", mine.config)
    told = MMDiT(**KINDS["own"][1], noise_steps=1000)
    with pytest.raises(ValueError, match="a has noise_steps None, the network here 1000; the two"):
        adapt(Weights(mine.state_dict(), mine.config, None), told, "drop", "a")


@pytest.mark.parametrize("kind", ["own", "own pixart"])
def test_weights_are_adapted_to_another_size(kind):
    build, options = KINDS[kind]
    old, new = network(kind), build(**options | dict(input_size=8))
    found = adapt(Weights(old.state_dict(), old.config, None), new, "keep", "a")
    assert torch.equal(found["pos_embed"], new.pos_embed)
    assert all(torch.equal(old.state_dict()[n], v) for n, v in found.items() if n != "pos_embed")


def test_weights_without_a_configuration_are_named(tmp_path):
    ours = network("own")
    torch.save(ours.state_dict(), tmp_path / "a.pt")
    weights = load_weights(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt has the weights of a MMDiT and not its config"):
        build_network(NetworkChoice(tmp_path / "a.pt"), weights, "none")
    assert load_pretrained(tmp_path / "a.pt", config=ours.config)[0].config == ours.config
    torch.save(DiT(**SMALL).state_dict(), tmp_path / "b.pt")
    choice = NetworkChoice(tmp_path / "b.pt", model="MMDiT-Ti/2")
    with pytest.raises(ValueError, match="`model` is MMDiT-Ti/2, but .*b.pt is of a DiT"):
        build_network(choice, load_weights(tmp_path / "b.pt"), "none")


@pytest.mark.parametrize(("sizes_of", "right"), [
    ("MMDiT-Ti/2", ["MMDiT-Ti/2"]), ("PixArt-Ti/2", []),
])  # fmt: skip
def test_a_model_of_the_same_sizes_and_another_class_contradicts(tmp_path, vae, sizes_of, right):
    made = MMDiT(input_size=4, in_channels=4, **MODELS[sizes_of].keywords)
    publish.save_pretrained(made, tmp_path / "hub")
    weights = load_weights(tmp_path / "hub")
    for model in ("MMDiT-Ti/2", "PixArt-Ti/2", "DiT-Ti/2", "MMDiT-Ti/1"):
        choice = NetworkChoice(tmp_path / "hub", model=model)
        if model in right:
            assert isinstance(build_network(choice, weights, vae), MMDiT)
            continue
        with pytest.raises(ValueError, match=f"`model` is {model}, but .* is of another size"):
            build_network(choice, weights, vae)


def test_a_variant_was_not_released():
    choice = NetworkChoice(model="MMDiT-Ti/2", process="flow")
    assert choice.published == "MMDiT-Ti/2" and choice.sizes()[0] == "MMDiT-Ti/2"
    assert NetworkChoice(model="DiT-XL/2", process="flow").published == "SiT-XL/2"


# ---- diffusers', read ----


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_a_pipeline_of_diffusers_gives_its_numbers(name, request):
    folder, theirs = request.getfixturevalue(name)
    for place in (folder, folder / "transformer"):
        ours, classes = import_diffusers(place)
        x, t, y = inputs(ours)
        expected = theirs_at(theirs, x, t, y)
        assert classes is None and ours.text is None
        assert (ours(x, t, y) - expected).abs().max() < 2e-5 < 0.1 < expected.abs().max()


def test_their_processes_are_told(sd3, pixart, tmp_path):
    for folder, shift in [(sd3[0], 3.0), (sd3[0] / "transformer", 3.0), (tmp_path / "alone", 1.0)]:
        if folder.name == "alone":
            shutil.copytree(sd3[0] / "transformer", folder)
        ours, _ = load_pretrained(folder)
        process = process_learned(NetworkChoice(folder), load_weights(folder), ours)
        assert process.config == FlowProcess(time_shift=shift).config
    ours, _ = load_pretrained(pixart[0])
    assert ours.process is None and process_of(ours).config["name"] == "gaussian"
    assert ours.learn_sigma


def test_an_older_name_of_pixart_is_known(pixart, tmp_path):
    shutil.copytree(pixart[0] / "transformer", tmp_path / "a")
    change(tmp_path / "a", {"_class_name": "Transformer2DModel"})
    ours, theirs = load_pretrained(tmp_path / "a")[0], load_pretrained(pixart[0])[0]
    assert torch.equal(ours(*inputs(ours)), theirs(*inputs(theirs)))


@pytest.mark.parametrize(("options", "form", "network_of"), [
    (SD3, sd3_format, SD3Transformer2DModel),
    (SD3 | dict(qk_norm="rms_norm", out_channels=8), sd3_format, SD3Transformer2DModel),
    (PIXART, pixart_format, PixArtTransformer2DModel),
    (PIXART | dict(out_channels=None, interpolation_scale=2), pixart_format,
     PixArtTransformer2DModel),
])  # fmt: skip
def test_no_key_and_no_number_is_lost(options, form, network_of):
    theirs = filled(network_of(**options))
    name = "sd3" if form is sd3_format else "pixart"
    read, made, config_from, config_to = (
        getattr(form, f"{part}_{name}") for part in ("from", "to", "config_from", "config_to")
    )
    config = config_from(dict(theirs.config))
    there, tensors = config_to(config), theirs.state_dict()
    back = made(read(tensors, config), config)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        if key == sd3_format.TABLE:
            assert (back[key] - value).abs().max() < 1e-6
        else:
            assert torch.equal(back[key], value), key
    plain = {key: value for key, value in there.items() if key[0] != "_"}
    rebuilt = network_of(**plain)
    assert rebuilt.state_dict().keys() == tensors.keys()
    assert config_from(dict(rebuilt.config)) == config == config_from(there)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_are_those_of_their_scheduler(sd3, shift):
    """With the same noise levels, to float32's rounding."""
    folder, theirs = sd3
    ours, _ = load_pretrained(folder)
    steps, noise = 6, randn(2, 4, 4, 6).float()
    text = Text(randn(2, 5, 12).float(), None, randn(2, 10).float())
    process = FlowProcess(time_shift=shift)
    moments = process.trajectory(lambda x, t, step: ours(x, t, text), noise, "euler", steps)
    found = [moment["sample"] for moment in moments]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # The scheduler shifts these, and adds a last 0
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    levels = [1 - t for t in process.times("euler", steps)]
    torch.testing.assert_close(
        scheduler.timesteps, 1000 * torch.tensor(levels), rtol=1e-6, atol=1e-4
    )
    x = noise
    for t, mine in zip(scheduler.timesteps, found, strict=True):
        velocity = theirs(x, text.tokens, text.pooled, t.expand(2)).sample
        x = scheduler.step(velocity, t, x).prev_sample
        assert (mine - x).abs().max() < 5e-4
    assert (found[-1] - noise).abs().max() > 0.1


def change(folder, entries, name="config.json"):
    """Change entries of a JSON file."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(("entries", "says"), [
    ({"dual_attention_layers": [0]}, "its dual_attention_layers are blocks with a second"),
    ({"qk_norm": "layer_norm"}, "its qk_norm is layer_norm; None and rms_norm are read"),
    ({"qk_norm": None}, "more than its configuration: .*norm_added_k"), ({"qk_norm": 1}, "qk_norm"),
    ({"caption_projection_dim": 8}, "caption_projection_dim is 8; wanted is its width, 16"),
    ({"out_channels": 5}, "out_channels 5 for 4 in_channels"), ({"num_layers": 3}, "lack transfor"),
    ({"num_layers": 1}, "lack|more"), ({"num_layers": 10**9}, "depth is 1000000000"),
    ({"num_layers": None}, "num_layers is None"), ({"sample_size": 10**9}, "input_size"),
    ({"sample_size": [4]}, "sample_size is a list"), ({"patch_size": 0}, "patch_size is 0"),
    ({"sample_size": 8}, "pos_embed.pos_embed is not the table of sines and cosines"),
    ({"pos_embed_max_size": 4000}, r"pos_embed is not the table .* \(1, 16000000, 16\)"),
    ({"pos_embed_max_size": 10**9}, "table_side is"),
    ({"attention_head_dim": 0}, "wanted is its width, 0"),
    ({"attention_head_dim": 10**9, "caption_projection_dim": 2 * 10**9}, "hidden_size is"),
    ({"joint_attention_dim": 10**9}, "text_width is"), ({OWN: []}, "our arguments in it are not"),
    ({OWN: {"_class_name": "MMDiT", "depth": "x"}}, "depth is 'x'"),
    ({OWN: {"_class_name": "MMDiT"}}, "contradicts itself: input_size"),
    ({OWN_TEXT: 3}, "_dit_text is 3; wanted is a list"),
])  # fmt: skip
def test_what_no_mmdit_can_be_is_refused_by_name(sd3, tmp_path, entries, says):
    refused(sd3[0], tmp_path, entries, says)


@pytest.mark.parametrize(("entries", "says"), [
    ({"use_additional_conditions": True}, "it has use_additional_conditions"),
    ({"use_additional_conditions": "x"}, "use_additional_conditions is 'x'"),
    ({"sample_size": 128}, "it has use_additional_conditions"),
    ({"norm_type": "layer_norm"}, "no like here: norm_type 'layer_norm'"),
    ({"attention_type": "gated"}, "attention_type 'gated'"), ({"dropout": 0.1}, "dropout 0.1"),
    ({"norm_elementwise_affine": True}, "norm_elementwise_affine"), ({"norm_eps": 1e-5}, "norm_ep"),
    ({"attention_bias": False}, "attention_bias False"), ({"activation_fn": "geglu"}, "'geglu'"),
    ({"caption_channels": None}, "its caption_channels are none"),
    ({"caption_channels": "4"}, "caption_channels is '4'"),
    ({"cross_attention_dim": 8}, "cross_attention_dim is 8; wanted is its width, 16"),
    ({"interpolation_scale": "x"}, "interpolation_scale is 'x'"),
    ({"interpolation_scale": -1}, "position_scale is -1"),
    ({"interpolation_scale": 10**30}, "position_scale is 1000"),
    ({"out_channels": 12}, "out_channels 12 for 4"), ({"num_layers": 3}, "lack transformer_bl"),
    ({"num_layers": 1}, "more than its configuration: transformer_blocks.1"),
    ({"num_layers": 10**9}, "depth is 1000000000"), ({"sample_size": 10**9}, "input_size"),
    ({OWN: {"_class_name": "DiT"}}, "our arguments in it are not"),
])  # fmt: skip
def test_what_no_pixart_can_be_is_refused_by_name(pixart, tmp_path, entries, says):
    refused(pixart[0], tmp_path, entries, says)


def refused(folder, tmp_path, entries, says):
    """A transformer with these entries ends in one message that names its config.json."""
    shutil.copytree(folder / "transformer", tmp_path / "a")
    change(tmp_path / "a", entries)
    with pytest.raises(ValueError, match=says) as raised:
        load_pretrained(tmp_path / "a")
    assert "config.json" in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize(("name", "wrong"), [("sd3", 0.01), ("pixart", 0.01), ("sd3", None)])
def test_a_position_table_of_other_numbers_is_refused(request, tmp_path, name, wrong):
    folder, _ = request.getfixturevalue(name)
    shutil.copytree(folder / "transformer", tmp_path / "a")
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    table = tensors.pop("pos_embed.pos_embed", torch.zeros(1, 4, 16))
    if wrong is not None:
        tensors["pos_embed.pos_embed"] = table + wrong
    safetensors.torch.save_file(tensors, file)
    says = "lack pos_embed.pos_embed" if wrong is None else "pos_embed.pos_embed is not the table"
    with pytest.raises(ValueError, match=says):
        load_pretrained(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read(sd3, tmp_path, dtype):
    folder, theirs = sd3
    shutil.copytree(folder / "transformer", tmp_path / "a")
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.to(dtype) for key, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)
    ours, _ = load_pretrained(tmp_path / "a")
    x, t, y = inputs(ours)
    expected = theirs_at(theirs, x, t, y)
    error = (ours(x, t, y) - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.05 and ours.pos_embed.dtype == torch.float32


@pytest.mark.parametrize(("entries", "says"), [
    ({"use_dynamic_shifting": True}, "has use_dynamic_shifting, which a flow has not here"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas"), ({"invert_sigmas": True}, "invert_sigmas"),
    ({"shift_terminal": 0.1}, "shift_terminal"), ({"num_train_timesteps": 500}, "wanted is 1000"),
    ({"_class_name": "DDIMScheduler"}, "is a DDIMScheduler; FlowMatchEuler"),
    ({"shift": "x"}, "time_shift is 'x'"), ({"shift": 0}, "time_shift is 0"),
])  # fmt: skip
def test_a_flows_scheduler_says_its_times(sd3, tmp_path, entries, says):
    shutil.copytree(sd3[0], tmp_path / "p")
    change(tmp_path / "p" / "scheduler", entries, "scheduler_config.json")
    with pytest.raises(ValueError, match=says):
        load_pretrained(tmp_path / "p")
    assert any("scheduler" in pattern for pattern in HUB_FILES)


@pytest.mark.parametrize(("entries", "says"), [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of another process .*FlowMatch"),
    ({"flow_shift": 3.0}, "is of another process .*flow_shift: 3.0"),
    ({"use_flow_sigmas": True}, "is of another process .*use_flow_sigmas"),
    ({"lambda_min_clipped": float("nan")}, "it has the number NaN, which JSON does not know"),
])  # fmt: skip
def test_a_pixart_with_the_scheduler_of_a_flow_is_refused(pixart, tmp_path, entries, says):
    """As diffusers writes it, it has flow_shift 1, which is none, and a number -Infinity."""
    shutil.copytree(pixart[0], tmp_path / "p")
    change(tmp_path / "p" / "scheduler", entries, "scheduler_config.json")
    with pytest.raises(ValueError, match=says):
        load_pretrained(tmp_path / "p")


# ---- and written ----


@pytest.mark.parametrize("kind", TO_DIFFUSERS)
def test_an_exported_network_gives_our_numbers_and_comes_back(tmp_path, vae, kind):
    ours = network(kind)
    ours.process = FlowProcess(time_shift=3.0).config if isinstance(ours, MMDiT) else None
    publish.export_diffusers(ours, load_vae(vae), tmp_path / "p")
    name = json.loads((tmp_path / "p" / "model_index.json").read_text())["_class_name"]
    left_out = dict.fromkeys(publish.PIPELINES[type(ours).__name__].without)
    pipeline = getattr(diffusers, name).from_pretrained(tmp_path / "p", **left_out)
    x, t, y = inputs(ours)
    x = x[..., :4]  # theirs takes no grid beyond its table
    expected = ours(x, t, y)
    with torch.no_grad():
        found = theirs_at(pipeline.transformer.eval(), x, t, y)
    assert (found - expected).abs().max() < 2e-5 < 0.05 < expected.abs().max()
    if ours.process:
        assert pipeline.scheduler.config.shift == 3.0
    back, _ = load_pretrained(tmp_path / "p")
    assert torch.equal(back(x, t, y), expected)
    assert back.config == ours.config and back.text == ENCODERS
    assert process_of(back).config == process_of(ours).config


@pytest.mark.parametrize(("build", "options", "says"), [
    (MMDiT, KINDS["own"][1], "it has a text encoder of its own"),
    (MMDiT, KINDS["sd3"][1] | dict(streams=1), "its streams are 1"),
    (MMDiT, KINDS["sd3"][1] | dict(mlp_ratio=2.0), "its mlp_ratio is 2.0"),
    (MMDiT, KINDS["sd3"][1] | dict(input_size=[4, 8]), r"its latents are \[4, 8\]"),
    (MMDiT, KINDS["sd3"][1] | dict(noise_steps=None), "built with noise_steps=1000 can be ex"),
    (PixArt, KINDS["own pixart"][1], "it has a text encoder of its own"),
    (PixArt, KINDS["pixart"][1] | dict(extrapolation="crop"), "its extrapolation is crop"),
    (PixArt, KINDS["pixart"][1] | dict(mlp_ratio=2.0), "its mlp_ratio is 2.0"),
])  # fmt: skip
def test_what_diffusers_cannot_be_is_refused(tmp_path, vae, build, options, says):
    made = build(**options)
    made.process = FlowProcess().config if build is MMDiT else None
    with pytest.raises(ValueError, match=says):
        publish.export_diffusers(made, load_vae(vae), tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("kind", "process", "says"), [
    ("sd3", None, "the network is told the noise level of a flow"),
    ("pixart", FlowProcess(), "PixArtAlphaPipeline cannot sample a flow"),
    ("sd3", FlowProcess(path="gvp"), "learned the velocity on the path gvp"),
    ("sd3", FlowProcess(prediction="score"), "learned the score on the path linear"),
])  # fmt: skip
def test_a_process_that_their_pipeline_has_not_is_refused(tmp_path, vae, kind, process, says):
    with pytest.raises(ValueError, match=says):
        publish.export_diffusers(network(kind), load_vae(vae), tmp_path / "p", process=process)


def test_a_table_of_other_numbers_is_not_exported(tmp_path, vae):
    for kind in ("sd3", "pixart"):
        made = network(kind)
        made.process = FlowProcess().config if kind == "sd3" else None
        made.pos_embed += 0.01
        with pytest.raises(ValueError, match="pos_embed is not the table of sines and cosines"):
            publish.export_diffusers(made, load_vae(vae), tmp_path / "p")


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_the_door_goes_round(tmp_path, vae, kind):
    """Hub's form, diffusers' and one file, each made of the one before."""
    ours = network(kind)
    ours.process = FlowProcess(time_shift=2.0).config if kind == "sd3" else None
    publish.save_pretrained(ours, tmp_path / "start")
    ckpt = tmp_path / "start"
    for form, name in [("diffusers", "p"), ("hub", "h"), ("safetensors", "one.safetensors")]:
        out = tmp_path / name
        flags = ["--ckpt", str(ckpt), "--vae", vae, "--format", form, "--output", str(out)]
        export.main(flags)
        ckpt = out
    found, _ = load_pretrained(ckpt)
    assert found.config == ours.config and found.text == ENCODERS
    assert process_of(found).config == process_of(ours).config
    assert torch.equal(found(*inputs(found)), ours(*inputs(ours)))


def test_the_door_names_what_cannot_be_exported(tmp_path, vae, capsys):
    made = network("own")
    made.process = FlowProcess().config
    publish.save_pretrained(made, tmp_path / "start")
    flags = ["--ckpt", str(tmp_path / "start"), "--vae", vae, "--format", "diffusers"]
    with pytest.raises(SystemExit):
        export.main([*flags, "--output", str(tmp_path / "p")])
    assert "cannot be this network: it has a text encoder of its own" in capsys.readouterr().err
