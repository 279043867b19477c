"""What a run writes: log lines, metrics, checkpoints, scores and previews."""

from collections.abc import Mapping
from functools import partial
import time

from accelerate.utils import broadcast_object_list, gather_object
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from checkpoints.files import checkpoint_path, list_checkpoints, prune_checkpoints, save_checkpoint
from checkpoints.networks import Network, create_network
from data.captioned import Captioned
from data.images import BadImage
from runtime.disk import disk_space, write_whole
from training.assembly import Job
from training.run_log import Meter, RunLog, StopSignals
from training.scores import Prompts, Stopped, preview, score_samples
from training.sharding import unsharded


def is_sound(job: Job) -> bool:
    """Whether the last step was good, and weights and averages are finite in every process.

    Every process calls this.
    """
    bad = torch.tensor(float(not job.state.is_finite()), device=job.accelerator.device)
    return not job.state.bad_in_a_row and not job.accelerator.reduce(bad, reduction="sum") > 0


def log_window(job: Job, meter: Meter) -> None:
    """Write the means over the window since the last log line, and begin a new one."""
    options, state = job.options, job.state
    means = state.window.means(options.global_batch_size)
    row: dict[str, float | None] = {
        "step": state.step, **means, "learning_rate": state.recipe.rate(state.step - 1),
        "bad_steps": state.bad_steps,
    }  # fmt: skip
    images = meter.steps_per_second() * options.global_batch_size
    rates: dict[str, float | None] = {
        "images_per_second": images,
        "model_flops_per_second": images * job.flops,
    }
    job.log.row(row | rates | {"time": time.time()})
    track(job, row | rates)
    metrics = ", ".join(
        f"{name.replace('_', ' ')} {four_digits(means[name])}" for name in state.window.shown
    )
    speed = f"{images:.1f} {options.samples}/s"
    job.log(f"step {state.step:07d} of {job.last_step}: {metrics}, {speed}")
    state.begin_window()


def track(job: Job, values: Mapping[str, float | None]) -> None:
    """Send what values there are, but the step, to the tracker, if there is one."""
    if job.options.log_with:
        known = {
            name: value for name, value in values.items() if value is not None and name != "step"
        }
        try:
            job.accelerator.log(known, step=job.state.step)
        except OSError as error:
            tracker = job.options.log_with
            job.log(f"`log_with` {tracker} did not take the metrics ({error.strerror})")


def show(job: Job, images: Tensor) -> None:
    """Send previews uint8 (N, 3, H, W) to the tracker, if there is one; in the main process."""
    for tracker in job.accelerator.trackers:
        tensors = images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"previews": tensors}, step=job.state.step, **layout)


def four_digits(value: float | None) -> str:
    """A number with four digits, or that there is none: every step of the window was skipped."""
    return "none" if value is None else f"{value:.4f}"


class Skipped:
    """The unreadable images that were skipped.

    Some were met `here`, by this process, and some reported so far, by any.
    """

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self.here: set[BadImage] = set()
        self.reported: set[BadImage] = set()

    def report(self) -> None:
        """Log those that are new since the last report, counted, from all processes.

        Every process calls this.
        """
        for path, why in sorted(set(gather_object(list(self.here))) - self.reported):
            self.reported.add(BadImage(path, why))
            self.log(f"skipped unreadable image {path} ({why}), {len(self.reported)} so far")
        self.here.clear()


def save(job: Job, must: bool) -> None:
    """Write the checkpoint of the current step, in the main process, while the others wait.

    Where that fails, end the run or go on, as on_save_error says; end it if the run `must` have
    this one.
    """
    sound = is_sound(job)
    failure = broadcast_object_list([write_checkpoint(job)])[0]
    if failure:
        after_failure(job, failure, stopping=must or job.options.on_save_error == "stop")
    elif job.options.keep_last and not sound:
        job.log(
            "note: the last step or the weights are not finite, so no older checkpoint was deleted"
        )
    elif job.options.keep_last and job.accelerator.is_main_process:
        try:
            prune_checkpoints(job.folder, job.options.keep_last)
        except OSError as error:
            job.log(f"could not delete {error.filename} ({error.strerror})")


def write_checkpoint(job: Job) -> str | None:
    """Write the checkpoint, in the main process; why that failed, None if it did not.

    With FSDP all processes put it together.
    """
    accelerator, contents = job.accelerator, {}
    if accelerator.is_main_process or job.options.fsdp:
        contents = job.state.to_checkpoint(
            job.options.recorded(), job.dataset.classes, accelerator.num_processes,
            keep=accelerator.is_main_process,
        )  # fmt: skip
    if not accelerator.is_main_process:
        return None
    path = checkpoint_path(job.folder, job.state.step)
    try:
        job.log.sync()
        save_checkpoint(path, contents)
        job.log(f"saved {path}")
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        return f"{path} was not written ({why}; {disk_space(job.folder)})"
    return None


def after_failure(job: Job, failure: str, stopping: bool) -> None:
    """Log that a checkpoint was not written, and end the run if it is to stop."""
    good = [str(path) for path in list_checkpoints(job.folder)[-1:]] or ["none"]
    message = f"{failure}; the last good checkpoint is {good[0]}"
    if stopping:
        job.end(
            f'{message}; stopping; make room, and `resume="auto"` goes on from there', told=True
        )
    job.log(f"{message}; going on without")


def whole_average(job: Job) -> Network:
    """The network with the main average's weights, whole in every process."""
    state = job.state
    if not job.options.fsdp:
        return state.ema
    tensors = unsharded(state.ema.state_dict())
    network = create_network(state.network.config).to(job.accelerator.device).eval()
    network.requires_grad_(False)
    network.load_state_dict(tensors)
    return network


def prompts_of(job: Job) -> Prompts | None:
    """Captions of the data for samples while training, the same each time; None where it has none.
    """
    if not isinstance(job.dataset, Captioned):
        return None
    return Prompts(partial(job.dataset.drawn, job.options.global_seed), job.dataset.texts.null)


def evaluation_due(job: Job) -> bool:
    """Whether scores are to be taken at this step."""
    step, every = job.state.step, job.options.eval_every
    return every is not None and step > 0 and step % every == 0


def save_scores(job: Job, signals: StopSignals) -> bool:
    """Score samples of the main average and write the scores to log, metrics and tracker.

    False if a signal in any process broke it off: then the next start takes them.
    """
    accelerator, step, began = job.accelerator, job.state.step, time.monotonic()

    def any_process(flag=None):
        flag = torch.as_tensor(
            signals.received is not None if flag is None else flag, device=accelerator.device
        )
        return bool(accelerator.reduce(flag.float(), reduction="sum") > 0)

    assert job.judge is not None  # there is one where evaluation is ever due
    try:
        network = whole_average(job)
        scores, notes = score_samples(
            job.judge, network, job.state.process, job.space, job.options.global_seed,
            accelerator.device, any_process, prompts_of(job),
        )  # fmt: skip
    except Stopped:
        return False
    except ValueError as error:
        scores = None
        job.log(f"step {step:07d}: not scored ({error})")
    if scores:
        log_scores(job, scores, notes or [], time.monotonic() - began)
    accelerator.wait_for_everyone()
    return True


def log_scores(job: Job, scores: dict[str, float | None], notes: list[str], seconds: float) -> None:
    """Write scores, which took so many seconds, to log, metrics and tracker; the notes once."""
    options, step = job.options, job.state.step
    row = {f"eval_{name}": value for name, value in scores.items()} | {
        "eval_samples": options.eval_samples
    }
    against = {"eval_reference": options.eval_reference, "eval_features": options.eval_features}
    job.log.row({"step": step} | row | against | {"time": time.time()})
    track(job, row)
    told = ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in scores.items()
        if value is not None
    )
    job.log(f"step {step:07d}: {told}; {options.eval_samples} samples, {seconds:.0f} s")
    for note in notes if step == options.eval_every else []:
        job.log(f"note: {note}")


def side_by_side(samples: Tensor) -> Tensor:
    """Images (N, H, W, 3) as they are, or of clips (N, F, H, W, 3) their frames in a row each,
    (N, H, F·W, 3).
    """
    return samples if samples.dim() == 4 else samples.transpose(1, 2).flatten(2, 3)


def save_preview(job: Job) -> None:
    """Write previews/SSSSSSS.png from the main average; of clips, the frames side by side.

    Noise and labels, or captions, are the same each time.
    """
    state, network = job.state, whole_average(job)
    if job.accelerator.is_main_process:
        path = job.folder / "previews" / f"{state.step:07d}.png"
        try:
            samples = preview(
                network, state.process, job.space, job.options.global_seed,
                job.accelerator.device, prompts_of(job),
            )  # fmt: skip
            images = side_by_side(samples).permute(0, 3, 1, 2)  # (N, 3, H, W)
            in_a_row = 4 if job.options.frames is None else 1
            grid = make_grid(images.cpu().float() / 255, nrow=in_a_row)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, lambda temporary: save_image(grid, temporary, format="png"))
            show(job, images)
        except ValueError as error:
            job.log(f"{path} was not written ({error})")
        except OSError as error:
            job.log(
                f"{path} was not written ({error.strerror}; {disk_space(job.folder)}); "
                "going on without"
            )
    job.accelerator.wait_for_everyone()
