"""What surrounds a process: its place among others, its launcher's wishes, installed packages."""

from importlib.util import find_spec
import os
from typing import NamedTuple

TORCHRUN = "start the processes with torchrun (docs/training.md), or one alone without these"
# Launchers that start processes without RANK and WORLD_SIZE: where they say how many, and which.
COUNTED_BY = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "mvapich's mpirun": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    "flux run": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"), "PALS's aprun": ("PALS_SIZE", "PALS_RANKID"),
    "prun": ("PMIX_SIZE", "PMIX_RANK"),
}  # fmt: skip
# What `accelerate launch` hands over in the environment and the scripts here do in another way, or
# not at all.
ACCELERATE_SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "its own FSDP (train.py has --fsdp)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its own parallelism",
}
ACCELERATE_VALUES = {  # variable → what the script's own flag is called
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_DYNAMO_BACKEND": "compile",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "grad_accum",
}
NEUTRAL = ("", "no", "1")  # such a value asks for nothing


class Place(NamedTuple):
    """Which of the processes that share the work this one is."""

    rank: int = 0
    world_size: int = 1


def own_place() -> Place:
    """This process's Place, from RANK and WORLD_SIZE as torchrun sets them.

    The process is alone if both are absent or empty. Empty ones are taken out of the environment.
    Raises ValueError if they make no sense, or if another launcher started several processes and
    did not set them: then each process would do the whole work.
    """
    told = {name: os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE")}
    if not any(told.values()) and os.environ.get("LOCAL_RANK", "").strip():
        raise ValueError(f"the environment has LOCAL_RANK without RANK and WORLD_SIZE; {TORCHRUN}")
    if not any(told.values()):
        _check_counted()
        for name in (*told, "LOCAL_RANK"):  # accelerate takes an empty one for a number
            os.environ.pop(name, None)
        return Place()
    for name, text in told.items():
        if not text.isdecimal():
            raise ValueError(
                f"the environment has {name}={text!r} beside {_other(told, name)}; {TORCHRUN}"
            )
    local = os.environ.get("LOCAL_RANK", "").strip()
    if local and not local.isdecimal():
        raise ValueError(f"the environment has LOCAL_RANK={local!r}; {TORCHRUN}")
    rank, world_size = int(told["RANK"]), int(told["WORLD_SIZE"])
    if rank >= world_size:
        raise ValueError(f"the environment has RANK={rank} and WORLD_SIZE={world_size}; {TORCHRUN}")
    return Place(rank, world_size)


def _other(told, name):
    return " and ".join(f"{key}={value!r}" for key, value in told.items() if key != name)


def _check_counted():
    """Raise ValueError if a launcher that sets no RANK started several processes."""
    for launcher, (size, number) in COUNTED_BY.items():
        count, rank = (_whole(os.environ.get(name, "")) for name in (size, number))
        if count > 1 or rank > 0:
            raise ValueError(
                f"{launcher} started this as process {rank} of {max(count, rank + 1)} without RANK "
                "and WORLD_SIZE, so each "
                f"would do the whole work by itself; {TORCHRUN}"
            )


def _whole(text):
    return int(text) if text.isdecimal() else 0


def lone_task_note() -> str | None:
    """What to say if SLURM has several tasks for this job and nothing but this process was started.

    Otherwise the answer is None.
    """
    tasks = _whole(os.environ.get("SLURM_NTASKS", ""))
    if tasks < 2 or os.environ.get("WORLD_SIZE", "").strip():
        return None
    return (
        f"SLURM gave this job {tasks} tasks, and this is one process alone; torchrun starts "
        "several "
        "(docs/training.md)"
    )


def check_accelerate(**own: object) -> None:
    """Raise ValueError if `accelerate launch` asks for what the script does not do.

    What the script's own flags are to ask for is refused, too. `own` are the values of these flags
    by name, such as mixed_precision="bf16".
    """
    for name, what in ACCELERATE_SWITCHES.items():
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on", "y", "t"):
            raise ValueError(
                f"accelerate asks for {what} ({name}={os.environ[name]}), which is not heeded "
                "here; start with torchrun, or switch it off with accelerate config"
            )
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE", "").strip():
        raise ValueError(
            f"the environment has ACCELERATE_TORCH_DEVICE={device}, which is not heeded here; pass "
            "`device`"
        )
    for name, flag in ACCELERATE_VALUES.items():
        asked = os.environ.get(name, "").strip().lower()
        if asked not in NEUTRAL and asked != str(own.get(flag, "")).lower():
            here = f"give the script its own `{flag}`"
            if flag not in own:
                here = f"this script has no --{flag.replace('_', '-')}"
            raise ValueError(
                f"accelerate launch asks for {name}={asked}, which is not heeded here: {here}, and "
                "leave the launcher's out or at no"
            )


def is_installed(package: str) -> bool:
    """Whether a package can be imported.

    A mere folder of its name beside the script does not count.
    """
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
