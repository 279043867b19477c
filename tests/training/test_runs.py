"""Run folders: who may write, where --resume goes on, damaged checkpoints, a full disk, and what is
kept.
"""

import json
import os
from pathlib import Path
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from checkpoints.files import (
    check_whole, checkpoint_path, list_checkpoints, newest_whole_checkpoint, prune_checkpoints,
    read_checkpoint, save_checkpoint,
)  # fmt: skip
from conftest import ROOT
from training import flags as training_flags
from training import folder_lock
from training import loop
from training import records
from training import run_folder
from training import run_log
from training.folder_lock import FolderLock
from training.options import DECIDING
from training.run_log import Meter, RunLog, StopSignals
from test_train import QUICK, fresh_accelerator, images, run, same  # noqa: F401
import train

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training.folder_lock import FolderLock
with FolderLock() as lock:
    lock.take(Path(sys.argv[2]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/000-DiT-Ti-8."""
    folder = tmp_path / "000-DiT-Ti-8"
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ROOT), str(folder)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"held\n", process.stderr.read()
    yield process
    process.kill()
    process.wait()


# ---- the lock ----


def test_a_second_writer_is_refused_with_host_and_process(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "LOCK_PATIENCE", 0)
    with FolderLock() as lock, pytest.raises(ValueError) as refused:
        lock.take(tmp_path / "000-DiT-Ti-8")
    assert f"written by process {holder.pid} on {os.uname().nodename};" in str(refused.value)


def test_lock_of_a_killed_process_is_free_at_once(holder, tmp_path, monkeypatch):
    holder.kill()
    holder.wait()
    monkeypatch.setattr(folder_lock, "LOCK_PATIENCE", 0)
    with FolderLock() as lock:
        lock.take(tmp_path / "000-DiT-Ti-8")


def test_a_process_that_is_just_dying_is_waited_for(holder, tmp_path):
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with FolderLock() as lock:
        lock.take(tmp_path / "000-DiT-Ti-8")


def test_forked_children_do_not_hold_the_lock(tmp_path):
    with FolderLock() as lock:
        lock.take(tmp_path)
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with FolderLock() as lock:
            lock.take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with FolderLock() as lock:
        lock.take(tmp_path)
        assert "cannot lock (Operation not supported)" in lock.note


def test_resuming_a_run_that_goes_on_elsewhere_is_refused(images, tmp_path, monkeypatch, capsys):
    run(images, tmp_path, "--max-steps", "2")
    folder = tmp_path / "000-DiT-Ti-8"
    before = contents_of(folder)
    monkeypatch.setattr(folder_lock, "LOCK_PATIENCE", 0)
    with FolderLock() as lock:
        lock.take(folder)
        for resume in ("auto", str(folder), str(checkpoint_path(folder, 2))):
            with pytest.raises(SystemExit) as stopped:
                run(images, tmp_path, "--max-steps", "4", "--resume", resume)
            assert (
                stopped.value.code == 2 and "is being written by process" in capsys.readouterr().err
            )
    assert contents_of(folder) == before and len(list(tmp_path.iterdir())) == 1


def contents_of(folder):
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_told_to_stop_while_an_image_does_not_come(images, tmp_path, monkeypatch, capsys):
    """As where a network's disk hangs: what was learned is saved, and the blocked worker is not
    waited for.
    """
    monkeypatch.setattr("data.loader.WAIT", 0.2)
    monkeypatch.setattr("data.loader.GRACE", 0.2)
    monkeypatch.setattr("data.loader.TELL_SECONDS", 0.3)
    folder = copied(images, tmp_path / "images")
    order = np.random.default_rng([0, 0, 0]).permutation(12)
    blocked = sorted(folder.glob("*/*.png"), key=lambda path: (path.parent.name, path.name))[
        order[9]
    ]
    make_loader = loop.make_loader

    def blocking(*args, **kwargs):
        blocked.unlink()
        os.mkfifo(blocked)  # in the third batch
        return make_loader(*args, **kwargs)

    monkeypatch.setattr(loop, "make_loader", blocking)
    log = RunLog.__call__

    def stop(self, line):
        log(self, line)
        if "no batch for" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "__call__", stop)
    with pytest.raises(SystemExit) as stopped:
        run(
            folder, tmp_path / "results", "--max-steps", "6", "--num-workers", "1", "--resume",
            "auto",
        )  # fmt: skip
    assert "stopped by SIGTERM while waiting for images, saved at step 2" in stopped.value.code
    assert [path.name for path in list_checkpoints(tmp_path / "results" / "000-DiT-Ti-8")] == [
        "0000002.pt"
    ]


@pytest.mark.parametrize("error", [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), KeyError("x"),
    RuntimeError("shapes"),
])  # fmt: skip
def test_a_lost_worker_is_said_wherever_it_is_noticed(images, tmp_path, monkeypatch, error):
    def interrupted(*args, **kwargs):
        raise error

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises((SystemExit, KeyError, RuntimeError)) as stopped:
        run(images, tmp_path, "--max-steps", "2")
    told = (
        "worker (pid 7) is killed by signal: Killed: the system"
        in (tmp_path / "000-DiT-Ti-8/log.txt").read_text()
    )
    assert told == isinstance(stopped.value, SystemExit) == ("DataLoader" in str(error))


def test_a_run_in_another_thread_than_the_main_one(images, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run, args=(images, tmp_path, "--max-steps", "2"))
    thread.start()
    thread.join()
    assert (
        len(list_checkpoints(tmp_path / "000-DiT-Ti-8")) == 1
        and signal.getsignal(signal.SIGTERM) == before
    )


# ---- where a run goes on ----


def test_a_run_killed_before_its_first_checkpoint_starts_over_in_its_folder(
    images, tmp_path, capsys
):
    whole = run(images, tmp_path / "whole", "--max-steps", "4")
    run(images, tmp_path / "parts", "--max-steps", "4")
    folder = tmp_path / "parts" / "000-DiT-Ti-8"
    for path in list_checkpoints(folder):
        path.unlink()
    resumed = run(images, tmp_path / "parts", "--max-steps", "4", "--resume", "auto")
    assert (
        "starting over in" in capsys.readouterr().out
        and len(list((tmp_path / "parts").iterdir())) == 1
    )
    assert same(whole["model"], resumed["model"])
    assert [row["step"] for row in rows(folder)] == [2, 4]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_rates(folder):
    timed = ("images_per_second", "model_flops_per_second", "time")
    return [
        {name: value for name, value in row.items() if name not in timed} for row in rows(folder)
    ]


def test_resumed_metrics_and_state_are_those_of_one_run(images, tmp_path):
    flags = ["--log-every", "4", "--ckpt-every", "3", "--ema-decay", "0.5", "0.25"]
    whole = run(images, tmp_path / "whole", "--max-steps", "8", *flags)
    run(images, tmp_path / "parts", "--max-steps", "8", *flags)
    folder = tmp_path / "parts" / "000-DiT-Ti-8"
    for step in (8, 6):  # as if it had been killed after step 7 at the earliest
        checkpoint_path(folder, step).unlink()
    resumed = run(images, tmp_path / "parts", "--max-steps", "8", *flags, "--resume", "auto")
    assert without_rates(folder) == without_rates(tmp_path / "whole" / "000-DiT-Ti-8")
    assert [row["step"] for row in rows(folder)] == [4, 8]
    for part in ("model", "ema"):
        assert same(whole[part], resumed[part])
    assert list(resumed["emas"]) == [0.25] and same(whole["emas"][0.25], resumed["emas"][0.25])
    assert whole["log"] == resumed["log"]
    for theirs, ours in zip(
        whole["opt"]["state"].values(), resumed["opt"]["state"].values(), strict=True
    ):
        assert same(theirs, ours)


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '5\n{"step": "x", "a": 1}\n{"step": 2, "a": 1}\n' + "[" * 10**5 + "\n"
    )
    assert run_log.has_row(tmp_path, 2, "a") and not run_log.has_row(tmp_path, 2, "b")


def test_rows_beyond_the_step_and_half_written_ones_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 0.5}\n{"step": 4}\n{"step": 6}\n{"st')
    run_log.cut_rows(path, 4)
    assert path.read_text() == '{"step": 2, "loss": 0.5}\n{"step": 4}\n'
    run_log.cut_rows(tmp_path / "none.jsonl", 4)
    assert not (tmp_path / "none.jsonl").exists()


def test_other_images_make_another_run(images, tmp_path, capsys):
    for path in images.glob("*/*.png"):
        target = tmp_path / "images" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    run(tmp_path / "images", tmp_path / "results", "--max-steps", "2")
    target.rename(target.with_name("renamed.png"))
    run(tmp_path / "images", tmp_path / "results", "--max-steps", "4", "--resume", "auto")
    assert "has other images in --data-path" in capsys.readouterr().out
    assert len(list((tmp_path / "results").iterdir())) == 2


def copied(folder, target):
    """A copy of a folder in another place."""
    shutil.copytree(folder, target)
    return target


def test_the_same_images_in_another_place_are_the_same_run(images, tmp_path, capsys):
    """As where every job unpacks its data to a disk of its own."""
    results = tmp_path / "results"
    run(copied(images, tmp_path / "job1"), results, "--max-steps", "2")
    contents = run(
        copied(images, tmp_path / "job2"), results, "--max-steps", "4", "--resume", "auto"
    )
    assert contents["step"] == 4 and len(list(results.iterdir())) == 1
    assert f"--data-path was {tmp_path / 'job1'}, which held the same" in capsys.readouterr().out
    other = copied(images, tmp_path / "job3")
    changed = sorted(other.glob("*/*.png"))[0]
    changed.write_bytes(changed.read_bytes() + b" ")
    run(other, results, "--max-steps", "2", "--resume", "auto")
    assert "has other --data-path" in capsys.readouterr().out and len(list(results.iterdir())) == 2


def test_a_record_that_says_less_is_no_reason_to_start_over(images, tmp_path, capsys):
    """Records of earlier versions have no content: where their path is gone, nobody knows what was
    there.
    """
    first, results = copied(images, tmp_path / "job1"), tmp_path / "results"
    run(first, results, "--max-steps", "2")
    record = results / "000-DiT-Ti-8" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "content": {}}))
    second = copied(images, tmp_path / "job2")
    # The first is still there: another
    assert run(second, results, "--max-steps", "2", "--resume", "auto")["step"] == 2
    shutil.rmtree(results / "001-DiT-Ti-8")
    shutil.rmtree(first)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(second, results, "--max-steps", "4", "--resume", "auto")
    assert (
        "its --data-path is gone" in capsys.readouterr().err and len(list(results.iterdir())) == 1
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "{}", '{"args": 5, "data": "", "id": ""}', "[" * 100_000, "NO LR"]
)
def test_a_damaged_record_is_no_reason_to_start_over(images, tmp_path, capsys, text):
    run(images, tmp_path, "--max-steps", "2")
    record = tmp_path / "000-DiT-Ti-8" / "run.json"
    found = json.loads(record.read_text())
    del found["args"]["lr"]
    record.write_text(text.replace("NO LR", json.dumps(found)))
    (tmp_path / "000-DiT-Ti-8" / "lock").unlink()  # as a copy may lack it
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--max-steps", "4", "--resume", "auto")
    error = capsys.readouterr().err
    assert "cannot tell whether" in error and f"give --resume {tmp_path / '000-DiT-Ti-8'}" in error
    # It is another
    assert (
        run(images, tmp_path, "--max-steps", "3", "--resume", "auto", "--lr", "3e-4")["step"] == 3
    )


def test_a_start_from_a_checkpoint_waits_for_the_same_one(images, tmp_path, monkeypatch, capsys):
    run(images, tmp_path, "--max-steps", "2")
    begun = []
    monkeypatch.setattr(FolderLock, "begin", lambda self, results, key: begun.append(results))
    run(
        images, tmp_path, "--max-steps", "3", "--lr", "3e-4", "--resume",
        str(tmp_path / "000-DiT-Ti-8"),
    )  # fmt: skip
    assert begun == [tmp_path]


def test_a_run_whose_beginning_is_gone_says_where_that_was(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "2")
    first = checkpoint_path(tmp_path / "000-DiT-Ti-8", 2)
    run(images, tmp_path, "--max-steps", "3", "--lr", "3e-4", "--resume", str(first))
    checkpoint_path(tmp_path / "001-DiT-Ti-8", 3).unlink()
    first.rename(first.with_name("kept"))
    run(images, tmp_path, "--max-steps", "3", "--lr", "3e-4", "--resume", "auto")
    assert f"001-DiT-Ti-8 began at {first}, which is gone" in capsys.readouterr().out


def test_a_run_in_a_folder_that_is_not_utf8(images, tmp_path):
    results = tmp_path / os.fsdecode(b"r\xe9sultats")
    run(images, results, "--max-steps", "1")
    assert (
        run(images, results, "--max-steps", "2", "--resume", "auto")["step"] == 2
        and len(list(results.iterdir())) == 1
    )


def test_the_autoencoder_may_move(images, tmp_path, vae):
    flags = ["--model", "DiT-Ti/4", "--resume", "auto", "--vae"]
    run(images, tmp_path / "results", "--max-steps", "1", *flags, vae)
    moved = str(copied(vae, tmp_path / "moved"))
    assert run(images, tmp_path / "results", "--max-steps", "2", *flags, moved)["step"] == 2
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_two_starts_of_one_run_at_once(tmp_path, monkeypatch):
    """The second waits until the first has its folder, and then finds it; starts of other runs do
    not wait.
    """
    monkeypatch.setattr(folder_lock, "START_PATIENCE", 0)
    results = tmp_path / "results"
    with FolderLock() as first, FolderLock() as second, FolderLock() as other:
        first.begin(results, "a")
        other.begin(results, "b")
        with pytest.raises(ValueError, match="is being written by process"):
            second.begin(results, "a")
        folder = results / "000-DiT"
        folder.mkdir()
        first.take(folder)
        second.begin(results, "a")
    assert [path.name for path in results.iterdir()] == ["000-DiT"] and [
        path.name for path in folder.iterdir()
    ] == ["lock"]


def test_a_start_that_fails_leaves_nothing(tmp_path):
    with FolderLock() as lock:
        lock.begin(tmp_path / "results", "a")
    assert list(tmp_path.iterdir()) == []


def test_a_start_is_not_held_by_a_file_that_was_taken_away(tmp_path):
    with FolderLock() as first, FolderLock() as second:
        first.begin(tmp_path, "a")
        (tmp_path / ".starting-a").unlink()
        second.begin(tmp_path, "a")
        assert (tmp_path / ".starting-a").exists()


@pytest.mark.parametrize("change, message", [
    (lambda c: c["opt"].update(state={}), "no moments for some"),
    (lambda c: c["opt"]["state"].pop(3), "no moments for some"),
    (lambda c: c["opt"]["state"][0].pop("exp_avg"), "no moments for some"),
    (lambda c: c.update(step=100), "its step is 100, .* has counted 2"),
    (lambda c: c.update(step=1), "its step is 1, .* has counted 2"),
    (lambda c: c.update(step=10**30), "has counted 2"),
    (lambda c: c.update(step=True), "its step is no checkpoint's"),
    (lambda c: c["opt"]["state"][0].update(step=torch.zeros(3)), "has counted 0"),
    (lambda c: c["opt"]["state"][0].update(step="x"), "optimizer's state is not of this network"),
    (lambda c: c["opt"].update(state=5), "optimizer's state is not of this network"),
    (lambda c: c["opt"].update(param_groups=[]), "optimizer's state is not of this network"),
    (lambda c: c.update(model={"a": 5}), "are no state dict"),
    (lambda c: c.update(emas={0.5: 3}), "are no state dict"),
    (lambda c: c["args"].update(prediction="velocity"), "of another process"),
    (lambda c: c["log"].update(bad_steps=-1), "counts of skipped steps"),
    (lambda c: c["log"].update(bad_steps="x"), "counts of skipped steps"),
    (lambda c: c["log"].update(window=[1.0]), "window of its log"),
    (lambda c: c.update(log=[1]), "log is no dict"),
])  # fmt: skip
def test_parts_of_a_checkpoint_that_do_not_belong_together(
    images, tmp_path, capsys, change, message
):
    contents = run(images, tmp_path, "--max-steps", "2")
    change(contents)
    save_checkpoint(checkpoint_path(tmp_path / "000-DiT-Ti-8", 2), contents)
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--max-steps", "4", "--resume", "auto")
    assert re.search(message, capsys.readouterr().err)


PARTS = ("data", "network", "process", "recipe")  # of --help, whose flags decide


def test_deciding_flags_are_those_that_the_documentation_says():
    groups = {
        group.title: group._group_actions for group in training_flags.build_parser()._action_groups
    }
    flags = {action.dest for title in PARTS for action in groups[title]}
    assert set(DECIDING) == flags - {"epochs", "max_steps", "max_bad_steps"}


def test_another_number_of_processes_is_told(images, tmp_path, capsys):
    contents = run(images, tmp_path, "--max-steps", "2")
    assert contents["rng"] == {"seed": 0, "processes": 1, "device": "cpu"}
    path = checkpoint_path(tmp_path / "000-DiT-Ti-8", 2)
    save_checkpoint(path, {**contents, "rng": {"seed": 0, "processes": 2, "device": "cpu"}})
    run(images, tmp_path, "--max-steps", "4", "--resume", "auto")
    out = capsys.readouterr().out
    assert (
        "written by 2 process(es) on cpu; the same samples and noise per step, but other rounding"
        in out
    )


def test_a_folder_is_the_same_however_it_is_spelt(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    for steps, spelt in enumerate(("train", "train/", "./train", str(images)), start=2):
        flags = [
            *QUICK, "--results-dir", str(tmp_path), "--resume", "auto", "--max-steps", str(steps),
        ]  # fmt: skip
        train.main(["--data-path", spelt, *flags])
        monkeypatch.chdir(images.parent if spelt != "./train" else tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["000-DiT-Ti-8"]
    assert list_checkpoints(tmp_path / "000-DiT-Ti-8")[-1].name == "0000005.pt"


@pytest.mark.parametrize("resume", ["auto", "PATH"])
def test_a_run_begun_at_a_checkpoint_restarts_from_there(images, tmp_path, resume, capsys):
    run(images, tmp_path, "--max-steps", "4", "--ckpt-every", "3")
    first = str(checkpoint_path(tmp_path / "000-DiT-Ti-8", 3))  # in the middle of a log window
    flags = ["--lr", "3e-3", "--max-steps", "5"]
    whole = run(images, tmp_path, *flags, "--resume", first)
    written = without_rates(tmp_path / "001-DiT-Ti-8")
    # As if killed before its first checkpoint
    checkpoint_path(tmp_path / "001-DiT-Ti-8", 5).unlink()
    for _ in range(2):  # and then a second time, when it is finished
        again = run(images, tmp_path, *flags, "--resume", resume.replace("PATH", first))
    assert same(whole["model"], again["model"]) and again["step"] == 5
    assert without_rates(tmp_path / "001-DiT-Ti-8") == written and [
        row["step"] for row in written
    ] == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-DiT-Ti-8", "001-DiT-Ti-8"]
    out = capsys.readouterr().out
    assert f"no checkpoint yet, from {first}" in out and "at its last step already" in out


def test_a_new_run_keeps_neither_the_log_window_nor_the_bad_steps_in_a_row(images, tmp_path):
    contents = run(images, tmp_path, "--max-steps", "3", "--log-every", "9", "--ckpt-every", "2")
    path = checkpoint_path(tmp_path / "000-DiT-Ti-8", 2)
    contents = read_checkpoint(path)
    contents["log"]["bad_in_a_row"] = 9
    save_checkpoint(path, contents)
    run(
        images, tmp_path, "--max-steps", "4", "--lr", "1e-9", "--global-batch-size", "12",
        "--resume", str(path),
    )  # fmt: skip
    (row,) = rows(tmp_path / "001-DiT-Ti-8")
    assert 0.8 < row["loss"] < 1.3 and contents["log"]["window"][0] > 1


def test_a_new_run_with_nothing_to_do_is_refused(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "4")
    with pytest.raises(SystemExit):
        run(
            images, tmp_path, "--max-steps", "3", "--lr", "1e-3", "--resume",
            str(tmp_path / "000-DiT-Ti-8"),
        )  # fmt: skip
    assert "is at step 4, the last would be 3; raise it" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


# ---- damaged checkpoints ----


def damaged_by(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:  # a bit in the middle of a tensor
        content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("how", ["cut", "bit", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    images, tmp_path, capsys, how
):
    flags = ["--max-steps", "6", "--ckpt-every", "2"]
    whole = run(images, tmp_path / "whole", *flags)
    run(images, tmp_path / "parts", *flags)
    folder = tmp_path / "parts" / "000-DiT-Ti-8"
    newest = checkpoint_path(folder, 6)
    content = damaged_by(newest, how)
    if how == "bit":
        torch.load(newest, weights_only=True)  # takes it without a word
    resumed = run(images, tmp_path / "parts", *flags, "--resume", "auto")
    out = capsys.readouterr().out
    assert f"{newest} is damaged" in out and f"going on from {checkpoint_path(folder, 4)}" in out
    assert newest.with_name("0000006.pt.damaged").read_bytes() == content
    assert same(whole["model"], resumed["model"]) and same(whole["ema"], resumed["ema"])
    assert without_rates(folder) == without_rates(tmp_path / "whole" / "000-DiT-Ti-8")


def test_a_read_error_is_no_damage(images, tmp_path, monkeypatch, capsys):
    run(images, tmp_path, "--max-steps", "4", "--ckpt-every", "2")
    before = contents_of(tmp_path)

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("checkpoints.files.zipfile.ZipFile.testzip", fail)
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--max-steps", "6", "--resume", "auto")
    assert (
        "0000004.pt: Input/output error" in capsys.readouterr().err
        and contents_of(tmp_path) == before
    )


@pytest.mark.parametrize("part", [0.2, 0.4, 0.6, 0.8])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, part):
    path = tmp_path / "checkpoints" / "0000001.pt"
    path.parent.mkdir()
    save_checkpoint(path, {"model": {f"layer.{i}": torch.arange(3000.0) for i in range(3)}})
    check_whole(path)
    content = bytearray(path.read_bytes())
    content[int(part * len(content))] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match="0000001.pt is damaged"):
        check_whole(path)


def test_a_path_to_a_damaged_checkpoint_is_refused(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "4", "--ckpt-every", "2")
    for step in (2, 4):
        damaged_by(checkpoint_path(tmp_path / "000-DiT-Ti-8", step), "bit")
        kept = sorted(tmp_path.rglob("*"))
        for path in (checkpoint_path(tmp_path / "000-DiT-Ti-8", step), tmp_path / "000-DiT-Ti-8"):
            if step == 2 and path.is_dir():
                continue
            with pytest.raises(SystemExit):
                run(images, tmp_path, "--max-steps", "6", "--resume", str(path))
            assert "is damaged" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == kept
    run(images, tmp_path, "--max-steps", "4", "--resume", "auto")
    assert "a new run" in (tmp_path / "001-DiT-Ti-8" / "log.txt").read_text()


def test_damaged_files_get_names_of_their_own(tmp_path):
    folder = tmp_path / "000-DiT-Ti-8"
    for step in (1, 2):
        checkpoint_path(folder, step).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(checkpoint_path(folder, step), {"a": torch.ones(3)})
    for content in (b"one", b"two"):
        checkpoint_path(folder, 2).write_bytes(content)
        assert newest_whole_checkpoint(folder)[0] == checkpoint_path(folder, 1)
        (folder / "checkpoints" / ".0000002.pt.partial").touch()
        assert run_folder.go_on(folder).checkpoint == checkpoint_path(folder, 1)
    found = {
        path.name: path.read_bytes()
        for path in (folder / "checkpoints").iterdir()
        if path.suffix != ".pt"
    }
    assert found == {"0000002.pt.damaged": b"one", "0000002.pt.damaged1": b"two"}


# ---- what is saved, and when ----


def test_keep_last_deletes_the_older_ones(images, tmp_path):
    run(images, tmp_path, "--max-steps", "7", "--ckpt-every", "2", "--keep-last", "2")
    assert [p.name for p in list_checkpoints(tmp_path / "000-DiT-Ti-8")] == [
        "0000006.pt",
        "0000007.pt",
    ]


def test_pruning_spares_other_files(tmp_path):
    for name in ("0000001.pt", "0000002.pt", "best.pt", "0000001.pt.damaged"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).touch()
    prune_checkpoints(tmp_path, 1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "0000001.pt.damaged", "0000002.pt", "best.pt",
    ]  # fmt: skip


def test_checkpoints_by_the_clock(images, tmp_path):
    run(images, tmp_path, "--max-steps", "4", "--ckpt-minutes", "1e-9")
    assert len(list_checkpoints(tmp_path / "000-DiT-Ti-8")) == 4
    run(images, tmp_path, "--max-steps", "4", "--ckpt-minutes", "60")
    assert len(list_checkpoints(tmp_path / "001-DiT-Ti-8")) == 1


def short_of_space(path, contents, save=records.save_checkpoint):
    """save_checkpoint where files may have 100,000 bytes, but for the first checkpoint.

    Python ignores the signal that goes with the limit.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if "0000002" not in path.name:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        save(path, contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("on_error, reached", [("stop", 4), ("continue", 6)])
def test_a_full_disk_is_told_and_the_last_good_checkpoint_kept(
    images, tmp_path, monkeypatch, capsys, on_error, reached
):
    monkeypatch.setattr(records, "save_checkpoint", short_of_space)
    flags = ["--max-steps", "6", "--ckpt-every", "2", "--keep-last", "1"]
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, *flags, "--on-save-error", on_error)
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    folder = tmp_path / "000-DiT-Ti-8"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["0000002.pt"]
    check_whole(checkpoint_path(folder, 2))
    assert "0000004.pt was not written (File too large" in out
    assert f"the last good checkpoint is {checkpoint_path(folder, 2)}; " in out
    assert rows(folder)[-1]["step"] == reached and "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = RunLog(tmp_path, is_main=True, step=0, last_step=2)
    log("one")
    log.row({"step": 1})
    log("two")
    log.close()
    out, err = capsys.readouterr()
    assert (
        "] one\n" in out
        and "] two\n" in out
        and "the log was not written (No space left on device)" in err
    )
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_preview_that_cannot_be_written_does_not_end_the_run(
    images, tmp_path, monkeypatch, capsys
):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_whole", full)
    assert run(images, tmp_path, "--max-steps", "2", "--sample-every", "1")["step"] == 2
    assert (
        "previews/0000001.png was not written (No space left on device" in capsys.readouterr().out
    )


def test_the_disks_reason_is_told(tmp_path, monkeypatch):
    def save(contents, file):  # as torch.save does it
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (what torch.save does)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "0000001.pt", {})
    assert not list(tmp_path.iterdir())


# ---- signals ----


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, None), (signal.SIGUSR1, None), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_the_run_goes_on_later(
    images, tmp_path, monkeypatch, capsys, number, code
):
    whole = run(images, tmp_path / "whole", "--max-steps", "6")
    step_of = loop.train_step

    def step_with_signal(state, *args, **kwargs):
        if state.step == 2:
            os.kill(os.getpid(), number)
        return step_of(state, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", step_with_signal)
        if code:
            with pytest.raises(SystemExit) as stopped:
                run(images, tmp_path / "parts", "--max-steps", "6")
            assert stopped.value.code == code
        else:
            run(images, tmp_path / "parts", "--max-steps", "6")
    assert f"stopped by {number.name} after step" in capsys.readouterr().out
    (stopped_at,) = [int(p.stem) for p in list_checkpoints(tmp_path / "parts" / "000-DiT-Ti-8")]
    assert 3 <= stopped_at <= 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = run(images, tmp_path / "parts", "--max-steps", "6", "--resume", "auto")
    assert same(whole["model"], resumed["model"]) and same(whole["ema"], resumed["ema"])
    assert without_rates(tmp_path / "parts" / "000-DiT-Ti-8") == without_rates(
        tmp_path / "whole" / "000-DiT-Ti-8"
    )


def test_a_second_interruption_stops_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_loader_workers_leave_signals_to_the_training_process(images):
    from data.images import ImageDataset
    from data.listing import list_images
    from data.loader import make_loader

    dataset = ImageDataset(list_images(images, 3), 8)
    loader = iter(make_loader(dataset, [[(i, False)] for i in range(8)], num_workers=1))
    next(loader)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(loader._workers[0].pid, number)
    assert len(list(loader)) == 7


# ---- clocks and logs ----


def test_meter_leaves_pauses_out(monkeypatch):
    now = iter([0.0, 10.0, 13.0, 15.0, 15.0, 16.0])
    monkeypatch.setattr(folder_lock.time, "monotonic", lambda: next(now))
    meter = Meter()
    meter.steps = 6
    with meter.paused():  # from 10 to 13
        pass
    assert meter.steps_per_second() == 6 / 12  # at 15
    meter.started = next(now)
    assert meter.steps_per_second() == 0


def test_only_the_main_process_writes(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=False, step=0, last_step=4)
    log("nothing")
    log.row({"step": 1})
    log.sync()
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
