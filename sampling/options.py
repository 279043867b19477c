"""How to sample: the options of every picture, and those of a job of many images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from flow.forms import FORMS
from flow.solvers import LAST_STEPS
from layers.positions import EXTRAPOLATIONS
from processes.gaussian import GaussianProcess
from processes.process import Process
from processes.table import KINDS, SOLVERS
from runtime.limits import RANGES, check_kinds, check_numbers, is_number, short
from sampling.caching import parse_cache, written
from sampling.sampler import (
    check_negative, check_options, check_sampler, check_steps, usual_channels,
)  # fmt: skip
from sampling.speed import PRECISIONS

# Options that some solvers have; ddim's eta, which is older, is apart. None: the solver's default
OWN = (
    "time_shift", "sample_eps", "diffusion_form", "diffusion_norm", "last_step", "last_step_size",
    "atol", "rtol",
)  # fmt: skip
NUMBERS = [name for name in OWN if name not in ("diffusion_form", "last_step")]
# An SDE's last steps as users name them
LAST_STEP_NAMES = {"none" if name is None else name: name for name in LAST_STEPS}
OWN_NOISE = ("ddpm", "sde", "sde-heun")  # solvers that add noise without being told


@dataclass(frozen=True)
class SamplingOptions:
    """How a network is sampled.

    sampler: a key of SOLVERS, None for the usual one of the network's process; num_sampling_steps:
    how many steps it takes, None for its own number.
    eta: the noise that ddim adds, from 0, none, to 1, as much as ddpm.
    cfg_scale: guidance, 1 for none; cfg_channels: how many latent channels it is for, or "all"
    (None: 3, of a network that reads text or makes clips all);
    cfg_interval: the shares of the noise levels, from 0 (clean) to 1, between which it applies.
    mixed_precision: a key of PRECISIONS, the network's; compile: whether to compile the network.
    extrapolation: a key of EXTRAPOLATIONS, where tokens are in images of another size than the
    network was trained on; None for what the network says.
    negative_prompt: of a network that reads text, what samples are guided away from; None for the
    empty prompt.
    frames: of a network that makes clips, how many frames they have; None for as many as it was
    trained on.
    high_from: the noise level, from 0, clean, to 1, from which on the network of `ckpt_high` is
    asked; None without one.
    cache: at which steps the network's blocks are not asked, such as "taylor:3,1", as
    sampling.caching.parse_cache has it; None: at none.

    The others are for solvers of a flow, whose t runs from 0, noise, to 1, data; None is the
    solver's default. time_shift: how much nearer to noise the steps lie, as flow.shifted has it;
    sample_eps: how far from ends with an infinite term the steps stay. atol, rtol: the error that
    dopri5 allows itself. Of sde and sde-heun: diffusion_form, a key of FORMS, and diffusion_norm,
    its factor; last_step, a key of LAST_STEP_NAMES, and last_step_size, its length.

    A new option is a last field here and of Sampler, a flag in sampling/flags.py, a range in
    runtime/limits.py, and in many_folder.NEWER what older folders did. One of some solvers alone is
    in their Solver.options, a last field here, in OWN, and a flag.

    Raises ValueError for options that make no sense, whatever the checkpoint.
    """

    sampler: str | None = None
    num_sampling_steps: int | None = None
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | str | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    mixed_precision: str = "no"
    compile: bool = False
    time_shift: float | None = None
    sample_eps: float | None = None
    diffusion_form: str | None = None
    diffusion_norm: float | None = None
    last_step: str | None = None
    last_step_size: float | None = None
    atol: float | None = None
    rtol: float | None = None
    extrapolation: str | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    high_from: float | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        # One type for each option: sample_many names folders after the options
        for name, value in _given(self).items():
            if name in NUMBERS:
                object.__setattr__(self, name, _number(name, value))
        if self.high_from is not None:
            object.__setattr__(self, "high_from", _number("high_from", self.high_from))
        check_numbers(self)
        for name in ("eta", "cfg_scale"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "cfg_interval", _interval(self.cfg_interval))
        _check_choices(self)
        _check_eta(self)
        _check_interval(self)
        _check_last_step(self)
        check_negative(self.negative_prompt, self.cfg_scale)
        _settle_cache(self)
        if self.sampler is not None:
            check_options(_given(self), self.sampler)
        if self.num_sampling_steps is not None:
            _check_steps(self)
        check_kinds(self)  # of what is left

    def settled(
        self, process: Process, usual: str | None = None, text: bool = False, clips: bool = False
    ) -> dict[str, Any]:
        """{name: value} of every option for a network of a process: with the solver, the number of
        steps that are taken, the channels that are guided, and those of OWN that the solver has.

        usual: the solver where none is given; None is that of the process. text: whether the
        network reads text; clips: whether it makes clips. Raises ValueError for a solver that the
        process does not have, and for options that the solver does not have.
        """
        sampler = self.sampler or usual or process.usual
        check_sampler(sampler, process)
        solver, steps = process.solvers[sampler], self.num_sampling_steps
        if steps is None:
            steps = solver.steps
        check_steps(sampler, steps, process.solvers)
        given = _given(self)
        check_options(given, sampler, process.solvers)
        defaults = {name: value for name, value in solver.options.items() if name in OWN}
        values = {name: value for name, value in asdict(self).items() if name not in OWN}
        if self.cfg_channels is None:
            values["cfg_channels"] = usual_channels(text, clips)
        return values | {"sampler": sampler, "num_sampling_steps": steps} | defaults | given


def solver_options(settled: Mapping[str, Any]) -> dict[str, Any]:
    """Those of OWN in what SamplingOptions.settled gives, as a process takes them."""
    own = {name: settled[name] for name in OWN if name in settled}
    if "last_step" in own:
        own["last_step"] = LAST_STEP_NAMES[own["last_step"]]
    return own


def _number(name, value):
    """A number as a float. Raises ValueError, naming the argument, for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"`{name}` is {value!r:.60}; give a number")
    return float(value)


def _interval(value):
    """The two ends of an interval as floats. Raises ValueError for anything but two numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"`cfg_interval` is {value!r:.60}; give two numbers")
    return tuple(_number("cfg_interval", end) for end in value)


def _given(options):
    """{name: value} of those of OWN that are given."""
    return {name: value for name in OWN if (value := getattr(options, name)) is not None}


def _check_choices(options):
    choices: dict[str, Iterable[str]] = {
        "sampler": SOLVERS, "mixed_precision": PRECISIONS, "diffusion_form": FORMS,
        "last_step": LAST_STEP_NAMES, "extrapolation": EXTRAPOLATIONS,
    }  # fmt: skip
    for name, known in choices.items():
        value = getattr(options, name)
        if value is not None and value not in [*known]:
            raise ValueError(f"`{name}` is {value!s:.60}; give one of {', '.join(known)}")
    channels = options.cfg_channels
    if channels not in (None, "all") and not (isinstance(channels, int) and channels > 0):
        raise ValueError(
            f"`cfg_channels` is {channels}; give a number of channels, 1 or more, or all"
        )


def _check_eta(options):
    if not 0 <= options.eta <= 1:
        raise ValueError(f"`eta` is {options.eta}; it must be from 0 to 1")
    sampler = options.sampler or GaussianProcess.usual  # that of a flow does not have it either
    if options.eta and sampler != "ddim":
        own = "has its own noise" if sampler in OWN_NOISE else "adds none"
        raise ValueError(f'`eta` {options.eta} is for `sampler="ddim"`; {sampler} {own}')


def _check_last_step(options):
    if options.last_step == "none" and options.last_step_size is not None:
        raise ValueError(
            f"`last_step_size` {options.last_step_size} is for a last step, and "
            '`last_step="none"` is none; leave `last_step_size` out'
        )


def _settle_cache(options):
    """Give `cache` its one form. Raise ValueError for another text."""
    if options.cache is not None:
        object.__setattr__(options, "cache", written(parse_cache(options.cache)))


def _check_steps(options):
    """Raise ValueError if no solver that may be meant takes so many steps."""
    widest = max((kind.usual for kind in KINDS), key=lambda name: SOLVERS[name].most)
    check_steps(options.sampler or widest, options.num_sampling_steps)


def _check_interval(options):
    if len(options.cfg_interval) != 2:
        raise ValueError(f"`cfg_interval` has {len(options.cfg_interval)} numbers; give two")
    low, high = options.cfg_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"`cfg_interval` is {low} {high}; give two shares of the noise levels, t/1000 or in a "
            "flow 1 - t, with 0 <= LO <= HI <= 1"
        )
    if (low, high) != SamplingOptions.cfg_interval and options.cfg_scale == 1:
        raise ValueError(
            f"`cfg_interval` {low} {high} is for guidance, and `cfg_scale=1` is none; pass another "
            "scale"
        )


@dataclass(frozen=True)
class ManyOptions:
    """A job of many images.

    num_fid_samples: how many images; per_proc_batch_size: how many at a time in each process.
    sample_dir: where the folder of images and the .npz go.
    global_seed: image i depends on it and on i alone.
    labels: "random", "balanced", or a file with a number or name in each line.
    prompts: of a network that reads text, a file with a prompt in each line. They take turns: image
        i has the prompt of line i modulo their number, counted from 0.

    Raises ValueError for numbers out of their range.
    """

    num_fid_samples: int = 50_000
    per_proc_batch_size: int = 32
    sample_dir: Path | str = "samples"
    global_seed: int = 0
    labels: Path | str = "random"
    prompts: Path | str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        check_seed(self.global_seed)
        check_numbers(self)
        for name in ("sample_dir", "labels", "prompts"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(path))


def check_seed(seed: int) -> None:
    """Raise ValueError unless a seed is a whole number from 0 to 2**63 - 1."""
    least, most = RANGES["seed"]
    if not is_number(seed, Integral):
        raise ValueError(f"the seed is {seed!r:.60}; give a whole number")
    if not least <= seed <= most:
        raise ValueError(f"the seed is {short(seed)}; it must be at least 0 and below 2**63")
