"""Runs that are killed with SIGKILL and resumed with the same command end bit by bit as one that
was left alone.

kill_campaign.py does the killing, and can be run by itself for as many kills as wanted.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from PIL import Image
import psutil
import pytest

from conftest import ROOT
import kill_campaign
from kill_campaign import (
    RUN, RUNS, SAID, SHAPED, STEPS, end, fingerprint, launcher, start, step_reached, survive,
)  # fmt: skip

sys.path.insert(0, str(ROOT / "examples" / "digits"))
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install .[digits]")

import make_dataset

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def context():
    return launcher()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_dataset.main(["--output", str(folder)])
    return folder / "train"


@pytest.fixture(scope="module")
def shaped(data, tmp_path_factory):
    """A part of the digits, standing, square and lying ones, large and small."""
    folder = tmp_path_factory.mktemp("shaped")
    for i, path in enumerate(sorted(data.rglob("*.png"))[::4]):
        (folder / path.parent.name).mkdir(exist_ok=True)
        size = [(32, 32), (21, 34), (70, 48), (16, 24)][i % 4]
        Image.open(path).resize(size).save(folder / path.parent.name / path.name)
    return folder


@pytest.fixture(scope="module")
def captioned(data, tmp_path_factory):
    """A part of the digits with captions, some with two and some with none."""
    folder = tmp_path_factory.mktemp("captioned")
    for i, path in enumerate(sorted(data.rglob("*.png"))[::8]):
        shutil.copy(path, folder / f"{i}.png")
        digit = path.parent.name
        (folder / f"{i}.txt").write_text(f"a {digit}\nnumber {digit}\n"[: 4 + 9 * (i % 3)])
    return folder


@pytest.fixture(scope="module")
def alone(context, data, tmp_path_factory):
    """The fingerprint of a run of RUNS on so many processes that nobody disturbed."""
    found = {}

    def of(processes, run="diffusion"):
        if (processes, run) not in found:
            folder = tmp_path_factory.mktemp(f"alone-{processes}-{run}")
            end(start(context, data, folder, processes, run=RUNS[run]), 0)
            found[processes, run] = fingerprint(folder)
            shutil.rmtree(folder)  # six checkpoints
        return found[processes, run]

    return of


@pytest.mark.long
def test_killed_once_from_outside(context, data, alone, tmp_path):
    step, found = survive(context, data, tmp_path, 1, None, random.Random(time.time_ns()))
    assert 0 < step < STEPS and found == alone(1)


def test_killed_in_the_middle_of_a_checkpoint(context, data, tmp_path):
    """In a run that is shorter than those of other tests."""
    steps, death = 16, {"at": "byte", "save": 2, "share": 0.5}
    run = [*RUN, "--max-steps", str(steps)]
    end(start(context, data, tmp_path / "alone", 1, run=run), 0)
    step, found = survive(context, data, tmp_path / "killed", 1, death, random, run, steps)
    assert step == 14 and found == fingerprint(tmp_path / "alone", steps)


@pytest.mark.long
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_ten_steps(context, data, alone, tmp_path, processes, run):
    source = random.Random(processes)
    for step in sorted(source.sample(range(1, STEPS - 1), 10)):
        folder = tmp_path / str(step)
        started = start(context, data, folder, processes, run=RUNS[run])
        assert step <= kill_campaign.kill_at(started, folder, step, source.uniform(0, 0.02)) < STEPS
        end(start(context, data, folder, processes, run=RUNS[run]), 0)
        assert fingerprint(folder) == alone(processes, run), f"killed after step {step}"
        shutil.rmtree(folder)


@pytest.mark.long
def test_a_flow_killed_in_the_middle_of_a_checkpoint(context, data, alone, tmp_path):
    death = {"at": "byte", "save": 3, "share": 0.5}
    step, found = survive(context, data, tmp_path, 1, death, random, RUNS["flow"])
    assert step == 21 and found == alone(1, "flow")
    assert found != alone(1)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_while_learning_from_captions(context, captioned, tmp_path, processes):
    """From outside, and in the middle of a checkpoint."""
    of = context, captioned
    end(start(*of, tmp_path / "alone", processes, run=SAID), 0)
    for name, death in {"out": None, "in": {"at": "byte", "save": 3, "share": 0.5}}.items():
        folder, source = tmp_path / name, random.Random(time.time_ns())
        step, found = survive(*of, folder, processes, death, source, SAID)
        assert found == fingerprint(tmp_path / "alone"), f"killed after step {step}"


@pytest.mark.long
@pytest.mark.parametrize("run, processes", [("buckets", 1), ("packed", 2)])
def test_killed_on_images_of_their_own_shape(context, shaped, tmp_path, run, processes):
    """From outside, and in the middle of a checkpoint."""
    of = context, shaped
    end(start(*of, tmp_path / "alone", processes, run=SHAPED[run]), 0)
    for name, death in {"out": None, "in": {"at": "byte", "save": 3, "share": 0.5}}.items():
        folder, source = tmp_path / name, random.Random(time.time_ns())
        step, found = survive(*of, folder, processes, death, source, SHAPED[run])
        assert found == fingerprint(tmp_path / "alone"), f"killed after step {step}"


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "at, share", [("byte", 0.0), ("byte", 0.01), ("byte", 0.99), ("before", 1), ("after", 1)]
)
def test_killed_while_a_checkpoint_is_written(context, data, alone, tmp_path, processes, at, share):
    step, found = survive(
        context, data, tmp_path, processes, {"at": at, "save": 3, "share": share}, random
    )
    assert step == 21 and found == alone(processes)


@pytest.mark.long
def test_killed_on_four_processes(context, data, alone, tmp_path):
    """More than two, where a sum over processes depends on its order."""
    step, found = survive(
        context, data, tmp_path, 4, {"at": "before", "save": 2, "share": 1}, random
    )
    assert step == 14 and found == alone(4)


@pytest.mark.long
def test_killed_again_and_again(context, data, alone, tmp_path):
    for step in (3, 9, 10, 24):
        started = start(context, data, tmp_path, 1)
        kill_campaign.kill_at(started, tmp_path, step, 0)
        (tmp_path / "progress").unlink()
    end(start(context, data, tmp_path, 1), 0)
    assert fingerprint(tmp_path) == alone(1)


ENDLESS = ["--max-steps", "100000", "--keep-last", "2"]


def torchrun(data, folder, more=()):
    """The command under torchrun, in a process group of its own; its output goes to
    folder/torchrun.txt. `more` are further flags.
    """
    folder.mkdir(exist_ok=True)
    flags = ["--data-path", str(data), "--results-dir", str(folder / "results"), *RUN, *more]
    with open(folder / "torchrun.txt", "a") as output:
        return subprocess.Popen(
            [*TORCHRUN, "train.py", *flags], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def kill_all(processes):
    """SIGKILL to each of these psutil processes, of which all are alive."""
    assert all(process.is_running() for process in processes)
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, 20)


def with_workers(process):
    """torchrun, its two workers and their loaders, as psutil processes."""
    launcher = psutil.Process(process.pid)
    found = [launcher, *launcher.children(recursive=True)]
    assert len(found) >= 3
    return found


def wait_for(folder, text, process):
    """Wait until the launcher's output has the text."""
    for _ in range(1200):
        if text in (folder / "torchrun.txt").read_text():
            return
        assert process.poll() is None, (folder / "torchrun.txt").read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in " + (folder / "torchrun.txt").read_text())


@pytest.mark.long
def test_torchrun_killed_with_its_whole_group(data, alone, tmp_path):
    for text in ("step 0000010", "step 0000025"):
        process = torchrun(data, tmp_path)
        wait_for(tmp_path, text, process)
        kill_all(with_workers(process))
        process.wait()
    assert torchrun(data, tmp_path).wait(120) == 0
    assert fingerprint(tmp_path) == alone(2)


@pytest.mark.long
def test_torchrun_killed_alone_leaves_workers_that_hold_the_folder(data, tmp_path):
    process = torchrun(data, tmp_path, ENDLESS)
    wait_for(tmp_path, "saved", process)
    launcher, *workers = with_workers(process)
    process.kill()
    process.wait()
    assert torchrun(data, tmp_path, ENDLESS).wait(120) != 0
    text = (tmp_path / "torchrun.txt").read_text()
    holder = re.search(r"is being written by process (\d+) on (\S+);", text)
    assert (
        holder
        and int(holder[1]) in [worker.pid for worker in workers]
        and holder[2] == os.uname().nodename
    ), text
    kill_all(workers)
    later = torchrun(data, tmp_path, ENDLESS)
    wait_for(tmp_path, "going on from", later)
    kill_all(with_workers(later))
    later.wait()


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_torchrun_passes_a_schedulers_signal_on(data, alone, tmp_path, name):
    flags = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=60"]
    TORCHRUN.extend(flags)
    try:
        process = torchrun(data, tmp_path)
        wait_for(tmp_path, "step 0000010", process)
        process.send_signal(getattr(signal, name))
        assert process.wait(120) == 1  # torchrun's own status; the workers end with 0
        text = (tmp_path / "torchrun.txt").read_text()
        assert f"stopped by {name} after step" in text and "--resume auto" in text
        assert torchrun(data, tmp_path).wait(120) == 0
    finally:
        del TORCHRUN[-len(flags) :]
    assert fingerprint(tmp_path) == alone(2)


def test_step_reached_before_the_first(tmp_path):
    assert step_reached(tmp_path) == 0
