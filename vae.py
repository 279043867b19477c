"""Pixels ↔ latents: the autoencoder that a DiT works behind, and everything that is known about it.

Scale factor, shift, downsampling ratio and channels are read from the autoencoder's own
configuration; nothing else in the project holds a copy of them. Shapes: images (N, 3, H, W) in
[-1, 1], latents (N, C, H/ratio, W/ratio).
"""

import codecs
from collections.abc import Sequence
from contextlib import contextmanager, suppress
import hashlib
import json
import math
from pathlib import Path
import shutil
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from runtime.disk import readable_name
from runtime.image_size import ImageSize
from runtime.json_files import read_json
from runtime.offline import cache_of_the_hub, why_offline


class LatentShape(NamedTuple):
    """What a network must know of a latent space: its channels, and the pixels per latent.

    Pixels per latent are counted along each side.
    """

    channels: int
    ratio: int

    def size(self, image_size: ImageSize, patch_size: int = 1) -> ImageSize:
        """The latents' side, or height and width, for images of a size.

        Raises ValueError as `side`.
        """
        if isinstance(image_size, int):
            return self.side(image_size, patch_size)
        height, width = image_size
        of_height = self.side(height, patch_size, "image height")
        return of_height, self.side(width, patch_size, "image width")

    def side(self, image_size: int, patch_size: int = 1, what: str = "image size") -> int:
        """How many latents lie along a side of image_size pixels.

        Raises ValueError, which calls them `what`, if patches do not fill them exactly.
        """
        unit = self.ratio * patch_size
        if image_size < 1 or image_size % unit:
            below = image_size // unit * unit
            near = f"{below} or {below + unit}" if below > 0 else unit
            raise ValueError(
                f"{what} {image_size} is not a multiple of {unit} "
                f"(the VAE's {self.ratio} pixels per latent x patch size {patch_size}); use {near}"
            )
        return image_size // self.ratio

    def latent(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape (C, h, w) of the latent of an image of so many pixels.

        Raises ValueError as `side`.
        """
        return self.channels, self.side(height), self.side(width)

    def image(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width in pixels of the image of a latent (C, h, w), or of the frames of a clip
        (C, F, h, w).
        """
        return tuple(size * self.ratio for size in latent[-2:])


PIXELS = LatentShape(channels=3, ratio=1)  # diffusion in pixel space: no autoencoder

# The two fine-tuned autoencoders of Stable Diffusion. Their shape stands here as well as in their
# configuration so that a wrong image size is found before they are downloaded.
HUB_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
HUB_SHAPE = LatentShape(channels=4, ratio=8)

SIZES = ("latent_channels", "in_channels", "out_channels", "layers_per_block", "norm_num_groups")
# Of an autoencoder; no known one comes near
MOST_LEVELS, MOST_CHANNELS, MOST_LAYERS = 8, 16_384, 64

STATISTICS = ("latents_mean", "latents_std")  # of each channel, where latents are normalised

# What one call of the autoencoder sees: 8 images of 256 px, 2 of 512 px
PIXELS_AT_ONCE = 8 * 256 * 256


def latent_shape(name: str) -> LatentShape:
    """The LatentShape of a VAE, its weights not loaded.

    The VAE is "ema", "mse", "none" (pixels), a local folder, or a hub id. Raises ValueError if
    there is no such VAE.
    """
    if name == "none":
        return PIXELS
    if name in HUB_VAES:
        return HUB_SHAPE
    if _is_folder(name) and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"`vae` {name} is a folder without config.json; give the folder that "
            "AutoencoderKL.save_pretrained wrote"
        )
    try:
        config = (
            read_json(Path(name) / "config.json")
            if _is_folder(name)
            else AutoencoderKL.load_config(name)
        )
        return _shape_of(_checked(config))
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(_cannot_load(name, error)) from error


def load_vae(name: str, device: torch.device | str = "cpu") -> "Space":
    """The VAE called `name` on the device: a PixelSpace for "none", else a LatentSpace.

    Names as in latent_shape.

    Raises ValueError, with the reason, if it cannot be loaded or its weights are not complete.
    """
    if name == "none":
        return PixelSpace()
    latent_shape(name)
    try:
        with _as_diffusers_reads_it(HUB_VAES.get(name, name)) as source:
            autoencoder, info = AutoencoderKL.from_pretrained(
                source, torch_dtype=torch.float32, output_loading_info=True
            )
    except (
        Exception
    ) as error:  # diffusers, huggingface_hub and safetensors each raise their own kinds
        raise ValueError(_cannot_load(name, error)) from error
    if info["missing_keys"]:
        raise ValueError(
            f"VAE {name} lacks weights, {len(info['missing_keys'])} of them, such as "
            f"{sorted(info['missing_keys'])[0]}"
        )
    try:
        config = _checked(autoencoder.config)
    except (ValueError, KeyError, TypeError) as error:  # of the hub's, not looked at before
        raise ValueError(_cannot_load(name, error)) from error
    autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    scale, shift = _normalisation(config)
    return LatentSpace(_shape_of(config), scale, shift, autoencoder)


@contextmanager
def _as_diffusers_reads_it(name):
    """The name itself, or that of a copy without a byte order mark.

    diffusers refuses a folder whose config.json begins with such a mark.
    """
    if not _is_folder(name):
        yield name
        return
    if not (Path(name) / "config.json").read_bytes().startswith(codecs.BOM_UTF8):
        with readable_name(name) as folder:
            yield str(folder)
        return
    with TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(name, Path(temporary) / "vae"))
        (copy / "config.json").write_text(
            json.dumps(read_json(copy / "config.json")), encoding="utf-8"
        )
        yield str(copy)


def _is_folder(name):
    with suppress(OSError, ValueError):  # of names that no file can have
        return Path(name).is_dir()
    return False


def vae_hashes(name: str) -> dict[str, str]:
    """File name → SHA-256 for a VAE in a local folder.

    For others, whose names say what they are, there is nothing in it.
    """
    files = [path for path in sorted(Path(name).glob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _cannot_load(name, error):
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    if isinstance(error, KeyError):
        reason = f"config.json lacks {reason}"
    repository = HUB_VAES.get(name, name)
    if offline := why_offline(error):
        reason = (
            f"{offline}, and there is no copy of {repository} in the cache {cache_of_the_hub()}"
        )
    if name in HUB_VAES:
        advice = (
            f"give `vae` a local folder with config.json and weights, or fetch {repository} where "
            "there is a network (hf download) and set HF_HOME to that cache"
        )
    else:
        advice = (
            "give ema or mse (fetched from the Hugging Face hub on first use), a hub id, a local "
            "folder with config.json and weights, or none for pixels"
        )
    return f"cannot load VAE {name!r} ({reason}); {advice}"


def _checked(config):
    """A configuration of an AutoencoderKL whose entries are of their kinds and of sizes that exist.

    Raises ValueError for another.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"an AutoencoderKL is wanted, this is another {kind}")
    if config.get("quantization_config"):
        raise ValueError(
            "its weights are quantized, by quantization_config; give one in floating point"
        )
    widths = config["block_out_channels"]
    if not isinstance(widths, (list, tuple)) or not 1 <= len(widths) <= MOST_LEVELS:
        raise ValueError(
            f"in config.json block_out_channels is no list of 1 to {MOST_LEVELS} widths"
        )
    numbers = {f"block_out_channels, {width!r}"[:80]: width for width in widths}
    numbers |= {
        key: config[key] for key in SIZES if key == "latent_channels" or config.get(key) is not None
    }
    for key, value in numbers.items():
        if type(value) is not int or not 1 <= value <= MOST_CHANNELS:
            raise ValueError(f"in config.json {key} is no whole number from 1 to {MOST_CHANNELS}")
    if config.get("layers_per_block", 1) > MOST_LAYERS:
        raise ValueError(
            f"in config.json layers_per_block is {config['layers_per_block']}, and at most "
            f"{MOST_LAYERS} are read"
        )
    for key, other in {"scaling_factor": 1.0, "shift_factor": 0.0}.items():
        value = other if config.get(key) is None else config[key]
        if not _is_number(value):
            raise ValueError(f"in config.json {key} is no number")
        if key == "scaling_factor" and value <= 0:
            raise ValueError(f"in config.json scaling_factor is {value}; it must be above 0")
    _check_statistics(config)
    return config


def _is_number(value):
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _check_statistics(config):
    """Raise ValueError unless a configuration has no mean and deviation of latents, or both of
    each channel.
    """
    given = {key: config.get(key) for key in STATISTICS if config.get(key) is not None}
    if not given:
        return
    if len(given) < len(STATISTICS):
        raise ValueError(
            f"config.json has {next(iter(given))} alone; {' and '.join(STATISTICS)} go together"
        )
    channels = config["latent_channels"]
    for key, values in given.items():
        if not isinstance(values, (list, tuple)) or len(values) != channels:
            count = f"{len(values)} entries" if isinstance(values, (list, tuple)) else "no list"
            raise ValueError(f"in config.json {key} has {count}; wanted is one number for each of "
                             f"{channels} latent_channels")  # fmt: skip
        if not all(_is_number(value) for value in values):
            raise ValueError(f"in config.json {key} has an entry that is no number")
    if min(given["latents_std"]) <= 0:
        least = min(given["latents_std"])
        raise ValueError(f"in config.json latents_std has {least}; deviations must be above 0")
    if config.get("shift_factor"):
        raise ValueError(
            f"config.json has shift_factor {config['shift_factor']} and latents_mean; take out the "
            "one that is not subtracted"
        )


def _normalisation(config):
    """(scale, shift) of a checked configuration: numbers, or a list with one for each channel.

    With statistics z = (latent - latents_mean) / latents_std · scaling_factor, as in diffusers.
    """
    scale = config["scaling_factor"]
    if config.get("latents_std") is None:
        return scale, config.get("shift_factor") or 0.0
    return [scale / std for std in config["latents_std"]], list(config["latents_mean"])


def _shape_of(config):
    return LatentShape(config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1))


class LatentSpace:
    """A diffusers AutoencoderKL as an encoder and decoder of scaled latents.

    Scaled latents are z = (latent - shift)·scale; each of the two is a number, or one for each
    channel. Without the autoencoder, the space still draws from moments that were computed before.
    """

    clip_denoised = False  # latents have no range to clip predictions to

    def __init__(
        self, shape: LatentShape, scale: float | Sequence[float],
        shift: float | Sequence[float] = 0.0, autoencoder: AutoencoderKL | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.scale, self.shift, self.autoencoder = shape, scale, shift, autoencoder

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images (N, 3, H, W), unscaled.

        Mean and deviation are (N, C, h, w).
        """
        assert self.autoencoder is not None  # whoever has stored moments does not ask for them
        posteriors = [
            self.autoencoder.encode(part).latent_dist for part in images.split(_chunk(images, 1))
        ]
        return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])

    def draw(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A scaled latent (N, C, h, w) from the posterior with these moments."""
        latent = mean + std * noise
        return (latent - _of_channels(self.shift, latent)) * _of_channels(self.scale, latent)

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] and normal noise → scaled latents, both (N, C, h, w)."""
        return self.draw(*self.moments(images), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) → images (N, 3, H, W), about in [-1, 1].

        A fixed number of pixels is decoded at a time.
        """
        assert self.autoencoder is not None
        latents = latents / _of_channels(self.scale, latents) + _of_channels(self.shift, latents)
        return torch.cat(
            [
                self.autoencoder.decode(part).sample
                for part in latents.split(_chunk(latents, self.shape.ratio))
            ]
        )


def _of_channels(value, latents):
    """A number as it is; one for each channel as (C, 1, 1), in the kind and place of latents."""
    return value if isinstance(value, (int, float)) else latents.new_tensor(value).view(-1, 1, 1)


class PixelSpace:
    """The same interface for diffusion on pixels: images are their own latents."""

    shape = PIXELS
    clip_denoised = True  # pixels lie in [-1, 1]

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """The images themselves; there is no posterior to draw from."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents


Space = LatentSpace | PixelSpace


def _chunk(x, ratio):
    """How many of x (N, C, h, w), each standing for h·ratio × w·ratio pixels, are handled at once.
    """
    return max(1, PIXELS_AT_ONCE // (x.shape[-1] * x.shape[-2] * ratio**2))


def from_uint8(images: Tensor) -> Tensor:
    """Grey levels uint8 (N, 3, H, W) → float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in about [-1, 1] → grey levels uint8 (N, H, W, 3), on the same device."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
