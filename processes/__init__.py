"""What a network learns to go back: processes from data to noise, behind one interface."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "processes.flow": "FlowProcess",
        "processes.gaussian": "GaussianProcess",
        "processes.process": "Process Solver",
        "processes.table": "PROCESSES process_of",
    },
)
