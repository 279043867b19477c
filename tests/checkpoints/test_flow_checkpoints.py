"""Checkpoints of flows: what files and users say of the process arrives wherever one is loaded."""
import argparse
import json
import re

import numpy as np
from PIL import Image
import pytest
import safetensors.torch
import torch

from checkpoints import loading, publish
from checkpoints.choice import NetworkChoice
from checkpoints.files import save_checkpoint
from checkpoints.fitting import adapt, note_of_process
from checkpoints.loading import load_pretrained
from checkpoints.publish import save_pretrained
from checkpoints.weights import Weights, load_weights, save_weights
from conftest import fill_randomly, randn
import export
from models import DiT, DiT_models
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from processes.table import process_of
import sample
from sampling import load_sampler
import train
from training.options import TrainOptions

SIZES = dict(input_size=16, in_channels=3, num_classes=3)
GVP = FlowProcess(path="gvp", prediction="noise", loss_weight="velocity")
BARE = dict(vae="none", model="DiT-Ti/8", image_size=16, num_classes=3)
EULER = dict(sampler="euler", steps=2, device="cpu", vae="none")
# As SiT's train.py writes them, beside others
SIT = dict(
    model="SiT-Ti/8", path_type="GVP", prediction="noise", loss_weight="velocity", train_eps=None,
    sample_eps=None, image_size=256, num_classes=3, cfg_scale=4.0, vae="ema",
)  # fmt: skip


def network(**changes):
    """A DiT-Ti/8 for 16 pixels and 3 classes, with random weights."""
    return fill_randomly(DiT_models["DiT-Ti/8"](**SIZES, **changes)).eval().requires_grad_(False)


NETWORK, STATE = network(), network().state_dict()


def sit_file(path, **changes):
    """A checkpoint as SiT's train.py writes it, its arguments changed."""
    args = argparse.Namespace(**SIT | changes)
    torch.save({"model": STATE, "ema": STATE, "opt": {"state": {}}, "args": args}, path)
    return path


def images(checkpoint, **options):
    """Two images of a checkpoint by the sampler that it gets, and that sampler."""
    sampler = load_sampler(checkpoint, **EULER | options)
    return sampler.images([0, 2], seed=1), sampler


def expected(process):
    """The images of NETWORK if it has learned this flow, from its trajectory."""
    torch.manual_seed(1)
    noise, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    *_, last = process.trajectory(
        lambda x, t, step: NETWORK(x, t, labels), noise, "euler", 2, clip=True
    )
    return ((last["sample"].permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255)


# ---- what SiT's train.py writes ----

@pytest.mark.parametrize("changes, flow", [
    ({}, dict(path="gvp", prediction="noise", loss_weight="velocity", train_eps=1e-3)),
    (dict(path_type="Linear", prediction="velocity", loss_weight=None), dict(train_eps=0.0)),
    # Its code takes neither weights of velocities nor their distance from the ends
    (dict(path_type="Linear", prediction="velocity", loss_weight="likelihood", train_eps=0.1),
     dict(loss_weight=None, train_eps=0.0)),
    (dict(path_type="VP", prediction="velocity", loss_weight="None", train_eps=1e-4),
     dict(path="vp", loss_weight=None, train_eps=1e-4)),
    (dict(path_type="VP", prediction="score", loss_weight="None"),
     dict(path="vp", prediction="score", loss_weight=None, train_eps=1e-5)),
])  # fmt: skip
def test_arguments_of_sit_say_the_flow(tmp_path, changes, flow):
    weights = load_weights(sit_file(tmp_path / "a.pt", **changes))
    assert weights.config is None
    got = loading.process_learned(NetworkChoice(tmp_path / "a.pt"), weights, NETWORK)
    assert got.config == FlowProcess().config | flow


def test_a_checkpoint_of_sit_is_sampled_as_the_flow_that_it_is(tmp_path):
    path = sit_file(tmp_path / "a.pt")
    got, sampler = images(path, **BARE)
    assert sampler.process.config == GVP.config and sampler.network.learn_sigma
    assert np.abs(got - expected(GVP).numpy()).max() <= 1
    assert np.abs(got - expected(FlowProcess()).numpy()).max() > 5
    with pytest.raises(ValueError, match="`sampler` .*ddim.* heun"):
        images(path, **BARE, **{"sampler": "ddim"})


@pytest.mark.parametrize("changes, mark", [
    (dict(path_type="linear"), "SiT"), (dict(path_type="cosine"), "SiT"),
    (dict(prediction="v"), "SiT"), (dict(model="LightningDiT-B/1"), "LightningDiT"),
    (dict(model="SiT-H/2"), "SiT-H/2"), (dict(use_flow_sigmas=True), "use_flow_sigmas"),
    (dict(path_type=torch.ones(2)), "SiT"), (dict(objective="meanflow"), "meanflow"),
])  # fmt: skip
def test_relatives_of_sit_are_refused_as_before(tmp_path, changes, mark):
    """REPA's path_type is in small letters, and its t runs the other way."""
    with pytest.raises(ValueError, match=f"a.pt is of another process .*({mark})"):
        load_weights(sit_file(tmp_path / "a.pt", **changes))


def test_arguments_that_lack_some_of_sits_are_not_its(tmp_path):
    args = {name: value for name, value in SIT.items() if name != "loss_weight"}
    save_checkpoint(tmp_path / "a.pt", {"ema": STATE, "args": args})
    with pytest.raises(ValueError, match="a.pt is of another process"):
        load_weights(tmp_path / "a.pt")


# ---- what our files say ----

def our_args(**options):
    return TrainOptions(data_path="x", process="flow", **options).recorded()


def test_our_checkpoint_says_its_flow_in_the_configuration_or_the_arguments(tmp_path):
    args = our_args(path="gvp", prediction="noise", loss_weight="velocity")
    config = NETWORK.config | {"process": GVP.config}
    for name, contents in {"a": {"config": config}, "b": {}, "c": {"process": GVP.config}}.items():
        path = tmp_path / f"{name}.pt"
        save_checkpoint(path, {"ema": STATE, "args": args if name < "c" else {}, **contents})
        assert load_weights(path).process == GVP.config


@pytest.mark.parametrize("wrap", [
    lambda process: {"hyper_parameters": {"process": process}},
    lambda process: {"config": {"inner": {"process": process}}},
])  # fmt: skip
def test_a_flow_named_where_nobody_looks_is_refused(tmp_path, wrap):
    """It would be sampled as a diffusion."""
    save_checkpoint(tmp_path / "a.pt", {"ema": STATE, **wrap(GVP.config)})
    with pytest.raises(ValueError, match="a.pt is of another process .process: flow"):
        load_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("said, message", [
    ({"path": torch.ones(2)}, "path is a Tensor; wanted is a number or a text"),
    ({"path": ["linear"]}, "path is a list"), ({5: 1}, "5 is no name"),
    ({"train_eps": 10**100}, "train_eps is 10000"),
    ({"time_sampling": {}}, "time_sampling is a dict"),
    ({"path": "cubic"}, "path is 'cubic'; choose one of linear, gvp, vp"),
    ({"loss_weight": "velocity"}, "loss_weight is for a score or the noise"),
    ({"train_eps": float("nan")}, "train_eps is nan"), ({"train_eps": True}, "train_eps is True"),
    ({"time_sampling": "mode:9"}, "time_sampling is mode:9"),
    ({"time_shift": 0}, "time_shift is 0"), ({"cosine_loss": "yes"}, "cosine_loss is 'yes'"),
    ({"colour": "red"}, "colour, which is not known here"),
])  # fmt: skip
def test_nonsense_about_a_flow_is_one_message_that_names_the_file(
    tmp_path, capsys, said, message
):
    config = NETWORK.config | {"process": {"name": "flow", **said}}
    torch.save({"ema": STATE, "config": config}, tmp_path / "a.pt")
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path / "a.pt"), "--vae", "none", "--device", "cpu"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"error: {tmp_path / 'a.pt'}: of its process " in error
    assert message in error


@pytest.mark.parametrize("said, message", [
    ({"path": ["linear"]}, "path is a list"), ({"path": "cubic"}, "path is 'cubic'; choose"),
    ({"name": "edm"}, "another process .process: edm"), ({"colour": "red"}, "has colour, which is"),
])  # fmt: skip
def test_nonsense_in_a_folder_is_one_message_too(tmp_path, said, message):
    publish.save_pretrained(NETWORK, tmp_path / "a")
    safetensors.torch.save_file(STATE, tmp_path / "a" / "model.safetensors")
    config = NETWORK.config | {"process": {"name": "flow", **said}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path / 'a'}.*{message}"):
        load_sampler(tmp_path / "a", **EULER)


# ---- what users say ----

def test_a_model_called_sit_is_a_flow_of_dits_size():
    choice = NetworkChoice(model="SiT-B/4")
    assert choice.sizes() == ("DiT-B/4", 256, 1000) and choice.learned == "flow"
    assert NetworkChoice().learned is None and NetworkChoice().published == "DiT-XL/2"
    assert NetworkChoice(model="DiT-B/4").learned is None
    assert NetworkChoice(process="flow").published == "SiT-XL/2"
    assert NetworkChoice(model="SiT-B/4", process="flow").published == "SiT-B/4"


@pytest.mark.parametrize("options, message", [
    (dict(model="SiT-B/4", process="diffusion"), "`model` is SiT-B/4, which is a flow.*`process`"),
    (dict(model="SiT-H/2"), "give one of DiT-Ti/1.* with SiT for DiT"),
    (dict(process="edm"), "`process` is edm; give one of diffusion, flow"),
])  # fmt: skip
def test_choices_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkChoice(**options)


@pytest.mark.parametrize("said", [dict(process="flow"), dict(model="SiT-Ti/8")])
@pytest.mark.parametrize("has_sigma", [True, False])
def test_a_bare_state_dict_is_what_the_user_says(tmp_path, said, has_sigma):
    """The number of outputs tells whether it has a variance, which a flow leaves out."""
    own = network(learn_sigma=has_sigma)
    torch.save(own.state_dict(), tmp_path / "a.pt")
    got, sampler = images(tmp_path / "a.pt", **BARE | said)
    assert sampler.process.config == FlowProcess().config
    assert sampler.network.learn_sigma == has_sigma
    if has_sigma:
        assert np.abs(got - expected(FlowProcess()).numpy()).max() <= 1
    with pytest.raises(ValueError, match="choose|diffusion"):
        images(tmp_path / "a.pt", **BARE)  # nobody says flow: no sampler called euler


@pytest.mark.parametrize("process, word", [(GVP, "flow"), (None, "diffusion")])
@pytest.mark.parametrize("kind", ["run", "hub", "file", "old"])
def test_a_user_does_not_contradict_a_file(tmp_path, process, word, kind):
    config = NETWORK.config | ({"process": process.config} if process else {})
    if kind == "hub":
        publish.save_pretrained(NETWORK, tmp_path / "a", process=process)
    elif kind == "file":
        metadata = {"config": json.dumps(config)}
        safetensors.torch.save_file(STATE, tmp_path / "a", metadata)
        (tmp_path / "a").rename(tmp_path / "a.safetensors")
    else:
        save_checkpoint(tmp_path / "a.pt", {"ema": STATE, "config": config})
    path = next(tmp_path.glob("a*"))
    other = {"flow": "diffusion", "diffusion": "flow"}[word]
    with pytest.raises(
        ValueError, match=f"`process` is {other}, but .*a.* has learned {word}; leave the argument"
    ):
        load_sampler(path, vae="none", device="cpu", process=other)
    solver = {"flow": "heun", "diffusion": "ddim"}[word]
    agreed = load_sampler(path, vae="none", device="cpu", process=word, sampler=solver, steps=2)
    assert agreed.process.word == word
    if word == "diffusion":
        with pytest.raises(ValueError, match="`model` is SiT-Ti/8, but .* has learned diffusion"):
            load_sampler(path, vae="none", device="cpu", model="SiT-Ti/8")


def test_the_door_takes_both_words(tmp_path, capsys):
    torch.save(STATE, tmp_path / "a.pt")
    pictures = []
    for said in (["--model", "SiT-Ti/8"], ["--model", "DiT-Ti/8", "--process", "flow"]):
        output = tmp_path / f"{len(pictures)}.png"
        sample.main([
            "--ckpt", str(tmp_path / "a.pt"), "--vae", "none", "--image-size", "16",
            "--num-classes", "3", "--sampler", "euler", "--steps", "2", "--device", "cpu",
            "--output", str(output), *said,
        ])  # fmt: skip
        pictures.append(np.asarray(Image.open(output)))
    assert np.array_equal(*pictures)
    with pytest.raises(SystemExit):
        sample.main(["--model", "SiT-Ti/8", "--process", "diffusion"])
    assert "--model is SiT-Ti/8, which is a flow, and --process is" in capsys.readouterr().err


# ---- files for others ----

def test_an_exported_flow_is_a_flow_wherever_it_is_loaded(tmp_path):
    """From a checkpoint of SiT, by way of a folder and a file."""
    checkpoint = sit_file(tmp_path / "a.pt")
    flags = ["--ckpt", str(checkpoint), "--vae", "none", "--image-size", "16", "--num-classes", "3"]
    export.main([*flags, "--model", "SiT-Ti/8", "--output", str(tmp_path / "hub")])
    export.main([
        "--ckpt", str(tmp_path / "hub"), "--vae", "none", "--format", "safetensors", "--output",
        str(tmp_path / "one.safetensors"),
    ])  # fmt: skip
    want, _ = images(checkpoint, **BARE)
    for path in (tmp_path / "hub", tmp_path / "one.safetensors"):
        got, sampler = images(path)
        assert sampler.process.config == GVP.config and np.array_equal(got, want)
        alone, classes = loading.load_pretrained(path)
        assert isinstance(alone, DiT) and classes is None
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["process"] == GVP.config
    assert "| process | name flow, path gvp, " in (tmp_path / "hub" / "README.md").read_text()


def test_a_bare_state_dict_is_exported_with_what_the_user_says(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    choice = NetworkChoice(tmp_path / "a.pt", **BARE | {"model": "SiT-Ti/8"})
    publish.export_checkpoint(choice, tmp_path / "hub")
    assert load_weights(tmp_path / "hub").process == FlowProcess().config


def test_a_flow_is_no_pipeline_of_diffusers(tmp_path, vae, capsys):
    latent = fill_randomly(DiT(4, 2, 4, 16, 1, 2, num_classes=3))
    publish.save_pretrained(latent, tmp_path / "a", process=FlowProcess())
    with pytest.raises(SystemExit):
        export.main([
            "--ckpt", str(tmp_path / "a"), "--vae", vae, "--format", "diffusers", "--output",
            str(tmp_path / "b"),
        ])  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert "DiTPipeline cannot sample a flow; write a folder for the hub (--format hub)" in error
    with pytest.raises(ValueError, match="cannot sample a flow"):
        publish.export_diffusers(latent, None, tmp_path / "b", process=FlowProcess())
    assert not (tmp_path / "b").exists()


# ---- starting from them ----

def test_outputs_for_a_variance_are_dropped(tmp_path):
    """What is left gives the first half of the output, as before."""
    fresh = DiT_models["DiT-Ti/8"](**SIZES, learn_sigma=False)
    fresh.load_state_dict(adapt(Weights(STATE, None, None), fresh, "keep", "x"))
    x, t, y = randn(2, 3, 16, 16).float(), torch.tensor([0.1, 0.9]), torch.tensor([0, 2])
    torch.testing.assert_close(fresh.eval()(x, t, y), NETWORK(x, t, y)[:, :3])


def test_outputs_for_a_variance_are_not_made_up():
    bare = network(learn_sigma=False).state_dict()
    with pytest.raises(ValueError, match="x has no outputs for a variance.*`learn_sigma=False`"):
        adapt(Weights(bare, None, None), network(), "keep", "x")


SAYS_FLOW, SAYS_NOTHING = Weights(STATE, NETWORK.config, None), Weights(STATE, None, None)


@pytest.mark.parametrize("weights, process, note", [
    (SAYS_FLOW._replace(process=GVP.config), GVP, None),
    (SAYS_FLOW._replace(process=GVP.config), FlowProcess("gvp", "noise", time_shift=3.0), None),
    (SAYS_FLOW._replace(process=GVP.config), FlowProcess(),
     "x has learned another process, name flow, path gvp, prediction noise; this run learns name "
     "flow, path linear, prediction velocity"),
    (SAYS_FLOW._replace(process=GVP.config), GaussianProcess(), "name flow.* learns name gaussian"),
    (SAYS_FLOW, FlowProcess(), "x has learned another process, name gaussian; this run learns"),
    (SAYS_FLOW, GaussianProcess(), None), (SAYS_NOTHING, GaussianProcess(), None),
    (SAYS_NOTHING, FlowProcess(), "x does not say which process it has learned; if that is not"),
])  # fmt: skip
def test_another_process_to_start_from_is_noted(weights, process, note):
    got = note_of_process(weights, NETWORK, process, "x")
    assert got is None if note is None else re.search(note, got)


def test_training_starts_a_flow_from_sits_checkpoint_and_notes_another_process(tmp_path, capsys):
    for label in range(3):
        (tmp_path / "data" / f"class{label}").mkdir(parents=True)
        pixels = np.full((16, 16, 3), 80 * label, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"class{label}" / "a.png")
    flags = [
        "--data-path", str(tmp_path / "data"), "--vae", "none", "--model", "DiT-Ti/8",
        "--image-size", "16", "--num-classes", "3", "--global-batch-size", "2", "--max-steps", "1",
        "--device", "cpu", "--num-workers", "0", "--init-from", str(sit_file(tmp_path / "a.pt")),
        "--results-dir", str(tmp_path / "r"), "--lr", "1e-9",
    ]  # fmt: skip
    same = ["--process", "flow", "--path", "gvp", "--prediction", "noise"]
    train.main([*flags, *same])
    assert "another process" not in capsys.readouterr().out
    [path] = (tmp_path / "r").glob("*/checkpoints/0000001.pt")
    made = torch.load(path, weights_only=True)["model"]["final_layer.linear.bias"]
    kept = STATE["final_layer.linear.bias"].view(64, 6)[:, :3].flatten()
    torch.testing.assert_close(made, kept, atol=1e-7, rtol=0)
    train.main(flags)
    noted = "--init-from .*a.pt has learned another process, name flow, path gvp, prediction noise"
    assert re.search(f"note: {noted}; this run learns name gaussian", capsys.readouterr().out)


def test_a_loaded_flow_is_saved_again_as_a_flow(tmp_path):
    """Nobody has to say it twice: load_pretrained and save_pretrained hand it on."""
    config = dict(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    net = fill_randomly(DiT(**config, learn_sigma=False), std=0.3)
    process = FlowProcess("gvp", time_shift=3.0)
    save_pretrained(net, tmp_path / "a", process=process)
    loaded, _ = load_pretrained(tmp_path / "a")
    save_pretrained(loaded, tmp_path / "b")
    assert load_weights(tmp_path / "b").process == process.config
    assert process_of(loaded).config == process.config


@pytest.mark.parametrize("said", [3, True])
def test_a_process_that_is_a_number_is_refused(said, tmp_path):
    config = dict(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    (tmp_path / "config.json").write_text(json.dumps({**config, "process": said}))
    save_weights(tmp_path / "model.safetensors", Weights(DiT(**config).state_dict(), None, None))
    with pytest.raises(ValueError, match=f"its process is {said}; wanted is a dict with a name"):
        load_weights(tmp_path)
