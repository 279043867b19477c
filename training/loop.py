"""The training loop: steps, and what is due after each of them."""

from contextlib import closing
from functools import partial
import sys
import time

import numpy as np
import torch
from torch import Tensor

from data.batches import StepBatches
from data.images import BadImage, unreadable
from data.loader import make_loader, read, say_waiting
from runtime.team import once
from training.job import Job
from training.records import (
    Skipped, evaluation_due, is_sound, leave, log_window, save, save_preview, save_scores,
)  # fmt: skip
from training.run_log import Meter, StopSignals, has_row
from training.step import draw, train_step, warm_up
from vae import LatentSpace, Space, from_uint8

# Seconds for which several processes, told to stop, still wait for a batch of one of them
STOP_PATIENCE = 15


def train(job: Job, signals: StopSignals) -> None:
    """The loop, from state.step to last_step: steps, log lines, checkpoints, previews."""
    args, accelerator, state, log = job.args, job.accelerator, job.state, job.log
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    drawn = dict(
        latent=state.network.latent_shape,
        dropout_prob=state.network.config["class_dropout_prob"],
        process=state.process, device=device, rank=rank, world_size=world,
    )  # fmt: skip
    batches = StepBatches(
        len(job.dataset), args.global_batch_size, args.global_seed, state.step, job.last_step, rank,
        world, args.flip,
    )  # fmt: skip
    skipped, meter = Skipped(log), Meter()
    reduce = partial(accelerator.reduce, reduction="sum")
    if world > 1:
        share = args.global_batch_size // world // args.grad_accum
        warm_up(state, torch.zeros(share, *drawn["latent"], device=device))
    if evaluation_due(job) and not once(
        accelerator, has_row, job.folder, state.step, "eval_samples"
    ):
        with meter.paused():
            if not save_scores(job, signals):  # for which the run was stopped the last time
                return log("stopped while scoring; nothing is lost")
    loader = make_loader(job.dataset, batches, args.num_workers, pin_memory=device.type == "cuda")
    with closing(read(loader, partial(wait_on, job, signals))) as loaded:
        for batch, labels, bad in loaded:
            check_readable(job, batch, bad)
            skipped.here.update(bad)
            batch, labels = (x.to(device, non_blocking=True) for x in (batch, labels))
            draws = draw(args.global_seed, state.step, args.global_batch_size, **drawn)
            latents = to_latents(job.space, batch, draws.vae_noise)  # (n, C, h, w)
            old = (
                args.ckpt_minutes is not None
                and time.monotonic() - meter.saved > 60 * args.ckpt_minutes
            )
            report = train_step(
                state, latents, labels, draws, reduce, bool(signals.received), old
            )
            meter.steps += 1
            log.bar.update()
            if report["bad"]:
                guard(job, batches.indices(state.step - 1))
            with meter.paused():
                stop = keep_records(job, report, signals, meter, skipped)
            if stop:
                name = signals.received.name if signals.received else "a signal to another process"
                return log(
                    f"stopped by {name} after step {state.step}; the same command with --resume auto goes on from there"
                )
    conclude(job)


def wait_on(job: Job, signals: StopSignals, seconds: float) -> None:
    """Say now and then that a batch has not come for so long; leave the program if it was told to
    stop meanwhile.
    """
    alone = job.accelerator.num_processes == 1
    if signals.received and (alone or seconds > STOP_PATIENCE):
        if alone:
            save(job, must=True)
        kept = f"saved at step {job.state.step}" if alone else "not saved"
        leave(
            job,
            f"stopped by {signals.received.name} while waiting for images, {kept}; --resume auto goes on from there",
        )
    say_waiting(seconds, job.log)


def conclude(job: Job) -> None:
    """Say that the run is done; leave the program with an error if its last steps, or its weights,
    are not finite.
    """
    state = job.state
    if is_sound(job):
        return job.log("done")
    why = (
        f"its last {state.bad_in_a_row} step(s) were skipped"
        if state.bad_in_a_row
        else "it has weights that are not finite"
    )
    leave(
        job,
        f"the run ended badly: {why}, loss or gradient not being finite. Look at log.txt, and begin a new run with --resume "
        "CHECKPOINT, an earlier one, and a lower --lr or a --grad-clip",
    )


def keep_records(
    job: Job, report: dict[str, float], signals: StopSignals, meter: Meter, skipped: "Skipped"
) -> bool:
    """What is due after a step with this report: log line, checkpoint, preview, scores.

    Whether to stop then.
    """
    args, step = job.args, job.state.step
    stop, last = bool(report["stop"]), step == job.last_step
    if step % args.log_every == 0 or last:
        log_window(job, meter)
        if args.skip_bad_images:
            skipped.report()
    saving = stop or report["save"] or last or step % args.ckpt_every == 0
    if saving:
        save(job, must=stop or last)
        meter.saved = time.monotonic()
    if args.sample_every and step % args.sample_every == 0:
        save_preview(job)
    if not stop and evaluation_due(job) and not save_scores(job, signals):
        stop = True
        if not saving:
            save(job, must=True)
    return stop


def check_readable(job: Job, batch: Tensor | None, bad: list[BadImage]) -> None:
    """Leave the program, naming the file, if an image could not be read and none may stand in for
    it.
    """
    if batch is None or (bad and not job.args.skip_bad_images):
        leave(job, unreadable(bad, job.args.skip_bad_images))


def to_latents(space: Space, batch: Tensor, noise: Tensor) -> Tensor:
    """Scaled latents (n, C, h, w), drawn with noise, from images uint8 (n, 3, S, S) or moments (n,
    2, C, h, w).
    """
    if batch.dtype == torch.uint8:
        return space.encode(from_uint8(batch), noise)
    assert isinstance(space, LatentSpace)  # check_arguments refuses pixels with --latents
    mean, std = batch.float().unbind(dim=1)
    return space.draw(mean, std, noise)


def guard(job: Job, indices: np.ndarray) -> None:
    """Log a step that was skipped, with its samples; leave the program, saving nothing, after
    --max-bad-steps in a row.
    """
    state = job.state
    job.log(
        f"step {state.step:07d}: loss or gradient is not finite, step skipped ({state.bad_in_a_row} in a row, "
        f"{state.bad_steps} in all); samples {indices.tolist()}"
    )
    if state.bad_in_a_row >= job.args.max_bad_steps:
        job.log(
            f"stopped after {state.bad_in_a_row} such steps in a row, no checkpoint saved: look at these samples, or begin "
            f"a new run with --resume {job.folder} and a lower --lr or a --grad-clip"
        )
        sys.exit(1)
