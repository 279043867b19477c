"""The right to write in a run's folder."""

from contextlib import suppress
import os
from pathlib import Path
import socket
import time

from runtime.presence import lock

LOCK_PATIENCE = 5  # seconds: a process that was just killed may not be gone yet
START_PATIENCE = 600  # seconds that another start of the same run may take, until it has its folder


class FolderLock:
    """A context manager with the right to write in one folder.

    One process on any machine holds that right until it ends. It is an flock, so the system takes
    it back from a process that was killed. Before there is a folder, `begin` gives the right to
    start a run.
    """

    def __init__(self) -> None:
        self.handles: dict[Path, int] = {}
        self.note = ""
        if hasattr(os, "register_at_fork"):
            # A loader's worker may outlive us and must not hold it
            os.register_at_fork(after_in_child=self._forget)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _forget(self):
        for handle in self.handles.values():
            os.close(handle)
        self.handles.clear()

    def release(self) -> None:
        """Give back whatever is held; a lock that `begin` took leaves no file."""
        for path in self.handles:
            if path.name != "lock":
                with suppress(OSError):
                    path.unlink()
                with suppress(OSError):  # if nothing else is there, it was made for this
                    path.parent.rmdir()
        self._forget()

    def begin(self, results: Path, key: str) -> None:
        """Wait for other starts of the same run, which `key` tells, to have their folder or fail.

        The right is held until `take`. Raises ValueError if that takes more than START_PATIENCE
        seconds, or the folder cannot be written.
        """
        path = results / f".starting-{key}"
        try:
            results.mkdir(parents=True, exist_ok=True)
            while not self._hold(path, START_PATIENCE):
                pass
        except OSError as error:
            raise ValueError(
                f"cannot write in {results} ({error.strerror}); choose another `results_dir`"
            ) from None

    def take(self, folder: Path) -> None:
        """Take the folder's lock, in place of what was held.

        Raises ValueError, naming host and process, if another holds it.
        """
        before, self.handles = self.handles, {}
        try:
            self._hold(folder / "lock", LOCK_PATIENCE)
        finally:
            taken, self.handles = self.handles, before
            self.release()
            self.handles = taken

    def _hold(self, path, patience):
        """Lock a file; False if it is no longer the one of that name.

        Raises ValueError if another process has it so long.
        """
        handle = self.handles[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + patience
        while not self._try(handle):
            if time.monotonic() > deadline:
                holder = (
                    os.pread(handle, 300, 0).decode(errors="replace").strip() or "another process"
                )
                os.close(self.handles.pop(path))
                raise ValueError(
                    f"{path.parent} is being written by {holder}; wait until that ends or stop it, "
                    "then give the same command again"
                )
            time.sleep(0.1)
        if not path.exists() or os.fstat(handle).st_ino != path.stat().st_ino:
            os.close(self.handles.pop(path))
            return False
        with suppress(OSError):  # a full disk: nobody needs to read it
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return True

    def _try(self, handle):
        try:
            return lock(handle)
        except OSError as error:  # some network file systems
            reason = error.strerror or error
            self.note = (
                f"the file system cannot lock ({reason}): see to it that only one job writes here"
            )
            return True
