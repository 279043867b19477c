"""Labels or prompts → images or clips: network and VAE, guidance, the solver, each sample's own
randomness.

Shapes: labels (N,), or a Text of N prompts for a network that reads text; noise and latents
(N, C, *space), images uint8 (N, H, W, 3), clips uint8 (N, F, H, W, 3).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.networks import Network, makes_clips, patch_frames, reads_text
from conditions.condition import Condition, Values, condition_of
from conditions.given import Given, check_given
from conditions.labels import label_tensor
from conditions.reading import beginning, check_text, checked_prompts, cut_notes, reader_for
from conditions.text import Reader
from diffusion.gaussian_diffusion import TensorMap, as_taken
from layers.clips import frames_of
from layers.positions import check_grid
from layers.schedule import Scheduled, at_step
from layers.sizes import box_of, grid_of
from layers.text import Text
from processes.noise import ImageNoise
from processes.process import Process, Solver, StepNetwork
from processes.table import KINDS, SOLVERS, process_of
from runtime.image_size import ImageSize, settled, sides
from runtime.limits import RANGES, check_range, is_number
from sampling.caching import CachedRun, check_cache, check_once_a_step, parse_cache
from sampling.pair import Pair, check_high, check_pair, idle_notes
from sampling.speed import PRECISIONS
from vae import Space, from_uint8, to_uint8

# Latent channels that are guided where nobody says it: DiT's convention, which networks of text and
# of clips do not have
CFG_CHANNELS, CFG_CHANNELS_OF_TEXT = 3, "all"


@dataclass
class Sampler:
    """A network and a VAE on one device, and how to sample from them.

    `classes` are the class names, None if unknown; `checkpoint` is the file that the network came
    from, if any. `sampler` names a solver of the process, which the network has learned: the
    Gaussian one unless told otherwise; `solver_options` are options of that solver beside eta, as
    the process has them, its defaults in place of those that are left out. Guidance is applied at
    noise levels, 0 clean and 1 noise, inside cfg_interval (Kynkäänniemi et al. 2024). latent_shape,
    (C, H, W), of clips (C, F, H, W), is that of the latents to sample; None is what the network was
    trained on. cfg_channels: None is CFG_CHANNELS, of a network that reads text or makes clips all.

    Of a network that makes clips, some frames may be `given` to what draws them: of one clip for
    all samples, or of N clips (conditions.given). They are in the samples as they were given.
    `frame_rate` is how many frames a second of clips like those it was trained on has, None if
    unknown.

    Of a network that reads text, `reader` reads the prompts: the network's own unless told
    otherwise. Guidance is against what it makes of negative_prompt; None is the empty prompt.
    Where prompts come as Text alone, `null`, a Text of one caption to be guided against, does
    instead of both.

    `high` is a second network, which is asked in place of the first from the noise level
    `high_from` on (sampling.pair); all else the first one says.
    `cache`, such as "taylor:3,1", says at which steps the network's blocks are not asked
    (sampling.caching.parse_cache); None: at none.

    Raises ValueError for options that do not fit the network or the process.
    """

    network: Network
    space: Space
    classes: list[str] | None
    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | str | None = None
    mixed_precision: str = "no"
    checkpoint: Path | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    process: Process = None  # type: ignore[assignment]  # __post_init__ chooses the Gaussian one
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    latent_shape: tuple[int, ...] | None = None
    reader: Reader | None = None
    negative_prompt: str | None = None
    null: Text | None = None
    frame_rate: float | None = None
    high: Network | None = None
    high_from: float | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        self.process = self.process or process_of(self.network)
        check_sampler(self.sampler, self.process)
        check_steps(self.sampler, self.num_sampling_steps, self.process.solvers)
        check_options(self.solver_options, self.sampler, self.process.solvers)
        if self.solver_options:
            self.steps()  # refuses values that they cannot have
        self.asked = self._asked()
        self.latent = self.latent_shape or self.network.latent_shape
        if self.latent_shape is not None:
            check_latent(self.latent_shape, self.network)
            if self.high is not None:
                check_latent(self.latent_shape, self.high)
        self.condition = self._condition()
        if self.cfg_channels is None:
            self.cfg_channels = usual_channels(self.reads_text, self.makes_clips)
        if self.cfg_scale != 1 and not self.condition.has_null:
            raise ValueError(
                f"`cfg_scale` {self.cfg_scale}: the network has no null class to guide against; "
                "pass `cfg_scale=1`"
            )
        channels = self.latent[0]
        if isinstance(self.cfg_channels, int) and self.cfg_channels > max(3, channels):
            raise ValueError(
                f"`cfg_channels` {self.cfg_channels}: the latents have {channels}; "
                "pass that, fewer, or all"
            )
        if self.cfg_scale != 1 and not any(self.guided()):
            low, high = self.cfg_interval
            raise ValueError(
                f"`cfg_interval` {low} {high} holds none of the {self.num_sampling_steps} steps of "
                f"{self.sampler}, so nothing would be guided; widen it, or pass `cfg_scale=1`"
            )
        if self.cache is not None:
            check_once_a_step(self.sampler, self.process.solvers)
            check_cache(self.asked, parse_cache(self.cache), self.guided())

    def _asked(self) -> Network | Pair:
        """What is asked: the network, or it and `high` as one."""
        check_high(self.high, self.high_from)
        if self.high is None or self.high_from is None:
            return self.network
        check_pair(self.network, self.high, self.process)
        return Pair(self.network, self.high, self.high_from, self.process)

    def _condition(self) -> Condition:
        """What the network is conditioned on, guided against the negative prompt."""
        check_negative(self.negative_prompt, self.cfg_scale)
        if self.negative_prompt is not None and not self.reads_text:
            raise ValueError(
                "`negative_prompt` is for networks that read text, and this one does not; leave "
                "the argument out"
            )
        if self.null is not None:
            return condition_of(self.network, self.null)
        if self.reader is None:
            self.reader = reader_for(self.network)
        if self.reader is None or self.negative_prompt is None:
            return condition_of(self.network, None if self.reader is None else self.reader.null)
        return condition_of(self.network, self.reader.encode([self.negative_prompt]))

    @property
    def reads_text(self) -> bool:
        """Whether the network takes prompts, and not labels."""
        return reads_text(self.network)

    @property
    def makes_clips(self) -> bool:
        """Whether its samples are clips, and not images."""
        return makes_clips(self.network)

    @property
    def frames(self) -> int | None:
        """How many frames its samples have; None where they are images."""
        return self.latent[1] if self.makes_clips else None

    @property
    def options(self) -> dict[str, Any]:
        """The solver's options: eta, where it has that, and solver_options."""
        known = self.process.solvers[self.sampler].options
        eta = {"eta": self.eta} if "eta" in known else {}
        return {**eta, **self.solver_options}

    @property
    def image_size(self) -> ImageSize:
        """The size of the images, or of the frames, in pixels, a number or (height, width)."""
        return settled(self.space.shape.image(self.latent))

    def steps(self) -> list[int] | list[float]:
        """The times t at which steps begin, in order."""
        return self.process.times(self.sampler, self.num_sampling_steps, **self.options)

    def guided(self) -> list[bool]:
        """For each of the steps, whether it is guided."""
        low, high = self.cfg_interval
        levels = self.process.levels(self.sampler, self.num_sampling_steps, **self.options)
        return [self.cfg_scale != 1 and low <= level <= high for level in levels]

    def breaks(self) -> list[int]:
        """The indices of the steps with which guidance begins or ends."""
        guided = self.guided() if self.cfg_scale != 1 else []
        return [i + 1 for i, (before, now) in enumerate(pairwise(guided)) if before != now]

    def conditions(self, asked: Sequence[int] | Sequence[str] | Values) -> Values:
        """What conditions N samples, on the network's device: labels (N,), int64, of labels; where
        the network reads text, the Text of N prompts, or of a Text.

        Raises ValueError for labels where prompts are wanted, the other way round, and for labels
        that the network does not have.
        """
        device = next(self.network.parameters()).device
        several = isinstance(asked, Collection) and not isinstance(asked, Tensor)
        words = isinstance(asked, (str, Text)) or several and any(
            isinstance(one, str) for one in asked
        )
        if not self.reads_text:
            if words:
                raise ValueError(
                    "the network takes class labels, and was given prompts; give the numbers of "
                    "classes"
                )
            return label_tensor(asked, self.network).to(device)
        if isinstance(asked, Text):
            return asked.to(device)
        if not words and (not isinstance(asked, Sized) or len(asked)):
            raise ValueError(
                "the network reads text, and was given class labels; give a list of prompts, such "
                'as ["a thick three"]'
            )
        if self.reader is None:
            raise ValueError("the Sampler has `null` and no `reader`; give prompts as a Text")
        return self.reader.encode(checked_prompts(asked)).to(device)

    def notes(self, asked: object) -> list[str]:
        """Sentences on a network of two that is asked at no step; and on prompts among those that
        are asked for, and on the negative one, that are too long to be read whole, with what is
        read of them.
        """
        found = []
        if isinstance(self.asked, Pair) and self.process.solvers[self.sampler].at_beginnings:
            found += idle_notes(self.asked, self.steps())
        if self.reader is None or not isinstance(asked, Sequence):
            return found
        negative = [] if self.negative_prompt is None else [self.negative_prompt]
        return found + cut_notes(self.reader, [*asked, *negative])

    def schedule(self) -> Scheduled | None:
        """What is asked, prepared for the times of the steps, if it can be told which step it is
        asked in: if it makes use of that, and the solver asks at the steps' beginnings alone.
        """
        if not isinstance(self.asked, Scheduled):
            return None
        if not self.process.solvers[self.sampler].at_beginnings:
            return None
        self.asked.schedule(self.steps())
        return self.asked

    def cached_run(self) -> CachedRun | None:
        """The network along one trajectory, with its blocks left out where `cache` says so; None
        where they never are.
        """
        cache = None if self.cache is None else parse_cache(self.cache)
        if cache is None or cache.interval == 1:
            return None
        return CachedRun(self.network, cache, self.steps(), self.guided())

    def predictor(self, labels: Values, given: Given | None = None) -> StepNetwork:
        """predict(x, t, step) → what the network makes of x (N, C, *space) at t (N,), guided if the
        step with this index, a Python number, is inside the interval. It is asked with the given
        frames in their places, if there are any.

        The index says so, and not t: to look at t would make the CPU wait for a GPU.
        """
        guided, plain = self.guided(), self.condition.keywords(labels)
        doubled = self.condition.doubled(labels) if any(guided) else {}
        dtype, channels = PRECISIONS[self.mixed_precision], self.cfg_channels
        assert channels is not None  # __post_init__ has settled it
        told, cached = self.schedule(), self.cached_run()

        def predict(x, t, step):
            network = self.asked if cached is None else cached.at(step)
            cast = torch.autocast(x.device.type, dtype, enabled=dtype is not None)
            with cast, at_step(told, step):
                before, x = x, as_taken(network, x)
                if guided[step]:
                    x2, t2 = torch.cat([x, x]), torch.cat([t, t])  # (2N, ...)
                    out = network.forward_with_cfg(
                        x2, t2, cfg_scale=self.cfg_scale, cfg_channels=channels, **doubled
                    )[: len(x)]
                else:
                    out = network(x, t, **plain)
            return out.to(before.dtype)

        return predict if given is None else given.asked(predict)

    def trajectory(
        self, labels: Values, noise: Tensor, noise_fn: TensorMap = torch.randn_like,
        progress: bool = False, given: Given | None = None,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Yields for each of `steps` a dict: `t`, the step; `sample`, the latents (N, C, *space)
        after it; `pred_xstart`, the clean ones that it predicted. In both are the given frames.

        Arguments as for `latents`.
        """
        if given is not None:
            check_given(given, tuple(noise.shape), patch_frames(self.network))
            given = given.on(noise.device)
            noise = given.held(noise)

        # Other implementations draw for the doubled batch, and only its first half counts
        def doubled(x):
            return noise_fn(torch.cat([x, x]))[: len(x)]

        way = self.process.trajectory(
            self.predictor(labels, given), noise, self.sampler, self.num_sampling_steps,
            **self.options, noise_fn=noise_fn if self.cfg_scale == 1 else doubled,
            clip=self.space.clip_denoised, progress=progress, breaks=self.breaks(),
        )  # fmt: skip
        for out in way:
            yield out if given is None else out | {
                name: given.held(out[name]) for name in ("sample", "pred_xstart")
            }

    def latents(
        self, labels: Values, noise: Tensor, noise_fn: TensorMap = torch.randn_like,
        progress: bool = False, given: Given | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents (N, C, *space) for labels (N,), or a Text, from noise of their shape.

        With guidance, noise_fn draws for a doubled batch. Solvers such as dpm++, unipc and heun
        draw nothing. Raises ValueError for given frames that do not fit.
        """
        for out in self.trajectory(labels, noise, noise_fn, progress, given):
            last = out["sample"]
        return last

    def numbered_latents(self, seed: int, indices: Sequence[int], labels: Values) -> Tensor:
        """Latents (N, C, *space) of the images with these indices; labels as `conditions` gives
        them.

        An image depends on (seed, index) and its label, or its prompt, alone.
        """
        noise_fn = ImageNoise(seed, indices, labels.device)
        noise = noise_fn(torch.empty(len(indices), *self.latent, device=labels.device))
        return self.latents(labels, noise, noise_fn)

    def seeded_trajectory(
        self, labels: Sequence[int] | Sequence[str] | Values, seed: int = 0, progress: bool = False,
        given: Given | None = None,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """The trajectory for labels (N,), or N prompts, from torch's generator, which is seeded
        just before the first draw; on the network's device.

        Raises ValueError as `conditions` and `latents`.
        """
        values = self.conditions(labels)
        check_range("seed", seed, RANGES["seed"])
        torch.manual_seed(seed)
        noise = torch.randn(len(values), *self.latent, device=values.device)  # (N, C, *space)
        yield from self.trajectory(values, noise, progress=progress, given=given)

    def images(
        self, labels: Sequence[int] | Sequence[str] | Values, seed: int = 0,
        given: Given | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Images for labels (N,), or of a network that reads text for N prompts, a uint8 array
        (N, H, W, 3): those that sample.py draws; of a network that makes clips clips,
        (N, F, H, W, 3). A prompt that is too long is cut, with a note.

        Raises ValueError as `conditions` and `latents`, for none at all, and if the images are not
        finite.
        """
        if isinstance(labels, Sized) and not len(labels):
            raise ValueError("`labels` is empty; give a label or a prompt for each image")
        values = self.conditions(labels)
        for note in self.notes(labels):
            print(f"note: {note}", file=sys.stderr)
        for out in self.seeded_trajectory(values, seed, given=given):
            last = out["sample"]
        return self.decode(last).cpu().numpy()

    def give(self, frames: np.ndarray, places: Sequence[int]) -> Given:
        """Frames uint8 (K, H, W, 3), of the size of those that are drawn, as what a clip is to have
        at K places, counted from 0: a Given of one clip, which is for all samples.

        Raises ValueError for a network of images, for frames of another number or size, and for a
        part of a patch.
        """
        wanted = (len(places), *sides(self.image_size), 3)
        if not self.makes_clips or frames.shape != wanted or frames.dtype != np.uint8:
            raise ValueError(
                f"`frames` are {frames.dtype} of shape {frames.shape}; wanted are, for a network "
                f"that makes clips, uint8 of shape {wanted}"
            )
        device = next(self.network.parameters()).device
        images = from_uint8(torch.from_numpy(frames).permute(0, 3, 1, 2).to(device))
        channels, count, height, width = self.latent
        no_noise = torch.zeros(len(places), channels, height, width, device=device)
        latents = self.space.encode(images, no_noise)  # (K, C, h, w)
        clip = torch.zeros(self.latent, device=device)
        clip[:, places] = latents.transpose(0, 1)  # (C, F, h, w)
        mask = torch.zeros(1, count, dtype=torch.bool, device=device)
        mask[:, places] = True
        given = Given(clip.unsqueeze(0), mask, self.process.clean)
        check_given(given, (1, *self.latent), patch_frames(self.network))
        return given

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 (N, H, W, 3) of latents (N, C, H, W), or clips uint8 (N, F, H, W, 3) of
        latents (N, C, F, H, W), on their device. A clip is decoded at a time.

        Raises ValueError if they are not finite.
        """
        if latents.dim() > 4:
            return torch.stack([self.decode(frames_of(clip)) for clip in latents.split(1)])
        images = self.space.decode(latents)
        if not images.isfinite().all():
            raise ValueError(
                "some images have values that are not finite, with "
                f"`mixed_precision={self.mixed_precision}` and `cfg_scale={self.cfg_scale}`: "
                "try no or bf16, less guidance, or look for NaN in the checkpoint"
            )
        return to_uint8(images)


def check_latent(latent: tuple[int, ...], network: Network) -> None:
    """Raise ValueError unless a network has positions for latents of a shape (C, H, W), of clips
    (C, F, H, W).
    """
    shape, channels, patch_size = (1, *latent), network.in_channels, network.patch_size
    if tube := patch_frames(network):
        grid = box_of(shape, channels, patch_size, tube)[1:]
    else:
        grid = grid_of(shape, channels, patch_size)
    if network.extrapolation is not None:
        check_grid(network.extrapolation, grid, network.grid)


def usual_channels(text: bool, clips: bool) -> int | str:
    """The latent channels that are guided where nobody says it, of a network that reads text, or
    makes clips, or does neither.
    """
    return CFG_CHANNELS_OF_TEXT if text or clips else CFG_CHANNELS


def check_steps(sampler: str, steps: int, solvers: Mapping[str, Solver] = SOLVERS) -> None:
    """Raise ValueError unless there is such a solver and it can take so many steps."""
    if sampler not in solvers:
        raise ValueError(f"`sampler` is {sampler!r}; choose one of {', '.join(solvers)}")
    if not is_number(steps, Integral):
        raise ValueError(f"`num_sampling_steps` is {steps!r:.60}; give a whole number")
    solver, longest = solvers[sampler], max(solver.most for solver in solvers.values())
    if not solver.least <= steps <= solver.most:
        bound = f"most {solver.most}" if steps > solver.least else f"least {solver.least}"
        reason = f"; `sampler={sampler}` takes at {bound}" if 1 <= steps <= longest else ""
        raise ValueError(
            f"`num_sampling_steps` is {steps}; it must be from {solver.least} to "
            f"{solver.most}{reason}"
        )


def check_sampler(sampler: str, process: Process | type[Process]) -> None:
    """Raise ValueError unless the process has a solver of that name."""
    if sampler in process.solvers:
        return
    of = "".join(f" is one of {kind.word}'s" for kind in KINDS if sampler in kind.solvers)
    raise ValueError(
        f"`sampler` {sampler!s:.60}{of or ' is unknown'}; this network has learned the process "
        f"{process.word}: choose one of {', '.join(process.solvers)}"
    )


def check_negative(negative_prompt: str | None, cfg_scale: float) -> None:
    """Raise ValueError for a negative prompt that is no text, or that nothing is guided against."""
    if negative_prompt is None:
        return
    if not isinstance(negative_prompt, str):
        raise ValueError(f"`negative_prompt` is {negative_prompt!r:.60}; give one text")
    check_text(negative_prompt, "negative_prompt")
    if cfg_scale == 1:
        raise ValueError(
            f"`negative_prompt` {beginning(negative_prompt)} is for guidance, and `cfg_scale=1` is "
            "none; pass another scale"
        )


def check_options(
    given: Iterable[str], sampler: str, solvers: Mapping[str, Solver] = SOLVERS
) -> None:
    """Raise ValueError for the name of an option that the solver does not have."""
    for name in given:
        if name in solvers[sampler].options:
            continue
        *others, last = [each for each, solver in SOLVERS.items() if name in solver.options] or [""]
        known = f"samplers {', '.join(others)} and {last}" if others else f"sampler {last}"
        raise ValueError(f"`{name}` is for the {known}; `sampler` is {sampler}")
