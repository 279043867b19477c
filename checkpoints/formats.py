"""diffusers' networks that are read and written here, a row for each of its classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.diffusers_format import (
    config_from_diffusers, config_to_diffusers, from_diffusers, is_diffusers, to_diffusers,
)  # fmt: skip
from checkpoints.network_config import Tensors
from checkpoints.networks import OURS
from checkpoints.pixart_format import (
    config_from_pixart, config_to_pixart, from_pixart, is_pixart, to_pixart,
)  # fmt: skip
from checkpoints.process_marks import check_process
from checkpoints.sd3_format import STEPS, config_from_sd3, config_to_sd3, from_sd3, is_sd3, to_sd3
from processes.flow import FlowProcess
from runtime.json_files import read_json

EULER = "FlowMatchEulerDiscreteScheduler"
# Entries of its configuration that make another course of times, if they are set
OTHER_TIMES = (
    "use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "shift_terminal",
)  # fmt: skip


class PipelineEncoder(NamedTuple):
    """A text encoder of a pipeline: its kind and folder, how many tokens it reads, and what becomes
    of those that fill a caption up, as conditions.encoders has them.
    """

    kind: str
    folder: str
    length: int
    padding: str


# As Stable Diffusion 3 was trained, and PixArt-α
SD3_ENCODERS = (
    PipelineEncoder("clip", "text_encoder", 77, "read"),
    PipelineEncoder("clip", "text_encoder_2", 77, "read"),
    PipelineEncoder("t5", "text_encoder_3", 256, "read"),
)
PIXART_ENCODERS = (PipelineEncoder("t5", "text_encoder", 120, "masked"),)


class Format(NamedTuple):
    """One class of diffusers' and the class of ours that it is. `is_it` says whether a config.json
    is of it. The next four map configurations and state dicts both ways. `learned` says what the
    network has learned, a Process's `config` or None for the Gaussian process, of the pipeline
    whose model_index.json this is, or None for none; it raises ValueError for another process.
    `encoders` are those of the pipeline that read its prompts.
    """

    is_it: Callable[[dict], bool]
    config_from: Callable[[dict], dict]
    tensors_from: Callable[[Tensors, dict], Tensors]
    config_to: Callable[[dict], dict]
    tensors_to: Callable[[Tensors, dict], Tensors]
    learned: Callable[[Path | None], dict[str, Any] | None]
    encoders: tuple[PipelineEncoder, ...] = ()

    def text(self, index: Path | None) -> list[dict[str, Any]] | None:
        """What a checkpoint says of the encoders in the pipeline whose model_index.json this is;
        None if there is no pipeline, or it lacks one of them.
        """
        if index is None or not self.encoders:
            return None
        folders = [index.parent.absolute() / one.folder for one in self.encoders]
        if not all((folder / "config.json").is_file() for folder in folders):
            return None
        return [
            {"kind": one.kind, "name": str(folder), "length": one.length, "padding": one.padding,
             "sha256": ""}  # which is not known
            for one, folder in zip(self.encoders, folders)
        ]  # fmt: skip


def gaussian(index: Path | None) -> None:
    """As Format.learned: nothing is said, and nothing must be that is of another process."""
    if index is None:
        return
    check_process(read_json(index), index)
    scheduler = _scheduler(index)
    if scheduler.is_file():
        check_process(read_json(scheduler, infinite=True), scheduler)


def rectified_flow(index: Path | None) -> dict[str, Any]:
    """As Format.learned: the flow on the straight path, its times shifted as the scheduler says."""
    shift, file = 1.0, index and _scheduler(index)
    if file is not None and file.is_file():
        says = read_json(file, infinite=True)
        kind, steps = says.get("_class_name"), says.get("num_train_timesteps", STEPS)
        if kind != EULER:
            raise ValueError(f"{file} is a {str(kind)[:60]}; {EULER} alone is read")
        if steps != STEPS:
            raise ValueError(f"{file}: num_train_timesteps is {str(steps)[:60]}; wanted is {STEPS}")
        if others := [name for name in OTHER_TIMES if says.get(name)]:
            raise ValueError(
                f"{file} has {', '.join(others)}, which a flow has not here; a shift alone is read"
            )
        shift = says.get("shift", shift)
    try:
        return FlowProcess(path="linear", prediction="velocity", time_shift=shift).config
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).replace('`', '')}") from None


def _scheduler(index):
    """The file of a pipeline's scheduler."""
    return index.parent / "scheduler" / "scheduler_config.json"


FORMATS = {
    OURS: Format(
        is_diffusers, config_from_diffusers, from_diffusers, config_to_diffusers, to_diffusers,
        gaussian,
    ),
    "MMDiT": Format(
        is_sd3, config_from_sd3, from_sd3, config_to_sd3, to_sd3, rectified_flow, SD3_ENCODERS
    ),
    "PixArt": Format(
        is_pixart, config_from_pixart, from_pixart, config_to_pixart, to_pixart, gaussian,
        PIXART_ENCODERS,
    ),
}  # fmt: skip


def format_of(config: dict) -> Format | None:
    """The Format that a config.json's contents are of; None if none."""
    return next((one for one in FORMATS.values() if one.is_it(config)), None)
