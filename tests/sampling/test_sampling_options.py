"""Options made in Python: what they refuse, what they fill in, and what they lead to."""

from dataclasses import FrozenInstanceError
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import NetworkChoice
from conftest import ROOT
import sample_ddp
from processes.gaussian import GaussianProcess
from sampling import ManyOptions, SamplingOptions, load_sampler, sample_many

DIGITS = ROOT / "examples" / "digits"
CKPT, VAE = DIGITS / "dit.safetensors", DIGITS / "vae"


@pytest.mark.parametrize("kind, values, message", [
    (SamplingOptions, dict(sampler="plms"), "`sampler` is plms; give one of ddpm, ddim"),
    (SamplingOptions, dict(mixed_precision="fp8"), "`mixed_precision` is fp8; give one of no"),
    (SamplingOptions, dict(cfg_channels=0), "`cfg_channels` is 0; give a number of channels"),
    (SamplingOptions, dict(cfg_channels="3"), "`cfg_channels` is 3; give a number of channels"),
    (SamplingOptions, dict(cfg_interval=(0.1,)), "`cfg_interval` has 1 numbers; give two"),
    (SamplingOptions, dict(cfg_interval=(0.7, 0.3)), "`cfg_interval` is 0.7 0.3; give two shares"),
    (SamplingOptions, dict(cfg_interval=(0, 0.3)), "is for guidance, and `cfg_scale=1` is none"),
    (SamplingOptions, dict(eta=1), '`eta` 1.0 is for `sampler="ddim"`; ddpm has its own noise'),
    (SamplingOptions, dict(eta="0", sampler="ddim"), "`eta` is '0'; give a number"),
    (SamplingOptions, dict(cfg_scale=None), "`cfg_scale` is None; give a number"),
    (SamplingOptions, dict(cfg_interval=0.5), "`cfg_interval` is 0.5; give two numbers"),
    (SamplingOptions, dict(cfg_interval=("0", "1")), "`cfg_interval` is '0'; give a number"),
    (SamplingOptions, dict(compile="yes"), "`compile` is 'yes'; it is true or false"),
    (SamplingOptions, dict(num_sampling_steps="9"), "`num_sampling_steps` is '9'; give a whole nu"),
    (SamplingOptions, dict(num_sampling_steps=9.0), "`num_sampling_steps` is 9.0; give a whole nu"),
    (SamplingOptions, dict(num_sampling_steps=True), "`num_sampling_steps` is True; give a whole"),
    (SamplingOptions, dict(num_sampling_steps=0), "it must be from 1 to 1000"),
    (SamplingOptions, dict(cfg_scale=float("nan")), "it must be from -1000 to 1000"),
    (NetworkChoice, dict(model="DiT-XXL/2"), "`model` is DiT-XXL/2; give one of DiT-Ti/1"),
    (NetworkChoice, dict(weights="best"), "'best' is none of ema, raw and ema@DECAY"),
    (NetworkChoice, dict(weights=1), "`weights` is 1; give ema, raw or ema@DECAY"),
    (NetworkChoice, dict(model=["DiT-S/2"]), "`model` is .'DiT-S/2'.; give one of DiT-Ti/1"),
    (NetworkChoice, dict(ckpt=3), "`ckpt` is 3; give the name of a file or folder"),
    (NetworkChoice, dict(ckpt=""), "`ckpt` is ''; give the name of a file or folder"),
    (NetworkChoice, dict(ckpt_high=[]), "`ckpt_high` is .*; give the name of a file or folder"),
    (NetworkChoice, dict(vae=3), "`vae` is 3; give the name of a file or folder"),
    (NetworkChoice, dict(num_classes=-1), "it must be at least 0"),
    (ManyOptions, dict(num_fid_samples=0), "it must be at least 1"),
    (ManyOptions, dict(global_seed=2**63), "the seed is .*; it must be at least 0 and below 2"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_when_it_is_made(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_options_cannot_be_written_to_and_fill_in_what_is_not_given():
    options = SamplingOptions(sampler="unipc", cfg_scale=2, cfg_interval=[0, 0.5])
    assert options.num_sampling_steps is None
    assert options.settled(GaussianProcess()) == dict(
        sampler="unipc", num_sampling_steps=20, eta=0.0, cfg_scale=2.0, cfg_channels=3,
        cfg_interval=(0.0, 0.5), mixed_precision="no", compile=False,
        extrapolation=None, negative_prompt=None, frames=None, high_from=None, cache=None,
    )  # fmt: skip
    assert NetworkChoice().sizes() == ("DiT-XL/2", 256, 1000)
    assert NetworkChoice(image_size=512, num_classes=0).sizes() == ("DiT-XL/2", 512, 0)
    assert NetworkChoice(weights="ema@.9").weights == "ema@0.9"
    with pytest.raises(FrozenInstanceError):
        options.eta = 1.0


def test_a_sampler_from_python_is_that_of_the_command_line():
    sampler = load_sampler(CKPT, vae=VAE, steps=3, device="cpu", sampler="ddim", cfg_scale=2)
    assert (sampler.num_sampling_steps, sampler.sampler, sampler.cfg_scale) == (3, "ddim", 2.0)
    assert sampler.checkpoint == CKPT and sampler.classes == [str(i) for i in range(10)]
    labels = torch.tensor([3, 1])
    images = sampler.decode(sampler.numbered_latents(0, range(2), labels))
    assert images.shape == (2, 32, 32, 3) and images.device.type == "cpu"


@pytest.mark.parametrize("options, message", [
    (dict(scale=2), "no option scale; there are checkpoint, vae, steps, device, atol, cache, cfg"),
    (dict(ckpt="x.pt"), "no option ckpt; there are checkpoint"),
    (dict(num_classes=7), "`num_classes` is 7, but .* is of 10; leave the argument out"),
    (dict(vae="none"), "`vae` none has 3 channels"),
    (dict(device="warp"), "`device` warp cannot be used"),
])  # fmt: skip
def test_mistakes_from_python_are_told_in_its_words(options, message):
    with pytest.raises(ValueError, match=message):
        load_sampler(CKPT, **{"vae": VAE, "device": "cpu"} | options)


def test_a_job_from_python_goes_on_in_the_folder_of_the_command_line(tmp_path, capsys):
    sample_ddp.main([
        "--ckpt", str(CKPT), "--vae", str(VAE), "--num-fid-samples", "3", "--steps", "2",
        "--per-proc-batch-size", "2", "--sample-dir", str(tmp_path), "--cfg-scale", "2",
    ])  # fmt: skip
    (npz,) = tmp_path.glob("*.npz")
    images, folder = np.load(npz)["arr_0"], Path(str(npz).removesuffix(".npz"))
    npz.unlink()
    (folder / "000001.png").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    found = sample_many(
        NetworkChoice(CKPT, vae=VAE), SamplingOptions(num_sampling_steps=2, cfg_scale=2),
        ManyOptions(num_fid_samples=3, per_proc_batch_size=2, sample_dir=tmp_path),
    )  # fmt: skip
    assert found == npz and np.array_equal(np.load(found)["arr_0"], images)
    assert "2 of 3 images are in" in capsys.readouterr().out
    again = json.loads((folder / "manifest.json").read_text())
    assert [again[key] for key in ("decides", "options")] == [
        manifest[key] for key in ("decides", "options")
    ]
    assert len(again["runs"]) == 2
