"""How to sample: the options of every picture, and those of a job of many images."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.limits import RANGES, check_numbers, short
from processes.table import SOLVERS
from sampling.sampler import check_steps
from sampling.speed import PRECISIONS


@dataclass(frozen=True)
class SamplingOptions:
    """How a network is sampled.

    sampler: a key of SOLVERS; num_sampling_steps: how many steps it takes, None for its own number.
    eta: the noise that ddim adds, from 0, none, to 1, as much as ddpm.
    cfg_scale: guidance, 1 for none; cfg_channels: how many latent channels it is for, or "all";
    cfg_interval: the shares of the noise levels, from 0 (clean) to 1, between which it applies.
    mixed_precision: a key of PRECISIONS, the network's; compile: whether to compile the network.

    A new option is a last field here and of Sampler, a flag in sampling/flags.py, a range in
    runtime/limits.py, and in many_folder.NEWER what older folders did.

    Raises ValueError for options that make no sense, whatever the checkpoint.
    """

    sampler: str = "ddpm"
    num_sampling_steps: int | None = None
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | str = 3
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    mixed_precision: str = "no"
    compile: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        # One type for each option: sample_many names folders after the options
        for name in ("eta", "cfg_scale"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "cfg_interval", tuple(map(float, self.cfg_interval)))
        _check_choices(self)
        if self.num_sampling_steps is not None:
            check_steps(self.sampler, self.num_sampling_steps)
        _check_eta(self)
        _check_interval(self)

    @property
    def step_count(self) -> int:
        """How many steps are taken."""
        given = self.num_sampling_steps
        return SOLVERS[self.sampler].steps if given is None else given

    def settled(self) -> dict[str, Any]:
        """{name: value} of every option, with the number of steps that are taken."""
        return asdict(self) | {"num_sampling_steps": self.step_count}


def _check_choices(options):
    for name, known in {"sampler": list(SOLVERS), "mixed_precision": list(PRECISIONS)}.items():
        if getattr(options, name) not in known:
            raise ValueError(
                f"`{name}` is {getattr(options, name)}; give one of {', '.join(known)}"
            )
    channels = options.cfg_channels
    if channels != "all" and not (isinstance(channels, int) and channels > 0):
        raise ValueError(
            f"`cfg_channels` is {channels}; give a number of channels, 1 or more, or all"
        )


def _check_eta(options):
    if not 0 <= options.eta <= 1:
        raise ValueError(f"`eta` is {options.eta}; it must be from 0 to 1")
    if options.eta and options.sampler != "ddim":
        own = "has its own noise" if options.sampler == "ddpm" else "adds none"
        raise ValueError(f'`eta` {options.eta} is for `sampler="ddim"`; {options.sampler} {own}')


def _check_interval(options):
    if len(options.cfg_interval) != 2:
        raise ValueError(f"`cfg_interval` has {len(options.cfg_interval)} numbers; give two")
    low, high = options.cfg_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"`cfg_interval` is {low} {high}; give two shares of the noise levels, t/1000, with "
            "0 <= LO <= HI <= 1"
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

    Raises ValueError for numbers out of their range.
    """

    num_fid_samples: int = 50_000
    per_proc_batch_size: int = 32
    sample_dir: Path | str = "samples"
    global_seed: int = 0
    labels: Path | str = "random"

    def __post_init__(self) -> None:
        check_seed(self.global_seed)
        check_numbers(self)
        for name in ("sample_dir", "labels"):
            object.__setattr__(self, name, str(getattr(self, name)))


def check_seed(seed: int) -> None:
    """Raise ValueError unless a seed is from 0 to 2**63 - 1."""
    least, most = RANGES["seed"]
    if not least <= seed <= most:
        raise ValueError(f"the seed is {short(seed)}; it must be at least 0 and below 2**63")
