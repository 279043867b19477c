"""Which of the processes that share work through a folder are at it.

So none waits for one that is gone.
"""

from contextlib import suppress
import os
from pathlib import Path
import socket
from typing import BinaryIO

from runtime.surroundings import Place


class Presence:
    """A context in which this process is seen at work in the folder, and sees the others.

    Each process holds a lock on a file of its own, .process-RANK, which the system takes back from
    a process that was killed. A process that ends by an exception leaves its file. With `only`,
    entering raises ValueError if another process of the same rank is there.
    """

    def __init__(self, folder: Path, place: Place, only: bool = False) -> None:
        self.folder, self.place, self.only = folder, place, only
        self.handle: int | None = None
        self.seen: set[int] = set()  # at work, since this one began

    def __enter__(self) -> "Presence":
        is_own = True
        with suppress(OSError):  # then nobody can tell, and everybody waits
            self.handle = os.open(self._path(self.place.rank), os.O_RDWR | os.O_CREAT, 0o666)
            is_own = lock(self.handle)
            if is_own:
                os.ftruncate(self.handle, 0)
                os.pwrite(
                    self.handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0
                )
            self.began = os.fstat(self.handle).st_mtime_ns
        if self.only and not is_own:
            holder = (
                self._path(self.place.rank).read_text(encoding="utf-8", errors="replace").strip()
                or "another process"
            )
            raise ValueError(
                f"{self.folder} is being written by {holder}; wait until that ends or stop it"
            )
        for rank in range(self.place.world_size):
            self.at_work(rank)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None or self.place.world_size == 1:  # or nobody is there to be told
            done = range(self.place.world_size) if self.place.rank == 0 else [self.place.rank]
            for rank in done:
                if rank == self.place.rank or not self.at_work(rank):
                    with suppress(OSError):
                        self._path(rank).unlink()
        if self.handle is not None:
            os.close(self.handle)

    def _path(self, rank):
        return self.folder / f".process-{rank}"

    def at_work(self, rank: int) -> bool:
        """Whether a process is there; also if that cannot be told."""
        try:
            handle = os.open(self._path(rank), os.O_RDWR)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            there = not lock(handle)
        except OSError:
            return True
        finally:
            os.close(handle)
        self.seen |= {rank} if there else set()
        return there

    def is_gone(self, rank: int) -> bool:
        """Whether a process that has been there since this one began is no more, its work not done.
        """
        # It never was there, or ended well
        if self.at_work(rank) or self.handle is None or not self._path(rank).exists():
            return False
        try:
            return rank in self.seen or self._path(rank).stat().st_mtime_ns >= self.began
        except OSError:
            return False

    def missed(self, ranks: set[int]) -> str:
        """Which of the processes whose work is missing are not there, in words; "" if all are.

        Raises ValueError if one of them is gone.
        """
        gone = sorted(filter(self.is_gone, ranks))
        if gone:
            raise ValueError(
                f"process {gone[0]} of {self.place.world_size} has ended without doing its share; "
                "look at what it said, and "
                "give the same command again, which goes on"
            )
        absent = [str(rank) for rank in sorted(ranks) if not self.at_work(rank)]
        return (
            f" (process {', '.join(absent)} of {self.place.world_size} is not there: start it)"
            if absent
            else ""
        )


def lock(file: int | BinaryIO) -> bool:
    """Whether this process could take the lock of an open file.

    The lock is held until the file is closed. Raises OSError where there are no locks.
    """
    try:
        import fcntl  # which Windows lacks
    except ImportError:
        raise OSError("there are no locks") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
