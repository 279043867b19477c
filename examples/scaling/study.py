"""Train many small DiTs and score what they draw: the paper's claims about size, compute and block
design, on one machine.

    python examples/scaling/study.py --output scaling           # within 75 minutes on 2 cores
    python examples/scaling/study.py --output scaling-large --preset large          # for a GPU
    python examples/scaling/plot.py --results scaling --output scaling  # the figures

Every network is trained for the same number of steps on the same patches of photographs
(patches.py) and scored by the Fréchet distance of its samples to real patches. Each one that is
finished is a line of OUTPUT/points.jsonl; the same command goes on where it was stopped. On CPUs
each network has one thread, so that nothing depends on how many are trained at a time.
"""

from pathlib import Path
import sys

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
import json
import multiprocessing
import os
import signal
import threading
import time
from typing import NamedTuple

from PIL import Image
import torch

from checkpoints.files import read_checkpoint
from runtime.disk import write_whole
from runtime.devices import choose_device
from evaluation.metrics import SCORED, Moments, Statistics, frechet_distance
from runtime.limits import check_numbers
from models import BLOCKS, DiT
from patches import CLASSES, REAL, REFERENCE, TRAINING, Classifier, draw_patches, train_classifier
from records import Point, read_about, read_rows
from training.folder_lock import FolderLock
from conditions.labels import random_labels
from sampling.sampler import Sampler
from training.cost import training_flops
from training.state import Recipe, new_state
from training.step import draw, train_step
from vae import from_uint8, load_vae

SEEDS = (0, 1)
# of DDIM; the others for the last weights of the first seed
DEFAULT_STEPS, OTHER_STEPS = 20, (5, 10, 40)


class Plan(NamedTuple):
    """A preset.

    Images are image_size pixels wide, of photographs reduced by a factor; `scored_at` are steps of
    training.

    The block designs are compared at the size and patch size `compared`.
    """

    image_size: int
    reduction: int
    sizes: dict  # name → (depth, width, heads)
    patch_sizes: tuple
    compared: tuple
    scored_at: tuple
    batch_size: int
    samples: int
    reference: int  # real patches that they are compared with
    classifier_steps: int
    lr: float = 1e-3
    ema_decay: float = 0.99
    bf16: bool = False


PRESETS = {
    "tiny": Plan(
        16, 2, {"S": (1, 32, 1), "M": (2, 32, 1)}, (4, 8), ("S", 8), (2, 4), 8, 20, 100, 5
    ),
    "small": Plan(
        16, 2, {"S": (3, 64, 2), "M": (4, 96, 3), "L": (6, 128, 4)}, (2, 4, 8), ("M", 2),
        (375, 750, 1500), 32, 1000, 10_000, 600,
    ),
    "large": Plan(
        32, 1, {"S": (6, 128, 2), "M": (9, 256, 4), "L": (12, 512, 8)}, (2, 4, 8), ("M", 2),
        (1250, 2500, 5000, 10000), 128, 5000, 50_000, 2000, lr=3e-4, ema_decay=0.999, bf16=True,
    ),
}  # fmt: skip


def config_of(plan, point):
    """DiT's arguments for a network of a plan."""
    depth, width, heads = plan.sizes[point.size]
    return dict(
        input_size=plan.image_size, patch_size=point.patch, in_channels=1, hidden_size=width,
        depth=depth, num_heads=heads, num_classes=CLASSES, block=point.block,
    )  # fmt: skip


class Study(NamedTuple):
    """What is trained, named as PRESETS has it, and scored; where it is written; on which device,
    and how many networks at a time.
    """

    preset: str
    output: Path
    device: torch.device
    workers: int

    @property
    def plan(self):
        return PRESETS[self.preset]


class Judge(NamedTuple):
    """What samples are scored by."""

    classifier: Classifier
    reference: Statistics


def list_points(plan):
    """The Points of a plan, those that take long first."""
    points = [
        Point(size, patch, "adaln_zero", s)
        for s in SEEDS
        for size in plan.sizes
        for patch in plan.patch_sizes
    ]
    points += [
        Point(*plan.compared, block, s) for s in SEEDS for block in BLOCKS if block != "adaln_zero"
    ]
    return sorted(points, key=lambda point: -training_flops(config_of(plan, point)))


def make_judge(plan, device):
    """(a Judge, what is to be told of it: how many classes it finds, and how far as many real
    patches are).
    """
    size, reduction = plan.image_size, plan.reduction
    classifier, accuracy = train_classifier(size, reduction, plan.classifier_steps, device)
    reference = statistics(
        classifier, draw_patches(plan.reference, size, reduction, REFERENCE)[0].to(device)
    )
    real = statistics(classifier, draw_patches(plan.samples, size, reduction, REAL)[0].to(device))
    told = {
        "classifier_accuracy": accuracy,
        "distance_of_real_patches": frechet_distance(real, reference),
    }
    return Judge(classifier, reference), told


def save_judge(judge, path):
    """Write a Judge to a file, so that a study that goes on scores as it did before."""
    contents = {
        "classifier": judge.classifier.state_dict(),
        **{k: torch.from_numpy(v) for k, v in judge.reference._asdict().items()},
    }
    write_whole(path, lambda temporary: torch.save(contents, temporary))


def load_judge(path, device):
    """The Judge in a file. Raises ValueError if it cannot be read."""
    if not path.exists():
        raise ValueError(
            f"{path} is missing, which scored the networks so far; begin again in another --output"
        )
    contents, classifier = read_checkpoint(path), Classifier()
    try:
        classifier.load_state_dict(contents["classifier"])
        reference = Statistics(contents["mean"].numpy(), contents["covariance"].numpy())
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(
            f"{path} is no judge that study.py wrote; begin again in another --output"
        ) from None
    return Judge(classifier.to(device).eval().requires_grad_(False), reference)


@torch.no_grad()
def statistics(classifier, patches):
    """The Statistics of the classifier's features of patches uint8 (N, 1, S, S)."""
    moments = Moments()
    for part in patches.split(500):
        moments.add(classifier(part)[0])
    return moments.statistics()


def run_point(plan, point, judge, device, folder):
    """Train one network and score it along the way: the dict that is a line of points.jsonl.

    Raises ValueError, naming the point, if a loss or what it draws is not finite.
    """
    try:
        return train_and_score(plan, point, judge, device, folder)
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from None


def train_and_score(plan, point, judge, device, folder):
    """What run_point returns; its ValueErrors say what, but not where."""
    begun, config = time.monotonic(), config_of(plan, point)
    torch.manual_seed(point.seed)
    network = DiT(**config).to(device)
    state = new_state(network, Recipe(lr=plan.lr, ema_decay=(plan.ema_decay,), bf16=plan.bf16))
    dropout_prob, curve = network.config["class_dropout_prob"], []
    while state.step < plan.scored_at[-1]:
        drawn = draw_patches(
            plan.batch_size, plan.image_size, plan.reduction, TRAINING, point.seed, state.step
        )
        patches, labels = (x.to(device) for x in drawn)
        draws = draw(
            point.seed, state.step, plan.batch_size, network.latent_shape, dropout_prob,
            state.process, device,
        )  # fmt: skip
        if train_step(state, from_uint8(patches), labels, draws)["bad"]:
            raise ValueError(
                f"the loss or gradient of step {state.step} is not finite; lower the plan's lr"
            )
        if state.step in plan.scored_at:
            mse = state.window.means(plan.batch_size)["mse"]
            state.begin_window()
            curve.append(
                {
                    "step": state.step,
                    "mse": mse,
                    "distance": distance(plan, state.ema, judge, DEFAULT_STEPS),
                }
            )
    by_steps = [{"steps": DEFAULT_STEPS, "distance": curve[-1]["distance"]}]
    if point.seed == SEEDS[0] and point.block == "adaln_zero":
        by_steps += [
            {"steps": n, "distance": distance(plan, state.ema, judge, n)} for n in OTHER_STEPS
        ]
        save_samples(plan, state.ema, folder / "samples" / f"{point.size}-{point.patch}.png")
    flops = training_flops(config)
    return point._asdict() | {
        "parameters": sum(p.numel() for p in network.parameters()), "macs": flops // 6,
        "training_flops": flops, "batch_size": plan.batch_size, "curve": curve,
        "by_sampling_steps": by_steps, "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


def distance(plan, network, judge, steps):
    """The Fréchet distance of samples, DDIM of so many steps without guidance; noise and labels are
    the same each time.
    """
    device = next(network.parameters()).device
    images = []
    for indices in torch.arange(plan.samples).split(250):
        labels = random_labels(0, indices.tolist(), CLASSES).to(device)
        images.append(draw_images(plan, network, steps, indices.tolist(), labels))
    return frechet_distance(statistics(judge.classifier, torch.cat(images)), judge.reference)


def draw_images(plan, network, steps, indices, labels):
    """Images uint8 (n, 1, S, S) with these indices and labels (n,).

    Raises ValueError if they are not finite.
    """
    sampler = Sampler(
        network, load_vae("none"), None, steps, "ddim",
        mixed_precision="bf16" if plan.bf16 else "no",
    )  # fmt: skip
    return sampler.decode(sampler.numbered_latents(0, indices, labels)).permute(0, 3, 1, 2)


def save_samples(plan, network, path):
    """Write one sample of each class, side by side."""
    labels = torch.arange(CLASSES, device=next(network.parameters()).device)
    save_strip(draw_images(plan, network, DEFAULT_STEPS, range(CLASSES), labels), path)


def save_real(plan, path):
    """Write one real patch of each class, side by side."""
    patches, labels = draw_patches(plan.reference, plan.image_size, plan.reduction, REFERENCE)
    save_strip(torch.stack([patches[labels == label][0] for label in range(CLASSES)]), path)


def save_strip(images, path):
    """Write images uint8 (n, 1, S, S) side by side."""
    strip = images.permute(1, 2, 0, 3).flatten(2)[0]  # (S, n·S)
    path.parent.mkdir(exist_ok=True)
    write_whole(
        path, lambda temporary: Image.fromarray(strip.cpu().numpy()).save(temporary, format="png")
    )


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--output", required=True, type=Path,
        help="folder for study.json, points.jsonl, judge.pt and samples/",
    )  # fmt: skip
    presets = (
        "tiny: a trial of seconds, whose numbers mean nothing; small: for 2 cores; "
        "large: for a GPU (default: %(default)s)"
    )
    parser.add_argument("--preset", choices=PRESETS, default="small", help=presets)
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    workers = "networks trained at a time (default: as many as there are cores, 1 on a GPU)"
    parser.add_argument("--workers", type=int, help=workers)
    return parser


def open_folder(study):
    """(what study.json says; the Judge; the rows that are done, by Point), all new in a folder
    without a study.

    Raises ValueError if the folder holds a study of another plan or device, or a damaged one.
    """
    folder, plan, device = study.output, study.plan, study.device
    if not (folder / "study.json").exists():
        if (folder / "points.jsonl").exists():
            raise ValueError(
                f"{folder} has a points.jsonl without its study.json; choose another --output"
            )
        print("training the classifier that scores", flush=True)
        judge, told = make_judge(plan, device)
        save_real(plan, folder / "samples" / "real.png")
        save_judge(judge, folder / "judge.pt")
        points = {"points": [list(point) for point in list_points(plan)]}
        about = json.dumps(describe(study) | told | points) + "\n"
        write_whole(
            folder / "study.json", lambda temporary: temporary.write_text(about, encoding="utf-8")
        )
    about, now = read_about(folder), json.loads(json.dumps(describe(study)))
    for name in ("plan", "device_type"):
        if about.get(name) != now[name]:
            begun = f"{about.get('command')} on a {about.get('device_type')}"
            raise ValueError(
                f"{folder} holds another study ({begun}); go on with that, "
                "or choose another --output"
            )
    return about, load_judge(folder / "judge.pt", device), read_rows(folder, about)


def describe(study):
    """What study.json says of the plan, and of where and how the study was begun."""
    device = study.device
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "plan": study.plan._asdict(), "torch": torch.__version__,
        "device_type": device.type, **gpu, "cores": os.cpu_count(), "workers": study.workers,
        "command": f"python examples/scaling/study.py --output OUTPUT --preset {study.preset}",
    }  # fmt: skip


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


def run_all(plan, points, judge, device, folder, workers):
    """Yield each Point that is done, with its row."""
    if workers == 1:
        yield from ((point, run_point(plan, point, judge, device, folder)) for point in points)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=prepare_worker) as pool:
        try:
            # Which the workers inherit, so none can be hit before prepare_worker
            with ctrl_c_blocked():
                work = {
                    pool.submit(run_point, plan, point, judge, device, folder): point
                    for point in points
                }
            for future in as_completed(work):
                yield work[future], future.result()
        except BaseException:  # do not wait for what is still under way
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


@door("--workers", resumes=True)
def main(argv=None):
    parser = build_parser()
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
            run_study(Study(args.preset, args.output, device, workers))
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


def run_study(study):
    """Do what is left of the study."""
    plan, folder, begun = study.plan, study.output, time.monotonic()
    about, judge, done = open_folder(study)
    points = [Point(*point) for point in about["points"]]
    left = [point for point in points if point not in done]
    print(
        f"{len(done)} networks are done, {len(left)} are left, those that take long first",
        flush=True,
    )
    work = run_all(plan, left, judge, study.device, folder, study.workers) if left else ()
    for point, row in work:
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


if __name__ == "__main__":
    main()
