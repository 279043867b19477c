"""The process in which a part of benchmarks.gpu runs, with its report and its time; benchmarks.gpu
starts it.

    python -m benchmarks.gpu_worker MODULE     # each line of JSON on standard input is an order

An order says which function of the module is called, and how. On a GPU each part has a process of
its own, since only a process can be cut for certain: a compiler, a collective call or a GPU that
answers no more never comes to a check between rounds. It also gives all memory back, and an error
of CUDA ends with it. Beside that, parts look at their time between rounds, so that they mostly end
by themselves with what they have.
"""

import importlib
import json
import os
from pathlib import Path
import queue
import signal
import sys
import threading
import time
import traceback

from benchmarks.sides import timed
from runtime.disk import write_whole


RUNNING, STOPPED = "running", "stopped at its time limit"  # of a part


class Report:
    """What a part has found so far, in a file that is whole at any time; and the time that the part
    has.

    `path` None keeps it in memory alone. `failed` says which pieces of the part raised, and what;
    `outcome` how the part is to end if it does not raise, `status` how it has ended.
    """

    def __init__(self, path, seconds, name=""):
        self.path, self.name, self.ends = path, name, time.monotonic() + seconds
        self.status, self.outcome = {"status": RUNNING}, {"status": "done"}
        self.found, self.failed = {}, {}

    def set(self, **found):
        """Take in what was found under these names, and write it."""
        self.found |= found
        self.write()

    def add(self, **found):
        """As `set`, and print it."""
        self.set(**found)
        for name, value in found.items():
            print(f"  {self.name}: {name.replace('_', ' ')} {json.dumps(value)}", flush=True)

    def end(self, status, **why):
        """Say how the part ended."""
        self.status = {"status": status, **why}
        self.write()

    def left(self):
        """The seconds that are left."""
        return self.ends - time.monotonic()

    def contents(self):
        """The report as a dict of plain values."""
        return {
            **self.status, "found": self.found, **({"failed": self.failed} if self.failed else {}),
        }  # fmt: skip

    def write(self):
        if self.path is not None:
            text = json.dumps(self.contents())
            write_whole(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def attempt(report, name, call, *args):
    """call(*args), or None where it raises: then the report has the message under this name, and
    the part goes on.
    """
    try:
        return call(*args)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # compilers, CUDA and diffusers have many kinds
        traceback.print_exc()
        report.failed[name] = message(error)
        report.write()
        print(f"  {report.name}: {name} failed, {report.failed[name]}", flush=True)
        return None


def message(error):
    """The kind and the first 500 characters of an error."""
    return f"{type(error).__name__}: {error}"[:500].strip()


def take_turns(report, sides, rounds, show, ready=lambda name: None):
    """As sides.alternate, while there is time for another round: {name: seconds of each round}.

    ready(name) comes before each turn and is not timed; show(seconds) after each round, so that a
    part which is cut has what it measured.
    """
    seconds, longest = {name: [] for name in sides}, 0.0
    for i in range(rounds):
        began = time.monotonic()
        if i and report.left() < longest:
            report.outcome = {"status": STOPPED}
            break
        for name in list(sides)[:: -1 if i % 2 else 1]:
            ready(name)
            seconds[name].append(timed(sides[name]))
        longest = max(longest, time.monotonic() - began)
        show(seconds)
    return seconds


def run(report, function, sizes):
    """Do a part. Whatever it raises is in its report, and a library that is missing leaves it out.
    """
    try:
        function(report, **sizes)
    except ModuleNotFoundError as error:
        report.end("left out", why=f"{error.name} is not installed")
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        where = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-5:]
        ]
        report.end("error", error=message(error), where=where)
    else:
        report.end(**report.outcome)


def standard_input():
    """A handle of standard input, in whose place others here, and children, find an empty one."""
    handle, empty = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return handle


def read_orders(handle, orders):
    """Put each line of a pipe into a queue.

    Where the process that writes has ended, end too, with all children.
    """
    waiting = b""
    while read := os.read(handle, 4096):
        *lines, waiting = (waiting + read).split(b"\n")
        for line in lines:
            orders.put(json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main():
    handle, missing, module = standard_input(), None, None
    try:  # before an order comes, while another part is measured: imports take seconds
        module = importlib.import_module(sys.argv[1])
    except ModuleNotFoundError as error:
        missing = error
    orders = queue.Queue()
    threading.Thread(target=read_orders, args=(handle, orders), daemon=True).start()
    while True:
        order = orders.get()

        def part(report, **sizes):
            if missing is not None:
                raise missing
            getattr(module, order["function"])(report, **sizes)

        run(Report(Path(order["path"]), order["seconds"], order["name"]), part, order["sizes"])


if __name__ == "__main__":
    main()
