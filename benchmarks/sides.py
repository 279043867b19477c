"""What the benchmarks share: sides timed in turn, ratios to the first, the machine's limit, and a
result file that says where it was run.
"""

from datetime import date
import importlib.metadata
import itertools
import json
from pathlib import Path
import platform
import shlex
import statistics
import subprocess
import sys
import time

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = "matrix product"  # the side that is the machine's limit
RATIO = "time as a ratio [of the medians; quartiles of the rounds' ratios]"
# Of the square matrices whose product is the machine's limit
PRODUCT_SIDES = (1024, 2048, 4096, 8192)


def device():
    """The GPU, if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def alternate(sides, rounds, clock=time.perf_counter):
    """{name: seconds of each round} of callables that are called in turn, every other round
    backwards, so that all meet the machine's moods alike; `clock` as for timed.
    """
    seconds = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            seconds[name].append(timed(sides[name], clock))
    return seconds


def timed(side, clock=time.perf_counter):
    """The seconds that a call takes, by a clock: process_time counts this process's alone."""
    synchronize()
    began = clock()
    side()
    synchronize()
    return clock() - began


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(seconds, base):
    """{name: [ratio of its median time to the base's, lower and upper quartile of the ratios within
    each round]}.
    """
    found = {}
    for name, times in seconds.items():
        quotients = [one / other for one, other in zip(times, seconds[base], strict=True)]
        low, _, high = (
            statistics.quantiles(quotients, method="inclusive")
            if len(quotients) > 1
            else 3 * quotients
        )
        ratio = statistics.median(times) / statistics.median(seconds[base])
        found[name] = [round(value, 3) for value in (ratio, low, high)]
    return found


def best_product(dtype=torch.float32, matrix_sides=None):
    """(a call that multiplies two square matrices, its operations): of the size at which this
    machine does most a second.
    """
    best = None
    for n in matrix_sides or PRODUCT_SIDES[: None if torch.cuda.is_available() else -1]:
        a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a=a, b=b, out=out):
            torch.mm(a, b, out=out)

        multiply()
        rate = max(2 * n**3 / timed(multiply) for _ in range(3))
        if best is None or rate > best[0]:
            best = rate, multiply, 2 * n**3
    return best[1:]


def share_of_limit(seconds, operations, limit):
    """What share of the matrix product's rate a side reaches: `limit` is (the product's seconds of
    each round, its operations).

    A ratio of median rates.
    """
    product_seconds, product_operations = limit
    rate = operations / statistics.median(seconds)
    return round(rate / (product_operations / statistics.median(product_seconds)), 3)


def compare(seconds, base, operations, product_operations):
    """({side: its ratios to the base}, {side: its share of the limit}) of sides that take turns
    with LIMIT's product.
    """
    limit = seconds[LIMIT], product_operations
    found = ratios({side: times for side, times in seconds.items() if side != LIMIT}, base)
    return found, {side: share_of_limit(seconds[side], operations, limit) for side in found}


def machine():
    """What the numbers depend on: hardware, threads, versions, commit and command."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next(
        (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    script = Path(sys.argv[0]).resolve()
    inside = script.relative_to(ROOT) if ROOT in script.parents else Path(script.name)
    program = (
        ["-m", f"benchmarks.{script.stem}"]
        if script.parent == ROOT / "benchmarks"
        else [str(inside)]
    )
    return {
        "date": str(date.today()), "cpu": cpu, "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "diffusers", "accelerate")},
        "commit": commit(), "command": shlex.join(["python", *program, *sys.argv[1:]]),
    }  # fmt: skip


def version(package):
    """The version of an installed package, None for one that is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit():
    """The commit of this checkout, None where git, or its folder, is missing."""
    asked = ["git", "describe", "--always", "--dirty"]
    try:
        return (
            subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
        )
    except OSError:
        return None


def table(rows, columns):
    """Print {name: its values} as a table under these columns."""
    width = max(map(len, rows))
    print(f"{'':{width}}  {'  '.join(columns)}")
    for name, values in rows.items():
        print(
            f"{name:{width}}  "
            f"{'  '.join(f'{value!s:>{len(column)}}' for value, column in zip(values, columns))}"
        )


def write(name, result):
    """Write benchmarks/results/DATE-NAME.json with the machine's description, and say so.

    A second of a day gets a number.
    """
    path = free_path(name)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"wrote {path}")


def free_path(name):
    """benchmarks/results/DATE-NAME.json, or with the first number that no file there has."""
    RESULTS.mkdir(exist_ok=True)
    names = (f"{date.today()}-{name}{'' if i == 1 else f'-{i}'}.json" for i in itertools.count(1))
    return next(RESULTS / one for one in names if not (RESULTS / one).exists())
