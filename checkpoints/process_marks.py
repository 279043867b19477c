"""Which process a network was trained with, as its files say it.

Networks of other processes have the same tensors as a DiT: SiT and others predict a velocity, EDM's
a clean image. Sampled, or trained further, as if they predicted the noise of 1,000 steps with
linear betas, they give images without sense and no error. So a file either says its process as this
project does, or as SiT's train.py does, or it must have no mark of another one.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import islice
import math
import re
from typing import Any

from checkpoints.network_config import check_plain, process_in
from checkpoints.run_arguments import SIT_ARGUMENTS, flow_of_arguments
from diffusion import create_diffusion
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from processes.table import PROCESSES

UNDERSTOOD = {*SIT_ARGUMENTS, *FlowProcess.settings, "process"}  # by flow_of_arguments
MOST_ENTRIES = 10_000  # of lists and dicts in one another that are looked at
NOISE = {"epsilon", "eps", "e", "noise", "pred_noise", "pred_eps", "pred_epsilon", "ddpm"}
GAUSSIAN = {"gaussian", "ddpm", "iddpm", "diffusion", "gaussian_diffusion", "improved_diffusion"}
# Key of a configuration → the texts, in small letters, under it that mean the process of this
# project.
TEXTS = {
    **dict.fromkeys(
        (
            "prediction",
            "prediction_type",
            "pred_type",
            "predict_type",
            "pred",
            "predict",
            "predicts",
            "parameterization",
            "parametrization",
            "prediction_target",
        ),
        NOISE,
    ),
    **dict.fromkeys(("model_mean_type", "mean_type"), NOISE),
    **dict.fromkeys(("process", "diffusion_process"), GAUSSIAN),
    **dict.fromkeys(("noise_schedule", "beta_schedule", "schedule_name"), {"linear"}),
    "path_type": set(),
}
# Keys that say it by having a value.
SWITCHES = {
    "predict_xstart", "predict_x0", "predict_v", "v_prediction", "v_pred", "rescale_betas_zero_snr",
    "zero_terminal_snr", "flow", "use_flow", "is_flow", "fm", "velocity_prediction",
    "predict_velocity", "zero_snr", "flow_matching", "use_flow_matching", "rectified_flow",
    "use_rectified_flow", "use_flow_sigmas", "flow_shift", "velocity", "edm", "use_edm", "p_mean",
    "sigma_data",
}  # fmt: skip
NO_SHIFT = {"flow_shift": 1}  # which says nothing: diffusers writes it for every multistep solver
STEPS = (
    "diffusion_steps", "num_train_timesteps", "num_diffusion_timesteps", "num_timesteps",
    "timesteps",
)  # fmt: skip
NAMES = ("model", "arch", "architecture", "model_name", "model_type", "_class_name", "class_name")
OPEN = (
    *NAMES, "objective", "loss_type", "loss", "loss_fn", "framework", "formulation",
    "training_type", "training", "trainer", "transport", "diffusion_type", "diffusion", "type",
    "method", "algorithm", "precond", "preconditioning", "scheduler", "noise_scheduler",
    "weighting", "mode", "interpolant", "timestep_type",
)  # fmt: skip
WHOLE = {"v", "x0", "u", "flow", "velocity"}  # as the whole text of one of OPEN
# An entry of a configuration that was kept as text
SAID = re.compile(r"""["']?-{0,2}(\w+)["']?\s*[=:,]\s*["']?([\w.+-]+)""")
# In the texts of OPEN.
OTHER = re.compile(
    r"(?<![a-z])(sit|lightningdit|jit|flow(?!er)\w*|rectified\w*|reflow|velocity|v[-_ ]?pred\w*|"
    r"edm\w*|karras|meanflow|score|consistency\w*|lcm\w*|pred_x0|pred_v|x0)(?![a-z])",
    re.IGNORECASE,
)
# In the names of diffusers' classes
CLASS = re.compile("SiT|FlowMatch|RectifiedFlow|EDM|LCM|Consistency|CMStochastic|TCD")
TEXT_OF_ARGUMENTS = (
    "args", "config", "cfg", "hparams", "opt", "options", "params", "command", "argv",
)  # fmt: skip
# Key of a configuration → how LightningDiT's says the flow that it learns.
LIGHTNING = {
    "path_type": re.compile(r"linear$", re.IGNORECASE),
    "prediction": re.compile(r"velocity$", re.IGNORECASE),
    **dict.fromkeys(NAMES, re.compile("LightningDiT")),
}
DEEPEST = 4  # of containers in one another


def check_process(said: object, origin: object) -> None:
    """Raise ValueError if what a file says of its network is of another process than ours.

    `said` and `origin` are as in process_said.
    """
    process_said(said, origin)


def process_said(
    said: object, origin: object, of_tensors: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """What a file says of the process that its network has learned, a Process's `config`; None
    where it says nothing, as files of the Gaussian process may.

    `said`, a configuration or something else, is a dict, a Namespace, or a container of them;
    `origin` is where it stands. What stands under `process`, in a dict or in the `config` in it,
    goes first, then the arguments of a run. Where that is one of PROCESSES other than the Gaussian
    one, it alone counts: the marks below are those of networks that are not Gaussian. `of_tensors`
    is what the names of the tensors say, LightningDiT's flow: it counts where nothing else is said,
    and words for it are no marks of another.

    Raises ValueError for another process than these, or one that is said by no plain values.
    """
    top = said if isinstance(said, Mapping) else {}
    found = (process_in(part) for part in (top.get("config"), top))
    process = next((one for one in found if one is not None), None)
    if process is None and isinstance(top.get("process"), (bool, int, float)):
        raise ValueError(f"{origin}: its process is {top['process']}; wanted is a dict with a name")
    args = _arguments(top)
    of_arguments = flow_of_arguments(args) if process is None else None
    try:
        check_plain(process or of_arguments or {})
    except ValueError as error:
        raise ValueError(f"{origin}: of its process {error}") from None
    if process is not None and process.get("name") in PROCESSES.keys() - {GaussianProcess.name}:
        return process
    unknown = {name: value for name, value in args.items() if name not in UNDERSTOOD}
    left = {**top, "args": unknown} if of_arguments else said
    _check_marks(left, origin, LIGHTNING if of_tensors else {})
    return process or of_arguments or of_tensors


def _check_marks(said, origin, allowed):
    """Raise ValueError for an entry that is of another process than the Gaussian one, and whose
    text under this key is not `allowed`.
    """
    for key, value in _entries(said):
        if mark := _mark(key, value):
            if key in allowed and allowed[key].match(str(value)):
                continue
            raise ValueError(
                f"{origin} is of another process ({mark}): here a network predicts the noise of "
                "1,000 steps with linear betas, "
                "and sampled or trained so it would give images without sense. Use the code that "
                "it was trained with; if the "
                "entry is wrong, save the state dict alone"
            )


def _arguments(top):
    """The arguments of a run in what a file says; {} for none, or none that are a dict or a
    Namespace.
    """
    args = top.get("args")
    args = vars(args) if isinstance(args, Namespace) else args
    return args if isinstance(args, Mapping) else {}


def _mark(key, value):
    """How an entry says that it is of another process, or None."""
    if key == "trained_betas" and isinstance(value, list):
        return None if _are_ours(value) else "trained_betas of its own"
    if (name := _own(key, value)) is not None and name != GaussianProcess.name:
        return f"process: {name[:60]}"
    if not isinstance(value, (str, int, float)):
        return None
    text = str(value)[:200].strip()
    wrong = False
    if key in TEXTS and isinstance(value, str):
        wrong = text.lower() not in TEXTS[key] | {"", "none"}
    elif key in SWITCHES:
        nothing = text.lower() in ("", "0", "0.0", "false", "no", "none")
        wrong = not nothing and value != NO_SHIFT.get(key)
    elif key in STEPS and not isinstance(value, str):
        wrong = value != len(_betas())
    elif key in ("beta_start", "beta_end") and not isinstance(value, str):
        wrong = not math.isclose(value, _betas()[0 if key == "beta_start" else -1], rel_tol=1e-6)
    elif key in OPEN and isinstance(value, str):
        wrong = bool(OTHER.search(text) or CLASS.search(text)) or text.lower() in WHOLE
    return f"{key}: {text[:60]}" if wrong else None


def _own(key, value):
    """The name of the process where an entry says it as our files do, else None."""
    name = value.get("name") if key == "process" and isinstance(value, Mapping) else None
    return name if isinstance(name, str) else None


def _betas():
    return create_diffusion("").betas


def _are_ours(value):
    """Whether trained_betas of a scheduler are this project's."""
    ours = _betas()
    numbers = (
        isinstance(value, list)
        and len(value) == len(ours)
        and all(isinstance(beta, (int, float)) for beta in value)
    )
    return numbers and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(value, ours))


def _entries(said: Any, depth: int = 0, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key in small letters and without what stands before a dot, value) of each entry.

    Entries inside of others are among them.
    """
    if isinstance(said, Namespace):
        said = vars(said)
    if isinstance(said, Mapping):
        inside = list(islice(said.items(), MOST_ENTRIES))
    elif isinstance(said, (list, tuple)):
        inside = [(key, value) for value in islice(said, MOST_ENTRIES)]
        texts = [value for value in said[:MOST_ENTRIES] if isinstance(value, str)]
        inside += [
            (name[2:], value) for name, value in zip(texts, texts[1:]) if name.startswith("--")
        ]
    elif isinstance(said, str) and key in ("", *TEXT_OF_ARGUMENTS):
        inside = SAID.findall(said[:MOST_ENTRIES])
    else:
        return
    for name, value in inside:
        name = str(name)[:200].rpartition(".")[2].lower().replace("-", "_")
        yield name, value
        if depth < DEEPEST:
            yield from _entries(value, depth + 1, name)
