"""Which flow a network has learned, as the arguments of its training run say it.

Checkpoints have such arguments under "args". Two scripts are known: train.py of this project, and
train.py of SiT, whose checkpoints say it nowhere else. Both count t from 0, noise, to 1, data.
"""

from collections.abc import Mapping
from typing import Any

from checkpoints.names import FLOWS
from processes.flow import FlowProcess

# SiT's arguments that tell a flow; its script writes all of them
SIT_ARGUMENTS = ("model", "path_type", "prediction", "loss_weight", "train_eps", "sample_eps")
SIT_PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}  # its word → ours
SIT_PREDICTIONS = ("velocity", "score", "noise")


def flow_of_arguments(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The flow that a run's arguments say, a Process's `config`; None if the arguments are of
    neither script, or of no flow. Their values are not looked at.
    """
    is_ours = FlowProcess.settings.keys() <= args.keys()
    if is_ours and str(args.get("process"))[:60] == FlowProcess.word:
        return {"name": FlowProcess.name} | {name: args[name] for name in FlowProcess.settings}
    return flow_of_sit(args) if {*SIT_ARGUMENTS} <= args.keys() else None


def flow_of_sit(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The flow that the arguments of SiT's train.py say; None for words that it does not have.

    Its code ignores a weight of the loss for velocities, and distances from the ends for velocities
    on its first two paths. `sample_eps` is about sampling, and not kept.
    """
    model, path, prediction = (str(args[name])[:60] for name in SIT_ARGUMENTS[:3])
    if model not in FLOWS or path not in SIT_PATHS or prediction not in SIT_PREDICTIONS:
        return None
    weight, is_velocity = args["loss_weight"], prediction == "velocity"
    said = {"name": FlowProcess.name, "path": SIT_PATHS[path], "prediction": prediction}
    unweighted = is_velocity or (isinstance(weight, str) and weight == "None")
    no_eps = is_velocity and path != "VP"
    return said | {
        "loss_weight": None if unweighted else weight,
        "train_eps": None if no_eps else args["train_eps"],
    }
