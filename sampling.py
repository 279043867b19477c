"""Labels → images: the loaded network and VAE, guidance, the choice of sampler, and each image's own randomness.

Shapes: labels (N,), noise and latents (N, C, h, w), images uint8 (N, H, W, 3).
"""

from argparse import Action, ArgumentTypeError, BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoints import Weights, check_fits, design_of, load_weights, newest_checkpoint, weights_choice
from diffusion import create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion
from download import download_model, released_name
from models import DiT, DiT_models
from vae import latent_shape, load_vae, to_uint8

TRAINED_STEPS = 1000
PREVIEW_IMAGES, PREVIEW_STEPS, PREVIEW_GUIDANCE = 16, 50, 4.0  # while training
MODEL, IMAGE_SIZE, NUM_CLASSES = "DiT-XL/2", 256, 1000  # what the flags say unless told otherwise
PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
LOOPS = {"ddpm": GaussianDiffusion.p_sample_loop, "ddim": GaussianDiffusion.ddim_sample_loop}


def add_sampling_flags(parser, vae, cfg_scale):
    """Add the flags that decide what is sampled from which network; vae and cfg_scale are their defaults."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--ckpt", help=f"checkpoint or run folder (default: the released {MODEL}, fetched on first use)"
    )
    network.add_argument(
        "--weights",
        type=_weights,
        default="ema",
        metavar="{ema,raw,ema@DECAY}",
        help="which of the checkpoint's weights (default: %(default)s)",
    )
    network.add_argument(
        "--vae", default=vae, help="ema, mse, a hub id, a local folder, or none for pixels (default: %(default)s)"
    )
    network.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    bare = parser.add_argument_group("network, for checkpoints that do not say")
    bare.add_argument(
        "--model",
        action=Said,
        choices=DiT_models,
        default=MODEL,
        metavar="MODEL",
        help=f"one of {', '.join(DiT_models)} (default: %(default)s)",
    )
    bare.add_argument(
        "--image-size", action=Said, type=int, default=IMAGE_SIZE, help="in pixels (default: %(default)s)"
    )
    bare.add_argument(
        "--num-classes",
        action=Said,
        type=int,
        default=NUM_CLASSES,
        help="0 for a network without classes (default: %(default)s)",
    )
    add_process_flags(parser.add_argument_group("process"), cfg_scale)


def add_process_flags(process, cfg_scale):
    """Add those of them that say how it is sampled."""
    process.add_argument(
        "--num-sampling-steps", type=int, default=250, help=f"1 to {TRAINED_STEPS} (default: %(default)s)"
    )
    process.add_argument(
        "--sampler", choices=LOOPS, default="ddpm", help="ddpm: ancestral sampling; ddim (default: %(default)s)"
    )
    process.add_argument(
        "--eta", type=float, default=0.0, help="noise that ddim adds: 0 none, 1 as much as ddpm (default: %(default)s)"
    )
    process.add_argument(
        "--cfg-scale", type=float, default=cfg_scale, help="guidance; 1 is none (default: %(default)s)"
    )
    process.add_argument(
        "--cfg-channels", type=_channels, default=3, help="latent channels to guide, or all (default: %(default)s)"
    )

    process.add_argument(
        "--mixed-precision",
        choices=PRECISIONS,
        default="no",
        help="the network's; the steps and the VAE stay in float32 (default: %(default)s)",
    )
    process.add_argument(
        "--tf32",
        action=BooleanOptionalAction,
        default=True,
        help="TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)",
    )


class Said(Action):
    """Stores a flag's value, and in `said` that it was given: at its default it looks like one that was not."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.said = {*getattr(namespace, "said", ()), self.dest}


def _weights(text):
    try:
        return weights_choice(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _channels(text):
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} is neither a number of channels, 1 or more, nor all")
    return text if text == "all" else int(text)


def check_sampling_flags(args):
    """Raise ValueError for flags that make no sense whatever the checkpoint."""
    if not 1 <= args.num_sampling_steps <= TRAINED_STEPS:
        raise ValueError(f"--num-sampling-steps is {args.num_sampling_steps}; it must be from 1 to {TRAINED_STEPS}")
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta is {args.eta}; it must be from 0 to 1")
    if args.eta and args.sampler != "ddim":
        raise ValueError(f"--eta {args.eta} is for --sampler ddim; {args.sampler} has its own noise")
    if not np.isfinite(args.cfg_scale):
        raise ValueError(f"--cfg-scale is {args.cfg_scale}; it must be a number")
    seed = getattr(args, "seed", 0) or getattr(args, "global_seed", 0)
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed is {seed}; it must be at least 0 and below 2**63")
    if args.image_size < 1 or args.num_classes < 0:
        raise ValueError(
            f"--image-size is {args.image_size} and --num-classes {args.num_classes}; 1 and 0 are the least"
        )


@dataclass
class Sampler:
    """A network and a VAE on one device, and how to sample from them.

    `classes` are the class names, None if unknown; `checkpoint` is the file that the network came from, if any.
    """

    network: DiT
    space: object
    classes: list | None
    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | str = 3
    mixed_precision: str = "no"
    checkpoint: Path | None = None

    def __post_init__(self):
        self.diffusion = create_diffusion(str(self.num_sampling_steps))
        side = self.network.input_size
        self.latent = (self.network.in_channels, side, side)
        if self.cfg_scale != 1 and self.network.null_label is None:
            raise ValueError(
                f"--cfg-scale {self.cfg_scale}: the network has no null class to guide against; pass --cfg-scale 1"
            )
        if self.cfg_channels != "all" and self.cfg_channels > max(3, self.network.in_channels):
            raise ValueError(
                f"--cfg-channels {self.cfg_channels}: the latents have {self.network.in_channels}; pass that, fewer, or all"
            )

    def latents(self, labels, noise, noise_fn=torch.randn_like, progress=False):
        """Latents (N, C, h, w) for labels (N,) from noise x_T; with guidance, noise_fn draws for a doubled batch."""
        n, conditions = len(noise), {}
        model, x = self.network, noise
        if self.network.num_classes:
            conditions["y"] = labels
        if self.cfg_scale != 1:
            null = torch.full_like(labels, self.network.null_label)
            conditions = dict(
                y=torch.cat([labels, null]), cfg_scale=self.cfg_scale, cfg_channels=self.cfg_channels
            )  # (2N,)
            model, x = self.network.forward_with_cfg, torch.cat([noise, noise])  # (2N, C, h, w)
        dtype = PRECISIONS[self.mixed_precision]

        def predict(x, t, **conditions):
            with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
                return model(x, t, **conditions).to(x.dtype)

        extra = {"eta": self.eta} if self.sampler == "ddim" else {}
        out = LOOPS[self.sampler](
            self.diffusion, predict, x.shape, x, clip_denoised=self.space.clip_denoised, model_kwargs=conditions,
            progress=progress, noise_fn=noise_fn, **extra,
        )  # fmt: skip
        return out[:n]

    def images(self, labels, noise, noise_fn=torch.randn_like, progress=False):
        """Images uint8 (N, H, W, 3) on the device; arguments as for `latents`. Raises ValueError if they are not finite."""
        return self.decode(self.latents(labels, noise, noise_fn, progress))

    def numbered_latents(self, seed, indices, labels):
        """Latents (N, C, h, w) of the images with these indices, each of which depends on (seed, index) and its label alone."""
        noise_fn = ImageNoise(seed, indices, labels.device)
        noise = noise_fn(torch.empty(len(indices), *self.latent, device=labels.device))
        return self.latents(labels, noise, noise_fn)

    def decode(self, latents):
        """Images uint8 (N, H, W, 3) of latents (N, C, h, w), on their device. Raises ValueError if they are not finite."""
        images = self.space.decode(latents)
        if not images.isfinite().all():
            raise ValueError(
                f"some images have values that are not finite, with --mixed-precision {self.mixed_precision} and --cfg-scale "
                f"{self.cfg_scale}: try no or bf16, less guidance, or look for NaN in the checkpoint"
            )
        return to_uint8(images)


def find_checkpoint(args):
    """The checkpoint file that --ckpt means: itself, the newest of a run folder, or the released one, fetched if need be.

    Raises ValueError if there is none.
    """
    if args.ckpt is None:
        return download_model(released_name(args.model, args.image_size, args.num_classes))
    return newest_checkpoint(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt)


def load_sampler(args, device, checkpoint=None):
    """The Sampler that the flags ask for, of this checkpoint if one is given. What can be wrong is found before the VAE's
    weights are loaded.

    Raises ValueError for a checkpoint, VAE and flags that do not fit together.
    """
    shape = latent_shape(args.vae)
    if args.ckpt is None:
        shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
    checkpoint = checkpoint or find_checkpoint(args)
    weights = load_weights(checkpoint, args.weights)
    if args.ckpt is None:
        weights = weights._replace(classes=weights.classes or imagenet_names())
    network = build_network(args, weights, shape).to(device)
    names = ("num_sampling_steps", "sampler", "eta", "cfg_scale", "cfg_channels", "mixed_precision")
    options = {name: getattr(args, name) for name in names}
    sampler = Sampler(network, None, weights.classes, checkpoint=checkpoint, **options)
    sampler.space = load_vae(args.vae, device)
    return sampler


def build_network(args, weights: Weights, shape):
    """The network with these weights, in float32 and for evaluation, from its own configuration or else from the flags.

    Raises ValueError if a flag contradicts the configuration, or the weights or the VAE do not fit.
    """
    origin = args.ckpt or "the released checkpoint"
    with torch.device("meta"):
        if weights.config is None:
            side = shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
            sizes = dict(input_size=side, in_channels=shape.channels, num_classes=args.num_classes)
            network = DiT_models[args.model](**sizes, block=design_of(weights.tensors))
        else:
            network = _from_config(weights.config, origin)
            _check_flags(args, network, shape, origin)
    check_fits(network, weights.tensors, origin)
    network.load_state_dict(weights.tensors, assign=True)
    return network.float().eval().requires_grad_(False)


def _from_config(config, origin):
    try:
        return DiT(**config)
    except TypeError as error:
        raise ValueError(f"{origin} has a configuration that this version does not know ({error})") from None


def _check_flags(args, network, shape, origin):
    """Raise ValueError if the VAE, or a flag that was given, contradicts the network."""
    if shape.channels != network.in_channels:
        raise ValueError(
            f"--vae {args.vae} has {shape.channels} channels, the network of {origin} takes {network.in_channels}; "
            "pass the VAE that it was trained with"
        )
    sizes = DiT_models[args.model].keywords
    same_model = all(network.config[key] == value for key, value in sizes.items())
    found = {
        "model": args.model if same_model else "another size",
        "image_size": network.input_size * shape.ratio,
        "num_classes": network.num_classes,
    }
    for name in sorted(getattr(args, "said", ())):
        if getattr(args, name) != found[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but {origin} is of {found[name]}; leave the flag "
                "out, the checkpoint says it itself"
            )


def imagenet_names():
    """The names of the 1,000 ImageNet classes in index order, as torchvision has them."""
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


class ImageNoise:
    """Normal noise in which image i of the run depends on (seed, i) alone: a noise_fn for the steps and loops.

    Called with x (N, ...), or with a doubled batch (2N, ...), it returns the N images' next draws, twice if doubled.
    """

    def __init__(self, seed, indices, device):
        # Neighbouring words, not hashes: two images of a run cannot share one, and CPU generators use 32 bits of it.
        base = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        self.generators = [torch.Generator(device).manual_seed((base + i) % 2**64) for i in indices]

    def __call__(self, x):
        n = len(self.generators)
        if len(x) not in (n, 2 * n):
            raise ValueError(f"noise for {n} images was asked for a batch of {len(x)}; it must be as many, or twice")
        drawn = torch.stack(
            [torch.randn(x.shape[1:], generator=g, device=x.device, dtype=x.dtype) for g in self.generators]
        )
        return drawn if len(x) == n else torch.cat([drawn, drawn])


def preview(network, space, seed, device):
    """PREVIEW_IMAGES images uint8 (N, H, W, 3) of evenly spread classes, on the device; the same noise for the same seed."""
    scale = PREVIEW_GUIDANCE if network.null_label is not None else 1.0
    sampler = Sampler(network, space, None, PREVIEW_STEPS, "ddim", cfg_scale=scale)
    labels = torch.arange(PREVIEW_IMAGES, device=device) * network.num_classes // PREVIEW_IMAGES
    return sampler.decode(sampler.numbered_latents(seed, range(PREVIEW_IMAGES), labels))


def random_labels(seed, indices, num_classes):
    """A uniformly drawn label for each image index, int64 (N,), that depends on (seed, index) alone."""
    return torch.tensor([np.random.default_rng([seed, i]).integers(num_classes) for i in indices], dtype=torch.int64)


def label_indices(texts, num_classes, classes):
    """The class indices for labels that a user wrote, numbers or else names. Raises ValueError for one that there is not."""
    names = {name: i for i, name in enumerate(classes or [])}
    labels = []
    for text in texts:
        number = int(text) if text.isdecimal() else -1
        label = number if 0 <= number < num_classes else names.get(text)  # a number wins over a name that looks like one
        if label is None:
            some = f"{', '.join(list(names)[:10])}{' …' if len(names) > 10 else ''}"
            known = f" or one of the names {some}" if names else ""
            raise ValueError(f"{text}: give a number from 0 to {num_classes - 1}{known}")
        labels.append(label)
    return labels


def check_writable(path):
    """Raise ValueError unless a file can be written at path."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    probe = path.parent / f".{path.name}.probe"
    try:
        probe.touch()
        probe.unlink(missing_ok=True)  # another process that asks the same may have been quicker
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}); choose a file in a folder that exists and is writable"
        ) from None
