"""sampling.py, sample.py and sample_ddp.py: what is drawn from what, the picture, the files, and
what users get wrong.
"""

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import threading

from diffusers import AutoencoderKL
import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.files import checkpoint_path, save_checkpoint
from checkpoints.weights import Weights, load_weights, save_weights
from conftest import ROOT, fill_randomly
from runtime.devices import choose_device, tf32
from diffusion import create_diffusion
from runtime.npz import open_array
from models import DiT, DiT_models
import sample
from sampling import many as sampling_many
from sampling import many_folder
import sample_ddp
from sampling.pictures import FONT_SIZE, LEAST_TILE, MARGIN, captions, picture
from runtime.presence import Presence
from checkpoints.choice import NetworkChoice
from checkpoints.loading import build_network
from conditions.labels import label_indices, random_labels, readable
from runtime.disk import check_writable
from sampling.loading import load_sampler
from sampling.options import ManyOptions
from processes.noise import ImageNoise
from sampling.sampler import Sampler
from runtime.surroundings import Place
from starts import each_start
from vae import PixelSpace, load_vae, to_uint8

CONFIG = dict(
    input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=10
)
NAMES = [f"digit {i}" for i in range(10)]
# Flags of a flow's solvers, which are not given
FLOWS = dict.fromkeys([
    "process", "time_shift", "sample_eps", "diffusion_form", "diffusion_norm", "last_step",
    "last_step_size", "atol", "rtol",
])  # fmt: skip


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint with configuration and class names, of random weights."""
    path = tmp_path_factory.mktemp("ckpt") / "dit.safetensors"
    save_weights(path, Weights(fill_randomly(DiT(**CONFIG)).state_dict(), CONFIG, NAMES))
    return str(path)


def write_bare(path, wrap=lambda state: state, **changes):
    """A file with the state dict of a DiT-Ti/4 for 8-pixel images behind a VAE of ratio 2 alone."""
    network = fill_randomly(
        DiT_models["DiT-Ti/4"](**{"input_size": 4, "num_classes": 10, **changes})
    )
    save_checkpoint(path, wrap(network.state_dict()))
    return network


def sampled(tmp_path, *flags):
    """sample.main with these flags; the picture as an array."""
    output = tmp_path / "out.png"
    sample.main(["--output", str(output), "--num-sampling-steps", "3", "--device", "cpu", *flags])
    return np.asarray(Image.open(output))


def test_flags_found_in_the_wild_keep_their_defaults():
    args = vars(sample.build_parser().parse_args([]))
    wild = dict(
        model="DiT-XL/2", vae="mse", image_size=256, num_classes=1000, cfg_scale=4.0,
        num_sampling_steps=250, seed=0, ckpt=None,
    )  # fmt: skip
    ours = dict(
        class_labels=None, sampler="ddpm", device=None, eta=0.0, output="sample.png", weights="ema",
        cfg_channels=3, mixed_precision="no", tf32=True, cfg_interval=[0.0, 1.0], compile=False,
        trajectory=None, extrapolation=None, prompt=None, negative_prompt=None,
        text_encoder=None, frames=None, frame_rate=None, given=None, given_frames=None, cache=None,
        ckpt_high=None, high_from=None, **FLOWS,
    )  # fmt: skip
    assert args == wild | ours
    args = vars(sample_ddp.build_parser().parse_args([]))
    wild = dict(
        model="DiT-XL/2", vae="ema", sample_dir="samples", per_proc_batch_size=32,
        num_fid_samples=50000, image_size=256, num_classes=1000, cfg_scale=1.5,
        num_sampling_steps=250, global_seed=0, tf32=True, ckpt=None,
    )  # fmt: skip
    ours = dict(
        sampler="ddpm", device=None, eta=0.0, weights="ema", cfg_channels=3, mixed_precision="no",
        labels="random", cfg_interval=[0.0, 1.0], compile=False, extrapolation=None, prompts=None,
        negative_prompt=None, text_encoder=None, frames=None, cache=None,
        ckpt_high=None, high_from=None, **FLOWS,
    )  # fmt: skip
    assert args == wild | ours
    assert sample.IMAGENET_LABELS == [207, 360, 387, 974, 88, 979, 417, 279]


def test_picture_shows_what_plain_calls_of_the_process_give(tmp_path, vae, ckpt):
    """Seed, then x_T, then one draw of the doubled batch per step: what other implementations do.
    """
    got = sampled(
        tmp_path, "--ckpt", ckpt, "--vae", vae, "--class-labels", "3", "digit 1", "--seed", "5"
    )
    network = fill_randomly(DiT(**CONFIG)).eval()
    torch.manual_seed(5)
    z = torch.randn(2, 4, 4, 4)
    z, y = torch.cat([z, z]), torch.tensor([3, 1, 10, 10])
    with torch.no_grad():
        for t in (999, 500, 0):
            process = create_diffusion("3")
            step = {999: 2, 500: 1, 0: 0}[t]
            assert process.timestep_map[step] == t
            z = process.p_sample(
                network.forward_with_cfg, z, torch.full((4,), step), clip_denoised=False,
                model_kwargs=dict(y=y, cfg_scale=4.0),
            )["sample"]  # fmt: skip
    tiles = to_uint8(load_vae(vae).decode(z[:2])).numpy()
    factor = LEAST_TILE // 8
    for i, tile in enumerate(tiles):
        left = MARGIN + i * (96 + MARGIN)
        assert np.array_equal(
            got[MARGIN : MARGIN + 96, left : left + 96], tile.repeat(factor, 0).repeat(factor, 1)
        )


@pytest.mark.parametrize("sampler, scale", [("ddpm", 4.0), ("ddim", 1.0)])
def test_a_sampler_gives_the_images_of_the_picture(sampler, scale):
    network = fill_randomly(DiT(**{**CONFIG, "in_channels": 3})).eval()
    ours = Sampler(network, PixelSpace(), None, 3, sampler, cfg_scale=scale)
    torch.manual_seed(9)  # which leaves no trace
    images = ours.images([3, 1], seed=5)
    drawn, _ = sample.sample(ours, [3, 1], 5)
    torch.manual_seed(5)
    noise = torch.randn(2, 3, 4, 4)
    latents = ours.latents(torch.tensor([3, 1]), noise)
    assert images.shape == (2, 4, 4, 3) and images.dtype == np.uint8
    assert np.array_equal(images, drawn) and np.array_equal(images, to_uint8(latents).numpy())
    assert np.array_equal(ours.images(torch.tensor([3, 1])), ours.images([3, 1], seed=0))
    for none in ([], torch.tensor([])):
        with pytest.raises(ValueError, match="`labels` is empty; give a label or a prompt for"):
            ours.images(none)


@pytest.mark.parametrize("labels, message", [
    ([11], "`labels` has 11; give numbers from 0 to 9, or 10 for no class"),
    ([0, -1], "`labels` has -1; give numbers from 0 to 9, or 10 for no class"),
    (2, "`labels` are 2; give a row of whole numbers"),
    ([1.5], "`labels` are .1.5.; give a row of whole numbers"),
    ([True], "`labels` are .True.; give a row"),
    ([None], "`labels` are .None.; give a row"),
    (np.array([[1, 2]]), "`labels` are array.*; give a row"),
    ([2**70], "`labels` are .*; give a row"),
])  # fmt: skip
def test_labels_that_the_network_does_not_have_are_refused(labels, message):
    ours = Sampler(DiT(**CONFIG).eval(), PixelSpace(), None, 3)
    with pytest.raises(ValueError, match=message):
        ours.images(labels)


@pytest.mark.parametrize("seed", [-1, 2**63, "0", 1.0, None, True])
def test_a_seed_from_python_is_one_that_the_command_line_takes(seed):
    ours = Sampler(DiT(**{**CONFIG, "in_channels": 3}).eval(), PixelSpace(), None, 3)
    with pytest.raises(ValueError, match="`seed` is .*; (give a whole number|it must be)"):
        ours.images([1], seed)


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.6)])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_sampler_calls_the_process_as_asked(sampler, eta, scale):
    network, noise, labels = (
        fill_randomly(DiT(**{**CONFIG, "in_channels": 3})).eval(), torch.randn(2, 3, 4, 4),
        torch.tensor([1, 2]),
    )  # fmt: skip
    ours = Sampler(network, PixelSpace(), None, 4, sampler, eta, scale, "all")
    torch.manual_seed(1)
    got = ours.latents(labels, noise)
    torch.manual_seed(1)
    process = create_diffusion("4")
    loop, extra = (
        (process.p_sample_loop, {})
        if sampler == "ddpm"
        else (process.ddim_sample_loop, {"eta": eta})
    )
    if scale == 1:
        want = loop(
            network, noise.shape, noise, clip_denoised=True, model_kwargs=dict(y=labels), **extra
        )
    else:
        y = torch.cat([labels, torch.tensor([10, 10])])
        kwargs = dict(y=y, cfg_scale=scale, cfg_channels=3)
        want = loop(
            network.forward_with_cfg, (4, 3, 4, 4), torch.cat([noise, noise]), clip_denoised=True,
            model_kwargs=kwargs, **extra,
        )[:2]  # fmt: skip
    assert torch.equal(got, want) and got.abs().max() <= 1.0


def test_no_guidance_means_no_doubled_batch():
    sizes = []
    network = fill_randomly(DiT(**{**CONFIG, "in_channels": 3})).eval()
    network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for scale in (1.0, 2.0):
        Sampler(network, PixelSpace(), None, 2, cfg_scale=scale).latents(
            torch.tensor([0, 1, 2]), torch.randn(3, 3, 4, 4)
        )
    assert sizes == [3, 3, 6, 6]


def test_guided_channels_matter(tmp_path, vae, ckpt):
    pictures = [
        sampled(tmp_path, "--ckpt", ckpt, "--vae", vae, "--cfg-channels", n)
        for n in ("3", "all", "4")
    ]
    assert not np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[1], pictures[2])


def test_grid_has_four_to_a_row_and_a_caption_under_each():
    images = np.zeros((6, 128, 128, 3), np.uint8)
    plain, labelled = (
        picture(images, [""] * 6),
        picture(images, ["a tench or two, quite a long name indeed"] * 6),
    )
    assert plain.size == (4 * 132 + 4, 2 * 132 + 4)
    assert labelled.size == (4 * 132 + 4, 2 * (132 + FONT_SIZE + MARGIN) + 4)
    strip = np.asarray(labelled)[4 + 128 : 4 + 128 + FONT_SIZE, :132]
    assert (strip < 100).any()
    # The margin between columns stays clear of long names
    between = np.asarray(labelled)[4 + 128 :, 132:136]
    assert (between[: FONT_SIZE] == 255).all()


def test_default_labels_and_names():
    assert sample.parse_labels(None, 1000, None) == sample.IMAGENET_LABELS
    assert sample.parse_labels(None, 10, NAMES) == list(range(8))
    assert sample.parse_labels(None, 3, None) == [0, 1, 2]
    assert sample.parse_labels(["digit 7", "0"], 10, NAMES) == [7, 0]
    assert sample.parse_labels(["10", "index:1", "name:1"], 3, ["1", "10", "2"]) == [1, 1, 0]
    with pytest.raises(
        ValueError,
        match="--class-labels 1 may be .* number 1 or .* called 1 .number 0.; give index:1 or",
    ):
        sample.parse_labels(["1"], 3, ["1", "10", "2"])
    assert captions([7, 2], 10, NAMES) == ["digit 7", "digit 2"] and captions([7], 10, None) == [
        "7"
    ]


def test_folder_names_of_imagenet_are_shown_and_understood_as_words():
    synsets = ["n02099601", "n03445777"]
    assert readable(synsets) == ["golden retriever", "golf ball"]
    assert label_indices(["golf ball", "n02099601", "1"], 2, synsets) == [1, 0, 1]
    assert readable(["n00000000"]) == ["n00000000"]
    cranes = ["n02012849", "n03126707"]  # a bird and a machine
    assert readable(cranes) == ["crane", "crane"] and label_indices(["n03126707"], 2, cranes) == [1]
    with pytest.raises(
        ValueError, match="crane: several classes have that name; give the number, 0 or 1"
    ):
        label_indices(["crane"], 2, cranes)
    for classes in (None, NAMES, [*synsets, "my sofa"]):
        assert readable(classes) == classes


@pytest.mark.parametrize("text, want", [
    ("0", 0), ("3", 3), ("03", {"give index:03 or name:03"}), ("007", 7), ("12", 2),
    ("index:12", {"give a number"}), ("name:03", 1), ("index:03", 3), ("cafe\u0301", 4),
    ("name:caf\xe9", 4), ("a\u0302\u0300", {"several"}), ("name:x", 5),
    ("9" * 6000, {"give a number from 0 to 9"}), ("-1", {"give a number"}), ("", {"give a number"}),
])  # fmt: skip
def test_a_label_is_one_class_or_refused(text, want):
    """Names that look like numbers, and names in either Unicode form."""
    # The same letter twice
    names = ["0", "03", "12", "three", "caf\xe9", "name:x", "\u1ea7", "\xe2\u0300", "A", "B"]
    if isinstance(want, int):
        assert label_indices([text], 10, names) == [want]
    else:
        with pytest.raises(ValueError, match=next(iter(want))):
            label_indices([text], 10, names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_a_network_put_in_half_precision_samples(dtype, sampler):
    """network.half(), as users of other implementations do it."""
    images = {}
    for kind in (torch.float32, dtype):
        network = (
            fill_randomly(DiT(4, 2, 3, 16, 2, 2, num_classes=3))
            .eval()
            .requires_grad_(False)
            .to(kind)
        )
        made = Sampler(network, PixelSpace(), None, 4, sampler, cfg_scale=2.0)
        images[kind] = made.numbered_latents(0, range(3), torch.arange(3))
    assert images[dtype].dtype == torch.float32
    assert 0 < (images[dtype] - images[torch.float32]).abs().mean() < 0.1


def test_bare_state_dict_takes_its_configuration_from_the_flags(tmp_path, vae):
    network = write_bare(tmp_path / "a.pt")
    write_bare(
        tmp_path / "b.pt",
        wrap=lambda state: {"model": {}, "ema": {f"module.{k}": v for k, v in state.items()}},
    )
    flags = ["--vae", vae, "--model", "DiT-Ti/4", "--image-size", "8", "--num-classes", "10"]
    a, b = (sampled(tmp_path, "--ckpt", str(tmp_path / name), *flags) for name in ("a.pt", "b.pt"))
    assert np.array_equal(a, b)
    choice = NetworkChoice(vae=vae, model="DiT-Ti/4", image_size=8, num_classes=10)
    built = build_network(choice, Weights(network.state_dict(), None, None), vae)
    assert all(
        torch.equal(x, y)
        for x, y in zip(built.state_dict().values(), network.state_dict().values(), strict=True)
    )
    assert not built.training and not any(p.requires_grad for p in built.parameters())


def test_half_precision_weights_are_sampled_in_float32(tmp_path, vae):
    write_bare(tmp_path / "half.pt", wrap=lambda state: {k: v.half() for k, v in state.items()})
    flags = ["--vae", vae, "--model", "DiT-Ti/4", "--image-size", "8", "--num-classes", "10"]
    assert sampled(tmp_path, "--ckpt", str(tmp_path / "half.pt"), *flags).any()


def test_raw_weights_differ_from_ema(tmp_path, vae):
    states = [fill_randomly(DiT(**CONFIG), seed).state_dict() for seed in (0, 1)]
    save_checkpoint(
        tmp_path / "c.pt", {"model": states[0], "ema": states[1], "config": CONFIG, "classes": None}
    )
    pictures = [
        sampled(tmp_path, "--ckpt", str(tmp_path / "c.pt"), "--vae", vae, "--weights", w)
        for w in ("raw", "ema")
    ]
    assert not np.array_equal(*pictures)


def test_network_without_classes(tmp_path, vae):
    config = {**CONFIG, "num_classes": 0}
    save_weights(
        tmp_path / "u.safetensors", Weights(fill_randomly(DiT(**config)).state_dict(), config, None)
    )
    flags = ["--ckpt", str(tmp_path / "u.safetensors"), "--vae", vae, "--cfg-scale", "1"]
    assert sampled(tmp_path, *flags).shape[:2] == (204, 404)
    sample_ddp.main(
        [
            *flags,
            "--num-fid-samples",
            "2",
            "--num-sampling-steps",
            "2",
            "--sample-dir",
            str(tmp_path / "s"),
        ]
    )
    assert len(list((tmp_path / "s").glob("*/*.png"))) == 2


BAD = [
    (["--model", "DiT-XXL/2"], "invalid choice: 'DiT-XXL/2'"),
    (["--num-sampling-steps", "0"], "--num-sampling-steps is 0; it must be from 1 to 1000"),
    (["--num-sampling-steps", "1001"], "--num-sampling-steps is 1001"),
    (["--eta", "0.5"], "--eta 0.5 is for --sampler ddim"),
    (["--sampler", "ddim", "--eta", "2"], "--eta is 2.0"),
    (["--cfg-scale", "nan"], "--cfg-scale is nan"),
    (["--cfg-channels", "0"], "neither a number of channels, 1 or more, nor all"),
    (["--cfg-channels", "9"], "--cfg-channels 9: the latents have 4"),
    (
        ["--class-labels", "10"],
        "--class-labels 10: give a number from 0 to 9 or one of the names digit 0",
    ),
    (["--class-labels", "-1"], "--class-labels -1: give a number from 0 to 9"),
    (["--class-labels", "dog"], "--class-labels dog: give a number from 0 to 9"),
    (["--output", "no/such/folder/a.png"], "cannot write no/such/folder/a.png"),
    (["--output", "/proc/a.png"], "cannot write /proc/a.png"),
    (["--output", "tests"], "tests is a folder"),
    (["--output", "/tmp/picture.xyz"], ".xyz is not an image format"),
    (["--vae", "none"], "--vae none has 3 channels, the network of"),
    (["--ckpt", "missing.pt"], "there is no checkpoint missing.pt"),
    (["--device", "warp"], "--device warp cannot be used"),
    (["--image-size", "10"], "image size 10 is not a multiple of 4"),
    (["--image-size", "8x10"], "image width 10 is not a multiple of 4"),
    (["--image-size", "16x8", "--extrapolation", "crop"],
     "a grid of 4 x 2 tokens is beyond the trained grid of 2 x 2"),
    (["--image-size", "16", "--extrapolation", "ntk"],
     "--extrapolation ntk slows rotations down, and the network has a position table without any"),
    (["--image-size", "0x8"], "--image-size is 0; it must be at least 1"),
    (["--image-size", "8*8"], "'8*8' is no size; give pixels, such as 256, or HEIGHTxWIDTH"),
    (["--num-classes", "7"], "--num-classes is 7, but"),
    (["--model", "DiT-B/4"], "--model is DiT-B/4, but"),
    (["--image-size", "99999"], "--image-size is 99999; it must be from 1 to 16,384"),
    (["--num-classes", "1000"], "--num-classes is 1000, but"),
    (["--seed", "99999999999999999999"], "the seed is 99999999999999999999; it must be"),
    (["--seed", "-1"], "the seed is -1"),
    (["--device", "meta"], "--device meta holds no numbers"),
    (["--output", "/tmp/picture.xbm"], ".xbm is not an image format"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_mistake_gets_one_message_before_sampling(
    tmp_path, capsys, monkeypatch, vae, ckpt, flags, message
):
    monkeypatch.setattr(Sampler, "trajectory", lambda *_: pytest.fail("sampling began"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        sample.main(
            [
                "--ckpt",
                ckpt,
                "--vae",
                vae,
                "--device",
                "cpu",
                "--output",
                str(tmp_path / "o.png"),
                *flags,
            ]
        )
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def test_a_run_behind_an_autoencoder_of_its_own_is_not_decoded_by_a_released_one(
    tmp_path, capsys, vae
):
    network, path = fill_randomly(DiT(**CONFIG)), tmp_path / "run.pt"
    saved = {"ema": network.state_dict(), "step": 3, "config": network.config}
    save_checkpoint(path, saved | {"args": {"vae": vae}})
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(path), "--output", str(tmp_path / "o.png"), "--device", "cpu"])
    assert f"was trained behind the autoencoder {vae}: give --vae {vae}" in capsys.readouterr().err
    assert sampled(tmp_path, "--ckpt", str(path), "--vae", vae).any()
    weights = load_weights(path)
    for recorded in ("ema", "stabilityai/sd-vae-ft-mse", vae):  # in the last case vae is not "mse"
        args = {"args": {"vae": recorded}}
        name = vae if recorded == vae else "mse"
        build_network(NetworkChoice(path), weights._replace(training=args), name)


def test_bare_state_dict_of_another_configuration(tmp_path, capsys, vae):
    write_bare(tmp_path / "a.pt")
    flags = [
        "--ckpt", str(tmp_path / "a.pt"), "--vae", vae, "--image-size", "8", "--output",
        str(tmp_path / "o.png"),
    ]  # fmt: skip
    for more, message in [
        (
            ["--model", "DiT-Ti/4"],
            "y_embedder.embedding_table.weight is (11, 128), wanted (1001, 128)",
        ),
        (["--model", "DiT-S/4", "--num-classes", "10"], "and"),
        (["--model", "DiT-Ti/8", "--num-classes", "10"], "image size 8 is not a multiple of 16"),
    ]:
        with pytest.raises(SystemExit):
            sample.main([*flags, *more])
        error = capsys.readouterr().err
        assert message in error and (
            "of another configuration" in error or "not a multiple" in error
        )


def test_guidance_needs_a_null_class(tmp_path, capsys, vae):
    config = {**CONFIG, "class_dropout_prob": 0.0}
    save_weights(
        tmp_path / "n.safetensors", Weights(fill_randomly(DiT(**config)).state_dict(), config, None)
    )
    with pytest.raises(SystemExit):
        sampled(tmp_path, "--ckpt", str(tmp_path / "n.safetensors"), "--vae", vae)
    assert (
        "the network has no null class to guide against; pass --cfg-scale 1"
        in capsys.readouterr().err
    )
    assert sampled(
        tmp_path, "--ckpt", str(tmp_path / "n.safetensors"), "--vae", vae, "--cfg-scale", "1"
    ).any()


@pytest.mark.parametrize("flags, message", [
    ([], "no weights were released for DiT-S/2"),
    (["--image-size", "128"], "no weights were released"),
    (["--num-classes", "10", "--model", "DiT-XL/2"], "no weights were released"),
])  # fmt: skip
def test_without_checkpoint_only_released_models_can_be_sampled(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        sample.main(["--model", "DiT-S/2", "--output", str(tmp_path / "o.png"), *flags])
    assert message in capsys.readouterr().err


@each_start
def test_sample_as_a_command(tmp_path, vae, ckpt, start):
    (tmp_path / "a.png").write_bytes(b"a picture of before")
    flags = ["--ckpt", ckpt, "--vae", vae, "--num-sampling-steps", "2"]
    done = start("sample.py", *flags, "--output", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert "8 images of 8x8 pixels" in done.stdout and Image.open(tmp_path / "a.png").size == (
        404,
        2 * 116 + 4,
    )


# ---- image noise, labels, settings ----


def test_noise_of_an_image_depends_on_seed_and_index_alone():
    whole, part = ImageNoise(3, range(6), "cpu"), ImageNoise(3, [4, 2], "cpu")
    x = torch.empty(6, 2, 3, 3)
    first, second = whole(x), whole(x)
    assert torch.equal(part(x[:2]), first[[4, 2]]) and torch.equal(part(x[:2]), second[[4, 2]])
    assert (
        len(
            {
                tuple(row.flatten().tolist())
                for row in torch.cat([first, second, ImageNoise(4, range(6), "cpu")(x)])
            }
        )
        == 18
    )
    assert abs(ImageNoise(0, range(4000), "cpu")(torch.empty(4000, 4)).std() - 1) < 0.02


def test_noise_for_a_doubled_batch_is_the_same_twice_and_leaves_torch_alone():
    state = torch.get_rng_state()
    noise = ImageNoise(0, range(3), "cpu")(torch.empty(6, 5))
    assert torch.equal(noise[:3], noise[3:]) and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="batch of 4"):
        ImageNoise(0, range(3), "cpu")(torch.empty(4, 5))


def test_labels_of_images_depend_on_seed_and_index_alone():
    labels = random_labels(1, range(2000), 10)
    assert torch.equal(random_labels(1, [7, 1500], 10), labels[[7, 1500]]) and not torch.equal(
        random_labels(2, range(2000), 10), labels
    )
    assert torch.bincount(labels, minlength=10).min() > 150


def test_tf32_is_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), tf32(True):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        raise KeyError
    with tf32(False):
        assert (
            torch.get_float32_matmul_precision() == "highest"
            and not torch.backends.cudnn.allow_tf32
        )
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_two_processes_may_ask_at_once_whether_a_file_can_be_written(tmp_path, monkeypatch):
    touch = Path.touch

    def and_the_other_is_done_first(path):
        touch(path)
        path.unlink()

    monkeypatch.setattr(Path, "touch", and_the_other_is_done_first)
    check_writable(tmp_path / "scores.json")
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_nowhere_is_told_before_anything_is_drawn(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match="loop.png .Too many levels of symbolic links"):
        check_writable(tmp_path / "loop.png")
    (tmp_path / "new.png").symlink_to("there.png")
    check_writable(tmp_path / "new.png")  # its target is written


def test_checks_leave_no_trace(tmp_path):
    check_writable(tmp_path / "new.png")
    assert not list(tmp_path.iterdir()) and choose_device("cpu").type == "cpu"


# ---- sample_ddp.py ----


def many(ckpt, vae, folder, *flags):
    """sample_ddp.main with 7 images; the folder of PNGs and the array in the .npz."""
    sample_ddp.main([
        "--ckpt", ckpt, "--vae", vae, "--num-fid-samples", "7", "--num-sampling-steps", "3",
        "--per-proc-batch-size", "2", "--device", "cpu", "--sample-dir", str(folder), *flags,
    ])  # fmt: skip
    (npz,) = Path(folder).glob("*.npz")
    return npz.with_suffix("") if npz.with_suffix("").is_dir() else Path(str(npz)[:-4]), np.load(
        npz
    )["arr_0"]


def test_files_are_whole_and_named_as_evaluations_expect(tmp_path, vae, ckpt):
    folder, array = many(ckpt, vae, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"{i:06d}.png" for i in range(7)),
        "manifest.json",
    ]
    assert array.shape == (7, 8, 8, 3) and array.dtype == np.uint8
    for i in range(7):
        assert np.array_equal(np.asarray(Image.open(folder / f"{i:06d}.png")), array[i])
    manifest = json.loads((folder / "manifest.json").read_text())
    decides, (one,) = manifest["decides"], manifest["runs"]
    assert decides["num_sampling_steps"] == 3 and decides["network"]["hidden_size"] == 16
    assert len(decides["checkpoint_sha256"]) == 64 and len(decides["vae_sha256"]) == 2
    assert manifest["options"]["ckpt"] == ckpt and manifest["options"]["per_proc_batch_size"] == 2
    assert (
        isinstance(one["seconds"], float)
        and one["processes"] == 1
        and one["versions"]["torch"] == torch.__version__
    )


def test_batch_size_moves_no_pixel_by_more_than_a_grey_level(tmp_path, vae, ckpt):
    arrays = [
        many(ckpt, vae, tmp_path / n, "--per-proc-batch-size", n)[1].astype(int)
        for n in ("2", "3", "7")
    ]
    assert max(abs(arrays[0] - other).max() for other in arrays[1:]) <= 1


def test_images_are_those_of_their_label_and_noise(tmp_path, vae, ckpt):
    _, array = many(ckpt, vae, tmp_path, "--cfg-scale", "1")
    noise_fn = ImageNoise(0, [5], "cpu")
    x, labels = noise_fn(torch.empty(1, 4, 4, 4)), random_labels(0, [5], 10)
    network = fill_randomly(DiT(**CONFIG)).eval()
    x = create_diffusion("3").p_sample_loop(
        network, x.shape, x, clip_denoised=False, model_kwargs=dict(y=labels), noise_fn=noise_fn
    )
    assert abs(to_uint8(load_vae(vae).decode(x))[0].numpy().astype(int) - array[5]).max() <= 1


def test_restart_makes_only_what_is_missing(tmp_path, vae, ckpt, monkeypatch):
    folder, array = many(ckpt, vae, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    (folder / "000003.png").rename(folder / ".000003.png.9-9.partial")
    (tmp_path / f"{folder.name}.npz").unlink()
    batches, latents = [], Sampler.latents
    monkeypatch.setattr(
        Sampler, "latents",
        lambda self, labels, *rest: batches.append(len(labels)) or latents(self, labels, *rest),
    )  # fmt: skip
    again = many(ckpt, vae, tmp_path)[1]
    assert batches == [2] and np.array_equal(again, array)
    assert all(
        before[p.name] == p.stat().st_mtime_ns
        for p in folder.glob("*.png")
        if p.name != "000003.png"
    )


def refused(capsys, ckpt, vae, folder, *flags):
    """What sample_ddp.py says when it gives up in the middle of its work."""
    with pytest.raises(SystemExit) as stopped:
        many(ckpt, vae, folder, *flags)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_foreign_and_damaged_files_in_the_folder(tmp_path, vae, ckpt, capsys):
    folder, array = many(ckpt, vae, tmp_path)
    npz = tmp_path / f"{folder.name}.npz"
    npz.unlink()
    (folder / "grid.png").write_bytes(b"a picture of somebody")
    victim = folder / "000002.png"
    victim.write_bytes(victim.read_bytes()[:40])
    assert "000002.png cannot be read" in refused(capsys, ckpt, vae, tmp_path)
    Image.new("RGB", (16, 16)).save(victim)
    assert "000002.png has the shape (16, 16, 3), others (8, 8, 3); remove it" in refused(
        capsys, ckpt, vae, tmp_path
    )
    assert not list(tmp_path.glob("*npz*")) and not list(tmp_path.glob(".*npz*"))
    victim.unlink()
    assert np.array_equal(many(ckpt, vae, tmp_path)[1], array) and (folder / "grid.png").exists()


def test_manifest_is_of_the_checkpoint_that_was_loaded(tmp_path, vae, monkeypatch):
    """A run folder may get a newer checkpoint while its newest is being loaded."""
    def save_step(step):
        state = fill_randomly(DiT(**CONFIG), seed=step).state_dict()
        path = checkpoint_path(tmp_path / "000-run", step)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {"model": state, "ema": state, "config": CONFIG, "classes": None})
        return path

    first, load = save_step(1), sampling_many.build_sampler
    monkeypatch.setattr(
        sampling_many, "build_sampler", lambda *args: (load(*args), save_step(2))[0]
    )
    folder, _ = many(str(tmp_path / "000-run"), vae, tmp_path / "samples")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["decides"]["checkpoint_sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    )
    assert folder.name.startswith("0000001-")


def test_another_autoencoder_in_the_same_place_gets_another_folder(tmp_path, vae, ckpt):
    copied = tmp_path / "vae"
    shutil.copytree(vae, copied)
    many(ckpt, str(copied), tmp_path / "samples")
    autoencoder = AutoencoderKL.from_pretrained(copied)
    autoencoder.post_quant_conv.weight.data.mul_(2)
    autoencoder.save_pretrained(copied)
    sample_ddp.main([
        "--ckpt", ckpt, "--vae", str(copied), "--num-fid-samples", "7", "--num-sampling-steps", "3",
        "--device", "cpu", "--per-proc-batch-size", "2", "--sample-dir", str(tmp_path / "samples"),
    ])  # fmt: skip
    assert len(list((tmp_path / "samples").glob("*.npz"))) == 2


def test_other_options_never_share_a_folder(tmp_path, vae, ckpt):
    for flags in (
        ["--cfg-scale", "2"], ["--global-seed", "1"], ["--sampler", "ddim"],
        ["--num-fid-samples", "3"], ["--cfg-channels", "all"], ["--labels", "balanced"],
        ["--no-tf32"], ["--per-proc-batch-size", "1"],
    ):  # fmt: skip
        many_flags = [
            "--ckpt", ckpt, "--vae", vae, "--num-fid-samples", "2", "--num-sampling-steps", "2",
            "--sample-dir", str(tmp_path),
        ]  # fmt: skip
        sample_ddp.main([*many_flags, *flags])
    assert len(list(tmp_path.glob("*.npz"))) == 8


@each_start
def test_two_processes_write_the_bytes_of_one(tmp_path, vae, ckpt, start):
    flags = [
        "--ckpt", ckpt, "--vae", vae, "--num-fid-samples", "7", "--num-sampling-steps", "3",
        "--per-proc-batch-size", "2", "--device", "cpu",
    ]  # fmt: skip
    names = ("one", "two")
    for processes, name in enumerate(names, start=1):
        done = start("sample_ddp.py", *flags, "--sample-dir", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
    files = [sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in names]
    assert len(files[0]) == 9
    assert [p.relative_to(tmp_path / "one") for p in files[0]] == [
        p.relative_to(tmp_path / "two") for p in files[1]
    ]
    for a, b in zip(*files):
        if a.name == "manifest.json":  # which also says when, and how many processes
            a, b = (json.loads(path.read_text()) for path in (a, b))
            assert a["decides"] == b["decides"] and [x["runs"][0]["processes"] for x in (a, b)] == [
                1,
                2,
            ]
        else:
            assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("flags, message", [
    (["--num-fid-samples", "0"], "--num-fid-samples is 0"),
    (["--per-proc-batch-size", "0"], "--per-proc-batch-size is 0"),
    (["--global-seed", "-1"], "the seed is -1"),
    (["--sample-dir", "/proc/samples"], "cannot write to /proc/samples"),
])  # fmt: skip
def test_mistakes_of_sample_ddp(tmp_path, capsys, vae, ckpt, flags, message):
    with pytest.raises(SystemExit) as stopped:
        many(ckpt, vae, tmp_path, *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_labels_are_drawn_balanced_or_read(tmp_path, vae, ckpt, capsys):
    """Images of a file with the labels that were drawn are the same; those of other labels are
    others.
    """
    lines = [str(int(label)) for label in random_labels(0, range(7), 10)]
    (tmp_path / "drawn.txt").write_text("\n".join(lines))
    (tmp_path / "named.txt").write_text(
        "\n".join(f" digit {line} " for line in lines) + "\nand more\n"
    )
    arrays = {
        name: many(
            ckpt,
            vae,
            tmp_path / f"to-{name}",
            "--labels",
            name if "." not in name else str(tmp_path / name),
        )[1]
        for name in ("random", "drawn.txt", "named.txt", "balanced")
    }
    assert np.array_equal(arrays["random"], arrays["drawn.txt"]) and np.array_equal(
        arrays["random"], arrays["named.txt"]
    )
    (tmp_path / "counted.txt").write_text("\n".join(str(i % 10) for i in range(7)))
    counted = many(ckpt, vae, tmp_path / "to-counted", "--labels", str(tmp_path / "counted.txt"))[1]
    assert np.array_equal(arrays["balanced"], counted) and not np.array_equal(
        counted, arrays["random"]
    )


def test_another_file_of_labels_gets_another_folder(tmp_path, vae, ckpt):
    path = tmp_path / "labels.txt"
    for last in ("3", "4"):
        path.write_text("1\n" * 6 + last)
        sample_ddp.main([
            "--ckpt", ckpt, "--vae", vae, "--num-fid-samples", "7", "--num-sampling-steps", "2",
            "--device", "cpu", "--sample-dir", str(tmp_path / "s"), "--labels", str(path),
            "--per-proc-batch-size", "7",
        ])  # fmt: skip
    first, second = (np.load(path)["arr_0"] for path in sorted((tmp_path / "s").glob("*.npz")))
    assert np.array_equal(first[:6], second[:6]) and not np.array_equal(first[6], second[6])


@pytest.mark.parametrize("text, message", [
    ("1\n2\n", "has 2 lines, --num-fid-samples is 7; one line per image"),
    ("1\n" * 6 + "12", "12: give a number from 0 to 9 or one of the names digit 0"),
    ("1\n\n" * 4, "labels.txt, line 2: : give a number from 0 to 9"),
    (None, "cannot be read (No such file or directory); give random, balanced, or a file"),
])  # fmt: skip
def test_mistakes_in_a_file_of_labels(tmp_path, capsys, vae, ckpt, text, message):
    if text:
        (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        many(ckpt, vae, tmp_path / "s", "--labels", str(tmp_path / "labels.txt"))
    assert (
        stopped.value.code == 2
        and message in capsys.readouterr().err
        and not (tmp_path / "s").exists()
    )


def test_labels_for_a_network_without_classes(tmp_path, capsys, vae):
    config = {**CONFIG, "num_classes": 0}
    save_weights(
        tmp_path / "u.safetensors", Weights(fill_randomly(DiT(**config)).state_dict(), config, None)
    )
    with pytest.raises(SystemExit):
        many(
            str(tmp_path / "u.safetensors"), vae, tmp_path, "--cfg-scale", "1", "--labels",
            "balanced",
        )  # fmt: skip
    assert "--labels balanced: the network was trained without classes" in capsys.readouterr().err


def test_what_killed_processes_left_is_removed_and_what_is_written_is_not(tmp_path, vae, ckpt):
    folder, _ = many(ckpt, vae, tmp_path)
    dead, dead_npz, alive = (
        folder / ".000003.png.0-99.partial", tmp_path / f".{folder.name}.npz.0-99.partial",
        folder / ".000004.png.1-7.partial",
    )  # fmt: skip
    for path in (dead, dead_npz, alive):
        path.write_bytes(b"half an image")
    with open(alive, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        many(ckpt, vae, tmp_path)
    assert alive.exists() and not dead.exists() and not dead_npz.exists()


def test_a_full_disk_gets_one_message(tmp_path, vae, ckpt, capsys, monkeypatch):
    def refuse(self, file, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(file.name))

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(SystemExit) as stopped:
        many(ckpt, vae, tmp_path)
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert (
        "No space left on device; when that is mended, the same command goes on" in err
        and "000000.png" in err
    )
    monkeypatch.setattr(Image.Image, "save", save)
    assert len(many(ckpt, vae, tmp_path)[1]) == 7


def test_png_files_are_written_while_the_next_chunk_is_sampled(tmp_path, vae, ckpt, monkeypatch):
    """Each write waits until the network has been asked for the chunk after it, which it would
    never be otherwise.
    """
    began, latents, write = [], Sampler.latents, sampling_many.write_locked
    more = threading.Condition()

    def noted(self, labels, *rest):
        with more:
            began.append(len(labels))
            more.notify_all()
        return latents(self, labels, *rest)

    def waiting(path, content):
        if path.suffix == ".png" and path.name < "000006":
            chunk = int(path.stem) // 2
            with more:
                assert more.wait_for(lambda: len(began) > chunk + 1, timeout=20)
        write(path, content)

    monkeypatch.setattr(Sampler, "latents", noted)
    monkeypatch.setattr(sampling_many, "write_locked", waiting)
    folder, array = many(ckpt, vae, tmp_path)
    assert began == [2, 2, 2, 1] and len(array) == 7


def test_progress_tells_the_time_left(tmp_path, vae, ckpt, capsys):
    many(ckpt, vae, tmp_path)
    assert "4/4 [00:" in capsys.readouterr().err


def test_the_first_process_says_whom_it_waits_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampling_many, "TELL_SECONDS", 0)
    monkeypatch.setattr(sampling_many.time, "sleep", lambda _: (tmp_path / "000001.png").touch())
    (tmp_path / "000000.png").touch()
    with Presence(tmp_path, Place(0, 2)) as presence:
        sampling_many.wait_for_all(tmp_path, 2, presence, 1)
    assert capsys.readouterr().out == (
        "waiting for 1 images of other processes (process 1 of 2 is not there: start it)\n"
    )


MEMORY = """
import sys
from pathlib import Path
from sampling import many
many.pack(Path(sys.argv[1]), int(sys.argv[2]), afresh=True)
# kB at most, of this program alone
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_packing_takes_no_more_memory_for_more_images(tmp_path):
    """2,000 and 10,000 images of 256×256 pixels (few, linked under many names)."""
    source, peaks = np.random.default_rng(0), []
    for i in range(20):
        Image.fromarray(source.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    for count in (2000, 10_000):
        folder = tmp_path / f"many-{count}"
        folder.mkdir()
        for i in range(count):
            os.link(tmp_path / f"{i % 20}.png", folder / f"{i:06d}.png")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(folder), str(count)], cwd=ROOT, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) / 1024)
        npz = folder.with_suffix(".npz")
        array = open_array(npz, "arr_0")
        assert array.shape == (count, 256, 256, 3)
        assert np.array_equal(
            array[count - 1], np.asarray(Image.open(tmp_path / f"{(count - 1) % 20}.png"))
        )
        npz.unlink()
    print(f"resident at most {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert abs(peaks[1] - peaks[0]) < 50 and max(peaks) < 1000


@pytest.mark.gpu
def test_decoding_in_a_stream_of_its_own_changes_nothing(tmp_path, vae, ckpt):
    """The images of the overlapped run are those decoded one chunk after the other; CPU and GPU
    have folders of their own.
    """
    folder, array = many(ckpt, vae, tmp_path, "--device", "cuda")
    device = torch.device("cuda:0")
    sampler = load_sampler(ckpt, vae=vae, steps=3, cfg_scale=1.5, device=device)
    labels = sampling_many.all_labels(ManyOptions(num_fid_samples=7), sampler).to(device)
    with tf32(True):
        for start in range(0, 7, 2):
            indices = range(start, min(start + 2, 7))
            images = (
                sampler.decode(sampler.numbered_latents(0, indices, labels[start : start + 2]))
                .cpu()
                .numpy()
            )
            assert np.array_equal(images, array[start : start + 2])
    many(ckpt, vae, tmp_path / "cpu", "--device", "cpu")
    assert not (tmp_path / "cpu" / folder.name).exists()


def test_images_that_are_not_finite_are_no_images(tmp_path, vae, capsys):
    """A network with NaN in it gives NaN, which as grey levels would be black."""
    tensors = fill_randomly(DiT(**CONFIG)).state_dict()
    tensors["final_layer.linear.bias"][0] = float("nan")
    save_weights(bad := tmp_path / "bad.safetensors", Weights(tensors, CONFIG, NAMES))
    assert "values that are not finite, with --mixed-precision no and --cfg-scale 2.0" in refused(
        capsys, str(bad), vae, tmp_path, "--cfg-scale", "2"
    )
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.glob("*.npz"))
    with pytest.raises(SystemExit):
        sampled(tmp_path, "--ckpt", str(bad), "--vae", vae)
    assert (
        "values that are not finite" in capsys.readouterr().err
        and not (tmp_path / "out.png").exists()
    )


def test_an_npz_that_is_not_whole_is_made_again(tmp_path, vae, ckpt):
    folder, array = many(ckpt, vae, tmp_path)
    npz = tmp_path / f"{folder.name}.npz"
    whole = npz.read_bytes()
    for damaged in (b"", whole[:-300], b"text"):
        npz.write_bytes(damaged)
        many(ckpt, vae, tmp_path)
        assert npz.read_bytes() == whole
    before = npz.stat().st_mtime_ns
    many(ckpt, vae, tmp_path)
    assert npz.stat().st_mtime_ns == before


def test_a_checkpoint_that_changes_while_it_is_read(tmp_path, vae, ckpt, capsys, monkeypatch):
    mine, load = tmp_path / "mine.safetensors", sampling_many.build_sampler
    shutil.copy(ckpt, mine)

    def meanwhile(*args):
        sampler = load(*args)
        save_weights(mine, Weights(fill_randomly(DiT(**CONFIG), 9).state_dict(), CONFIG, NAMES))
        return sampler

    monkeypatch.setattr(sampling_many, "build_sampler", meanwhile)
    with pytest.raises(SystemExit):
        many(str(mine), vae, tmp_path / "s")
    assert "changed while it was read; give the same command again" in capsys.readouterr().err
    assert not list((tmp_path / "s").rglob("*.png"))


def test_several_processes_want_a_checkpoint_and_no_run_folder(tmp_path, vae, capsys, monkeypatch):
    path = checkpoint_path(tmp_path / "000-run", 3)
    path.parent.mkdir(parents=True)
    state = fill_randomly(DiT(**CONFIG)).state_dict()
    save_checkpoint(path, {"model": state, "ema": state, "config": CONFIG, "classes": None})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        many(str(tmp_path / "000-run"), vae, tmp_path / "s")
    assert f"give the checkpoint itself, {path}" in capsys.readouterr().err


def test_a_start_under_other_circumstances_is_told(tmp_path, vae, ckpt, capsys):
    folder, _ = many(ckpt, vae, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["runs"][0] |= {"threads": 99, "versions": {"torch": "1.0"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    many(ckpt, vae, tmp_path)
    out = capsys.readouterr().out
    assert (
        "a start before had other threads (99): images may round otherwise" in out
        and "other versions" in out
    )
    assert len(json.loads((folder / "manifest.json").read_text())["runs"]) == 2
    (folder / "manifest.json").write_text("[]")
    many(ckpt, vae, tmp_path)


def test_the_place_of_the_autoencoder_does_not_matter(tmp_path, vae, ckpt, monkeypatch):
    folder, _ = many(ckpt, vae, tmp_path)
    monkeypatch.chdir(Path(vae).parent)
    assert many(ckpt, Path(vae).name, tmp_path)[0] == folder


def test_ctrl_c_is_no_traceback(tmp_path, vae, ckpt, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "latents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        many(ckpt, vae, tmp_path)
    assert (
        stopped.value.code == 130
        and "interrupted; the same command goes on" in capsys.readouterr().err
    )


def test_a_wrong_autoencoder_is_found_before_the_released_weights_are_fetched(
    tmp_path, vae, capsys, monkeypatch
):
    monkeypatch.setattr(
        "checkpoints.loading.download_model", lambda name: pytest.fail("a download began")
    )
    with pytest.raises(SystemExit):
        sample_ddp.main(
            ["--vae", str(tmp_path), "--sample-dir", str(tmp_path / "s"), "--device", "cpu"]
        )
    assert "is a folder without config.json" in capsys.readouterr().err


def test_a_file_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    """Another job that clears up just then must not take it away."""
    replace = Path.replace

    def replaced_while_another_clears_up(self, target):
        many_folder.remove_leftovers(tmp_path)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replaced_while_another_clears_up)
    many_folder.write_locked(tmp_path / "000000.png", lambda file: file.write(b"whole"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("000000.png", b"whole")
    ]
