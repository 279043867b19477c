"""Parts of benchmarks.gpu that run what others run by a command: the tests that need a GPU, and the
study of scaling.
"""

import json
import math
from pathlib import Path
import re
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks.gpu_worker import STOPPED
from benchmarks.sides import ROOT

MARK = "gpu"  # of pytest, on the tests that need one
# Files of tests without any are not read, which takes seconds.
MARKED = re.compile(rf"^@pytest\.mark\.{MARK}$", re.MULTILINE)
TO_END = 5  # seconds that the study has to end in, once it is interrupted


# ---- tests ----


class Recorder:
    """A plugin of pytest that reports each test when it is over."""

    def __init__(self, report):
        self.report, self.outcomes = report, {}
        self.report.set(collected=0, passed=0, failed=0, skipped=0, failures={}, reasons={})

    def pytest_collectreport(self, report):
        """Take in a file of tests that cannot be read, such as for want of a library: a failure."""
        if report.failed:
            self.report.found["failures"][named(report)] = str(report.longrepr)[-1000:]
            self.report.write()

    def pytest_collection_finish(self, session):
        self.report.set(collected=len(session.items))

    def pytest_runtest_logreport(self, report):
        """Take in a test's setup, call or end; a test that fails in any of them has failed."""
        if report.when != "call" and report.outcome == "passed":
            return
        if self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome
        name, found = named(report), self.report.found
        if report.outcome == "failed":
            found["failures"][name] = str(report.longrepr)[-1000:]
        elif report.outcome == "skipped":
            found["reasons"][name] = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else "an expected failure"
            )
        outcomes = list(self.outcomes.values())
        self.report.set(**{kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")})


def named(report):
    """The name of a test, or of a file of tests, that a report of pytest is about."""
    return report.nodeid.removeprefix("tests/")


def gpu_tests(report):
    """Run the tests that are marked as needing a GPU, which skip themselves without one."""
    import pytest

    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if MARKED.search(path.read_text())
    ]
    flags = [
        "-q", "-m", MARK, "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir",
        str(ROOT),
    ]  # fmt: skip
    pytest.main([*flags, *files], plugins=[Recorder(report)])
    report.add(**report.found)


# ---- the study of scaling ----


def scaling(report, preset, folder=None, seconds=math.inf):
    """Go on with examples/scaling in this folder until the time is over, or so many seconds; what
    is finished.

    Without a folder it begins in one that is thrown away.
    """
    import sklearn  # noqa: F401  the photographs come with it: without it the part is left out

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(folder or temporary).absolute()
        script = ROOT / "examples" / "scaling" / "study.py"
        command = [
            sys.executable, str(script), "--output", str(output), "--preset", preset, "--workers",
            "1",
        ]  # fmt: skip
        report.set(preset=preset, folder=folder, finished=0, of=None)
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL) as study:
            ends = min(time.monotonic() + seconds, report.ends - TO_END)
            while study.poll() is None and time.monotonic() < ends:
                time.sleep(0.2)
                show_study(report, output)
            if study.poll() is None:
                interrupt(study)
                report.outcome = {"status": STOPPED}
            elif study.returncode:
                report.outcome = {
                    "status": "error",
                    "error": f"study.py ended with {study.returncode}, see its output",
                }
        show_study(report, output)
    report.add(**report.found)


def interrupt(process):
    """Ctrl-C, after which the same command goes on; and an end where that is not obeyed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(TO_END - 1)
    except subprocess.TimeoutExpired:
        process.kill()


def show_study(report, folder):
    """Report the networks that are finished, if it is more than before."""
    about, lines = folder / "study.json", folder / "points.jsonl"
    if not about.exists():
        return
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    if report.found["of"] is not None and len(rows) == report.found["finished"]:
        return
    networks = [
        {key: row[key] for key in ("size", "patch", "block", "seed", "seconds")} | row["curve"][-1]
        for row in rows
    ]
    report.set(
        finished=len(rows), of=len(json.loads(about.read_text())["points"]), networks=networks
    )
