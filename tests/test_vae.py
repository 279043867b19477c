"""The autoencoder's wrapper against diffusers' own encode and decode, its chunks, the grey levels,
and its errors.
"""
import json
from pathlib import Path
import re
import shutil
from types import SimpleNamespace

import diffusers
from diffusers import AutoencoderKL, UNet2DModel, VQModel
import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file
import torch

from conftest import fill_randomly, randn
import vae
from vae import LatentShape, from_uint8, latent_shape, load_vae, to_uint8

# folder → what its configuration says: block widths, scale, shift. The first is of the kind that
# DiT was trained with.
TINY = {"plain": ((8, 16), 0.18215, None), "shifted": ((4, 8, 8), 0.3611, 0.1159)}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test of this file may wait for the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name → a folder that save_pretrained wrote, of random weights. Not to be changed."""
    return {
        name: save_tiny(tmp_path_factory.mktemp(name), *settings) for name, settings in TINY.items()
    }


def save_tiny(folder, widths, scale, shift, latent_channels=3):
    """Save an autoencoder with these widths, one per resolution; the posterior's deviations are of
    the means' order.
    """
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), block_out_channels=widths,
        norm_num_groups=4, latent_channels=latent_channels, sample_size=32, scaling_factor=scale,
        shift_factor=shift,
    )  # fmt: skip
    fill_randomly(autoencoder, std=0.1)
    autoencoder.save_pretrained(folder)
    return folder


def images(n, height=16, width=None):
    return randn(n, 3, height, width or height, dtype=torch.float32).clamp(-1, 1)


def edited(source, target, change=None, **config):
    """A copy of the folder `source`: entries of its config.json replaced (by None: removed), then
    change(target).
    """
    shutil.copytree(source, target)
    kept = {
        k: v for k, v in json.loads((target / "config.json").read_text()).items() if k not in config
    }
    kept |= {k: v for k, v in config.items() if v is not None}
    (target / "config.json").write_text(json.dumps(kept))
    if change:
        change(target)
    return target


# ---- names and shapes ----

@pytest.mark.parametrize("name, shape", [("plain", (3, 2)), ("shifted", (3, 4))])
def test_shape_is_read_from_the_configuration(folders, name, shape):
    assert latent_shape(str(folders[name])) == shape == load_vae(str(folders[name])).shape


def test_shape_needs_no_weights(folders, tmp_path):
    folder = edited(folders["plain"], tmp_path / "vae", lambda path: (path / WEIGHTS).unlink())
    assert latent_shape(str(folder)) == (3, 2)


@pytest.mark.parametrize("name, shape", [("ema", (4, 8)), ("mse", (4, 8)), ("none", (3, 1))])
def test_shape_of_the_named_ones_is_known_without_a_look(monkeypatch, name, shape):
    def refuse(*args, **kwargs):
        raise AssertionError("not needed")

    monkeypatch.setattr(AutoencoderKL, "load_config", refuse)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", refuse)
    assert latent_shape(name) == shape


@pytest.mark.parametrize(
    "name, where", [("ema", "stabilityai/sd-vae-ft-ema"), ("mse", "stabilityai/sd-vae-ft-mse")]
)
def test_ema_and_mse_come_from_the_hub(folders, monkeypatch, name, where):
    asked, from_pretrained = [], AutoencoderKL.from_pretrained

    def stand_in(source, **kwargs):
        asked.append(source)
        return from_pretrained(folders["plain"], **kwargs)

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", stand_in)
    assert load_vae(name).shape == (3, 2)  # the stand-in's: of the loaded one, not of the table
    assert asked == [where]


@pytest.mark.parametrize(
    "ratio, patch, pixels, side", [(8, 1, 256, 32), (8, 2, 512, 64), (2, 4, 24, 12), (1, 8, 8, 8)]
)
def test_side_of_the_latents(ratio, patch, pixels, side):
    assert LatentShape(4, ratio).side(pixels, patch) == side


def test_the_shape_of_a_latent_and_the_size_of_its_image():
    shape = LatentShape(4, 8)
    assert shape.latent(256, 512) == (4, 32, 64) and shape.image((4, 32, 64)) == (256, 512)
    with pytest.raises(ValueError, match="image size 100 is not a multiple of 8"):
        shape.latent(256, 100)


@pytest.mark.parametrize("patch, pixels, use", [
    (1, 100, "96 or 104"), (2, 250, "240 or 256"), (8, 256 + 32, "256 or 320"), (8, 63, "use 64"),
    (2, 0, "use 16"), (2, -16, "use 16"),
])  # fmt: skip
def test_side_names_the_nearest_sizes(patch, pixels, use):
    with pytest.raises(
        ValueError, match=rf"{pixels} is not a multiple of {8 * patch} .*; .*{use}$"
    ):
        LatentShape(4, 8).side(pixels, patch)


# ---- encode and decode ----

@pytest.mark.parametrize("name", TINY)
def test_scale_and_shift_are_read_from_the_configuration(folders, name):
    space = load_vae(str(folders[name]))
    assert (space.scale, space.shift) == (TINY[name][1], TINY[name][2] or 0.0)


@pytest.mark.parametrize("missing", ["scaling_factor", "shift_factor"])
def test_scale_and_shift_that_the_configuration_leaves_out(folders, tmp_path, missing):
    space = load_vae(str(edited(folders["shifted"], tmp_path / "vae", **{missing: None})))
    assert (space.scale, space.shift) == (
        (0.18215, 0.1159) if missing == "scaling_factor" else (0.3611, 0.0)
    )


@pytest.mark.parametrize("name", TINY)
def test_encode_draws_from_the_posterior_of_diffusers(folders, name):
    space, x = load_vae(str(folders[name])), images(2)
    side = 16 // space.shape.ratio
    noise = randn(2, 3, side, side, seed=5, dtype=torch.float32)
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(folders[name]).eval().encode(x).latent_dist
    mean, std = space.moments(x)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, torch.exp(0.5 * posterior.logvar))
    assert std.min() > 0.1 and mean.std() > 0.01  # neither part is lost in the other
    _, scale, shift = TINY[name]
    want = (posterior.mean + posterior.std * noise - (shift or 0)) * scale
    torch.testing.assert_close(space.encode(x, noise), want)
    torch.testing.assert_close(space.draw(mean, std, noise), want)


@pytest.mark.parametrize("name", TINY)
def test_decode_undoes_the_scale(folders, name):
    space = load_vae(str(folders[name]))
    unscaled = randn(2, 3, 6, 4, dtype=torch.float32)
    _, scale, shift = TINY[name]
    with torch.no_grad():
        want = AutoencoderKL.from_pretrained(folders[name]).eval().decode(unscaled).sample
    got = space.decode((unscaled - (shift or 0)) * scale)
    assert got.shape == (2, 3, 6 * space.shape.ratio, 4 * space.shape.ratio)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (space.decode(unscaled) - want).abs().max() > 1e-3  # the comparison sees a scale


@pytest.mark.parametrize("name", TINY)
def test_decode_of_encode_is_diffusers_round_trip(folders, name):
    """The scale that encode puts on is the one that decode takes off."""
    space, x = load_vae(str(folders[name])), images(2)
    with torch.no_grad():
        # Decodes the posterior's mode
        want = AutoencoderKL.from_pretrained(folders[name]).eval()(x).sample
    noiseless = torch.zeros_like(space.moments(x)[0])
    torch.testing.assert_close(space.decode(space.encode(x, noiseless)), want, atol=1e-5, rtol=1e-5)


def test_evaluation_mode_and_no_gradients(folders):
    space = load_vae(str(folders["plain"]))
    assert not any(module.training for module in space.autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in space.autoencoder.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in space.autoencoder.parameters())
    x, z = images(1).requires_grad_(), randn(1, 3, 4, 4, dtype=torch.float32).requires_grad_()
    assert not any(tensor.requires_grad for tensor in (*space.moments(x), space.decode(z)))


def test_weights_stored_in_half_precision_are_used_in_single(folders, tmp_path):
    AutoencoderKL.from_pretrained(folders["plain"]).half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_vae(str(tmp_path)).autoencoder.parameters()} == {torch.float32}


# ---- a fixed number of pixels at a time ----

class Recorder:
    """An autoencoder that passes everything on and remembers the shapes it was called with."""

    def __init__(self, autoencoder):
        self.autoencoder, self.config, self.shapes = autoencoder, autoencoder.config, []

    def encode(self, x):
        self.shapes.append(tuple(x.shape))
        return self.autoencoder.encode(x)

    def decode(self, z):
        self.shapes.append(tuple(z.shape))
        return self.autoencoder.decode(z)


@pytest.fixture
def recorded(folders):
    """The tiny autoencoder with 4 pixels per latent behind a Recorder."""
    space = load_vae(str(folders["shifted"]))
    space.autoencoder = Recorder(space.autoencoder)
    return space


def batches(space, call, *args):
    """What the call returns, and how many samples each call of the autoencoder saw."""
    space.autoencoder.shapes.clear()
    result = call(*args)
    return result, [shape[0] for shape in space.autoencoder.shapes]


@pytest.mark.parametrize("at_once, want", [
    (3 * 256, [3, 3, 1]), (2 * 256 + 255, [2, 2, 2, 1]), (1, [1] * 7), (10**6, [7]),
])  # fmt: skip
def test_autoencoder_sees_a_fixed_number_of_pixels_at_once(recorded, monkeypatch, at_once, want):
    # 7 of 16 × 16 pixels
    x, noise, z = images(7), randn(7, 3, 4, 4).float(), randn(7, 3, 4, 4, seed=1).float()
    whole_latents, _ = batches(recorded, recorded.encode, x, noise)
    whole_images, _ = batches(recorded, recorded.decode, z)
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", at_once)
    latents, seen_by_encoder = batches(recorded, recorded.encode, x, noise)
    pixels, seen_by_decoder = batches(recorded, recorded.decode, z)
    # So that the decoder's latents count as their pixels
    assert seen_by_encoder == seen_by_decoder == want
    torch.testing.assert_close(latents, whole_latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pixels, whole_images, atol=1e-5, rtol=1e-5)


def test_larger_images_come_in_smaller_batches(recorded, monkeypatch):
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 4 * 16 * 16)
    assert batches(recorded, recorded.moments, images(3, 16, 32))[1] == [2, 1]
    assert batches(recorded, recorded.decode, randn(3, 3, 8, 8).float())[1] == [1, 1, 1]


def test_peak_does_not_grow_with_the_batch(recorded, monkeypatch):
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 2 * 8 * 8)
    for n in (2, 5, 16):
        assert max(batches(recorded, recorded.moments, images(n, 8))[1]) == 2
        assert max(batches(recorded, recorded.decode, randn(n, 3, 2, 2).float())[1]) == 2


def test_eight_images_of_256_pixels_at_once():
    assert vae.PIXELS_AT_ONCE // 256**2 == 8 and vae.PIXELS_AT_ONCE // 512**2 == 2


# ---- pixels ----

def test_pixel_space_changes_nothing():
    space, x = load_vae("none"), randn(2, 3, 4, 4)
    assert space.encode(x, None) is x and space.decode(x) is x
    assert space.shape == vae.PIXELS == latent_shape("none")


def test_only_pixels_are_clipped_while_sampling(folders):
    assert load_vae("none").clip_denoised is True
    assert load_vae(str(folders["plain"])).clip_denoised is False


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_to_uint8_truncates(part):
    level = torch.arange(-200, 460)
    x = (level.double() + part - 128) / 127.5
    got = to_uint8(x.float().view(1, 1, 1, -1).expand(2, 3, 1, -1))
    assert got.dtype == torch.uint8 and got.shape == (2, 1, 660, 3)
    assert got[1, 0, :, 2].tolist() == [min(max(int(k), 0), 255) for k in level]


def test_to_uint8_at_the_ends():
    x = torch.tensor([-1.0, 0.0, 1.0, -torch.inf, torch.inf, 1e30]).view(2, 3, 1, 1)
    assert to_uint8(x).flatten().tolist() == [0, 128, 255, 0, 255, 255]


def test_to_uint8_puts_channels_last():
    levels = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    assert torch.equal(to_uint8(from_uint8(levels)), levels.movedim(1, 3))


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = from_uint8(levels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    torch.testing.assert_close(x.double(), 2 * levels.double() / 255 - 1, atol=1e-6, rtol=0)
    assert torch.equal(to_uint8(x).movedim(3, 1), levels)


# ---- errors: what is wrong and what to do about it ----

def cut(size):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def drop(*names):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(
            {k: v for k, v in tensors.items() if k not in names}, folder / WEIGHTS, {"format": "pt"}
        )

    return change


def overwrite(text):
    return lambda folder: (folder / "config.json").write_bytes(text)


BROKEN_CONFIG = {
    "no JSON": overwrite(b"{not json"), "empty": overwrite(b""),
    "no text": overwrite(b"\xff\xfe\x00{"), "a list": overwrite(b"[1, 2]"),
    "widths": overwrite(b'{"latent_channels": 4, "block_out_channels": 5}'),
    "missing": lambda folder: (folder / "config.json").unlink(),
}  # fmt: skip
BROKEN_WEIGHTS = {
    "cut": cut(5000), "header cut": cut(20), "empty": cut(0),
    "missing": lambda folder: (folder / WEIGHTS).unlink(),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN_CONFIG)
@pytest.mark.parametrize("call", [latent_shape, load_vae])
def test_broken_configuration(folders, tmp_path, how, call):
    folder = edited(folders["plain"], tmp_path / "vae", BROKEN_CONFIG[how])
    with pytest.raises(ValueError, match=r"(?s)/vae\b.*give .*folder") as caught:
        call(str(folder))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("change, says", [
    ({"block_out_channels": "abc"}, "block_out_channels is no list"),
    ({"block_out_channels": []}, "channels is no list"),
    ({"block_out_channels": [1] * 10**4}, "block_out_channels is no list"),
    ({"block_out_channels": [True]}, "is no whole"),
    ({"block_out_channels": [10**9]}, "is no whole number"),
    ({"latent_channels": "4"}, "latent_channels is no whole number"),
    ({"latent_channels": 0}, "latent_channels is no whole"),
    ({"latent_channels": None}, "latent_channels is no whole"),
    ({"layers_per_block": 10**4}, "layers_per_block is 10000, and at most"),
    ({"layers_per_block": 10**9}, "block is no"),
    ({"scaling_factor": "x"}, "scaling_factor is no number"),
    ({"scaling_factor": 0}, "scaling_factor is 0; it must be above"),
    ({"shift_factor": [1]}, "shift_factor is no number"),
    ({"norm_num_groups": 0}, "norm_num_groups is no whole number"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantized"),
    ({"_class_name": "AutoencoderKLWan"}, "another AutoencoderKLWan"),
])  # fmt: skip
@pytest.mark.parametrize("call", [latent_shape, load_vae])
def test_nonsense_in_a_configuration_is_named_before_anything_is_built(
    folders, tmp_path, change, says, call
):
    folder = edited(folders["plain"], tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"cannot load VAE '{folder}' .*{says}"):
        call(str(folder))


def test_a_configuration_with_a_byte_order_mark(folders, tmp_path):
    folder = edited(folders["plain"], tmp_path / "vae")
    (folder / "config.json").write_text((folder / "config.json").read_text(), encoding="utf-8-sig")
    assert (
        latent_shape(str(folder))
        == latent_shape(str(folders["plain"]))
        == load_vae(str(folder)).shape
    )


def test_an_offline_machine_is_told_so_and_not_to_give_what_it_gave():
    said = "set to be offline, by HF_HUB_OFFLINE, .*no copy of stabilityai/sd-vae-ft-ema"
    with pytest.raises(ValueError, match=said) as caught:
        load_vae("ema")
    assert "give `vae` a local folder" in str(caught.value) and "ema or mse" not in str(
        caught.value
    )


@pytest.mark.parametrize("how", BROKEN_WEIGHTS)
def test_broken_weights(folders, tmp_path, how):
    folder = edited(folders["plain"], tmp_path / "vae", BROKEN_WEIGHTS[how])
    with pytest.raises(ValueError, match=r"cannot load VAE '.*/vae' \(.+\); give .*weights"):
        load_vae(str(folder))


@pytest.mark.parametrize("names, count", [
    (["decoder.conv_out.weight"], 1), (["quant_conv.weight", "decoder.conv_in.bias"], 2),
])  # fmt: skip
def test_missing_weights_are_named_rather_than_made_up(folders, tmp_path, names, count):
    folder = edited(folders["plain"], tmp_path / "vae", drop(*names))
    with pytest.raises(
        ValueError, match=f"lacks weights, {count} of them, such as {sorted(names)[0]}"
    ):
        load_vae(str(folder))


def test_weights_of_another_size(folders, tmp_path):
    folder = edited(folders["plain"], tmp_path / "vae", latent_channels=5)
    with pytest.raises(ValueError, match=r"cannot load VAE .*shape"):
        load_vae(str(folder))


def test_network_of_another_class(tmp_path):
    blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, **blocks
    ).save_pretrained(tmp_path / "unet")
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vq")
    for name in ("unet", "vq"):
        with pytest.raises(ValueError, match=f"cannot load VAE '.*{name}'.*; give "):
            load_vae(str(tmp_path / name))


@pytest.mark.parametrize(
    "name", ["dit-afresh-tests/no-such-vae", "/no/such/folder", "no-such-folder", "a/b/c"]
)
@pytest.mark.parametrize("call", [latent_shape, load_vae])
def test_nothing_of_this_name(call, name):
    with pytest.raises(
        ValueError, match=f"cannot load VAE '{name}' .*; give ema or mse .*hub id.*local folder"
    ):
        call(name)


@pytest.mark.parametrize("error", [
    OSError("no route to the hub\nand more"), ImportError("no backend"), RuntimeError("HTTP 401"),
])  # fmt: skip
def test_hub_that_cannot_be_reached(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", fail)
    reason = str(error).split("\n")[0]
    with pytest.raises(ValueError, match=rf"cannot load VAE 'ema' \({reason}\); give") as caught:
        load_vae("ema")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


# ---- latents that are normalised in each channel ----

MEAN, STD = [0.3, -1.2, 0.0, 2.5], [0.7, 2.0, 1.1, 0.05]
STATISTICS = {"latents_mean": MEAN, "latents_std": STD}


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    """A folder of an autoencoder with four channels, statistics of each and a scale factor."""
    folder = tmp_path_factory.mktemp("normalised")
    save_tiny(folder, (4, 4), 0.13025, None, latent_channels=4)
    config = json.loads((folder / "config.json").read_text()) | STATISTICS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def diffusers_formula(target, start, vae, **tensors):
    """What a pipeline of diffusers computes in its line `target = start...`. The line is read: the
    pipeline itself needs packages that are not installed.
    """
    file = "pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl_img2img.py"
    text = (Path(diffusers.__file__).parent / file).read_text(encoding="utf-8")
    [line] = re.findall(rf"^ *{target} = ({re.escape(start)}.*)$", text, re.MULTILINE)
    statistics = {
        name: torch.tensor(values).view(1, -1, 1, 1) for name, values in STATISTICS.items()
    }
    return eval(line, {"self": SimpleNamespace(vae=vae), **statistics, **tensors})


def test_latents_are_normalised_in_each_channel_as_in_diffusers(normalised):
    space, x = load_vae(str(normalised)), images(2)
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    mean, std = space.moments(x)
    expected = diffusers_formula(
        "init_latents", "(init_latents", space.autoencoder, init_latents=mean + std * noise
    )
    torch.testing.assert_close(space.encode(x, noise), expected)
    for c in range(4):
        by_hand = (mean[:, c] + std[:, c] * noise[:, c] - MEAN[c]) / STD[c] * 0.13025
        torch.testing.assert_close(expected[:, c], by_hand, rtol=1e-4, atol=1e-6)


def test_decoding_takes_the_normalisation_back(normalised):
    space, latents = load_vae(str(normalised)), randn(3, 4, 4, 4, dtype=torch.float32)
    own = diffusers_formula("latents", "latents * latents_std", space.autoencoder, latents=latents)
    with torch.no_grad():
        expected = space.autoencoder.decode(own).sample
    torch.testing.assert_close(space.decode(latents), expected)


@pytest.mark.parametrize("widths, channels, shift, shape", [
    ((4, 4, 4, 4), 16, 0.0609, LatentShape(16, 8)),  # as SD3's and Flux's
    ((4, 4, 4, 4, 4), 32, None, LatentShape(32, 16)),  # as LightningDiT's
])  # fmt: skip
def test_more_channels_and_levels(tmp_path, widths, channels, shift, shape):
    folder = str(save_tiny(tmp_path / "vae", widths, 1.5305, shift, channels))
    space, x = load_vae(folder), images(2, 32, 48)
    assert latent_shape(folder) == space.shape == shape
    noise = randn(2, channels, 32 // shape.ratio, 48 // shape.ratio, dtype=torch.float32)
    with torch.no_grad():
        posterior = space.autoencoder.encode(x).latent_dist
    expected = (posterior.mean + posterior.std * noise - (shift or 0)) * 1.5305
    torch.testing.assert_close(space.encode(x, noise), expected)
    assert space.decode(expected).shape == x.shape


@pytest.mark.parametrize("change, says", [
    ({"latents_mean": None}, "latents_std alone; latents_mean and latents_std go together"),
    ({"latents_std": STD[:3]}, "latents_std has 3 entries; wanted is one number for each of 4"),
    ({"latents_std": 0.5}, "latents_std has no list"),
    ({"latents_std": [1, 1, 0, 1]}, "latents_std has 0; deviations must be above 0"),
    ({"latents_mean": [1, "2", 3, 4]}, "latents_mean has an entry that is no number"),
    ({"shift_factor": 0.1}, "has shift_factor 0.1 and latents_mean"),
])  # fmt: skip
@pytest.mark.parametrize("call", [latent_shape, load_vae])
def test_statistics_that_cannot_be(normalised, tmp_path, change, says, call):
    folder = edited(normalised, tmp_path / "vae", **change)
    with pytest.raises(ValueError, match=rf"cannot load VAE '{folder}' .*{says}"):
        call(str(folder))
