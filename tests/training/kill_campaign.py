"""Kill training runs with SIGKILL, give the same command again, and compare the end with that of a
run left alone.

    python tests/training/kill_campaign.py --data-path demo/digits/train --output campaign

Kills hit from outside at a random moment of a random step, at a random byte of a checkpoint's
write, and just before and after it gets its name; on one process and on two, from images and from
cached latents, of a diffusion and of a flow, with two averages, accumulated and clipped gradients.
Prints a line per kill and a summary; exits with 1 unless all survived. The images are those of
examples/digits/make_dataset.py.
"""

import argparse
from contextlib import chdir
import hashlib
import io
import itertools
import json
import multiprocessing
from multiprocessing.forkserver import ensure_running
import os
from pathlib import Path
import random
import shutil
import signal
import socket
import sys
import time

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.sides import machine  # noqa: E402

RUN = [
    "--vae", str(ROOT / "examples/digits/vae"), "--model", "DiT-Ti/2", "--image-size", "32",
    "--num-classes", "10", "--no-flip", "--global-batch-size", "16", "--max-steps", "40", "--lr",
    "2e-3", "--ema-decay", "0.9", "0.5", "--grad-accum", "2", "--grad-clip", "0.5", "--num-workers",
    "1", "--device", "cpu", "--log-every", "5", "--ckpt-every", "7", "--resume", "auto",
]  # fmt: skip
FLOW = [
    *RUN, "--process", "flow", "--path", "gvp", "--time-sampling", "logit-normal:0,1",
    "--time-shift", "2", "--cosine-loss", "--learn-sigma",
]  # fmt: skip
RUNS = {"diffusion": RUN, "flow": FLOW}
# On images of their own shape
SHAPED = {
    "buckets": [*RUN, "--aspect-buckets"], "packed": [*FLOW, "--pack", "20", "--positions", "rope"],
}  # fmt: skip
# With captions
SAID = [flag for flag in FLOW if flag not in ("--num-classes", "10")] + ["--model", "MMDiT-Ti/2"]
STEPS, SAVES = 40, 6  # of such a run: its steps, and its checkpoints
RATES = ("images_per_second", "model_flops_per_second", "time")
TIMEOUT = 120
DOORS = ["train", "extract_latents", "sample_ddp", "evaluate"]


def launcher():
    """A multiprocessing context whose processes start at once, all that doors need imported
    already.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(DOORS)
    with chdir(ROOT):  # where the server of forks finds them
        ensure_running()
    return context


def worker(argv, folder, env, death):
    """Run train.py in this process, noting each step in folder/progress; dies by itself as `death`
    says, if at all.
    """
    import train
    from training import loop

    # For the loader's workers, as in a process of one's own
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(env)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    step_of, progress = loop.train_step, os.open(folder / "progress", os.O_WRONLY | os.O_CREAT)

    def noted(state, *args, **kwargs):
        report = step_of(state, *args, **kwargs)
        os.pwrite(progress, b"%07d" % state.step, 0)
        return report

    loop.train_step = noted
    if death and env.get("RANK", "0") == "0":
        arm(death)
    train.main(argv)


def arm(death):
    """Have this process kill itself at its save number death["save"]: at a share of its bytes, or
    about its renaming.
    """
    import torch

    save, replace, count = torch.save, os.replace, iter(range(1, 1000))

    def dying_save(contents, file):
        if death["at"] == "byte" and next(count) == death["save"]:
            whole = io.BytesIO()
            save(contents, whole)
            file.write(whole.getvalue()[: int(death["share"] * whole.tell())])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(contents, file)

    def dying_replace(source, target):
        dies = (
            str(target).endswith(".pt")
            and death["at"] in ("before", "after")
            and next(count) == death["save"]
        )
        if dies and death["at"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, os.replace = dying_save, dying_replace


def start(context, data, folder, processes, death=None, run=RUN):
    """Begin the command on so many processes; the Process objects."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = ["--data-path", str(data), "--results-dir", str(folder / "results"), *run]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(processes):
        env = dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        started.append(
            context.Process(target=worker, args=(argv, folder, env if processes > 1 else {}, death))
        )
        started[-1].start()
    return started


def step_reached(folder):
    """The last step that the run has finished; 0 for none."""
    try:
        return int((folder / "progress").read_text())
    except (OSError, ValueError):
        return 0


def kill_at(started, folder, step, delay):
    """Kill all of a run's processes `delay` seconds after it has done `step`; the step that they
    had reached.
    """
    patience = time.monotonic() + TIMEOUT
    while step_reached(folder) < step:
        assert all(process.is_alive() for process in started), (folder / "output.txt").read_text()
        assert time.monotonic() < patience, "the run did not get so far"
        time.sleep(0.002)
    time.sleep(delay)
    assert all(process.is_alive() for process in started), "the kill came too late"
    for process in started:
        process.kill()
    end(started, -signal.SIGKILL)
    return step_reached(folder)


def end(started, code):
    """Wait until all processes have ended; fail unless each of them ended with this code."""
    for process in started:
        process.join(TIMEOUT)
        assert process.exitcode == code, f"a process ended with {process.exitcode}, not {code}"


def die(started, folder):
    """Wait until the first process has killed itself, and kill the others; the step that they had
    reached.
    """
    end(started[:1], -signal.SIGKILL)
    for process in started[1:]:
        process.kill()
        process.join(TIMEOUT)
    return step_reached(folder)


def fingerprint(folder, steps=STEPS):
    """A hash of the end of the only run in folder/results, after so many steps: weights, averages,
    optimizer, log window, metrics without rates.
    """
    import torch

    (run,) = (folder / "results").iterdir()
    checkpoint = sorted((run / "checkpoints").glob("*.pt"))[-1]
    assert checkpoint.name == f"{steps:07d}.pt"
    contents = torch.load(checkpoint, weights_only=True)
    digest = hashlib.sha256()

    def take(value):
        if isinstance(value, dict):
            for key in value:
                digest.update(repr(key).encode())
                take(value[key])
        elif torch.is_tensor(value):
            digest.update(value.numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    take({key: contents[key] for key in ("model", "ema", "emas", "opt", "step", "rng", "log")})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    take([{name: value for name, value in row.items() if name not in RATES} for row in rows])
    return digest.hexdigest()


def random_death(source):
    """One of the ways to die: None for a kill from outside, else what `arm` takes."""
    at = source.choice(["outside", "outside", "byte", "before", "after"])
    if at == "outside":
        return None
    return {
        "at": at, "save": source.randint(1, SAVES - 1 if at == "after" else SAVES),
        "share": source.random(),
    }  # fmt: skip


def survive(context, data, folder, processes, death, source, run=RUN, steps=STEPS):
    """Start a run, have it killed, start it again; (the step it was killed after, its fingerprint).
    """
    started = start(context, data, folder, processes, death, run)
    if death:
        step = die(started, folder)
    else:
        step = kill_at(started, folder, source.randint(1, steps - 2), source.uniform(0, 0.02))
    assert 0 < step <= steps
    end(start(context, data, folder, processes, run=run), 0)
    return step, fingerprint(folder, steps)


def cache(data, folder):
    """Latents of the digits, in a folder; returns it."""
    import extract_latents

    flags = [
        "--data-path", str(data), "--output", str(folder), "--image-size", "32", "--num-classes",
        "10", "--no-flip",
    ]  # fmt: skip
    extract_latents.main([*flags, "--vae", RUN[1], "--num-workers", "0", "--device", "cpu"])
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-path", required=True, type=Path,
        help="the digits: the folder train of make_dataset.py",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, type=Path, help="folder to work in; must not exist"
    )
    parser.add_argument("--kills", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--process", nargs="+", choices=RUNS, default=list(RUNS), help="(default: all)"
    )
    args = parser.parse_args(argv)
    if args.output.exists() or not args.data_path.is_dir():
        parser.error(
            f"--output {args.output} exists already, or --data-path {args.data_path} does not"
        )
    print(json.dumps(machine()), flush=True)
    context, source, survived, steps = launcher(), random.Random(args.seed), 0, []
    latents, wanted, runs = str(cache(args.data_path, args.output / "latents")), {}, {}
    for process in args.process:
        runs[f"{process}-images"] = RUNS[process]
        runs[f"{process}-latents"] = [*RUNS[process], "--latents", latents]
    for kind, processes in itertools.product(runs, (1, 2)):
        folder = args.output / f"alone-{kind}-{processes}"
        end(start(context, args.data_path, folder, processes, run=runs[kind]), 0)
        wanted[kind, processes] = fingerprint(folder)
    for number, (kind, processes) in zip(range(args.kills), itertools.cycle(wanted)):
        death = random_death(source)
        folder = args.output / f"killed-{number:03d}"
        step, found = survive(context, args.data_path, folder, processes, death, source, runs[kind])
        right = found == wanted[kind, processes]
        survived += right
        steps.append(step)
        how = "from outside" if death is None else " ".join(map(str, death.values()))
        print(
            f"{number:03d}: {kind}, {processes} process(es), {how}, after step {step}: {right}",
            flush=True,
        )
        if right:
            shutil.rmtree(folder)
    print(f"steps hit: {sorted(steps)}\nsurvived: {survived} of {args.kills}")
    return survived < args.kills


if __name__ == "__main__":
    sys.exit(main())
