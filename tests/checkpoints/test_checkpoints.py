"""Checkpoint files of every kind that is met, broken and hostile ones, and files that are whole or
not there at all.
"""
import argparse
import collections
from contextlib import nullcontext
import datetime
import decimal
import errno
import functools
import json
import os
import pathlib
from pathlib import Path
import stat
import tarfile
import types
import uuid
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from checkpoints.files import (
    checkpoint_path, list_checkpoints, newest_checkpoint, read_checkpoint, save_checkpoint,
)  # fmt: skip
from checkpoints.fitting import check_fits
from checkpoints.weights import Weights, clean_names, load_weights, save_weights
from runtime.json_files import read_json
from training.flags import build_parser as train_parser

CONFIG = {"input_size": 8, "depth": 2, "mlp_ratio": 4.0, "learn_sigma": True}
CLASSES = ["ant", "bee"]
FORMATS = {"zip": True, "legacy": False}  # torch.save's, since and before torch 1.6


def state_dict(value=0.0):
    """A small state dict that can be told from others by its value."""
    return {
        "blocks.0.attn.qkv.weight": torch.full((3, 2), value),
        "final_layer.linear.bias": torch.arange(4) + value,
    }


def ours(value=0.0):
    """A checkpoint as train.py writes it: ema is state_dict(value), model is state_dict(value + 1).
    """
    return dict(
        model=state_dict(value + 1), ema=state_dict(value),
        opt={"state": {}, "param_groups": [{"lr": 1e-4}]}, args={"model": "DiT-S/8"}, step=7,
        config=CONFIG, classes=CLASSES, rng={"torch": torch.get_rng_state()},
    )  # fmt: skip


def saved(path, contents, kind="zip"):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def assert_same(got, want):
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name])


# ---- files that are met ----

@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("which, value", [("ema", 3.0), ("raw", 4.0)])
def test_our_checkpoint(tmp_path, which, value, kind):
    weights = load_weights(saved(tmp_path / "a.pt", ours(3.0), kind), which)
    assert_same(weights.tensors, state_dict(value))
    assert weights.config == CONFIG and weights.classes == CLASSES


def test_ema_is_the_default_and_paths_may_be_text(tmp_path):
    assert_same(load_weights(str(saved(tmp_path / "a.pt", ours(3.0)))).tensors, state_dict(3.0))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("which, value", [("ema", 3.0), ("raw", 4.0)])
def test_checkpoint_with_a_namespace(tmp_path, which, value, kind):
    """Checkpoints in the wild hold model, ema, opt and a pickled argparse.Namespace."""
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4, ckpt=None, steps=[1, 2])
    wild = dict(
        model=state_dict(4.0), ema=state_dict(3.0), opt={"state": {0: {"step": torch.tensor(1.0)}}},
        args=args,
    )  # fmt: skip
    weights = load_weights(saved(tmp_path / "a.pt", wild, kind), which)
    assert_same(weights.tensors, state_dict(value))
    assert weights.config is None and weights.classes is None
    assert read_checkpoint(tmp_path / "a.pt")["args"] == args


def test_loading_a_namespace_leaves_no_permission_behind(tmp_path):
    load_weights(
        saved(tmp_path / "a.pt", dict(model=state_dict(), args=argparse.Namespace(a=1))), "raw"
    )
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("kind", FORMATS)
def test_bare_state_dict_counts_as_the_ema(tmp_path, kind):
    path = saved(tmp_path / "a.pt", state_dict(2.0), kind)
    assert_same(load_weights(path).tensors, state_dict(2.0))
    assert load_weights(path)[1:] == (None,) * 5
    with pytest.raises(ValueError, match="a.pt holds no 'raw' weights.*final_layer.linear.bias"):
        load_weights(path, "raw")


def test_module_state_dict_with_its_own_types(tmp_path):
    """state_dict() returns an OrderedDict, named_parameters() Parameters."""
    network = nn.Linear(3, 2)
    for contents in (network.state_dict(), dict(network.named_parameters())):
        tensors = load_weights(saved(tmp_path / "a.pt", contents)).tensors
        assert_same({k: v.detach() for k, v in tensors.items()}, dict(network.state_dict()))


@pytest.mark.parametrize("have, lack", [("ema", "raw"), ("model", "ema")])
def test_weights_that_are_not_there_are_not_replaced(tmp_path, have, lack):
    path = saved(tmp_path / "a.pt", {have: state_dict(), "step": 3})
    with pytest.raises(
        ValueError, match=f"a.pt holds no '{lack}' weights: its entries are {have}, step; "
    ):
        load_weights(path, lack)
    load_weights(path, "raw" if lack == "ema" else "ema")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_without_our_metadata(tmp_path, metadata):
    safetensors.torch.save_file(state_dict(2.0), tmp_path / "a.safetensors", metadata)
    weights = load_weights(tmp_path / "a.safetensors")
    assert sorted(weights.tensors) == sorted(state_dict())
    assert all(torch.equal(weights.tensors[k], v) for k, v in state_dict(2.0).items())
    assert weights.config is None and weights.classes is None
    with pytest.raises(ValueError, match="no 'raw' weights"):
        load_weights(tmp_path / "a.safetensors", "raw")


@pytest.mark.parametrize("config, classes", [(CONFIG, CLASSES), (CONFIG, None), (None, None)])
def test_safetensors_with_our_metadata(tmp_path, config, classes):
    metadata = {"config": json.dumps(config), "classes": json.dumps(classes), "format": "pt"}
    safetensors.torch.save_file(state_dict(2.0), tmp_path / "a.safetensors", metadata)
    assert load_weights(tmp_path / "a.safetensors")[1:] == (config, classes, None, None, None)


def test_saved_weights_come_back(tmp_path):
    tensors = {
        "transposed": torch.arange(6.0).view(2, 3).t(), "half": torch.ones(2).bfloat16(),
        "one": torch.tensor(3),
    }  # fmt: skip
    for weights in (Weights(tensors, CONFIG, CLASSES), Weights(tensors, None, None)):
        save_weights(tmp_path / "a.safetensors", weights)
        loaded = load_weights(tmp_path / "a.safetensors")
        assert loaded[1:] == weights[1:] and sorted(loaded.tensors) == sorted(tensors)
        assert_same({name: loaded.tensors[name] for name in tensors}, tensors)


# ---- names ----

@pytest.mark.parametrize("wrapped", [
    "module.blocks.0.attn.qkv.weight", "_orig_mod.blocks.0.attn.qkv.weight",
    "_orig_mod.module.blocks.0.attn.qkv.weight", "module._orig_mod.blocks.0.attn.qkv.weight",
    "module.module.blocks.0.attn.qkv.weight",
    "blocks.0._orig_mod.attn.qkv.weight", "module.blocks.0._orig_mod.attn._orig_mod.qkv.weight",
    "_orig_mod.blocks.0.module.attn.qkv.weight", "blocks.0.attn.qkv.weight",
    "_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module.attn.qkv.weight",
    "_orig_mod._forward_module.module."
    "blocks.0._checkpoint_wrapped_module._orig_mod.attn.qkv.weight",
])  # fmt: skip
def test_names_lose_the_marks_of_wrappers(tmp_path, wrapped):
    for contents in ({wrapped: torch.ones(2)}, {"ema": {wrapped: torch.ones(2)}}):
        assert list(load_weights(saved(tmp_path / "a.pt", contents)).tensors) == [
            "blocks.0.attn.qkv.weight"
        ]
    safetensors.torch.save_file({wrapped: torch.ones(2)}, tmp_path / "a.safetensors")
    assert list(load_weights(tmp_path / "a.safetensors").tensors) == ["blocks.0.attn.qkv.weight"]


@pytest.mark.parametrize("name", [
    "submodule.weight", "a.submodule.weight", "modules.weight", "a.module_list.0.weight", "module",
    "a.module", "my_orig_mod.weight", "_orig_module.weight", "moduleXweight",
])  # fmt: skip
def test_other_names_stay(name):
    assert list(clean_names({name: torch.ones(2)})) == [name]


def test_wrapped_networks_give_the_bare_names():
    network = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2))
    compiled = torch.compile(
        nn.Sequential(nn.Linear(2, 2), nn.SiLU(), torch.compile(nn.Linear(2, 2)))
    )
    assert any("_orig_mod" in name for name in compiled.state_dict())
    assert list(clean_names(compiled.state_dict())) == list(network.state_dict())
    assert list(clean_names(nn.DataParallel(network).state_dict())) == list(network.state_dict())


FIRST = "x_embedder.proj.weight"  # by which a network is found among others


def wild(prefix="", value=1.0):
    """A state dict in which a network can be found, with a prefix."""
    return {
        f"{prefix}{name}": tensor
        for name, tensor in {FIRST: torch.full((2,), value), **state_dict(value)}.items()
    }


@pytest.mark.parametrize("contents, found", [
    ({"state_dict": wild("model.", 1), "epoch": 3}, {"ema": 1}),
    ({"state_dict": {**wild("model.", 1), **wild("ema_model.", 2), "vae.x": torch.ones(1)}},
     {"ema": 2, "raw": 1}),
    ({"state_dict": {
        **wild("model.", 1), **wild("ema.ema_model.", 2), **wild("ema.online_model.", 1),
    }}, {"ema": 2}),
    # Whose average is not read
    ({"state_dict": {**wild("model.", 1), "model_ema.decay": torch.ones(1)}}, {"raw": 1}),
    ({"state_dict": {**wild("a.", 1), **wild("b.", 2)}}, {}),
    ({
        "model_state_dict": wild("", 1), "ema_state_dict": wild("module.", 2),
        "optimizer_state_dict": {},
    }, {"ema": 2, "raw": 1}),
    ({"model": wild("net.", 1), "ema": wild("", 2), "model_ema": wild("", 3)},
     {"ema": 2, "raw": 1}),
    ({"state_dict": wild("", 1), "model_ema": wild("", 2)}, {"ema": 2, "raw": 1}),
    ({"model": wild("", 1), "state_dict": wild("", 2)}, {"raw": 1}),
    ({"model": wild("", 1), "ema": {"shadow_params": [torch.ones(2)]}}, {"raw": 1}),
    ({"n_averaged": torch.tensor(3), **wild("module.", 1)}, {"ema": 1}),
    ({"model": wild("", 1), "ema": wild("", 2), "emas": 5, "args": {"ema_decay": [[1]]}},
     {"ema": 2, "raw": 1}),
])  # fmt: skip
def test_containers_of_other_trainers(tmp_path, contents, found):
    path = saved(tmp_path / "a.pt", contents)
    for which in ("ema", "raw"):
        if which in found:
            assert_same(
                dict(sorted(load_weights(path, which).tensors.items())),
                dict(sorted(wild("", found[which]).items())),
            )
        else:
            with pytest.raises(ValueError, match=f"a.pt holds no '{which}' weights"):
                load_weights(path, which)


@pytest.mark.parametrize("contents, says", [
    ({**wild("module."), **wild()}, "x_embedder.proj.weight is there twice"),
    ({"_fsdp_wrapped_module._flat_param": torch.ones(3)},
     "split over processes.*full_state_dict=True"),
    ({"ema": {"a": torch.ones(2, device="meta")}}, "a is a meta tensor"),
])  # fmt: skip
def test_tensors_that_are_no_plain_weights(tmp_path, contents, says):
    with pytest.raises(ValueError, match=rf"a\.pt.*{says}"):
        load_weights(saved(tmp_path / "a.pt", contents))


# ---- networks of other processes ----

@pytest.mark.parametrize("said", [
    {"args": argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity")},
    {"args": {"model": "SiT-XL/2"}},
    {"args": {"model": "DiT-XL/2", "path_type": "linear", "prediction": "noise"}},
    {"args": {"prediction": "v"}},
    {"hyper_parameters": {"diffusion": {"prediction_type": "v_prediction"}}},
    {"config": {"process": "flow"}}, {"config": {"transport": {"path_type": "GVP"}}},
    {"prediction_type": "sample"}, {"args": {"objective": "pred_v"}},
    {"args": {"loss_type": "flow-matching"}}, {"args": {"use_flow_matching": True}},
    {"args": {"noise_schedule": "squaredcos_cap_v2"}}, {"args": {"diffusion_steps": 4000}},
    {"args": {"predict_xstart": True}}, {"args": {"arch": "LightningDiT-B/1"}},
    {"args": {"loss": "score_matching"}}, {"cfg": {"sigma_data": 0.5}},
    {"args": types.SimpleNamespace(parameterization="x0")}, {"args": {"beta_end": 0.012}},
])  # fmt: skip
@pytest.mark.parametrize("which", ["ema", "raw"])
def test_a_network_of_another_process_is_refused(tmp_path, said, which):
    """Its tensors are those of a DiT, so nothing else would notice."""
    path = saved(tmp_path / "a.pt", {"model": state_dict(), "ema": state_dict(), **said})
    with pytest.raises(
        ValueError,
        match=r"a\.pt is of another process \(.*predicts the noise.*Use the code that it was",
    ):
        load_weights(path, which)


@pytest.mark.parametrize("said", [
    {"args": vars(train_parser().parse_args(["--data-path", "flowers"]))},
    {"args": {"model": "DiT-XL/2", "prediction": "eps"}},
    {"args": {
        "predict_xstart": False, "noise_schedule": "linear", "diffusion_steps": 1000,
        "path_type": None,
    }},
    {"args": {
        "model": "flowers-DiT-B/2", "lr_scheduler": "cosine", "results_dir": "runs/sit",
        "framework": "pytorch",
    }},
    {"args": {
        "schedule": "cosine", "target": "vae.Flow", "loss_type": "mse", "beta_start": 1e-4,
        "velocity": None,
    }},
    {"config": {**CONFIG, "process": "gaussian"}}, {"args": [1, 2]},
])  # fmt: skip
def test_what_says_nothing_of_another_process_is_taken(tmp_path, said):
    weights = load_weights(
        saved(tmp_path / "a.pt", {"model": state_dict(), "ema": state_dict(), **said})
    )
    assert "process" not in (weights.config or {})


@pytest.mark.parametrize("metadata", [
    {"modelspec.prediction_type": "v"}, {"modelspec.architecture": "SiT-XL/2"},
    {"config": '{"process": "rectified flow"}'}, {"_class_name": "SiTTransformer2DModel"},
    {"args": '{"prediction": "velocity"}'},
])  # fmt: skip
def test_metadata_say_another_process(tmp_path, metadata):
    safetensors.torch.save_file(
        state_dict(), tmp_path / "a.safetensors", {"format": "pt", **metadata}
    )
    with pytest.raises(ValueError, match="is of another process"):
        load_weights(tmp_path / "a.safetensors")


def test_config_beside_says_another_process(tmp_path):
    safetensors.torch.save_file(state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "SiTTransformer2DModel"}')
    with pytest.raises(
        ValueError, match="config.json is of another process ._class_name: SiTTransformer2DModel"
    ):
        load_weights(tmp_path)


# ---- run folders ----

def test_checkpoint_path_has_seven_digits(tmp_path):
    assert checkpoint_path(tmp_path, 400) == tmp_path / "checkpoints" / "0000400.pt"
    assert checkpoint_path(str(tmp_path), 0) == tmp_path / "checkpoints" / "0000000.pt"
    assert checkpoint_path("run", 12345678).name == "12345678.pt"


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (10_000_000, 900, 9_999_999, 50_000):
        saved(checkpoint_path(tmp_path, step), {})
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "0000900.pt", "0050000.pt", "9999999.pt", "10000000.pt",
    ]  # fmt: skip
    assert newest_checkpoint(str(tmp_path)) == tmp_path / "checkpoints" / "10000000.pt"


def test_foreign_and_partial_files_are_no_checkpoints(tmp_path):
    folder = checkpoint_path(tmp_path, 0).parent
    folder.mkdir()
    names = (
        ".0000900.pt.partial 0000900.pt.partial best.pt 0000900.pth 0000900 -000900.pt 9e2.pt "
        "0000900(1).pt .pt"
    )
    for name in names.split():
        (folder / name).touch()
    assert list_checkpoints(tmp_path) == []
    saved(checkpoint_path(tmp_path, 5), {})
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 5)]


def test_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step in (9_999_999, 10_000_000, 50):
        saved(checkpoint_path(tmp_path, step), ours(float(step)))
    assert_same(load_weights(tmp_path).tensors, state_dict(1e7))
    assert_same(load_weights(str(tmp_path), "raw").tensors, state_dict(1e7 + 1))


def test_folder_without_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path) == []
    for call in (load_weights, newest_checkpoint):
        with pytest.raises(
            ValueError,
            match=f"{tmp_path} has no checkpoints/.*give a run folder, a checkpoint file, or a",
        ):
            call(tmp_path)


# ---- broken files ----

def refusals(path, contents_by_case, suffix=""):
    """Case → what load_weights raised on these bytes, as text; anything but ValueError names its
    type.
    """
    said = {}
    for case, contents in contents_by_case.items():
        path.write_bytes(contents)
        try:
            load_weights(path)
        except ValueError as error:
            said[case] = str(error)
        except Exception as error:
            said[case] = f"{type(error).__name__}!"
    return said


@pytest.mark.parametrize("name", ["gone.pt", "gone.safetensors", "gone"])
def test_missing_file(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"there is no checkpoint {tmp_path / name}; give a .pt or"
    ):
        load_weights(tmp_path / name)


@pytest.mark.parametrize("kind, every", [("zip", 5), ("legacy", 1)])
def test_file_cut_short(tmp_path, kind, every):
    path = saved(tmp_path / "a.pt", dict(ema=state_dict(), args=argparse.Namespace(lr=1e-4)), kind)
    whole = path.read_bytes()
    lengths = range(0, len(whole), every)
    said = refusals(path, {length: whole[:length] for length in lengths})
    assert list(said) == list(lengths)  # none was taken for whole
    assert {text for text in said.values() if not text.startswith(f"{path} ")} == set()
    if kind == "zip":
        assert all(
            "cut short, damaged or no checkpoint; download or copy it again" in text
            for text in said.values()
        )


def test_saved_weights_can_be_read_by_whom_other_files_can(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(path, Weights(state_dict(), CONFIG, None))
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_safetensors_cut_short(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(path, Weights(state_dict(), CONFIG, None))
    whole = path.read_bytes()
    said = refusals(path, {length: whole[:length] for length in range(len(whole))})
    assert len(said) == len(whole)
    assert all(
        text.startswith(f"{path} is cut short or not a safetensors file") for text in said.values()
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_file_of_something_else(tmp_path):
    """Each first byte sends the unpickler another way."""
    path = tmp_path / "a.pt"
    texts = {first: bytes([first]) + b"his is no checkpoint.\nIt is text." for first in range(256)}
    said = refusals(path, texts)
    assert len(said) == 256
    assert {text for text in said.values() if not text.startswith(f"{path} ")} == set()
    assert said[ord("T")].startswith(f"{path} is cut short, damaged or no checkpoint")


def test_altered_directory_of_the_archive(tmp_path):
    path = saved(tmp_path / "a.pt", state_dict())
    whole = path.read_bytes()
    places = [*range(60), *range(len(whole) - 150, len(whole))]
    altered = {i: whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in places}
    said = refusals(path, altered)  # some bytes do not matter
    assert len(said) > 50
    assert {i: text for i, text in said.items() if not text.startswith(f"{path} ")} == {}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "contents, name", [([torch.ones(2)], "list"), (torch.ones(2), "Tensor"), (None, "NoneType")]
)
def test_file_that_holds_no_dict(tmp_path, contents, name, kind):
    path = saved(tmp_path / "a.pt", contents, kind)
    with pytest.raises(ValueError, match=f"a.pt holds a {name}, not a checkpoint"):
        load_weights(path)


@pytest.mark.parametrize("contents", [
    {}, {"step": 3, "lr": 1e-4}, {"ema": {}}, {"ema": {"a": 1}},
    {"ema": {"a": {"b": torch.ones(2)}}}, {"ema": None, "model": None},
    {"a": torch.ones(2), "epoch": 3}, {"state_dict": {"a": torch.ones(2)}},
])  # fmt: skip
def test_dict_without_weights(tmp_path, contents):
    with pytest.raises(ValueError, match="a.pt holds no 'ema' weights: .*a state dict is wanted"):
        load_weights(saved(tmp_path / "a.pt", contents))


# ---- JSON ----

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_in_any_unicode_and_with_a_byte_order_mark(tmp_path, encoding):
    """Editors on Windows begin a file with one."""
    (tmp_path / "a.json").write_bytes(
        json.dumps({"name": "é"}, ensure_ascii=False).encode(encoding)
    )
    assert read_json(tmp_path / "a.json") == {"name": "é"}


@pytest.mark.parametrize("text, says", [
    ("[" * 100_000, "nested too deeply"), ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
    ('{"a": NaN}', "the number NaN"), ('{"a": 1e999}', "the number 1e999"),
    ('{"a": ' + "9" * 5000 + "}", "5,000 digits"), ("\0", "Expecting value"),
    ("", "Expecting value"), ("5", "holds a int"), ('{"a": 1', "Expecting"),
    (b"\xff\x00\x01", "codec can't decode"), (None, "No such file"),
])  # fmt: skip
def test_nonsense_in_json_is_one_message(tmp_path, text, says):
    if text is not None:
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"{tmp_path}/a\.json.*{says}"):
        read_json(tmp_path / "a.json")


def test_json_of_an_absurd_size_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(ValueError, match="more than 256 MiB"):
        read_json(tmp_path / "a.json")


# ---- files that want to run code ----

class Hostile:
    """Unpickling it runs a shell command that makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("place", [
    lambda bad: {"a": torch.ones(2), "b": bad},
    lambda bad: {"model": state_dict(), "ema": state_dict(), "args": bad}, lambda bad: {"ema": bad},
    lambda bad: bad, lambda bad: argparse.Namespace(a=bad),
])  # fmt: skip
@pytest.mark.parametrize("kind", FORMATS)
def test_code_in_a_checkpoint_is_refused_and_named(tmp_path, place, kind):
    marker = tmp_path / "it ran"
    path = saved(tmp_path / "a.pt", place(Hostile(marker)), kind)
    with pytest.raises(
        ValueError, match=r"a\.pt was not loaded: it asks for \w+\.system,.* do not trust this file"
    ):
        load_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


class Call(Hostile):
    """Unpickling it makes this call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("wrap", [
    lambda bad: collections.defaultdict(bad), lambda bad: Call(collections.deque, bad),
    lambda bad: Call(pathlib.Path, bad), lambda bad: Call(np.dtype, bad),
    lambda bad: Call(types.SimpleNamespace, bad), lambda bad: Call(frozenset, bad),
])  # fmt: skip
def test_admitted_names_call_nothing(tmp_path, wrap, kind):
    marker = tmp_path / "it ran"
    hidden = (
        Call(os.system, f"touch '{marker}'") if "defaultdict" not in str(wrap(None)) else os.system
    )
    path = saved(tmp_path / "a.pt", {"ema": state_dict(), "x": wrap(hidden)}, kind)
    with pytest.raises(ValueError, match=r"it asks for \w+\.system,.* do not trust this file"):
        load_weights(path)
    path = saved(
        tmp_path / "a.pt", {"ema": state_dict(), "x": Call(eval, f"open({str(marker)!r}, 'w')")},
        kind,
    )  # fmt: skip
    with pytest.raises(ValueError, match="it asks for eval,.* do not trust this file"):
        load_weights(path)
    assert not marker.exists()


def test_a_factory_in_a_pickle_is_never_called(tmp_path):
    contents = {
        "ema": state_dict(), "x": collections.defaultdict(list, {"a": [1]}),
        "y": Call(bytes, 10**11),
    }  # fmt: skip
    path = saved(tmp_path / "a.pt", contents)
    with pytest.raises(ValueError, match="damaged"):  # rather than take 100 GB
        read_checkpoint(path)
    del contents["y"]
    assert type(read_checkpoint(saved(path, contents))["x"]) is dict


EVERYDAY = {  # beside the weights → what becomes of it
    "best_fid": (np.float64(12.5), 12.5), "step": (np.int32(7), 7),
    "big endian": (np.array([5], ">i4")[0], 5),
    "path": (pathlib.PurePosixPath("/data/x"), "/data/x"),
    "windows": (pathlib.PureWindowsPath("x"), "x"),
    "default": (collections.defaultdict(dict, {1: {}}), {1: {}}),
    "deque": (collections.deque([1, 2]), [1, 2]),
    "namespace": (types.SimpleNamespace(a=1), argparse.Namespace(a=1)),
    "version": (torch.__version__, str(torch.__version__)),
    "frozen": (frozenset([1]), frozenset([1])), "bytes": (b"", b""), "complex": (1j, 1j),
    "size": (torch.Size([1]),) * 2, "dtype": (torch.float16, torch.float16),
}  # fmt: skip
UNREAD = [
    np.arange(3), np.float32, np.dtype("f4"), np.random.get_state(), np.random.default_rng(0),
    datetime.datetime(2020, 1, 1), datetime.timedelta(3), decimal.Decimal("1.5"), uuid.UUID(int=3),
    int, slice(1, 2), np.datetime64("2020-01-01"),
]  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_everyday_objects_beside_weights_are_read_as_plain_values(tmp_path, kind):
    contents = {name: value for name, (value, _) in EVERYDAY.items()} | {
        "unread": UNREAD,
        "ema": state_dict(2.0),
    }
    path = saved(tmp_path / "a.pt", contents, kind)
    read = read_checkpoint(path)
    assert {name: read[name] for name in EVERYDAY} == {
        name: want for name, (_, want) in EVERYDAY.items()
    }
    assert_same(load_weights(path).tensors, state_dict(2.0))


def test_a_programs_own_object_is_called_that(tmp_path):
    path = saved(
        tmp_path / "a.pt",
        {"ema": state_dict(), "x": functools.partial(print), "y": nn.Linear(1, 1)},
    )
    with pytest.raises(
        ValueError,
        match="asks for functools.partial, an object of the program.*save the weights alone",
    ):
        load_weights(path)
    torch.save(state_dict(), path, pickle_protocol=4)
    with pytest.raises(ValueError, match="a pickle of another protocol than torch.save's own"):
        load_weights(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", [lambda network: network, lambda network: {"ema": network}])
def test_pickled_network_is_refused(tmp_path, place, kind):
    path = saved(tmp_path / "a.pt", place(nn.Linear(2, 2)), kind)
    with pytest.raises(
        ValueError, match=r"a\.pt was not loaded: it asks for torch\.nn\.modules\.linear\.Linear,"
    ):
        load_weights(path)


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_nobody_is_told_to_load_unsafely(tmp_path):
    """torch's own messages recommend weights_only=False."""
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        for name in ("constants.pkl", "data.pkl", "version"):
            script.writestr(f"script/{name}", b"3\n")
    with tarfile.open(tmp_path / "old.pt", "w") as old:
        old.add(tmp_path / "script.pt", "storages")
    saved(tmp_path / "network.pt", nn.Linear(2, 2))
    for name in ("script.pt", "old.pt", "network.pt"):
        with pytest.raises(ValueError, match=name) as caught:
            load_weights(tmp_path / name)
        assert "weights_only" not in str(caught.value)


# ---- does it fit? ----

def network():
    return nn.Sequential(nn.Linear(3, 2), nn.SiLU(), nn.Linear(2, 4))


def test_fitting_weights_pass():
    check_fits(network(), network().state_dict(), "a.pt")
    halves = dict(reversed(network().half().state_dict().items()))
    check_fits(network(), halves, "a.pt")  # neither order nor type matters


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("0.bias"), "0.bias is missing"),
    (lambda t: t.update({"3.bias": torch.ones(2)}), "3.bias is not in the network"),
    (lambda t: t.update({"2.weight": torch.ones(2, 4)}), r"2.weight is \(2, 4\), wanted \(4, 2\)"),
    (lambda t: t.update({"2.bias": torch.ones(1, 4)}), r"2.bias is \(1, 4\), wanted \(4,\)"),
    (lambda t: t.update({"2.bias": torch.ones(4).int()}),
     "2.bias is of torch.int32, wanted floating point"),
])  # fmt: skip
def test_each_misfit_is_named(change, says):
    tensors = dict(network().state_dict())
    change(tensors)
    with pytest.raises(
        ValueError, match=rf"^a\.pt is of another configuration: {says}\. Give the `model`"
    ):
        check_fits(network(), tensors, "a.pt")


def test_all_misfits_are_counted():
    with pytest.raises(
        ValueError, match=r"0\.weight is missing; 0\.bias is missing; .* and 2 more\. Give"
    ):
        check_fits(network(), {"x": torch.ones(1), "y": torch.ones(1)}, "a.pt")
    with pytest.raises(ValueError, match=r"2\.bias is missing\. Give"):
        check_fits(network(), {}, "a.pt")
    with pytest.raises(ValueError, match=r"2\.bias is missing and 1 more\. Give"):
        check_fits(network(), {"x": torch.ones(1)}, "a.pt")


# ---- whole or not there ----

def test_saved_checkpoint_loads_with_plain_torch(tmp_path):
    path = tmp_path / "0000007.pt"
    save_checkpoint(str(path), ours(2.0))
    loaded = torch.load(path, weights_only=True)
    assert_same(loaded["ema"], state_dict(2.0))
    assert_same(loaded["model"], state_dict(3.0))
    plain = ("opt", "args", "step", "config", "classes")
    assert {k: loaded[k] for k in plain} == {k: ours()[k] for k in plain}
    assert os.listdir(tmp_path) == ["0000007.pt"]  # nothing is left lying about


def half_written(contents, file, *args, **kwargs):
    """Stands for torch.save and save_file when the disk is full."""
    with open(file, "wb") if isinstance(file, Path) else nullcontext(file) as opened:
        opened.write(b"half of it")
    raise OSError("No space left on device")


SAVES = {
    "0000009.pt": lambda path: save_checkpoint(path, ours()),
    "a.safetensors": lambda path: save_weights(path, Weights(state_dict(), None, None)),
}


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("before", [None, b"an older one"])
def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch, name, before):
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir()
    if before:
        path.write_bytes(before)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half_written)
        patched.setattr(safetensors.torch, "save_file", half_written)
        with pytest.raises(OSError, match="No space left"):
            SAVES[name](path)
    assert (path.read_bytes() if path.exists() else None) == before
    assert list_checkpoints(tmp_path) == ([path] if before and path.suffix == ".pt" else [])
    SAVES[name](path)  # what the failure left behind is not in the way
    assert sorted(load_weights(path).tensors) == sorted(state_dict())
    assert os.listdir(path.parent) == [name]


@pytest.mark.parametrize("name", ["0" * 252 + ".pt", "é" * 121 + ".safetensors"])
def test_a_name_as_long_as_may_be_is_written(tmp_path, name):
    SAVES["0000009.pt" if name.endswith(".pt") else "a.safetensors"](tmp_path / name)
    assert os.listdir(tmp_path) == [name] and load_weights(tmp_path / name).tensors


@pytest.mark.parametrize(
    "path, says",
    [("x" * 256, "File name too long"), ("a\0b", "null"), ("file/x", "Not a directory")],
)
def test_paths_that_no_file_can_have(tmp_path, path, says):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=f"is no name for a file or folder .*{says}.*; give another"
    ):
        load_weights(tmp_path / path)


@pytest.mark.parametrize("number, fails", [
    (errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EACCES, False), (errno.EIO, True),
])  # fmt: skip
def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch, number, fails):
    """As on Windows and some network disks; a file that cannot is one."""
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, "refused")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="refused") if fails else nullcontext():
        save_checkpoint(tmp_path / "a.pt", ours())
    assert os.listdir(tmp_path) == ["a.pt"]
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EINVAL, "refused"))
    )
    with pytest.raises(OSError, match=f"refused: '{tmp_path}/b.pt'"):
        save_checkpoint(tmp_path / "b.pt", ours())
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_split_checkpoint_of_torch_distributed_is_called_that(tmp_path):
    (tmp_path / ".metadata").touch()
    with pytest.raises(
        ValueError,
        match="split over files; make one file of it: python -m torch.distributed.checkpoint",
    ):
        load_weights(tmp_path)


@pytest.mark.parametrize("name", SAVES)
def test_file_is_on_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch, name):
    done = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        done.append(
            "folder"
            if stat.S_ISDIR(os.fstat(handle).st_mode)
            else f"file of {os.fstat(handle).st_size}"
        )
        fsync(handle)

    def note_name(source, target):
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    SAVES[name](tmp_path / name)
    assert done == [f"file of {(tmp_path / name).stat().st_size}", "name", "folder"]
