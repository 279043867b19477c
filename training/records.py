"""What a run writes: log lines, metrics, checkpoints, scores and previews."""

import sys
import time

from accelerate.utils import broadcast_object_list, gather_object
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from checkpoints.files import checkpoint_path, list_checkpoints, prune_checkpoints, save_checkpoint
from data.images import BadImage
from models import DiT
from runtime.disk import disk_space, write_whole
from training.job import Job
from training.run_log import Meter, RunLog, StopSignals
from training.scores import Stopped, preview, score_samples
from training.sharding import unsharded


def leave(job: Job, message: str) -> None:
    """Leave the program with a message, which the log has too."""
    job.log(message)
    sys.exit(f"train.py: error: {message}")


def is_sound(job: Job) -> bool:
    """Whether the last step was good, and weights and averages are finite in every process, each of
    which calls this.
    """
    bad = torch.tensor(float(not job.state.is_finite()), device=job.accelerator.device)
    return not job.state.bad_in_a_row and not job.accelerator.reduce(bad, reduction="sum") > 0


def log_window(job: Job, meter: Meter) -> None:
    """Write the means over the window since the last log line, and begin a new one."""
    args, state = job.args, job.state
    means = state.window.means(args.global_batch_size)
    row = {
        "step": state.step, **means, "learning_rate": state.recipe.rate(state.step - 1),
        "bad_steps": state.bad_steps,
    }  # fmt: skip
    images = meter.steps_per_second() * args.global_batch_size
    rates = {"images_per_second": images, "model_flops_per_second": images * job.flops}
    job.log.row(row | rates | {"time": time.time()})
    track(job, row | rates)
    metrics = ", ".join(f"{name.replace('_', ' ')} {as_text(means[name])}" for name in state.window.shown)
    job.log(f"step {state.step:07d} of {job.last_step}: {metrics}, {images:.1f} images/s")
    state.begin_window()


def track(job: Job, values: dict[str, float | None]) -> None:
    """Send what values there are, but the step, to the tracker, if there is one."""
    if job.args.log_with:
        known = {
            name: value for name, value in values.items() if value is not None and name != "step"
        }
        try:
            job.accelerator.log(known, step=job.state.step)
        except OSError as error:
            job.log(f"--log-with {job.args.log_with} did not take the metrics ({error.strerror})")


def show(job: Job, images: Tensor) -> None:
    """Send preview images uint8 (N, 3, H, W) to the tracker, if there is one; in the main process.
    """
    for tracker in job.accelerator.trackers:
        tensors = images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"previews": tensors}, step=job.state.step, **layout)


def as_text(value: float | None) -> str:
    """A number with four digits, or that there is none: every step of the window was skipped."""
    return "none" if value is None else f"{value:.4f}"


class Skipped:
    """The unreadable images that were skipped: those met `here`, by this process, and those
    reported so far, by any.
    """

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self.here: set[BadImage] = set()
        self.reported: set[BadImage] = set()

    def report(self) -> None:
        """Log those that are new since the last report, counted, from all processes, each of which
        calls this.
        """
        for path, why in sorted(set(gather_object(list(self.here))) - self.reported):
            self.reported.add(BadImage(path, why))
            self.log(f"skipped unreadable image {path} ({why}), {len(self.reported)} so far")
        self.here.clear()


def save(job: Job, must: bool) -> None:
    """Write the checkpoint of the current step, in the main process, while the others wait.

    Where that fails, leave the program or go on, as --on-save-error says; leave it if the run
    `must` have this one.
    """
    args, accelerator, folder = job.args, job.accelerator, job.folder
    contents: dict = {}
    failure = None
    sound = is_sound(job)
    if accelerator.is_main_process or args.fsdp:
        keep = accelerator.is_main_process
        contents = job.state.to_checkpoint(
            vars(args), job.dataset.classes, accelerator.num_processes, keep
        )
    if accelerator.is_main_process:
        path = checkpoint_path(folder, job.state.step)
        try:
            job.log.sync()
            save_checkpoint(path, contents)
            job.log(f"saved {path}")
        except (OSError, RuntimeError) as error:
            failure = f"{path} was not written ({getattr(error, 'strerror', None) or error}; {disk_space(folder)})"
    failure = broadcast_object_list([failure])[0]
    if failure:
        good = [str(path) for path in list_checkpoints(folder)[-1:]] or ["none"]
        stopping = must or args.on_save_error == "stop"
        then = (
            "stopping; make room, and --resume auto goes on from there"
            if stopping
            else "going on without"
        )
        job.log(f"{failure}; the last good checkpoint is {good[0]}; {then}")
        if stopping:
            sys.exit(1)
    elif args.keep_last and not sound:
        job.log(
            "note: the last step or the weights are not finite, so no older checkpoint was deleted"
        )
    elif args.keep_last and accelerator.is_main_process:
        try:
            prune_checkpoints(folder, args.keep_last)
        except OSError as error:
            job.log(f"could not delete {error.filename} ({error.strerror})")


def whole_average(job: Job) -> DiT:
    """The network with the main average's weights, whole in every process."""
    state = job.state
    if not job.args.fsdp:
        return state.ema
    tensors = unsharded(state.ema.state_dict())
    network = DiT(**state.network.config).to(job.accelerator.device).eval().requires_grad_(False)
    network.load_state_dict(tensors)
    return network


def evaluation_due(job: Job) -> bool:
    """Whether scores are to be taken at this step."""
    return (
        job.judge is not None and job.state.step > 0 and job.state.step % job.args.eval_every == 0
    )


def save_scores(job: Job, signals: StopSignals) -> bool:
    """Score samples of the main average and write the scores to log, metrics and tracker.

    False if a signal in any process broke it off: then the next start takes them.
    """
    args, accelerator, step, began = job.args, job.accelerator, job.state.step, time.monotonic()

    def any_process(flag=None):
        flag = torch.as_tensor(
            signals.received is not None if flag is None else flag, device=accelerator.device
        )
        return bool(accelerator.reduce(flag.float(), reduction="sum") > 0)

    assert job.judge is not None  # evaluation_due looks at that
    try:
        network = whole_average(job)
        scores, notes = score_samples(
            job.judge, network, job.state.process, job.space, args.global_seed, accelerator.device, any_process
        )
    except Stopped:
        return False
    except ValueError as error:
        scores = None
        job.log(f"step {step:07d}: not scored ({error})")
    if scores:
        row = {f"eval_{name}": value for name, value in scores.items()} | {
            "eval_samples": args.eval_samples
        }
        against = {"eval_reference": args.eval_reference, "eval_features": args.eval_features}
        job.log.row({"step": step} | row | against | {"time": time.time()})
        track(job, row)
        told = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in scores.items()
            if value is not None
        )
        job.log(
            f"step {step:07d}: {told}; {args.eval_samples} samples, {time.monotonic() - began:.0f} s"
        )
        for note in (notes or []) if step == args.eval_every else []:
            job.log(f"note: {note}")
    accelerator.wait_for_everyone()
    return True


def save_preview(job: Job) -> None:
    """Write previews/SSSSSSS.png from the main average, for noise and labels that are the same each
    time.
    """
    state, network = job.state, whole_average(job)
    if job.accelerator.is_main_process:
        path = job.folder / "previews" / f"{state.step:07d}.png"
        try:
            images = preview(
                network, state.process, job.space, job.args.global_seed, job.accelerator.device
            ).permute(0, 3, 1, 2)
            grid = make_grid(images.cpu().float() / 255, nrow=4)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, lambda temporary: save_image(grid, temporary, format="png"))
            show(job, images)
        except ValueError as error:
            job.log(f"{path} was not written ({error})")
        except OSError as error:
            job.log(
                f"{path} was not written ({error.strerror}; {disk_space(job.folder)}); going on without"
            )
    job.accelerator.wait_for_everyone()
