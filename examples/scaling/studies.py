"""What every study does: many networks, several at a time, in a folder where the same command goes
on after it was stopped.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
import json
import multiprocessing
import os
from pathlib import Path
import signal
import sys
import threading
import time
from typing import Any, NamedTuple

import torch

from evaluation.metrics import SCORED
from records import read_about, read_rows
from runtime.command_line import Parser
from runtime.devices import choose_device
from runtime.disk import write_whole
from runtime.limits import check_numbers
from training.folder_lock import FolderLock
from trial import load_judge, make_judge, save_judge, save_real


def judge_of_patches(plan, device, folder):
    """(a new Judge of patches, what is to be told of it), once both are in the folder."""
    print("training the classifier that scores", flush=True)
    judge, told = make_judge(plan, device)
    save_real(plan, folder / "samples" / "real.png")
    save_judge(judge, folder / "judge.pt")
    return judge, told


def kept_judge(folder, device):
    """The Judge that judge_of_patches left in a folder. Raises ValueError if it cannot be read."""
    return load_judge(folder / "judge.pt", device)


class Study(NamedTuple):
    """What is asked: plans by name, and what is done for each network of a plan.

    `point` is the NamedTuple that names a network; list_points(plan) lists them all in the order in
    which they begin; run_point(plan, point, judge, device, folder) returns a line of points.jsonl,
    a dict with the fields of the point, "curve" and "seconds". tell(plan, judge, device) is what
    else study.json says of the plan's patches. begin_judge(plan, device, folder) and
    load_judge(folder, device) make what scores, and have it again, as those of patches do.
    """

    script: str
    presets: dict[str, Any]
    told: str  # of the presets, by --help
    point: type
    list_points: Callable
    run_point: Callable
    tell: Callable = lambda plan, judge, device: {}
    begin_judge: Callable = judge_of_patches
    load_judge: Callable = kept_judge


class Job(NamedTuple):
    """A study of one preset; where it is written; on which device, and how many networks at a time.
    """

    study: Study
    preset: str
    output: Path
    device: torch.device
    workers: int

    @property
    def plan(self):
        return self.study.presets[self.preset]


def run_door(study, parser, argv):
    """The main of a study's script, within its `door`; the parser is one of parser_of."""
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    with FolderLock() as lock:
        try:
            device = choose_device(args.device)
            check_numbers(args, num_samples=SCORED)
            cores = os.cpu_count() if device.type == "cpu" else 1
            workers = cores if args.workers is None else args.workers
            args.output.mkdir(parents=True, exist_ok=True)
            lock.take(args.output)
            if device.type == "cpu":
                torch.set_num_threads(1)
            run_job(Job(study, args.preset, args.output, device, workers))
        except ValueError as error:
            parser.error(str(error))
        except BrokenPipeError:  # of the output, which is nobody's mistake
            raise
        except OSError as error:
            parser.error(
                f"{error.filename or args.output}: {error.strerror}; choose another --output"
            )
        except ModuleNotFoundError as error:
            parser.error(f"{error.name} is not installed; pip install .[digits]")
        except BrokenProcessPool:
            sys.exit(
                "a worker was killed, perhaps for want of memory; the same command goes on, "
                "try fewer --workers"
            )
        finally:
            torch.set_num_threads(threads)


def parser_of(study, description):
    """The parser of a study's script."""
    parser = Parser(study.script, description=description)
    parser.add_argument(
        "--output", required=True, type=Path,
        help="folder for study.json, points.jsonl, judge.pt and samples/",
    )  # fmt: skip
    presets = f"{study.told} (default: %(default)s)"
    parser.add_argument("--preset", choices=study.presets, default="small", help=presets)
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    workers = "networks trained at a time (default: as many as there are cores, 1 on a GPU)"
    parser.add_argument("--workers", type=int, help=workers)
    return parser


# ---- the folder ----


def open_folder(job):
    """(what study.json says; the Judge; the rows that are done, by point), all new in a folder
    without a study.

    Raises ValueError if the folder holds a study of another plan or device, or a damaged one.
    """
    folder, plan, device, point = job.output, job.plan, job.device, job.study.point
    if not (folder / "study.json").exists():
        if (folder / "points.jsonl").exists():
            raise ValueError(
                f"{folder} has a points.jsonl without its study.json; choose another --output"
            )
        judge, told = job.study.begin_judge(plan, device, folder)
        told |= job.study.tell(plan, judge, device)
        points = {"points": [list(point) for point in job.study.list_points(plan)]}
        about = json.dumps(describe(job) | told | points) + "\n"
        write_whole(
            folder / "study.json", lambda temporary: temporary.write_text(about, encoding="utf-8")
        )
    about, now = read_about(folder, point), json.loads(json.dumps(describe(job)))
    for name in ("plan", "device_type"):
        if about.get(name) != now[name]:
            begun = f"{about.get('command')} on a {about.get('device_type')}"
            raise ValueError(
                f"{folder} holds another study ({begun}); go on with that, "
                "or choose another --output"
            )
    return about, job.study.load_judge(folder, device), read_rows(folder, about, point)


def describe(job):
    """What study.json says of the plan, and of where and how the study was begun."""
    device, script = job.device, "/".join(Path(job.study.script).parts[-3:])
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "plan": job.plan._asdict(), "torch": torch.__version__,
        "device_type": device.type, **gpu, "cores": os.cpu_count(), "workers": job.workers,
        "command": f"python {script} --output OUTPUT --preset {job.preset}",
    }  # fmt: skip


def run_job(job):
    """Do what is left of a study."""
    folder, begun = job.output, time.monotonic()
    about, judge, done = open_folder(job)
    points = [job.study.point(*point) for point in about["points"]]
    left = [point for point in points if point not in done]
    print(f"{len(done)} networks are done, {len(left)} are left", flush=True)
    for point, row in run_all(job, left, judge) if left else ():
        done[point] = row
        text = "".join(json.dumps(done[point]) + "\n" for point in points if point in done)
        write_whole(
            folder / "points.jsonl", lambda temporary: temporary.write_text(text, encoding="utf-8")
        )
        minutes = (time.monotonic() - begun) / 60
        print(
            f"{point}: distance {row['curve'][-1]['distance']:.3f}, {row['seconds']} s; "
            f"{minutes:.1f} minutes",
            flush=True,
        )


# ---- several at a time ----


def run_all(job, points, judge):
    """Yield each point that is done, with its row."""
    run_point, rest = job.study.run_point, (judge, job.device, job.output)
    if job.workers == 1:
        yield from ((point, run_point(job.plan, point, *rest)) for point in points)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.workers, context, initializer=prepare_worker) as pool:
        try:
            # Which the workers inherit, so none can be hit before prepare_worker
            with ctrl_c_blocked():
                work = {pool.submit(run_point, job.plan, point, *rest): point for point in points}
            for future in as_completed(work):
                yield work[future], future.result()
        except BaseException:  # do not wait for what is still under way
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def prepare_worker():
    """A worker has one thread, leaves it to the first process to answer Ctrl-C, and ends when that
    process has.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not getppid(): the first process may have been killed while this one began
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent):
    """End this process, at once, when its parent is another one: then the first was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def ctrl_c_blocked():
    """Within it, Ctrl-C waits; processes that are started meanwhile never see it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
