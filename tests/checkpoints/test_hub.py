"""hub.py, export.py and diffusers_format.py: folders that others read, the same numbers there, and
what cannot be exported.
"""

import json
import shutil

from diffusers import DiTPipeline, DiTTransformer2DModel
import huggingface_hub.constants
import numpy as np
from PIL import Image
import pytest
import safetensors.torch
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.files import save_checkpoint
from checkpoints.names import PRETRAINED, weights_file
from checkpoints.weights import Weights, load_weights, save_weights
from conftest import ROOT, fill_randomly, randn
from checkpoints import diffusers_format
from checkpoints import loading
from checkpoints import names as checkpoints_names
from checkpoints import publish
from diffusion import create_diffusion
import export
from processes.gaussian import GaussianProcess
from models import DiT
import sample
from sampling.sampler import Sampler
from starts import each_start
from vae import PixelSpace, load_vae, to_uint8

CONFIG = dict(
    input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=3, num_heads=2, num_classes=10
)
NAMES = [f"digit {i}" for i in range(10)]
DIGITS = ROOT / "examples" / "digits"


def network(**changes):
    """A small DiT with random weights that only samples."""
    return fill_randomly(DiT(**{**CONFIG, **changes})).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(vae, tmp_path_factory):
    """A pipeline's folder, written from network()."""
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    publish.export_diffusers(network(), load_vae(vae), folder, NAMES)
    return folder


def inputs(ours, null_label):
    """x, t and labels with a null one, for ours and for diffusers."""
    x, t = randn(4, ours.in_channels, 4, 4).float(), torch.tensor([0, 1, 500, 999])
    return x, t, torch.tensor([0, 3, 9, ours.null_label]), torch.tensor([0, 3, 9, null_label])


# ---- diffusers ----

@pytest.mark.parametrize(
    "changes", [{}, dict(learn_sigma=False, num_classes=1000), dict(patch_size=1, num_classes=1)]
)
def test_exported_network_gives_our_numbers(tmp_path, vae, changes):
    ours = network(**changes)
    publish.export_diffusers(ours, load_vae(vae), tmp_path / "p")
    pipeline = publish.load_exported(tmp_path / "p")
    x, t, here, there = inputs(ours, 1000)
    here, there = (
        here.clamp(max=ours.null_label),
        torch.where(here >= ours.num_classes, 1000, there),
    )
    with torch.no_grad():
        expected, out = ours(x, t, here), pipeline.transformer(x, t, there).sample
    assert expected.abs().max() > 0.1
    assert (out - expected).abs().max() < 1e-5


def test_stock_pipeline_is_off_which_is_why_load_exported_exists(exported):
    ours, stock = network(), DiTPipeline.from_pretrained(exported).transformer
    x, t, here, there = inputs(ours, 1000)
    with torch.no_grad():
        gap = (stock(x, t, there).sample - ours(x, t, here)).abs().max()
    assert 1e-4 < gap < 1e-1


def ours_as_the_pipeline_does_it(ours, space, labels, noise, steps, scale):
    """Images uint8 (N, H, W, 3) by 'ddimN' steps from noise, with all channels guided."""
    diffusion = create_diffusion(f"ddim{steps}", learn_sigma=ours.learn_sigma)
    y = torch.cat([labels, torch.full_like(labels, ours.null_label)])
    latents = diffusion.ddim_sample_loop(
        ours.forward_with_cfg, (2 * len(noise), *noise.shape[1:]), torch.cat([noise, noise]),
        clip_denoised=False, model_kwargs=dict(y=y, cfg_scale=scale, cfg_channels="all"),
    )  # fmt: skip
    return to_uint8(space.decode(latents[: len(noise)]))


def theirs(pipeline, labels, noise, steps, scale, monkeypatch):
    """The pipeline's images from that noise."""
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **kwargs: noise.clone()
    )
    # in [0, 1]
    images = pipeline(labels.tolist(), scale, num_inference_steps=steps, output_type="pt").images
    return to_uint8(2 * images - 1)


def grey_levels(a, b):
    return (a.float() - b.float()).abs().mean().item()


def test_pipeline_draws_our_pictures_of_digits(tmp_path, monkeypatch):
    ours, classes = loading.load_pretrained(DIGITS / "dit.safetensors")
    space = load_vae(str(DIGITS / "vae"))
    publish.export_diffusers(ours, space, tmp_path / "p", classes)
    assert publish.load_exported(tmp_path / "p").get_label_ids(["3", "7"]) == [3, 7]
    labels, noise = torch.arange(10), randn(10, *Sampler(ours, space, classes).latent).float()
    expected = ours_as_the_pipeline_does_it(ours, space, labels, noise, 20, 1.5)
    assert expected.float().std() > 50  # pictures of digits, not grey
    images = theirs(publish.load_exported(tmp_path / "p"), labels, noise, 20, 1.5, monkeypatch)
    assert grey_levels(images, expected) < 0.05
    stock = theirs(DiTPipeline.from_pretrained(tmp_path / "p"), labels, noise, 20, 1.5, monkeypatch)
    gap = grey_levels(stock, expected)
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    # the page's figure is this one
    said = float(text.split("grey levels of 255")[0].rsplit(maxsplit=1)[-1])
    assert abs(gap - said) < 0.1 * said


def test_import_undoes_export(exported):
    ours, (back, classes) = network(), loading.import_diffusers(exported)
    assert back.config == ours.config and classes == NAMES
    state = back.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert load_weights(exported / "transformer").classes == NAMES  # the folder within is as good


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}])
def test_import_of_what_diffusers_saved_again(exported, tmp_path, options):
    DiTPipeline.from_pretrained(exported, torch_dtype=torch.float16).save_pretrained(
        tmp_path / "again", **options
    )
    back, classes = loading.import_diffusers(tmp_path / "again")
    assert back.config == network().config and classes == NAMES
    halves = {
        name: value.half().float()
        for name, value in network().state_dict().items()
        if name != "pos_embed"
    }
    assert all(torch.equal(back.state_dict()[name], value) for name, value in halves.items())
    assert torch.equal(back.pos_embed, network().pos_embed)  # computed, not read


@pytest.fixture
def stock_folder(tmp_path):
    """The folder of a network that diffusers made itself, every block with the first one's
    embedders.
    """
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=4, num_embeds_ada_norm=1000, norm_eps=1e-6,
    ).eval()  # fmt: skip
    first, *others = theirs.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock", theirs


@pytest.mark.parametrize("older", [False, True])
def test_import_of_a_folder_that_diffusers_made(stock_folder, older):
    folder, theirs = stock_folder
    if older:  # another class name, and weights that torch.save wrote
        config = json.loads((folder / "config.json").read_text()) | {
            "_class_name": "Transformer2DModel"
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / "diffusion_pytorch_model.bin")
    ours, classes = loading.import_diffusers(folder)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, here, there = inputs(ours, 1000)
    assert ours.null_label == 1000 and classes is None
    with torch.no_grad():
        expected = theirs(x, t, there).sample
        assert (ours(x, t, here) - expected).abs().max() < 1e-5 < 0.1 < expected.abs().max()


@pytest.mark.parametrize(
    "name", ["class_embedder.embedding_table.weight", "timestep_embedder.linear_2.bias"]
)
def test_import_refuses_blocks_with_embedders_of_their_own(stock_folder, name):
    folder, _ = stock_folder
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[f"transformer_blocks.1.norm1.emb.{name}"][0] += 1e-3
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(
        ValueError,
        match=rf"config.json: its blocks have embedders of their own \(.*blocks.1.*{name}",
    ):
        loading.import_diffusers(folder)


@pytest.mark.parametrize("change, message", [
    ({"activation_fn": "geglu"}, "is no DiT: activation_fn 'geglu'"),
    ({"out_channels": 5}, "is no DiT: out_channels 5 for 4 in_channels"),
    ({"num_layers": 3}, "lack transformer_blocks.2"),
    ({"num_layers": 1}, "more than its configuration: transformer_blocks.1"),
    ({"num_layers": 0}, "depth is 0; it must be at least 1"),
    ({"num_layers": "2"}, "config.json: num_layers is '2'; wanted is a whole number"),
    ({"num_layers": True}, "num_layers is True"), ({"num_layers": 2.0}, "num_layers is 2.0"),
    ({"num_layers": 10**9}, "config.json: .*depth is 1000000000"),
    ({"sample_size": 10**9}, "config.json: .*input_size"),
    ({"attention_head_dim": 10**9}, "config.json: .*hidden_size"),
    ({"sample_size": [4]}, "sample_size is a list"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"in_channels": -1}, "out_channels 8 for -1 in_channels"),
    ({"attention_head_dim": "x" * 10**6}, "attention_head_dim is 'x{59}\\.\\.\\.; wanted"),
    ({"activation_fn": {}}, "activation_fn is a dict"),
    ({"norm_type": 5}, "it is of DiTTransformer2DModel, which is none of DiT, MMDiT"),
    ({"_class_name": ["DiT"]}, "it is of ..DiT.., which is none of"),
    ({"_class_name": None}, "it is of None"),
    ({"norm_eps": 0.5}, "is no DiT: norm_eps 0.5"),
    ({diffusers_format.OWN: []}, "_dit is not what it should be"),
    ({diffusers_format.OWN: {}}, "_dit is not what"),
    ({diffusers_format.OWN_CLASSES: ["a"] * 1001}, "has 1001 class names for 1000 classes"),
    ({diffusers_format.OWN: dict(DiT(**CONFIG).config, depth=9)}, "contradicts itself: depth"),
    ({diffusers_format.OWN: dict(DiT(**CONFIG).config, depth=2, num_classes=1001)},
     "contradicts itself: num_classes"),
    ({diffusers_format.OWN: dict(DiT(**CONFIG).config, depth=2, num_classes="x")},
     "num_classes is 'x'; wanted is a whole"),
])  # fmt: skip
def test_import_refuses_what_is_no_dit(stock_folder, change, message):
    folder, _ = stock_folder
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        loading.load_pretrained(folder)


@pytest.mark.parametrize("change, says", [
    ({"prediction_type": "v_prediction"}, "prediction_type: v_prediction"),
    ({"prediction_type": "sample"}, "prediction_type"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas"),
    ({"beta_schedule": "scaled_linear"}, "beta_schedule"), ({"beta_end": 0.012}, "beta_end"),
    ({"num_train_timesteps": 500}, "num_train_timesteps"),
    ({"trained_betas": [0.1] * 1000}, "trained_betas"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ({"_class_name": "DDPMScheduler", "trained_betas": create_diffusion("").betas.tolist()}, None),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, None),
])  # fmt: skip
def test_a_pipelines_scheduler_says_its_process(exported, tmp_path, change, says):
    shutil.copytree(exported, tmp_path / "p")
    file = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if says is None:
        loading.import_diffusers(tmp_path / "p")
        return
    for path in (tmp_path / "p", tmp_path / "p" / "transformer"):
        with pytest.raises(
            ValueError, match=rf"scheduler_config.json is of another process \({says}"
        ):
            loading.load_pretrained(path)


def test_import_takes_diffusers_format_alone(tmp_path):
    publish.save_pretrained(network(), tmp_path / "dit")
    for other in (tmp_path / "dit", DIGITS / "dit.safetensors", DIGITS / "vae"):
        with pytest.raises(
            ValueError, match="is no DiT of diffusers; load_pretrained reads everything else"
        ):
            loading.import_diffusers(other)


def test_an_autoencoder_is_no_checkpoint():
    with pytest.raises(ValueError, match="json: it is of AutoencoderKL, which is none of"):
        loading.load_pretrained(DIGITS / "vae")


@pytest.mark.parametrize("changes, reason", [
    (dict(num_classes=1001), "it has 1001 classes, and label 1000 stands for none there"),
    (dict(num_classes=0), "it has no classes"),
    (dict(class_dropout_prob=0.0), "it was trained without label dropout"),
    (dict(block="adaln_single"), "its blocks are of the design adaln_single"),
    (dict(mlp_ratio=2.0), "its mlp_ratio is 2.0"),
])  # fmt: skip
def test_export_refuses_what_the_pipeline_cannot_be(tmp_path, vae, changes, reason):
    with pytest.raises(ValueError, match=f"diffusers' DiT cannot be this network: {reason}"):
        publish.export_diffusers(network(**changes), load_vae(vae), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_export_refuses_pixels_and_shifted_latents(tmp_path, vae):
    with pytest.raises(ValueError, match="this network makes pixels"):
        publish.export_diffusers(network(in_channels=3), PixelSpace(), tmp_path / "p")
    space = load_vae(vae)
    space.shift = 0.1
    with pytest.raises(ValueError, match="shifted by 0.1"):
        publish.export_diffusers(network(), space, tmp_path / "p")


# ---- pretrained folders ----

def test_load_pretrained_undoes_save_pretrained(tmp_path):
    ours = network(block="adaln", num_classes=3)
    publish.save_pretrained(ours, tmp_path / "a" / "dit", ["a", "b", "é"])
    assert sorted(p.name for p in (tmp_path / "a" / "dit").iterdir()) == [
        "README.md", "config.json", PRETRAINED,
    ]  # fmt: skip
    back, classes = loading.load_pretrained(tmp_path / "a" / "dit")
    assert (
        back.config == ours.config
        and classes == ["a", "b", "é"]
        and not back.training
        and not back.pos_embed.requires_grad
    )
    assert all(
        torch.equal(value, back.state_dict()[name]) for name, value in ours.state_dict().items()
    )
    config = json.loads((tmp_path / "a" / "dit" / "config.json").read_text())
    assert config == {
        "_class_name": "DiT", **ours.config, "process": GaussianProcess().config,
        "id2label": {"0": "a", "1": "b", "2": "é"},
    }  # fmt: skip


def test_class_names_that_are_no_text_are_named_where_others_read(tmp_path, vae):
    """A folder in Latin-1 has such a name; train.py and sample.py take it."""
    names = ["a", "caf\udce9"]
    for write in (
        lambda: publish.save_pretrained(network(), tmp_path / "a", names),
        lambda: publish.export_diffusers(network(), load_vae(vae), tmp_path / "b", names),
    ):
        with pytest.raises(
            ValueError,
            match=r"the name of class 1, 'caf\\udce9', is not in UTF-8.*`format=\"safetensors\"`",
        ):
            write()
    assert not list(tmp_path.iterdir())
    save_weights(
        tmp_path / "c.safetensors", Weights(network().state_dict(), network().config, names)
    )
    assert load_weights(tmp_path / "c.safetensors").classes == names
    publish.save_pretrained(
        network(), tmp_path / "d", training={"step": 1, "args": {"model": "caf\udce9", "vae": 5}}
    )
    assert "# caf?" in (tmp_path / "d" / "README.md").read_text()


def test_a_disk_that_takes_no_more_is_named(tmp_path, vae, monkeypatch):
    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        ValueError,
        match="cannot write .*/a .No space left on device.; nothing is left of it: make room",
    ):
        publish.save_pretrained(network(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_that_brings_code_is_not_run(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "p")
    index = tmp_path / "p" / "model_index.json"
    index.write_text(
        json.dumps(
            json.loads(index.read_text()) | {"transformer": ["evil", "DiTTransformer2DModel"]}
        )
    )
    (tmp_path / "p" / "transformer" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(
        ValueError,
        match="its transformer is of .'evil'., not of diffusers; code in a folder is never run",
    ):
        publish.load_exported(tmp_path / "p")
    assert not (tmp_path / "ran").exists()


def test_the_hub_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match="some/one is no file.*set to be offline, by HF_HUB_OFFLINE, and there is no copy",
    ):
        checkpoints_names.local_path("some/one")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_weights_of_any_precision_become_float32(tmp_path, dtype):
    ours = network()
    average = {name: value.to(dtype) for name, value in ours.state_dict().items()}
    torch.save({"ema": average, "config": ours.config}, tmp_path / "a.pt")
    back, _ = loading.load_pretrained(tmp_path / "a.pt")
    for name, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.to(dtype).float())


def test_card_says_what_the_checkpoint_says():
    training = {
        "step": 1234,
        "args": {"model": "DiT-Ti/1", "lr": 1e-3, "vae": "some/vae", "results_dir": "/home/me"},
    }
    card = publish.model_card(network(), NAMES, training)
    for said in (
        "# DiT-Ti/1", "| training steps | 1234 |", "| lr | 0.001 |", "--vae some/vae", "10 classes",
        "| depth | 3 |", f"{sum(p.numel() for p in network().parameters()):,} parameters",
        "digit 0, digit 1",
    ):  # fmt: skip
        assert said in card
    assert "/home/me" not in card
    # A folder of this machine
    assert "--vae VAE\n" in publish.model_card(network(), vae=str(DIGITS / "vae"))
    assert "| classes | a&#124;b c |" in publish.model_card(network(), ["a|b\nc"])
    assert "that makes\nimages. It is" in publish.model_card(network(num_classes=0))


def test_config_beside_any_safetensors_file(tmp_path):
    ours = network()
    safetensors.torch.save_file(ours.state_dict(), tmp_path / "mine.safetensors")
    assert load_weights(tmp_path / "mine.safetensors").config is None
    (tmp_path / "config.json").write_text(
        json.dumps({**ours.config, "id2label": dict(enumerate(NAMES))})
    )
    weights = load_weights(tmp_path / "mine.safetensors")
    assert weights.config == ours.config and weights.classes == NAMES
    save_weights(
        tmp_path / "says.safetensors", Weights(ours.state_dict(), ours.config, ["its own"])
    )
    # What a file says itself counts more
    assert load_weights(tmp_path / "says.safetensors").classes == ["its own"]


@pytest.mark.parametrize("text, message", [
    ("{", "cannot read .*config.json"), ("[]", "config.json is no configuration: it holds a list"),
    (json.dumps({**CONFIG, "id2label": {"1": "a"}}), "config.json: id2label is not"),
    (json.dumps({**CONFIG, "id2label": ["a"]}), "config.json: id2label is not"),
    (json.dumps({**CONFIG, "depht": 3}), "a configuration that this version does not know .*depht"),
    ('{"architecture": "resnet10t"}', "timm's resnet10t, a classifier, and not"),
    (json.dumps({**CONFIG, "depth": 2}), "is of another configuration: blocks.2"),
    *((json.dumps({**CONFIG, key: value}), rf"config.json.*: {key} is ")
      for key in ("depth", "hidden_size", "num_classes") for value in ("x", 28.0, True, None, [3])),
    *((json.dumps({**CONFIG, key: value}), rf"dit.*: {key} is ")
      for key in ("depth", "input_size", "hidden_size", "num_heads") for value in (0, -1)),
    *((json.dumps({**CONFIG, key: 4 * 10**9}), key) for key in CONFIG),
    (json.dumps({**CONFIG, "mlp_ratio": 1e300}), "mlp_ratio"),
    (json.dumps({**CONFIG, "mlp_ratio": "x"}), "mlp_ratio is 'x'"),
    (json.dumps({**CONFIG, "learn_sigma": 1}), "learn_sigma is 1"),
    (json.dumps({**CONFIG, "block": 1}), "block is 1"),
    (json.dumps({**CONFIG, "id2label": 5}), "id2label is not"),
    (json.dumps({**CONFIG, "id2label": {"0": 5}}), "id2label is"),
    (json.dumps({**CONFIG, "id2label": {"0": "a", "00": "b"}}), "id2label is not"),
    ('{"depth": ' + "9" * 5000 + "}",
     "cannot read .*config.json .it has the number of 5,000 digits"),
])  # fmt: skip
def test_broken_configurations(tmp_path, text, message):
    publish.save_pretrained(network(), tmp_path / "dit")
    # Without metadata
    safetensors.torch.save_file(network().state_dict(), tmp_path / "dit" / PRETRAINED)
    (tmp_path / "dit" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        loading.load_pretrained(tmp_path / "dit")


def test_folders_without_weights(tmp_path, exported):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has config.json but none of model.safetensors.*shards"):
        weights_file(tmp_path)
    DiTPipeline.from_pretrained(exported).save_pretrained(
        tmp_path / "shards", max_shard_size="100KB"
    )
    with pytest.raises(ValueError, match="has config.json but none of model.safetensors.*shards"):
        weights_file(tmp_path / "shards")


@pytest.mark.parametrize("classes, message", [
    ("abc", "no list of texts"), ({"0": "a"}, "no list of texts"), ([1, 2], "no list of texts"),
    (["a"] * 11, "11 class names for 10"),
])  # fmt: skip
def test_class_names_that_are_none(tmp_path, classes, message):
    save_weights(
        tmp_path / "a.safetensors", Weights(network().state_dict(), network().config, classes)
    )
    with pytest.raises(ValueError, match=f"a.safetensors has .*{message}"):
        load_weights(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        publish.save_pretrained(network(), tmp_path / "dit", classes)
    assert not (tmp_path / "dit").exists()


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "dit").mkdir()
    publish.save_pretrained(network(), tmp_path / "dit")  # an empty folder may be filled
    before = (tmp_path / "dit" / PRETRAINED).stat()
    (tmp_path / ".dit.partial").mkdir()  # somebody's
    with pytest.raises(ValueError, match="dit exists already; give another name"):
        publish.save_pretrained(network(), tmp_path / "dit")
    assert (tmp_path / "dit" / PRETRAINED).stat() == before
    monkeypatch.setattr(publish, "model_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish.save_pretrained(network(), tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".dit.partial", "dit"]
    with pytest.raises(OSError, match="(?i)no such file"):
        save_weights(tmp_path / "no" / "a.safetensors", Weights(network().state_dict(), None, None))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write .*(Not a directory|File exists)"):
        publish.save_pretrained(network(), tmp_path / "file" / "dit")


# ---- the hub ----

@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """The hub's cache with me/dit in it, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "0" * 40
    publish.save_pretrained(network(), tmp_path / "models--me--dit" / "snapshots" / revision, NAMES)
    (tmp_path / "models--me--dit" / "refs").mkdir()
    (tmp_path / "models--me--dit" / "refs" / "main").write_text(revision)


def test_links_stay_and_are_not_written_over(tmp_path, vae):
    (tmp_path / "disk").mkdir()
    for name, target in {"empty": "disk", "dit": "disk/new", "one.safetensors": "no"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    for name in ("dit", "empty"):
        if name == "empty":
            shutil.rmtree(tmp_path / "disk/new")
        publish.save_pretrained(network(), tmp_path / name)
        assert (tmp_path / name).is_symlink() and (tmp_path / name / PRETRAINED).is_file()
    choice = NetworkChoice(tmp_path / "dit" / "..", vae=vae)
    with pytest.raises(ValueError, match="one.safetensors exists already"):
        publish.export_checkpoint(choice, tmp_path / "one.safetensors", "safetensors")


def test_name_on_the_hub(offline_cache, monkeypatch, tmp_path):
    ours, classes = loading.load_pretrained("me/dit")
    assert ours.config == network().config and classes == NAMES
    monkeypatch.chdir(tmp_path)
    publish.save_pretrained(network(depth=1), tmp_path / "me" / "dit")
    assert loading.load_pretrained("me/dit")[0].config["depth"] == 1  # a folder here counts more


def test_name_that_the_hub_does_not_give(offline_cache):
    with pytest.raises(
        ValueError, match="me/other is no file or folder here, and cannot be fetched from the hub"
    ):
        loading.load_pretrained("me/other")
    for path in ("me/dit.pt", "a/b/c", "dit"):
        with pytest.raises(ValueError, match=f"there is no checkpoint {path}"):
            loading.load_pretrained(path)


def test_weights_without_a_configuration(tmp_path):
    save_checkpoint(tmp_path / "bare.pt", network().state_dict())
    with pytest.raises(
        ValueError, match="bare.pt does not say how its network is built; pass config"
    ):
        loading.load_pretrained(tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="`config` is 3; give a dict"):
        loading.load_pretrained(tmp_path / "bare.pt", config=3)
    assert (
        loading.load_pretrained(tmp_path / "bare.pt", config=CONFIG)[0].config == network().config
    )
    for name in (3, None, b"bare.pt", ""):
        with pytest.raises(ValueError, match="`ckpt` is .*; give the name of a file or folder"):
            loading.load_pretrained(name)


# ---- the doors ----

def picture(tmp_path, *flags):
    sample.main(
        ["--output", str(tmp_path / "out.png"), "--steps", "2", "--device", "cpu", *map(str, flags)]
    )
    return np.asarray(Image.open(tmp_path / "out.png"))


def test_every_form_gives_the_same_picture(tmp_path, vae, exported):
    ours = network()
    raw = fill_randomly(DiT(**CONFIG), seed=1).state_dict()
    training = dict(
        ema=ours.state_dict(), model=raw, step=3, config=ours.config, classes=NAMES,
        args={"model": "mine"},
    )  # fmt: skip
    save_checkpoint(tmp_path / "run.pt", training)
    expected = picture(tmp_path, "--ckpt", tmp_path / "run.pt", "--vae", vae)
    export.main(
        ["--ckpt", str(tmp_path / "run.pt"), "--vae", vae, "--output", str(tmp_path / "hub")]
    )
    assert "| training steps | 3 |" in (tmp_path / "hub" / "README.md").read_text()
    pipeline, one = str(tmp_path / "diffusers"), str(tmp_path / "one.safetensors")
    export.main(
        [
            "--ckpt",
            str(tmp_path / "hub"),
            "--vae",
            vae,
            "--format",
            "diffusers",
            "--output",
            pipeline,
        ]
    )
    export.main(["--ckpt", pipeline, "--format", "safetensors", "--output", one])
    for ckpt in (
        tmp_path / "hub", tmp_path / "diffusers", tmp_path / "one.safetensors", exported,
        exported / "transformer",
    ):  # fmt: skip
        assert np.array_equal(picture(tmp_path, "--ckpt", ckpt, "--vae", vae), expected)
    # With the pipeline's own autoencoder
    assert np.array_equal(picture(tmp_path, "--ckpt", exported), expected)


@pytest.mark.parametrize("form", publish.FORMATS)
def test_half_of_the_space_and_the_same_network(tmp_path, vae, form):
    whole = network()
    path, output = str(tmp_path / "dit.pt"), tmp_path / "half.safetensors"
    save_checkpoint(path, dict(ema=whole.state_dict(), config=whole.config))
    export.main(["--ckpt", path, "--vae", vae, "--half", "--format", form, "--output", str(output)])
    files = [output] if form == "safetensors" else list(output.rglob("*.safetensors"))
    assert len(files) == 1 + (form == "diffusers")  # with the autoencoder's
    kept = [one for file in files for one in safetensors.torch.load_file(file).values()]
    assert {tensor.dtype for tensor in kept} == {torch.float16}
    read = load_weights(output)
    again = DiT(**read.config)
    again.load_state_dict(read.tensors)
    for name, tensor in whole.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == torch.float32
        if name == "pos_embed" or "_embedder.pos" in name:  # diffusers makes it anew
            assert torch.allclose(found, tensor, atol=1e-3)
        else:
            assert torch.equal(found, tensor.half().float())


def test_half_refuses_what_float16_does_not_have(tmp_path, vae, capsys):
    whole = network()
    whole.blocks[1].mlp.fc2.bias.data[3] = 1e5
    path, output = str(tmp_path / "dit.pt"), tmp_path / "half.safetensors"
    save_checkpoint(path, dict(ema=whole.state_dict(), config=whole.config))
    flags = ["--ckpt", path, "--vae", vae, "--format", "safetensors", "--output", str(output)]
    with pytest.raises(SystemExit):
        export.main([*flags, "--half"])
    assert "--half: blocks.1.mlp.fc2.bias has a number beyond 65,504" in capsys.readouterr().err
    assert not output.exists()
    export.main(flags)


def test_export_says_what_is_wrong(tmp_path, vae, capsys):
    publish.save_pretrained(network(), tmp_path / "dit")
    publish.save_pretrained(network(num_classes=0), tmp_path / "none")
    ours = ["--ckpt", str(tmp_path / "dit"), "--vae", vae]
    none = ["--ckpt", str(tmp_path / "none"), "--vae", vae]
    single = [*ours, "--format", "safetensors", "--output"]
    for flags, message in [
        ([*ours, "--output", str(tmp_path / "dit")], "dit exists already; give another name"),
        ([*ours, "--output", str(tmp_path / "a"), "--weights", "raw"], "no 'raw' weights"),
        ([*ours, "--output", str(tmp_path / "a"), "--format", "onnx"], "invalid choice: 'onnx'"),
        ([*ours, "--output", str(tmp_path / "a"), "--model", "DiT-S/2"], "--model is DiT-S/2, but"),
        ([*ours[:2], "--output", str(tmp_path / "a")],
         "does not say behind which autoencoder it was trained; pass --vae"),
        ([*single, str(tmp_path / "a")], "a name that ends in .safetensors"),
        ([*single, str(tmp_path / "a" / "b.safetensors")], "cannot write"),
        ([*none, "--output", str(tmp_path / "a"), "--format", "diffusers"], "no classes"),
        (["--ckpt", str(tmp_path / "gone"), "--vae", vae, "--output", str(tmp_path / "a")],
         "there is no checkpoint"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            export.main(flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and "Traceback" not in error
        assert not (tmp_path / "a").exists()


def test_the_autoencoder_of_the_run_is_exported(tmp_path, vae):
    ours = network()
    contents = dict(
        ema=ours.state_dict(), model={}, config=ours.config, classes=NAMES, args={"vae": vae},
        step=1,
    )  # fmt: skip
    save_checkpoint(tmp_path / "run.pt", contents)
    export.main(
        [
            "--ckpt",
            str(tmp_path / "run.pt"),
            "--format",
            "diffusers",
            "--output",
            str(tmp_path / "p"),
        ]
    )
    theirs, own = load_vae(str(tmp_path / "p" / "vae")), load_vae(vae)
    assert theirs.scale == own.scale and theirs.shape == own.shape
    assert all(
        torch.equal(a, b)
        for a, b in zip(theirs.autoencoder.parameters(), own.autoencoder.parameters(), strict=True)
    )


@each_start
def test_export_as_a_script(tmp_path, start):
    flags = [
        "--ckpt", DIGITS / "dit.safetensors", "--vae", DIGITS / "vae", "--output", tmp_path / "dit",
    ]  # fmt: skip
    done = start("export.py", *flags)
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'dit'}\n", done.stderr
    assert loading.load_pretrained(tmp_path / "dit")[0].config["hidden_size"] == 128
