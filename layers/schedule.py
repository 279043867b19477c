"""What is told to networks that do less at some times than at others, so that they may skip it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Scheduled(Protocol):
    """A network of which some parts are left out at some times t.

    Asked as any other it is right for samples of any times, each by itself. Where all samples have
    one time, known to the host, it can leave out these parts of the work, too.
    """

    def schedule(self, times: Sequence[float]) -> None:
        """Prepare for these times, in the unit of the network's t. This may read from the device,
        and keeps what it found for the same times.
        """

    def expect(self, step: int | None) -> None:
        """All samples of the next calls have the time at this place of the schedule, a number of
        the host; None: any times. Nothing is read from the device.
        """


@contextmanager
def at_step(network: Scheduled | None, step: int) -> Iterator[None]:
    """A context in which a network expects a step of its schedule; None expects nothing."""
    if network is None:
        yield
        return
    network.expect(step)
    try:
        yield
    finally:
        network.expect(None)
