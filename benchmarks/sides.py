"""What the benchmarks share: sides timed in turn, ratios to the first, and a result file that says where it was run."""

from datetime import date
import importlib.metadata
import json
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import time

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def alternate(sides, rounds):
    """{name: seconds of each round} of callables that are called in turn, so that all meet the machine's moods alike."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            synchronize()
            began = time.perf_counter()
            side()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(seconds, base):
    """{name: (median, lowest, highest) of the rounds' ratios to the base's time in the same round}."""
    found = {}
    for name, times in seconds.items():
        quotients = [one / other for one, other in zip(times, seconds[base], strict=True)]
        found[name] = [round(f(quotients), 3) for f in (statistics.median, min, max)]
    return found


def machine():
    """What the numbers depend on: hardware, threads, versions, commit and command."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next(
        (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.machine()
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    script = Path(sys.argv[0]).resolve()
    program = (
        ["-m", f"benchmarks.{script.stem}"] if script.parent == ROOT / "benchmarks" else [str(script.relative_to(ROOT))]
    )
    return {
        "date": str(date.today()), "cpu": cpu, "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "timm", "diffusers", "accelerate")},
        "commit": commit, "command": " ".join(["python", *program, *sys.argv[1:]]),
    }  # fmt: skip


def write(name, result):
    """Write benchmarks/results/DATE-NAME.json with the machine's description, and say so."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}-{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
