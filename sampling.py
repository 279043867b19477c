"""Labels → images: the loaded network and VAE, guidance, the choice of sampler, and each image's own randomness.

Shapes: labels (N,), noise and latents (N, C, h, w), images uint8 (N, H, W, 3).
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, wraps
import math
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints import Weights, design_of, load_weights, weights_file
from diffusion import create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion, TensorMap, as_taken
from download import download_model, released_name
from hub import local_path, network_of
from labels import label_index
from models import DiT, DiT_models
from vae import LatentShape, PixelSpace, Space, latent_shape, load_vae, to_uint8

TRAINED_STEPS = 1000
PREVIEW_IMAGES, PREVIEW_STEPS, PREVIEW_GUIDANCE = 16, 50, 4.0  # while training
PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
LOOPS = {
    "ddpm": GaussianDiffusion.p_sample_loop_progressive,
    "ddim": GaussianDiffusion.ddim_sample_loop_progressive,
}
# Multistep solvers of second order (Lu et al. 2022; Zhao et al. 2023), their steps of equal length in the log of sigma: of
# diffusers' spacings the one that comes nearest to the exact solution with 20 steps (docs/sampling.md).
SCHEDULERS = {
    "dpm++": partial(DPMSolverMultistepScheduler, use_lu_lambdas=True),
    "unipc": partial(UniPCMultistepScheduler, use_exponential_sigmas=True),
}


class Solver(NamedTuple):
    """How many steps a way from noise to data takes unless told otherwise, and how many it can take at most."""

    steps: int
    most: int


SOLVERS = {
    "ddpm": Solver(250, TRAINED_STEPS),
    "ddim": Solver(250, TRAINED_STEPS),
    "dpm++": Solver(20, TRAINED_STEPS - 1),  # one step number is left for the end of the last step
    "unipc": Solver(20, TRAINED_STEPS - 1),
}


@dataclass
class Sampler:
    """A network and a VAE on one device, and how to sample from them.

    `classes` are the class names, None if unknown; `checkpoint` is the file that the network came from, if any. Guidance is
    applied at the steps t from cfg_interval[0] to cfg_interval[1] times TRAINED_STEPS (Kynkäänniemi et al. 2024).
    """

    network: DiT
    space: Space
    classes: list[str] | None
    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | str = 3
    mixed_precision: str = "no"
    checkpoint: Path | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_steps(self.sampler, self.num_sampling_steps)
        respacing = str(self.num_sampling_steps) if self.sampler in LOOPS else ""
        self.diffusion = create_diffusion(respacing, learn_sigma=self.network.learn_sigma)
        side = self.network.input_size
        self.latent = (self.network.in_channels, side, side)
        if self.cfg_scale != 1 and self.network.null_label is None:
            raise ValueError(
                f"--cfg-scale {self.cfg_scale}: the network has no null class to guide against; pass --cfg-scale 1"
            )
        if isinstance(self.cfg_channels, int) and self.cfg_channels > max(3, self.network.in_channels):
            raise ValueError(
                f"--cfg-channels {self.cfg_channels}: the latents have {self.network.in_channels}; pass that, fewer, or all"
            )
        if self.cfg_scale != 1 and not any(self.guided()):
            low, high = self.cfg_interval
            raise ValueError(
                f"--cfg-interval {low} {high} holds none of the {self.num_sampling_steps} steps of {self.sampler}, so "
                "nothing would be guided; widen it, or pass --cfg-scale 1"
            )

    def steps(self) -> list[int]:
        """The step numbers at which the network is asked, in order."""
        if self.sampler in LOOPS:
            return self.diffusion.timestep_map[::-1]
        # The nearest to each sigma; diffusers' own are rounded down where its steps are of equal length.
        sigmas, known = self.scheduler().sigmas[:-1].numpy(), self.diffusion.sqrt_recipm1_alphas_cumprod
        return np.interp(np.log(sigmas), np.log(known), np.arange(TRAINED_STEPS)).round().astype(int).tolist()

    def guided(self) -> list[bool]:
        """For each of the steps, whether it is guided."""
        low, high = self.cfg_interval
        return [self.cfg_scale != 1 and low <= step / TRAINED_STEPS <= high for step in self.steps()]

    def scheduler(self) -> DPMSolverMultistepScheduler | UniPCMultistepScheduler:
        """A new scheduler of diffusers for a trajectory, which is to be given predictions of x_0."""
        scheduler = SCHEDULERS[self.sampler](
            trained_betas=self.diffusion.betas, num_train_timesteps=TRAINED_STEPS, prediction_type="sample"
        )
        scheduler.set_timesteps(self.num_sampling_steps)
        scheduler.set_begin_index(0)  # or it looks for its place on the device
        return scheduler

    def predictor(self, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """predict(x, t) → what the network makes of x (N, C, h, w), guided inside the interval.

        To be called once for each of `steps`, in their order: to look at t would make the CPU wait for a GPU.
        """
        guided = iter(self.guided())
        conditions = {"y": labels} if self.network.num_classes else {}
        if self.cfg_scale != 1:
            assert self.network.null_label is not None  # __post_init__ looks at that
            both = torch.cat([labels, torch.full_like(labels, self.network.null_label)])  # (2N,)
        dtype = PRECISIONS[self.mixed_precision]

        def predict(x, t):
            with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
                given, x = x, as_taken(self.network, x)
                if next(guided):
                    x2, t2 = torch.cat([x, x]), torch.cat([t, t])  # (2N, ...)
                    out = self.network.forward_with_cfg(x2, t2, both, self.cfg_scale, self.cfg_channels)[: len(x)]
                else:
                    out = self.network(x, t, **conditions)
            return out.to(given.dtype)

        return predict

    def trajectory(
        self, labels: Tensor, noise: Tensor, noise_fn: TensorMap = torch.randn_like, progress: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yields for each of `steps` a dict: `t`, the step; `sample`, the latents (N, C, h, w) after it; `pred_xstart`, the
        clean ones that it predicted.

        Arguments as for `latents`.
        """
        if self.sampler in SCHEDULERS:
            yield from self._multistep(labels, noise, progress)
            return

        def doubled(x):  # which other implementations sample, and of which only the first half counts
            return noise_fn(torch.cat([x, x]))[: len(x)]

        extra: dict[str, Any] = {"eta": self.eta} if self.sampler == "ddim" else {}
        loop = LOOPS[self.sampler](
            self.diffusion, self.predictor(labels), noise.shape, noise,
            clip_denoised=self.space.clip_denoised, progress=progress,
            noise_fn=noise_fn if self.cfg_scale == 1 else doubled, **extra,
        )  # fmt: skip
        for t, out in zip(self.steps(), loop, strict=True):
            yield {"t": t, "sample": out["sample"], "pred_xstart": out["pred_xstart"]}

    def _multistep(self, labels, noise, progress):
        """The trajectory by one of SCHEDULERS, from predictions of x_0 that are clipped where the space has bounds."""
        scheduler, predict, x = self.scheduler(), self.predictor(labels), noise
        sigmas = scheduler.sigmas.tolist()  # sqrt(1/alpha_bar - 1), from the host: a step reads nothing back
        for t, sigma in zip(tqdm(self.steps(), disable=not progress), sigmas):
            with torch.no_grad():
                eps = predict(x, torch.full((len(x),), t, device=x.device))[:, : x.shape[1]]  # without the variance
                x_start = math.sqrt(1 + sigma**2) * x - sigma * eps
                if self.space.clip_denoised:
                    x_start = x_start.clamp(-1, 1)
                x = scheduler.step(x_start, t, x).prev_sample
            yield {"t": t, "sample": x, "pred_xstart": x_start}

    def latents(
        self, labels: Tensor, noise: Tensor, noise_fn: TensorMap = torch.randn_like, progress: bool = False
    ) -> Tensor:
        """Latents (N, C, h, w) for labels (N,) from noise x_T; with guidance, noise_fn draws for a doubled batch.

        dpm++ and unipc draw nothing.
        """
        for out in self.trajectory(labels, noise, noise_fn, progress):
            last = out["sample"]
        return last

    def numbered_latents(self, seed: int, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Latents (N, C, h, w) of the images with these indices, each of which depends on (seed, index) and its label alone."""
        noise_fn = ImageNoise(seed, indices, labels.device)
        noise = noise_fn(torch.empty(len(indices), *self.latent, device=labels.device))
        return self.latents(labels, noise, noise_fn)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 (N, H, W, 3) of latents (N, C, h, w), on their device. Raises ValueError if they are not finite."""
        images = self.space.decode(latents)
        if not images.isfinite().all():
            raise ValueError(
                f"some images have values that are not finite, with --mixed-precision {self.mixed_precision} and --cfg-scale "
                f"{self.cfg_scale}: try no or bf16, less guidance, or look for NaN in the checkpoint"
            )
        return to_uint8(images)


def find_checkpoint(args: Namespace) -> Path:
    """The file of weights that --ckpt means, as in checkpoints.weights_file and for names on the hub, or the released one. What
    is not here is fetched.

    Raises ValueError if there is none.
    """
    if args.ckpt is None:
        return download_model(released_name(args.model, args.image_size, args.num_classes))
    return weights_file(local_path(args.ckpt))


def choose_vae(args: Namespace, checkpoint: Path) -> str:
    """The name of the VAE: that of --vae if it was given, else that of the pipeline of diffusers in which the checkpoint is,
    else the default.
    """
    pipeline = checkpoint.absolute().parents[1]
    beside = pipeline / "vae"
    is_pipeline = (pipeline / "model_index.json").is_file() and checkpoint.absolute().parent.name == "transformer"
    return str(beside) if is_pipeline and beside.is_dir() and "vae" not in getattr(args, "said", ()) else args.vae


def load_sampler(args: Namespace, device: torch.device, checkpoint: Path | None = None) -> Sampler:
    """The Sampler that the flags ask for, of this checkpoint if one is given. What can be wrong is found before the VAE's
    weights are loaded.

    Raises ValueError for a checkpoint, VAE and flags that do not fit together.
    """
    shape = latent_shape(args.vae)
    if args.ckpt is None:
        shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
    checkpoint = checkpoint or find_checkpoint(args)
    args.vae = choose_vae(args, checkpoint)
    weights = load_weights(checkpoint, args.weights)
    network = build_network(args, weights, latent_shape(args.vae)).to(device)
    names = ("num_sampling_steps", "sampler", "eta", "cfg_scale", "cfg_channels", "mixed_precision", "cfg_interval")
    options = {name: getattr(args, name) for name in names}
    sampler = Sampler(network, PixelSpace(), class_names(args, weights), checkpoint=checkpoint, **options)
    prepare(network, args.mixed_precision, args.compile)
    return replace(sampler, space=load_vae(args.vae, device))


def prepare(network: DiT, mixed_precision: str = "no", compile: bool = False) -> None:
    """Make a network fast that only samples from here on. Its outputs stay what they are under autocast; compiled, they round
    otherwise.

    What autocast would cast at each call, the weights of Linear layers and of the patch embedding, is cast once. Raises
    ValueError where PyTorch cannot compile.
    """
    if dtype := PRECISIONS[mixed_precision]:
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(dtype)
    if compile:
        device = next(network.parameters()).device
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))
        except Exception as error:  # compilers and PyTorch's back ends have many kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f"--compile: PyTorch cannot compile here ({reason}); leave the flag out") from None
        if device.type == "cpu":
            forward = frozen(torch.compile(network.forward, dynamic=True, fullgraph=True))
        else:  # each size of batch has a CUDA graph of its own, replayed without the CPU
            options: dict[str, Any] | None = {"triton.cudagraphs": True} if device.type == "cuda" else None
            forward = torch.compile(network.forward, dynamic=False, fullgraph=True, options=options)
        network.forward = forward  # type: ignore[method-assign]


def frozen(forward: Callable) -> Callable:
    """A compiled forward pass with inductor's `freezing`: the weights become constants, packed for oneDNN.

    Not an option of the compilation, since Dynamo asks for the setting before those count. oneDNN is taken for batches of
    any size only (dynamic=True); for a fixed one it would be MKL, which is slower here.
    """

    @wraps(forward)
    def call(*args, **kwargs):
        with torch._inductor.config.patch(freezing=True):
            return forward(*args, **kwargs)

    return call


def check_steps(sampler: str, steps: int) -> None:
    """Raise ValueError unless a sampler can take so many steps."""
    most = SOLVERS[sampler].most
    if not 1 <= steps <= most:
        reason = f"; --sampler {sampler} takes at most {most}" if 1 <= steps <= TRAINED_STEPS else ""
        raise ValueError(f"--num-sampling-steps is {steps}; it must be from 1 to {most}{reason}")


def build_network(args: Namespace, weights: Weights, shape: LatentShape) -> DiT:
    """The network with these weights, in float32 and for evaluation, from its own configuration or else from the flags.

    Raises ValueError if a flag contradicts the configuration, or the weights or the VAE do not fit.
    """
    origin = args.ckpt or "the released checkpoint"
    if weights.config is not None:
        network = network_of(weights, origin)
        _check_flags(args, network, shape, origin)
        return network
    side = shape.side(args.image_size, DiT_models[args.model].keywords["patch_size"])
    sizes = dict(input_size=side, in_channels=shape.channels, num_classes=args.num_classes)
    with torch.device("meta"):
        config = DiT_models[args.model](**sizes, block=design_of(weights.tensors)).config
    return network_of(weights._replace(config=config), origin)


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
    for name in sorted(found.keys() & getattr(args, "said", set())):
        if getattr(args, name) != found[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but {origin} is of {found[name]}; leave the flag "
                "out, the checkpoint says it itself"
            )


def class_names(args: Namespace, weights: Weights) -> list[str] | None:
    """The class names that a checkpoint has; the released ones do not say that they have ImageNet's. None if unknown."""
    return weights.classes or (imagenet_names() if args.ckpt is None else None)


def imagenet_names() -> list[str]:
    """The names of the 1,000 ImageNet classes in index order, as torchvision has them."""
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


def readable(classes: list[str] | None) -> list[str] | None:
    """Class names for people: those of ImageNet's folders, such as n02099601, in words ("golden retriever")."""
    if not classes or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-22k")
    synsets = set(known.label_names())
    return [known.label_name_to_description(name) if name in synsets else name for name in classes]


class ImageNoise:
    """Normal noise in which image i of the run depends on (seed, i) alone: a noise_fn for the steps and loops.

    Called with x (N, ...), or with a doubled batch (2N, ...), it returns the N images' next draws, twice if doubled.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str) -> None:
        # Neighbouring words, not hashes: two images of a run cannot share one, and CPU generators use 32 bits of it.
        base = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        self.generators = [torch.Generator(device).manual_seed((base + i) % 2**64) for i in indices]

    def __call__(self, x: Tensor) -> Tensor:
        n = len(self.generators)
        if len(x) not in (n, 2 * n):
            raise ValueError(f"noise for {n} images was asked for a batch of {len(x)}; it must be as many, or twice")
        drawn = torch.stack(
            [torch.randn(x.shape[1:], generator=g, device=x.device, dtype=x.dtype) for g in self.generators]
        )
        return drawn if len(x) == n else torch.cat([drawn, drawn])


def preview(network: DiT, space: Space, seed: int, device: torch.device | str) -> Tensor:
    """PREVIEW_IMAGES images uint8 (N, H, W, 3) of evenly spread classes, on the device; the same noise for the same seed."""
    scale = PREVIEW_GUIDANCE if network.null_label is not None else 1.0
    sampler = Sampler(network, space, None, PREVIEW_STEPS, "ddim", cfg_scale=scale)
    labels = torch.arange(PREVIEW_IMAGES, device=device) * network.num_classes // PREVIEW_IMAGES
    return sampler.decode(sampler.numbered_latents(seed, range(PREVIEW_IMAGES), labels))


def random_labels(seed: int, indices: Iterable[int], num_classes: int) -> Tensor:
    """A uniformly drawn label for each image index, int64 (N,), that depends on (seed, index) alone."""
    return torch.tensor([np.random.default_rng([seed, i]).integers(num_classes) for i in indices], dtype=torch.int64)


def label_indices(texts: Iterable[str], num_classes: int, classes: list[str] | None) -> list[int]:
    """The class indices for labels that a user wrote, as labels.label_index takes them. Raises ValueError as that does."""
    names = label_names(classes)
    return [label_index(text, num_classes, names) for text in texts]


def label_names(classes: list[str] | None) -> dict[str, set[int]]:
    """{name: indices} of every name that a class may be called by; ImageNet has two classes called crane."""
    names: dict[str, set[int]] = {}
    for written in (readable(classes), classes):
        for i, name in enumerate(written or []):
            names.setdefault(name, set()).add(i)
    return names


def check_writable(path: Path | str) -> None:
    """Raise ValueError unless a file can be written at path."""
    path = Path(path)
    probe = path.parent / f".{os.getpid()}.probe"  # not path's name and more, which may be too long
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # an error for a name that is too long
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}); choose a file in a folder that exists and is writable"
        ) from None
