"""Everything that is to be known of a GPU, in one command and in so many minutes.

    python -m benchmarks.gpu --minutes 8                 # on a GPU
    python -m benchmarks.gpu                             # on a CPU: a dry run, under 2 minutes
    python -m benchmarks.gpu --parts tests exactness     # some of it
    python -m benchmarks.gpu --tables                    # tables of docs/ from the newest result

The most important comes first. A dry run has tiny sizes. --tables writes into docs/sampling.md and
docs/training.md. Each part is a process with a time limit: what an earlier one leaves of its time
is there for the later ones. What is found is printed as it comes and written to
benchmarks/results/DATE-gpu.json (--output), which is whole at any time: a run that is cut counts as
far as it got. A part that fails, or lacks a library, is recorded as such and the next one begins.
What is compared takes turns in one process. The results of a dry run mean nothing, are called
DATE-gpu-dry-run.json and say so.
"""

import argparse
import json
import math
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import torch

from benchmarks import gpu_tables
from benchmarks.gpu_worker import RUNNING, STOPPED
from benchmarks.networks import TINY
from benchmarks.sides import ROOT, free_path, machine
from runtime.disk import write_whole

POLL_SECONDS = 0.1
MOST_MINUTES = 24 * 60
GRACE = 3  # seconds before its limit at which a part is to end by itself
STEPS = {"ddim": 50, "dpm++": 20}  # of each solver, as the goals have them
MATRICES = [64, 128]  # of a dry run


class Part(NamedTuple):
    """A function of a module here, its share of the time, and its arguments: on a GPU, and in a dry
    run.
    """

    module: str
    function: str
    share: int
    sizes: dict
    tiny: dict


def training_part(model, share, most):
    """The part that measures training steps of a model."""
    tiny = dict(model=TINY, most=2, rounds=2, matrix_sides=MATRICES)
    return Part(
        "benchmarks.gpu_training", "training", share, dict(model=model, most=most, rounds=5), tiny
    )


# In order of worth. Shares are seconds of 8 minutes; the first has the imports of a cold disk in
# it. A dry run leaves out the compiled ways of drawing digits, which take long to compile.
PARTS = {
    "limits": Part(
        "benchmarks.gpu_training", "limits", 30, dict(rounds=7, mebibytes=4096),
        dict(rounds=2, mebibytes=8, matrix_sides=MATRICES),
    ),
    "training DiT-XL/2": training_part("DiT-XL/2", 95, 512),
    "training DiT-B/2": training_part("DiT-B/2", 30, 1024),
    "training DiT-S/2": training_part("DiT-S/2", 25, 1024),
    "sampling DiT-XL/2": Part(
        "benchmarks.gpu_sampling", "sampling", 140,
        dict(model="DiT-XL/2", batch=32, steps=STEPS, rounds=3),
        dict(model=TINY, batch=2, steps={"ddim": 3, "dpm++": 2}, rounds=2, matrix_sides=MATRICES),
    ),
    "exactness": Part(
        "benchmarks.gpu_sampling", "exactness", 45, dict(images=100, steps=STEPS),
        dict(images=2, steps={"ddim": 3, "dpm++": 3}, ways=["float32", "TF32", "bf16"]),
    ),
    "tests": Part("benchmarks.gpu_commands", "gpu_tests", 60, {}, {}),
    "autoencoder": Part(
        "benchmarks.gpu_whole", "autoencoder", 12, dict(batch=32, image_size=256, rounds=5),
        dict(batch=1, image_size=32, rounds=2),
    ),
    "loader": Part(
        "benchmarks.gpu_whole", "loading", 15,
        dict(model="DiT-S/2", batch=256, images=4096, steps=40, workers=8, rounds=3),
        dict(model=TINY, batch=2, images=8, steps=2, workers=0, rounds=2),
    ),
    "one process": Part(
        "benchmarks.gpu_whole", "one_process", 18, dict(model="DiT-B/2", batch=64, rounds=5),
        dict(model=TINY, batch=2, rounds=2),
    ),
    "scaling": Part(
        "benchmarks.gpu_commands", "scaling", 10, dict(preset="large"),
        dict(preset="tiny", seconds=8),
    ),
}  # fmt: skip
# What others report, as the goals were given; their sources were not looked up here.
PUBLISHED = {
    "training DiT-XL/2, images per second": {
        "an H100, an encoder running beside": 173,
        "an H800": 284,
    },
    "sampling DiT-XL/2, DDIM 50, images per second": {"an H100": 3.8},
}


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all of it (default: %(default)g)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=", ".join(PARTS),
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="a new file (default: benchmarks/results/DATE-gpu.json)"
    )
    scaling = "folder of the part scaling, which a later run goes on with (default: %(default)s)"
    parser.add_argument("--scaling", type=Path, default=ROOT / "scaling-large", help=scaling)
    dry = "tiny sizes, as on a CPU: whether every part runs, also on a GPU"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing, bring the documents up to date"
    )
    return parser


class Worker:
    """A process that imports a part's module and waits for its order."""

    def __init__(self, module):
        command = [sys.executable, "-m", "benchmarks.gpu_worker", module]
        # A session of its own, so that what it starts can be ended with it.
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True
        )

    def follow(self, order, seconds, changed):
        """Give the order and return the last report, after so many seconds at most.

        changed(report) is called whenever there is a new one.
        """
        ends, path = time.monotonic() + seconds, Path(order["path"])
        report = {"status": RUNNING, "found": {}}
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended while it imported; what it says of that is on the screen
        seen, over = None, False
        while not over:
            over = self.process.poll() is not None or time.monotonic() > ends
            if path.exists() and (now := path.stat().st_mtime_ns) != seen:
                seen, report = now, json.loads(path.read_text(encoding="utf-8"))
                changed(report)
            over = over or report["status"] != RUNNING
            time.sleep(0 if over else POLL_SECONDS)
        if report["status"] == RUNNING:
            code = self.process.poll()
            how = {"status": "error", "error": f"its process ended with {code}"}
            report |= how if code is not None else {"status": "killed at its time limit"}
        return report

    def end(self):
        """End the process and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.stdin.close()
        self.process.wait()


class Run:
    """A run over some parts: its result, and the file that this is written to."""

    def __init__(self, args, dry, path):
        self.args, self.dry, self.path, self.began = args, dry, path, time.monotonic()
        self.result = {
            "machine": machine(), "dry_run": dry, "minutes": args.minutes, "published": PUBLISHED,
            "parts": {},
        }  # fmt: skip
        self.write()

    def write(self):
        self.result["goals"] = gpu_tables.goals({} if self.dry else self.result["parts"])
        text = json.dumps(self.result, indent=1) + "\n"
        write_whole(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def deadline(self, name):
        """When a part must be over: what earlier ones leave of their time is its.

        In a dry run each may take all.
        """
        names = self.args.parts
        so_far = names if self.dry else names[: names.index(name) + 1]
        share = sum(PARTS[n].share for n in so_far) / sum(PARTS[n].share for n in names)
        return self.began + 60 * self.args.minutes * share

    def go(self):
        """Do every part, each in a worker that imported what it needs while the one before was at
        work.

        In a dry run, whose time goes into imports, parts of one module share a worker while all is
        well.
        """
        workers = [Worker(PARTS[self.args.parts[0]].module)]  # the one at work, the one that waits
        with tempfile.TemporaryDirectory() as folder:
            try:
                for name, following in zip(
                    self.args.parts, [*self.args.parts[1:], None], strict=True
                ):
                    shared = (
                        self.dry and following and PARTS[following].module == PARTS[name].module
                    )
                    if following and not shared:
                        workers.append(Worker(PARTS[following].module))
                    well = self.do(name, workers[0], Path(folder))
                    if not (shared and well):
                        workers.pop(0).end()
                    if following and not workers:
                        workers.append(Worker(PARTS[following].module))
            finally:
                for worker in workers:
                    worker.end()

    def do(self, name, worker, folder):
        """Do one part and write what it found, also while it is under way; whether its worker can
        go on.
        """
        began = time.monotonic()
        seconds = self.deadline(name) - began
        if seconds < 1:
            self.take(name, {"status": "left out", "why": "no time was left for it"})
            return True
        print(f"{name}, at most {seconds:.0f} s", flush=True)
        part = PARTS[name]
        sizes = dict(part.tiny if self.dry else part.sizes)
        if name == "scaling" and not self.dry:
            sizes["folder"] = str(self.args.scaling.absolute())
        order = {
            "name": name, "function": part.function, "sizes": sizes,
            "path": str(folder / f"{self.args.parts.index(name)}.json"),
            "seconds": max(0.9 * seconds, seconds - GRACE),
        }  # fmt: skip
        report = worker.follow(
            order, seconds, lambda report: self.take(name, {"settings": sizes} | report)
        )
        report = {"settings": sizes, "seconds": round(time.monotonic() - began, 1)} | report
        self.take(name, report)
        print(f"{name}: {told(report)}, {report['seconds']} s", flush=True)
        return report["status"] in ("done", STOPPED)

    def take(self, name, report):
        """Take in a part's report, and write the result; if the disk is full, what was printed
        remains.
        """
        self.result["parts"][name] = report
        try:
            self.write()
        except OSError as error:
            print(f"{self.path} was not written ({error.strerror}); going on", file=sys.stderr)


def told(report):
    """A part's status in words."""
    return ", ".join(
        [report["status"], *(report[key] for key in ("why", "error") if key in report)]
    )


def went_wrong(part):
    """Whether anything in a part's report is an error."""
    return part["status"] not in ("done", "left out", STOPPED) or bool(
        part.get("failed") or part.get("found", {}).get("failures")
    )


def check(args):
    """Raise ValueError for what cannot be."""
    if not (math.isfinite(args.minutes) and 0 < args.minutes <= MOST_MINUTES):
        raise ValueError(
            f"--minutes is {args.minutes:g}; it must be above 0 and at most {MOST_MINUTES}"
        )
    if len(set(args.parts)) < len(args.parts):
        raise ValueError("--parts has a part twice; name each once")
    if args.output and args.output.exists():
        raise ValueError(
            f"--output {args.output} exists, and no result is overwritten; give a new name"
        )
    if args.output and not args.output.absolute().parent.is_dir():
        raise ValueError(
            f"--output {args.output}: there is no folder {args.output.parent}; make it first"
        )


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.tables:
        return gpu_tables.update_documents()
    dry = args.dry_run or not torch.cuda.is_available()
    try:
        check(args)
        path = args.output or free_path("gpu-dry-run" if dry else "gpu")
        run = Run(args, dry, path)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        where = error.filename or args.output
        parser.error(f"cannot write {where} ({error.strerror}); choose another --output")
    if dry:
        print("a dry run: tiny sizes, whose figures mean nothing", flush=True)
    try:
        run.go()
    except KeyboardInterrupt:
        print(f"interrupted; {path} has what was measured", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    for goal in [] if dry else run.result["goals"]:
        print(gpu_tables.goal_in_words(goal))
    print(f"wrote {path}")
    if wrong := [name for name, part in run.result["parts"].items() if went_wrong(part)]:
        sys.exit(f"something failed in: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
