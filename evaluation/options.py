"""What a user chooses of an evaluation, and what can be wrong with it before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.disk import check_writable
from runtime.image_size import ImageSize
from runtime.limits import check_memory, check_numbers


@dataclass(frozen=True)
class EvaluationOptions:
    """What evaluate compares, or what make_reference summarizes, and by which features.

    None stands for what is not given.
    """

    samples: Path | str | None = None  # a folder of images, or an .npz of them, uint8 (N, H, W, 3)
    reference: Path | str | None = None  # the same, or an .npz with mu, sigma, mu_s, sigma_s, arr_0
    make_reference: Path | str | None = None  # the folder of images to make a reference file of
    image_size: ImageSize | None = None  # of make_reference: crop to it, as training does
    output: Path | str | None = None  # the file of make_reference, or of write_report
    features: str = "inception"  # or "pixels", or a path, as load_extractor takes it
    inception_weights: Path | str | None = None  # None: fetched on first use
    batch_size: int = 64  # images at a time in each process
    num_workers: int = 4  # loader processes of each process
    device: str | None = None  # "cpu", "cuda" or "mps"; None: the GPU if there is one


def check_comparison(options: EvaluationOptions) -> None:
    """Raise ValueError unless the options say what to compare, with numbers in their ranges."""
    if not (options.samples and options.reference):
        raise ValueError("`samples` and `reference` are wanted, or `make_reference`")
    if options.image_size is not None:
        raise ValueError(
            "`image_size` is for `make_reference`; samples and reference are scored as they are"
        )
    check_common(options)


def check_making(options: EvaluationOptions) -> None:
    """Raise ValueError unless the options say what to make a reference of.

    Their numbers must be in range.
    """
    folder = options.make_reference
    if not folder or options.samples or options.reference or not options.output:
        raise ValueError(
            "`make_reference=DIR` goes with `output=FILE.npz`, and without `samples` and "
            "`reference`"
        )
    if not Path(folder).is_dir():
        raise ValueError(
            f"`make_reference` {folder} is no folder; give one with images below it"
        )
    check_common(options)


def check_common(options: EvaluationOptions) -> None:
    """Raise ValueError for numbers out of range, and a device or an output that cannot be used."""
    if options.inception_weights and options.features != "inception":
        raise ValueError(
            f"`inception_weights` is for `features=inception`, not {options.features}"
        )
    check_numbers(options)
    if options.image_size is not None:
        check_memory(options.batch_size, options.image_size, "`image_size` or `batch_size`")
    check_device(options.device)
    if options.output and Path(options.output).exists():
        raise ValueError(
            f"`output` {options.output} exists already; remove it or give another name"
        )
    if options.output:
        check_writable(options.output)


def check_device(name: str | None) -> None:
    """Raise ValueError for a kind of GPU that PyTorch does not see."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name in there and not there[name]:
        raise ValueError(
            f"`device={name}`: PyTorch sees none here; leave the flag out or pass `device=cpu`"
        )
