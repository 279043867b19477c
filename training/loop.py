"""The training loop: steps, and what is due after each of them."""

from contextlib import closing
from functools import partial
import time

import numpy as np
import torch
from torch import Tensor

from checkpoints.networks import routes
from conditions.condition import Values
from data.batches import Ragged, StepBatches, alike, collate, collate_ragged
from data.buckets import BucketBatches, ClipBatches
from data.images import BadImage, unreadable
from data.loader import make_loader, read, say_waiting
from data.options import TEXT
from layers.clips import clips_of, frames_of
from runtime.team import once
from training.assembly import Job
from training.records import (
    Skipped, evaluation_due, is_sound, log_window, save, save_preview, save_scores,
)  # fmt: skip
from training.run_log import Meter, StopSignals, has_row
from training.packed import first_numbers
from training.step import draw, train_step, warm_up
from vae import LatentSpace, Space, from_uint8

# Several processes, told to stop, still wait so many seconds for a batch of one of them
STOP_PATIENCE = 15


def train(job: Job, signals: StopSignals) -> None:
    """The loop, from state.step to last_step: steps, log lines, checkpoints, previews."""
    state = job.state
    batches, skipped, meter = batches_left(job), Skipped(job.log), Meter()
    warm_up_together(job)
    if scores_missing(job):
        with meter.paused():
            if not save_scores(job, signals):  # it was stopped here the last time as well
                return job.log("stopped while scoring; nothing is lost")
    pinned = job.accelerator.device.type == "cuda"
    join = collate if job.options.pack is None else collate_ragged
    loader = make_loader(job.dataset, batches, job.options.num_workers, pinned, join)
    with closing(read(loader, partial(wait_on, job, signals))) as loaded:
        for batch, labels, bad in loaded:
            check_batch(job, batch, bad)
            skipped.here.update(bad)
            report = one_step(job, batch, labels, signals, meter)
            meter.steps += 1
            job.log.bar.update()
            if report["bad"]:
                guard(job, batches.indices(state.step - 1))
            with meter.paused():
                stop = keep_records(job, report, signals, meter, skipped)
            if stop:
                name = signals.received.name if signals.received else "a signal to another process"
                return job.log(
                    f"stopped by {name} after step {state.step}; "
                    'the same command with `resume="auto"` goes on from there'
                )
    conclude(job)


def batches_left(job: Job) -> StepBatches:
    """The batches of this process, from the step that the run is at to its last."""
    options, accelerator = job.options, job.accelerator
    others = (
        options.global_batch_size, options.global_seed, job.state.step, job.last_step,
        accelerator.process_index, accelerator.num_processes, options.flip,
        options.condition == TEXT,
    )  # fmt: skip
    if options.aspect_buckets:
        return BucketBatches(job.dataset.sizes or [], *others)
    if options.frames is not None:
        return ClipBatches(job.dataset.lengths or [], *others)
    return StepBatches(len(job.dataset), *others)


def warm_up_together(job: Job) -> None:
    """Warm up the model, if there are several processes, on as many latents as a step takes."""
    processes, device = job.accelerator.num_processes, job.accelerator.device
    if processes > 1:
        share = job.options.global_batch_size // processes // job.options.grad_accum
        latent, side = job.state.network.latent_shape, job.state.network.patch_size
        if job.options.pack is not None:  # a row need not have room for a square
            latent = latent[0], side, side
        warm_up(job.state, torch.zeros(share, *latent, device=device))


def scores_missing(job: Job) -> bool:
    """Whether scores are due at the step that the run goes on from, and were not taken."""
    return evaluation_due(job) and not once(
        job.accelerator, has_row, job.folder, job.state.step, "eval_samples"
    )


def one_step(
    job: Job, batch: Tensor | Ragged, labels: Values, signals: StopSignals, meter: Meter
) -> dict[str, float]:
    """train_step's report of a step on this process's share of a batch.

    The report says what any process asks for: to stop, or to save.
    """
    options, accelerator, state = job.options, job.accelerator, job.state
    device, minutes = accelerator.device, options.ckpt_minutes
    batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    draws = draw(
        options.global_seed, state.step, options.global_batch_size, state.network.latent_shape,
        state.network.config["class_dropout_prob"], state.process, device,
        accelerator.process_index, accelerator.num_processes, state.condition.drops,
        options.given_frames, options.patch_frames, routes(state.network),
    )  # fmt: skip
    latents = all_latents(job.space, batch, draws.vae_noise)  # (n, C, *space), or n of (C, h, w)
    old = minutes is not None and time.monotonic() - meter.saved > 60 * minutes
    reduce = partial(accelerator.reduce, reduction="sum")
    return train_step(state, latents, labels, draws, reduce, bool(signals.received), old)


def wait_on(job: Job, signals: StopSignals, seconds: float) -> None:
    """Say now and then that a batch has not come for so long.

    End the run if it was told to stop meanwhile.
    """
    alone = job.accelerator.num_processes == 1
    if signals.received and (alone or seconds > STOP_PATIENCE):
        if alone:
            save(job, must=True)
        kept = f"saved at step {job.state.step}" if alone else "not saved"
        job.end(
            f"stopped by {signals.received.name} while waiting for images, {kept}; "
            '`resume="auto"` goes on from there'
        )
    say_waiting(seconds, job.log)


def conclude(job: Job) -> None:
    """Say that the run is done.

    End it with an error if its last steps, or its weights, are not finite.
    """
    state = job.state
    if is_sound(job):
        return job.log("done")
    why = (
        f"its last {state.bad_in_a_row} step(s) were skipped"
        if state.bad_in_a_row
        else "it has weights that are not finite"
    )
    job.end(
        f"the run ended badly: {why}, loss or gradient not being finite. Look at log.txt, and "
        "begin a new run with `resume` CHECKPOINT, an earlier one, and a lower `lr` or a "
        "`grad_clip`"
    )


def keep_records(
    job: Job, report: dict[str, float], signals: StopSignals, meter: Meter, skipped: Skipped
) -> bool:
    """What is due after a step with this report: log line, checkpoint, preview, scores.

    Whether to stop then.
    """
    options, step = job.options, job.state.step
    stop, last = bool(report["stop"]), step == job.last_step
    if step % options.log_every == 0 or last:
        log_window(job, meter)
        if options.skip_bad_images:
            skipped.report()
    saving = stop or report["save"] or last or step % options.ckpt_every == 0
    if saving:
        save(job, must=stop or last)
        meter.saved = time.monotonic()
    if options.sample_every and step % options.sample_every == 0:
        save_preview(job)
    if not stop and evaluation_due(job) and not save_scores(job, signals):
        stop = True
        if not saving:
            save(job, must=True)
    return stop


def check_batch(job: Job, batch: Tensor | Ragged | None, bad: list[BadImage]) -> None:
    """End the run, naming the file, if an image could not be read and none may stand in for it."""
    if batch is None or (bad and not job.options.skip_bad_images):
        job.end(unreadable(bad, job.options.skip_bad_images))


def to_latents(space: Space, batch: Tensor, noise: Tensor) -> Tensor:
    """Scaled latents (n, C, h, w), drawn with the first numbers of noise, from images or moments;
    of clips (n, C, F, h, w).

    Images are uint8 (n, 3, H, W), moments (n, 2, C, h, w); of clips (n, 3, F, H, W) and
    (n, 2, C, F, h, w).
    """
    if batch.dim() == (5 if batch.dtype == torch.uint8 else 6):
        return latents_of_clips(space, batch, noise)
    if batch.dtype == torch.uint8:
        shape = space.shape.latent(*batch.shape[2:])
        return space.encode(from_uint8(batch), first_numbers(noise, shape))
    assert isinstance(space, LatentSpace)  # TrainOptions refuses pixels with latents
    mean, std = batch.float().unbind(dim=1)
    return space.draw(mean, std, first_numbers(noise, mean.shape[1:]))


def latents_of_clips(space: Space, batch: Tensor, noise: Tensor) -> Tensor:
    """As to_latents, of clips, frame by frame."""
    frames, of_moments = batch.shape[-3], batch.dtype != torch.uint8
    shape = batch.shape[2:] if of_moments else (  # (C, F, h, w)
        space.shape.channels, frames, *space.shape.latent(*batch.shape[3:])[1:]
    )
    noise = frames_of(first_numbers(noise, shape))  # (n·F, C, h, w)
    if of_moments:
        parts = [frames_of(part) for part in batch.unbind(dim=1)]
        images = torch.stack(parts, dim=1)  # (n·F, 2, C, h, w)
    else:
        images = frames_of(batch)  # (n·F, 3, H, W)
    return clips_of(to_latents(space, images, noise), frames)  # (n, C, F, h, w)


def all_latents(space: Space, batch: Tensor | Ragged, noise: Tensor) -> Tensor | list[Tensor]:
    """As to_latents; of images or moments of several shapes n scaled latents (C, h, w).

    Those of one shape are encoded together.
    """
    if isinstance(batch, Tensor):
        return to_latents(space, batch, noise)
    parts = batch.parts()
    latents = list(parts)
    for numbers in alike(parts):
        made = to_latents(space, torch.stack([parts[i] for i in numbers]), noise[numbers])
        for i, latent in zip(numbers, made):
            latents[i] = latent  # (C, h, w)
    return latents


def guard(job: Job, indices: np.ndarray) -> None:
    """Log a step that was skipped, with its samples.

    End the run, saving nothing, after max_bad_steps in a row.
    """
    state = job.state
    job.log(
        f"step {state.step:07d}: loss or gradient is not finite, step skipped "
        f"({state.bad_in_a_row} in a row, {state.bad_steps} in all); samples {indices.tolist()}"
    )
    if state.bad_in_a_row >= job.options.max_bad_steps:
        job.end(
            f"stopped after {state.bad_in_a_row} such steps in a row, no checkpoint saved: look at "
            f"these samples, or begin a new run with `resume` {job.folder} and a lower `lr` or a "
            "`grad_clip`",
            told=True,
        )
