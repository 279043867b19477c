"""A training run from its options to its end, as train.py does it, without a command line."""

from collections.abc import Iterator
from pathlib import Path
import signal
from typing import NoReturn

from checkpoints.networks import Network, makes_clips, reads_text
from data import buckets
from data.loader import LoaderFailed, explained
from runtime.command_line import reason, why_lost
from runtime.devices import tf32
from runtime.surroundings import lone_task_note
from training import packed
from training.assembly import Job, assemble
from training.folder_lock import FolderLock
from training.loop import train
from training.options import TrainOptions
from training.run_log import RunInterrupted, StopSignals


def run_training(options: TrainOptions) -> Path:
    """Train as the options ask for.

    Returns the run folder, with its checkpoints, log.txt and metrics.jsonl. The log is printed,
    too. SIGTERM and SIGUSR1 save a checkpoint and end the run, as Ctrl-C does; resume="auto" goes
    on from there. Raises ValueError for what is wrong before the work begins (then nothing was
    written), RunEnded for what ends the run early, and RunInterrupted, a KeyboardInterrupt, after
    Ctrl-C.
    """
    with FolderLock() as lock, tf32(options.tf32):
        try:
            job = assemble(options, lock)
        except OSError as error:  # such as that of a name too long
            raise ValueError(reason(error)) from error
        return carry_out(job)


def carry_out(job: Job) -> Path:
    """Train until the Job's last step, or a signal; the run folder.

    Raises RunEnded and RunInterrupted as run_training does.
    """
    introduce(job)
    try:
        with StopSignals() as signals:
            train(job, signals)
    except (LoaderFailed, RuntimeError) as error:  # torch tells of a lost worker wherever it is
        end_by_failure(job, error)
    except KeyboardInterrupt:
        job.log(
            f"interrupted after step {job.state.step}, not saved; "
            '`resume="auto"` goes on from the last checkpoint'
        )
        raise RunInterrupted from None
    finally:
        job.log.close()
    job.accelerator.end_training()
    if signals.received == signal.SIGINT:
        raise RunInterrupted
    return job.folder


def end_by_failure(job: Job, error: Exception) -> NoReturn:
    """Log what failed; raise RunEnded if it was a loader's worker, else the error itself."""
    failure = explained(error) if type(error) is RuntimeError else error
    if isinstance(failure, LoaderFailed):
        job.end(f'{failure}; `resume="auto"` goes on from the last checkpoint')
    first = (str(error).splitlines() or [""])[0]
    job.log(f"stopped after step {job.state.step} by an error: {why_lost(error) or first}")
    raise error


def introduce(job: Job) -> None:
    """Log what is about to be done."""
    options, classes = job.options, job.dataset.classes or []
    job.log(f"{job.why}; folder {job.folder}")
    for note in (job.lock.note, lone_task_note(), *job.dataset.notes, job.state.note):
        if note:
            job.log(f"note: {note}")
    job.log(f"arguments: {options.recorded()}")
    size = sum(p.numel() for p in job.state.network.parameters())
    sorted_in = (
        f" in {len(classes)} of {options.num_classes} classes" if options.num_classes else ""
    )
    where = f"{job.accelerator.num_processes} process(es) on {job.accelerator.device.type}"
    job.log(
        f"{options.model}, {kind_of(job.state.network)}: {size:,} parameters, {len(job.dataset):,} "
        f"{options.samples}{sorted_in}, {where}, steps {job.state.step} to {job.last_step}"
    )
    for line in (*notes_on_shapes(job), *notes_on_start(job, classes)):
        job.log(line)


def kind_of(network: Network) -> str:
    """What a network is, beside its model's name: its design, how it sees clips, what it reads."""
    seen = [f"{network.config['attention']} attention"] if makes_clips(network) else []
    read = ["captions"] if reads_text(network) else []
    return ", ".join(seen + read) or network.config.get("block", type(network).__name__)


def notes_on_shapes(job: Job) -> Iterator[str]:
    """Lines about images of their own shape, or clips and images: how many there are of which."""
    options, sizes = job.options, job.dataset.sizes or []
    if options.aspect_buckets:
        yield from buckets.told(sizes, options.global_batch_size)
    if options.frames is not None:
        yield from buckets.told_clips(job.dataset.lengths or [], options.global_batch_size)
    if options.pack is not None:
        yield packed.told(sizes, job.space.shape.ratio * options.patch_size, options.pack)


def notes_on_start(job: Job, classes: list[str]) -> Iterator[str]:
    """Lines about what may not be meant: classes without images, another machine, nothing to do."""
    options, step = job.options, job.state.step
    if options.num_classes > len(classes):
        more = ", …" if len(classes) > 5 else ""
        some = f"{', '.join(classes[:5])}{more}"
        yield (
            f"note: fewer class folders ({some}) than `num_classes` {options.num_classes}; "
            "other labels stay untrained"
        )
    yield from notes_on_machine(job)
    if options.eval_every and options.eval_every > job.last_step:
        yield (
            f"note: `eval_every` {options.eval_every} is beyond the last step {job.last_step}: "
            "nothing will be scored"
        )
    if step >= job.last_step:
        yield (
            f"step {step}: the run is at its last step already; "
            "raise `epochs` or `max_steps` to go on"
        )


def notes_on_machine(job: Job) -> Iterator[str]:
    """A line if the checkpoint was written by another number of processes, or on other devices."""
    before, device = job.resumed, job.accelerator.device.type
    processes, kind = before.get("processes"), before.get("device")
    if before and (processes, kind) != (job.accelerator.num_processes, device):
        same = (
            "the same samples and noise per step, but other rounding"
            if kind == device
            else "the same samples per step, but other noise"
        )
        yield f"note: the checkpoint was written by {processes} process(es) on {kind}; {same}"
