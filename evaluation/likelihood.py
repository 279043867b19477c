"""From images and a checkpoint of a flow to bits per dimension: how likely the images are to it."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints.choice import NetworkChoice
from checkpoints.loading import (
    build_network, check_trained_size, find_files, process_learned,
)  # fmt: skip
from checkpoints.networks import Network, makes_clips
from checkpoints.weights import load_weights
from conditions.condition import Values, condition_of
from conditions.reading import reader_for
from data.cache import CachedLatents
from data.cache_format import MOMENTS
from data.images import ImageDataset
from data.listing import list_images
from data.loader import make_loader, read
from data.opening import misfits
from data.options import DataOptions
from flow.likelihood import ATOL, RTOL, bits_per_dim, check_exact
from processes.flow import FlowProcess
from processes.noise import ImageNoise
from processes.process import NoiseFunction, Process
from runtime.image_size import settled
from runtime.limits import check_numbers
from runtime.team import Team
from vae import LatentShape, LatentSpace, PixelSpace, Space, from_uint8, latent_shape, load_vae

LEVELS = 255  # steps between grey levels, which lie on [-1, 1]
DENSITY = (
    "bits per dimension are of a density of latents: they may be below 0, and compare networks "
    "behind the same autoencoder alone"
)
WITHOUT_TEXT = "the network reads text, and every image has the empty prompt"


@dataclass(frozen=True)
class LikelihoodOptions:
    """Of which images the likelihood is taken, and how.

    samples: a folder of images, one folder per class where the network has classes, or one of
        cached latents.
    exact: the trace itself rather than an estimate, for small latents.
    seed: what is drawn for image i depends on it and on i alone.
    cfg_scale: 1; there is no likelihood with guidance.
    batch_size: images at a time in each process; num_workers: its loader processes.

    Raises ValueError for values that there cannot be.
    """

    samples: Path | str
    exact: bool = False
    seed: int = 0
    cfg_scale: float = 1.0
    batch_size: int = 64
    num_workers: int = 4

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.cfg_scale != 1:
            raise ValueError(
                f"`cfg_scale` is {self.cfg_scale}, and a likelihood is that of the network without "
                "guidance; leave `cfg_scale` out"
            )


class Measured(NamedTuple):
    """A network that has learned a flow, and the images whose likelihood is taken.

    `labels` are the network's labels for those of the images, in their order. `null` is what each
    image is conditioned on where the network reads text: the empty prompt.
    """

    network: Network
    process: FlowProcess
    images: ImageDataset | CachedLatents
    labels: list[int]
    space: Space
    options: LikelihoodOptions
    checkpoint: Path
    null: Values | None = None

    @property
    def dims(self) -> int:
        """How many numbers the network sees of an image."""
        return math.prod(self.network.latent_shape)

    def bits(self, team: Team = Team()) -> Tensor:
        """Bits per dimension (N,) of every image, float32, the work being shared by a team.

        An image's are the same in any batch and process, but for rounding. Of pixels they are bits
        for 256 grey levels, the pixels having been spread evenly over the width of a level; of
        latents, which are the means that the autoencoder says, they are a density's. Raises
        ValueError for images that cannot be read.
        """
        mine = range(team.rank, len(self.images), team.world_size)
        device = next(self.network.parameters()).device
        found = torch.zeros(len(self.images), device=device)
        size = self.options.batch_size
        batches = [list(mine[first : first + size]) for first in range(0, len(mine), size)]
        for indices, data, labels in self._read(batches, quiet=team.rank > 0):
            found[indices] = self.bits_of(indices, data.to(device), labels.to(device))
        # The others' are 0
        return team.gather([found[None]])[0].sum(dim=0)  # (world_size, N) → (N,)

    def _read(self, batches, quiet):
        """Yields (indices, pixels or moments (n, ...), the network's labels (n,)) of each batch."""
        keys = [[(i, False) for i in indices] for indices in batches]
        loader = make_loader(self.images, keys, self.options.num_workers)
        with closing(read(loader)) as loaded:
            told = tqdm(loaded, total=len(batches), unit="batch", disable=quiet or None)
            for indices, (data, labels, bad) in zip(batches, told):
                if data is None:
                    path, reason = bad[0]
                    raise ValueError(f"{path} cannot be read ({reason}); mend it, or take it out")
                yield indices, data, torch.tensor(self.labels)[labels]

    def bits_of(self, indices: Sequence[int], data: Tensor, labels: Tensor) -> Tensor:
        """Bits per dimension (n,) of images with these indices: of pixels or moments (n, ...) and
        the network's labels (n,).
        """
        noise_fn = ImageNoise(self.options.seed, indices, data.device)
        x, finer = self.seen(data, noise_fn)
        log_p = self.process.flow.log_likelihood(
            self.network, x, exact=self.options.exact,
            probe=None if self.options.exact else torch.where(noise_fn(x) < 0, -1.0, 1.0),
            model_kwargs=self.condition(labels),
        )  # fmt: skip
        return bits_per_dim(log_p, self.dims) + finer

    def condition(self, labels: Tensor) -> dict[str, Any]:
        """Keywords of the network's forward for images with these labels (n,)."""
        condition = condition_of(self.network, self.null)
        return condition.keywords(
            labels if self.null is None else condition.blank(len(labels), labels.device)
        )

    def seen(self, data: Tensor, noise_fn: NoiseFunction) -> tuple[Tensor, float]:
        """(what the network sees (n, C, *space) of pixels or moments, the bits per dimension that
        lie between a density there and what is told).
        """
        if isinstance(self.space, PixelSpace):
            pixels = from_uint8(data)
            even = torch.special.ndtr(noise_fn(pixels)) - 0.5  # from -1/2 to 1/2 of a level
            return pixels + even * (2 / LEVELS), math.log2(LEVELS / 2)
        mean, std = (
            data.float().unbind(dim=1)  # (n, 2, C, h, w) → (n, C, h, w), twice
            if isinstance(self.images, CachedLatents)
            else self.space.moments(from_uint8(data))
        )
        return self.space.draw(mean, std, torch.zeros_like(std)), 0.0


def load_measured(
    choice: NetworkChoice, options: LikelihoodOptions, device: torch.device
) -> Measured:
    """The Measured of a chosen network and the options.

    Raises ValueError for a network of another process, or of clips, and for images that do not fit
    the network.
    """
    cached = open_cached(options.samples)
    files = find_files(choice, cached.manifest["vae"] if cached else DataOptions.vae)
    weights = load_weights(files.checkpoint, choice.weights)
    network = build_network(choice, weights, files.vae)
    check_images(network, choice.ckpt)
    process = checked(process_learned(choice, weights, network), choice.ckpt)
    if options.exact:
        check_exact(math.prod(network.latent_shape))
    shape = latent_shape(files.vae)
    check_trained_size(choice, network, shape)
    images = cached or open_images(options.samples, network, shape)
    if cached:
        check_fits(cached, network, shape, files.vae)
    labels = labels_of(images.classes, weights.classes, network.num_classes)
    reader = reader_for(network.to(device), choice.text_encoder)
    return Measured(
        network, process, images, labels,
        stored_space(cached) if cached else load_vae(files.vae, device), options, files.checkpoint,
        None if reader is None else reader.null,
    )  # fmt: skip


def check_images(network: Network, origin: object) -> None:
    """Raise ValueError for a network that makes clips."""
    if makes_clips(network):
        raise ValueError(
            f"`likelihood` {origin} makes clips, and a likelihood is that of images; give a network"
            " of images, or compare sets of clips with `frames`"
        )


def checked(process: Process, origin: object) -> FlowProcess:
    """A process that has a likelihood by its ODE. Raises ValueError if it has none."""
    if not isinstance(process, FlowProcess):
        raise ValueError(
            f"`likelihood` {origin} has learned {type(process).word}, and a likelihood is that of "
            "a flow; give a checkpoint of one, with `process=flow` if it does not say so, or call "
            "GaussianDiffusion.calc_bpd_loop for a bound"
        )
    return process


def open_cached(folder: Path | str) -> CachedLatents | None:
    """The cached latents in a folder; None if it has none, and is one of images."""
    return CachedLatents(folder, "samples") if (Path(folder) / MOMENTS).is_file() else None


def open_images(folder: Path | str, network: Network, shape: LatentShape) -> ImageDataset:
    """The images below a folder, cropped as training does."""
    listing = list_images(folder, network.num_classes, "samples")
    return ImageDataset(listing, settled(shape.image(network.latent_shape)))


def check_fits(cached: CachedLatents, network: Network, shape: LatentShape, vae: str) -> None:
    """Raise ValueError unless cached latents are what the network has learned."""
    wanted = DataOptions(
        image_size=settled(shape.image(network.latent_shape)), num_classes=network.num_classes,
        flip=False, vae=vae,
    )  # fmt: skip
    if wrong := misfits(cached, wanted, None):
        raise ValueError(f"`samples` do not fit the network: {'; '.join(wrong)}")


def stored_space(cached: CachedLatents) -> LatentSpace:
    """The space of cached latents, without its autoencoder."""
    said: dict[str, Any] = cached.manifest
    shape = LatentShape(said["channels"], said["ratio"])
    return LatentSpace(shape, said["scale"], said["shift"])


def labels_of(
    names: list[str] | None, classes: list[str] | None, num_classes: int
) -> list[int]:
    """The network's label for each class of the images, by name.

    classes: the network's names, None if they are unknown: then, and where the images have other
    names, there must be as many, and they count in their order. Raises ValueError where that leaves
    a doubt.
    """
    if names is None or not num_classes:
        return [0] * max(1, len(names or ()))
    known = {name: label for label, name in enumerate(classes or [])}
    if all(name in known for name in names):
        return [known[name] for name in names]
    strange = [name for name in names if name not in known]
    if len(names) == num_classes and len(strange) == num_classes:
        return list(range(num_classes))
    raise ValueError(
        f"`samples` have {len(names)} classes, and of the network's {num_classes} none is called "
        f"{', '.join(strange[:5])}; name the folders as its classes are called"
        + (f", such as {', '.join(list(known)[:5])}" if known else ", or give one for each")
    )


def report_on(measured: Measured, bits: Tensor) -> dict[str, Any]:
    """What is to be told of the bits per dimension (N,) of images, a dict for JSON.

    It has scores, notes, and what they are of. The standard error is None of one image.
    """
    images, options, count = measured.images, measured.options, len(bits)
    numbers = bits.double().cpu()
    is_density = not isinstance(measured.space, PixelSpace)
    without_text = [] if measured.null is None else [WITHOUT_TEXT]
    error = float(numbers.std()) / math.sqrt(count) if count > 1 else None
    scores = {"bits_per_dim": float(numbers.mean()), "standard_error": error}
    return {
        "scores": scores, "notes": [*images.notes, *[DENSITY] * is_density, *without_text],
        "samples": {"path": str(options.samples), "images": count, "dimensions": measured.dims},
        "network": {"path": str(measured.checkpoint), "process": measured.process.config},
        "settings": {
            "unit": "density of latents" if is_density else "grey levels", "exact": options.exact,
            "seed": options.seed, "atol": ATOL, "rtol": RTOL, "device": bits.device.type,
        },
    }  # fmt: skip
