"""Scripts as users start them, by themselves or on several processes of one run.

`fresh` starts Pythons of their own, with torchrun where there are several. `forked` starts
processes that have other people's modules already, which saves most of the time, and import ours
anew; they find what torchrun would tell them in their environment.
"""

import multiprocessing
import os
from pathlib import Path
import runpy
import socket
import subprocess
import sys
from tempfile import TemporaryDirectory

import pytest

from conftest import ROOT
from kill_campaign import TIMEOUT, launcher


def fresh(script, *words, processes=1, folder=ROOT, **environment):
    """A script run in a folder to its end; its CompletedProcess."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *map(str, (script, *words))],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True,
        text=True, timeout=TIMEOUT,
    )  # fmt: skip


def forked(script, *words, processes=1, folder=ROOT, **environment):
    """The same, from forked processes; its return code is that of the first that failed."""
    context, shared = launcher(), {**os.environ, **environment}
    argv = [str(Path(folder) / script), *map(str, words)]
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        shared |= dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with TemporaryDirectory() as outputs:
        started = []
        for rank in range(processes):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank)) if processes > 1 else {}
            wanted = (argv, folder, shared | own, f"{outputs}/{rank}")
            started.append(context.Process(target=run_as_script, args=wanted))
            started[-1].start()
        for process in started:
            process.join(TIMEOUT)
            process.kill()  # one that waits for another that has failed
            process.join()
        out, err = (
            "".join(path.read_text() for path in sorted(Path(outputs).glob(f"*.{kind}")))
            for kind in ("out", "err")
        )
    codes = [process.exitcode for process in started]
    return subprocess.CompletedProcess(argv, next(filter(None, codes), 0), out, err)


def run_as_script(argv, folder, environment, output):
    """Run a script in this process, as Python would; its two outputs go to files."""
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    # For the loader's workers, as in a process of one's own
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name, module in list(sys.modules.items()):
        if is_below(getattr(module, "__file__", None)):
            del sys.modules[name]
    sys.argv = argv
    sys.path[:] = [os.path.dirname(argv[0]), *(path for path in sys.path if not is_below(path))]
    runpy.run_path(argv[0], run_name="__main__")


def is_below(path):
    """Whether a path, if it is one, is in the repository, and not in an environment there."""
    inside = f"{path}{os.sep}".startswith(f"{ROOT}{os.sep}")
    return inside and "site-packages" not in path and ".venv" not in path


# A test of what a script does is short with the one, and meets all that users do with the other
STARTS = [forked, pytest.param(fresh, marks=pytest.mark.long)]
each_start = pytest.mark.parametrize("start", STARTS)
