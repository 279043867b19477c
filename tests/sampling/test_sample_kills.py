"""sample_ddp.py killed with SIGKILL and started again: the same images, and the same .npz, as if it
had been left alone.
"""

import hashlib
import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import tempfile
import time

from PIL import Image
import pytest

from conftest import ROOT
from kill_campaign import TIMEOUT, end, launcher

COUNT, BATCH = 40, 4
RUN = [
    "--ckpt", str(ROOT / "examples/digits/dit.safetensors"), "--vae",
    str(ROOT / "examples/digits/vae"), "--num-fid-samples", str(COUNT), "--per-proc-batch-size",
    str(BATCH), "--num-sampling-steps", "20", "--sampler", "ddim", "--device", "cpu",
]  # fmt: skip
WAYS = ["outside", "outside", "byte", "before", "after", "packing"]


@pytest.fixture(scope="module")
def context():
    return launcher()


def worker(folder, rank, processes, death):
    """sample_ddp.py as process `rank` of so many; rank 0 kills itself as `death` says, if at all.
    """
    from sampling import many
    import sample_ddp
    import torch

    os.setpgid(0, 0)
    output = os.open(folder.parent / f"{folder.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes))
    if death and rank == 0:
        arm(death, many)
    sample_ddp.main([*RUN, "--sample-dir", str(folder)])


def arm(death, many):
    """Have this process kill itself at a share of an image's bytes, about its renaming, or within
    the .npz.
    """
    write_locked, replace, images = many.write_locked, Path.replace, iter(range(COUNT))

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_write(path, write):
        at_image = (
            path.suffix == ".png" and death["at"] == "byte" and next(images) == death["image"]
        )
        if not at_image and not (path.suffix == ".npz" and death["at"] == "packing"):
            return write_locked(path, write)

        def half(file):
            with tempfile.TemporaryFile() as whole:
                write(whole)
                size = whole.tell()
                whole.seek(0)
                file.write(whole.read(int(death["share"] * size)))
            file.flush()
            die()

        write_locked(path, half)

    def dying_replace(self, target):
        dies = (
            death["at"] in ("before", "after")
            and target.suffix == ".png"
            and next(images) == death["image"]
        )
        if dies and death["at"] == "before":
            die()
        replace(self, target)
        if dies:
            die()

    many.write_locked, many.Path.replace = dying_write, dying_replace


def start(context, folder, processes, death=None):
    started = [
        context.Process(target=worker, args=(folder, rank, processes, death))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def kill_all(started):
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            process.kill()
        process.join(TIMEOUT)


def images(folder):
    """The images that are there under their names."""
    return sorted(folder.glob("*/[0-9]*.png"))


def hashes(folder):
    """Every file in folder but the manifest, by name, with its SHA-256; there is exactly what there
    should be.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) == COUNT + 1
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def all_whole(folder):
    for path in images(folder):
        with Image.open(path) as image:
            image.load()
            assert image.size == (32, 32)


@pytest.fixture(scope="module")
def alone(context, tmp_path_factory):
    """The hashes of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "samples"
    end(start(context, folder, 1), 0)
    return hashes(folder)


def survive(context, folder, processes, how, source):
    """Kill a run so, look at what it left, start it again; (images that were there, the hashes in
    the end).
    """
    death = None
    if how != "outside":
        death = {
            "at": how, "image": source.randrange(COUNT // processes - BATCH),
            "share": source.uniform(0.05, 0.95),
        }  # fmt: skip
    started = start(context, folder, processes, death)
    if death:
        started[0].join(TIMEOUT)
        assert started[0].exitcode == -signal.SIGKILL
    else:
        wanted, patience = source.randrange(1, COUNT - 2 * BATCH), time.monotonic() + TIMEOUT
        while len(images(folder)) < wanted:
            assert time.monotonic() < patience and all(process.is_alive() for process in started)
            time.sleep(0.002)
        time.sleep(source.uniform(0, 0.05))
    kill_all(started)
    left = len(images(folder))
    all_whole(folder)
    assert not list(folder.glob("*.npz"))
    end(start(context, folder, processes), 0)
    return left, hashes(folder)


@pytest.mark.long
def test_a_killed_group_goes_on_where_it_stopped(alone, tmp_path):
    """The command itself, in a process group of its own, killed as a scheduler would."""
    command = [sys.executable, "sample_ddp.py", *RUN, "--sample-dir", str(tmp_path / "samples")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, start_new_session=True, stderr=subprocess.DEVNULL
    )
    patience = time.monotonic() + TIMEOUT
    while len(images(tmp_path / "samples")) < 6:
        assert time.monotonic() < patience and process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 6 <= len(images(tmp_path / "samples")) < COUNT
    all_whole(tmp_path / "samples")
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert hashes(tmp_path / "samples") == alone
    (manifest,) = (tmp_path / "samples").glob("*/manifest.json")
    assert [run["seconds"] is None for run in json.loads(manifest.read_text())["runs"]] == [
        True,
        False,
    ]


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", range(2 * len(WAYS)))
def test_a_killed_run_goes_on_where_it_stopped(context, alone, tmp_path, processes, number):
    """Each way twice, on one process and on two, at moments that differ: 24 kills."""
    how = WAYS[number % len(WAYS)]
    left, found = survive(
        context, tmp_path / "samples", processes, how, random.Random(f"{number} {processes}")
    )
    print(f"{processes} process(es), {how}: {left} of {COUNT} images were there")
    assert (left == COUNT) == (how == "packing")
    assert found == alone
