"""The processes that there are, by the names that files have for them."""

from collections.abc import Mapping
from typing import Any

from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from processes.process import Learner, Process, Solver

PROCESSES: dict[str, type[Process]] = {
    GaussianProcess.name: GaussianProcess, FlowProcess.name: FlowProcess,
}  # fmt: skip
KINDS = tuple(PROCESSES.values())
WORDS = {kind.word: kind for kind in KINDS}  # as command lines name them

# Of all processes: what a command line may name before a checkpoint says which process it is of
SOLVERS: dict[str, Solver] = {
    name: solver for kind in KINDS for name, solver in kind.solvers.items()
}
# Their options of training, at None: not given
SETTINGS: tuple[str, ...] = tuple(name for kind in KINDS for name in kind.settings)


def process_of(network: Learner, said: Mapping[str, Any] | None = None) -> Process:
    """The process that a network has learned, or is to learn.

    `said` is what its file says under `process`, a Process's `config`; None is what the network was
    loaded with, and the Gaussian process where that is nothing, as in files that say nothing.
    Raises ValueError for a process that is not in PROCESSES, and for settings that it cannot have.
    """
    said = getattr(network, "process", None) if said is None else said
    said = {"name": GaussianProcess.name} if said is None else said
    kind = PROCESSES.get(str(said.get("name")))
    if kind is None:
        raise ValueError(
            f"the process {str(said.get('name'))[:60]} is not known here; "
            f"known are {', '.join(PROCESSES)}"
        )
    return kind.of(network, said)
