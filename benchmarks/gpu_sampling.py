"""Parts of benchmarks.gpu: labels to images against diffusers; how far fast ways move digits;
copies and waits.
"""

from functools import partial
import statistics
import time
from typing import NamedTuple

from diffusers import DPMSolverMultistepScheduler
import torch

from benchmarks.gpu_training import Steps, products
from benchmarks.gpu_worker import attempt, take_turns
from benchmarks.networks import random_network, trained, twin_of
from benchmarks.sampling import GUIDANCE, VAE, draw_images, pipeline
from benchmarks.sides import ROOT, device, share_of_limit, synchronize
from runtime.devices import tf32
from checkpoints.loading import load_pretrained
from sampling.sampler import Sampler
from sampling.speed import prepare
from training.cost import training_flops
from training.state import Recipe, new_state
from vae import load_vae

WARM = 2  # steps of a trajectory that only warms up
DIFFUSERS = "diffusers, bf16"
OURS = {"eager, TF32": ("no", False), "bf16": ("bf16", False), "compiled, bf16": ("bf16", True)}
SOLVERS = {"ddim": "DDIM", "dpm++": "dpm++"}  # the names in the report
LIMITS = {"no": "matrix product, float32", "bf16": "matrix product, bf16"}  # TF32 on a GPU
DIGITS = ROOT / "examples" / "digits"


class Way(NamedTuple):
    """One in which the digits are drawn."""

    precision: str
    compiled: bool = False
    tf32: bool = False


WAYS = {
    "float32": Way("no"), "TF32": Way("no", tf32=True), "bf16": Way("bf16"),
    "compiled, float32": Way("no", compiled=True), "compiled, bf16": Way("bf16", compiled=True),
}  # fmt: skip
# What the profiler counts: by these beginnings. "Memcpy" is what the GPU does, "cuda..." what the
# CPU asks for.
COUNTED = (
    "Memcpy HtoD", "Memcpy DtoH", "Memcpy DtoD", "cudaMemcpy", "cudaStreamSynchronize",
    "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "aten::_local_scalar_dense",
)  # fmt: skip
FEW, MANY = 2, 6  # steps profiled: the difference is that of steps alone


# ---- labels to images ----


class Drawing:
    """A batch of images of random weights, drawn by ours and by diffusers' pipeline; call(side,
    solver, steps) draws it.
    """

    def __init__(self, model, batch):
        self.network, self.space = random_network(model), load_vae(str(VAE), device())
        self.batch, self.labels = batch, torch.arange(batch, device=device())
        self.networks, self.pipe = {}, None

    def ours(self, side):
        """Make one of OURS ready, compiled by its first call."""
        self.networks[side] = twin_of(self.network)
        prepare(self.networks[side], *OURS[side])

    def diffusers(self):
        """Make diffusers' pipeline ready."""
        self.pipe = pipeline(self.network, torch.bfloat16)
        ddim = self.pipe.scheduler
        multistep = DPMSolverMultistepScheduler.from_config(ddim.config)
        self.schedulers = {"ddim": ddim, "dpm++": multistep}

    def call(self, side, solver, steps):
        if side != DIFFUSERS:
            how = solver, steps, OURS[side][0]
            return draw_images(self.networks[side], self.space, self.labels, *how)
        self.pipe.scheduler = self.schedulers[solver]
        draws = dict(generator=torch.Generator(device()).manual_seed(0), output_type="np")
        return self.pipe(self.labels.tolist(), GUIDANCE, num_inference_steps=steps, **draws)

    def operations(self, steps):
        """Those of the guided network; autoencoder and solver count nothing."""
        return training_flops(self.network.config) // 3 * 2 * self.batch * steps


def sampling(report, model, batch, steps, rounds, matrix_sides=None):
    """Guided sampling by each solver with its steps: images per second and share of the limit, of
    OURS and diffusers' pipeline.

    What has to be compiled comes last: by then the others have been measured once.
    """
    with tf32(True), torch.no_grad():
        drawing, ready, first = Drawing(model, batch), [], {}
        limits = {
            precision: products(dtype, matrix_sides)
            for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16))
        }
        makers = {side: partial(drawing.ours, side) for side in OURS} | {
            DIFFUSERS: drawing.diffusers
        }
        compiled = [side for side, (_, compiling) in OURS.items() if compiling]
        for side in [*(side for side in makers if side not in compiled), *compiled]:
            if side in compiled:
                race(report, drawing, ready, limits, dict(list(steps.items())[:1]), 1, first)
            seconds = attempt(report, side, warm_up, drawing, makers[side], side, steps)
            if seconds is not None:
                ready.append(side)
                first[side] = seconds
        race(report, drawing, ready, limits, steps, rounds, first)


def warm_up(drawing, make, side, steps):
    """Make a side ready and draw by each solver in a few steps: the seconds that took, compilation
    too.
    """
    began = time.monotonic()
    make()
    for solver in steps:
        drawing.call(side, solver, WARM)
    synchronize()
    return round(time.monotonic() - began, 1)


def race(report, drawing, ready, limits, steps, rounds, first):
    """Let the sides that are ready, and the limits' products, take turns with each solver, and
    report their figures.
    """
    products_called = {LIMITS[precision]: call for precision, (call, _) in limits.items()}
    for solver, count in steps.items():
        title = f"{SOLVERS[solver]} {count}"
        operations = drawing.operations(count)

        def show(seconds):
            def share(side):
                precision = OURS[side][0] if side in OURS else "bf16"
                limit = seconds[LIMITS[precision]], limits[precision][1]
                return share_of_limit(seconds[side], operations, limit)

            report.set(**{title: {
                side: {
                    "images per second": round(drawing.batch / statistics.median(seconds[side]), 3),
                    "share of the limit": share(side), "seconds until its first steps": first[side],
                    "rounds": len(seconds[side]),
                } for side in ready
            }})  # fmt: skip

        calls = {side: partial(drawing.call, side, solver, count) for side in ready}
        take_turns(report, calls | products_called, rounds, show)
        report.add(**{title: report.found[title]})


# ---- the same digits ----


class Digits:
    """The committed digits network and autoencoder on the device, with noise and labels for so many
    images.
    """

    def __init__(self, images):
        self.network, _ = load_pretrained(DIGITS / "dit.safetensors")
        self.network.to(device())
        self.space = load_vae(str(DIGITS / "vae"), device())
        shape = (images, *self.network.latent_shape)
        source = torch.Generator().manual_seed(
            0
        )  # of the CPU, so that the noise is the same everywhere
        self.noise = torch.randn(shape, generator=source).to(device())
        self.labels = torch.arange(images, device=device()) % self.network.num_classes

    def latents(self, network, precision, solver, steps):
        """(a Sampler of a network with these weights, the latents that it draws)."""
        how = dict(cfg_scale=1.5, mixed_precision=precision)
        sampler = Sampler(network, self.space, None, steps, solver, **how)
        return sampler, sampler.latents(self.labels, self.noise)

    def images(self, *how):
        """Grey levels (n, H, W, 3) of what it draws; arguments as for `latents`."""
        sampler, latents = self.latents(*how)
        return sampler.decode(latents).float()


def exactness(report, images, steps, ways=None):
    """How far TF32, bf16 and compilation move digits of the committed weights from float32's, from
    the same noise, in all WAYS or these; and what a step copies and waits for.
    """
    digits = Digits(images)
    with tf32(False):
        exact = {
            solver: digits.images(digits.network, "no", solver, count)
            for solver, count in steps.items()
        }
    report.set(counted_on=device().type, differences={}, counted_per_step={})
    for name in ways or WAYS:
        if torch.cuda.is_available() or not WAYS[name].tf32:
            attempt(report, name, compare, report, digits, exact, steps, name)
    attempt(report, "training, bf16", count_training, report)
    report.add(**report.found)


def compare(report, digits, exact, steps, name):
    """Report one of WAYS: how far its images are from the exact ones of each solver, and what its
    steps copy and wait for.
    """
    way, network = WAYS[name], twin_of(digits.network)
    prepare(network, way.precision, way.compiled)
    for solver, count in steps.items():
        title, how = f"{name}, {SOLVERS[solver]}", (network, way.precision, solver)
        with tf32(way.tf32):
            apart = (digits.images(*how, count) - exact[solver]).abs()
            report.found["differences"][f"{title} {count}"] = {
                "mean, of 255": round(apart.mean().item(), 4), "largest": apart.max().item(),
            }  # fmt: skip
            count_steps(report, f"sampling, {title}", partial(digits.latents, *how))


def count_training(report):
    """Count what a training step in bf16 copies and waits for."""
    network, _ = load_pretrained(DIGITS / "dit.safetensors")
    side = Steps(new_state(trained(network.to(device())), Recipe(bf16=True)))
    side.resize(32)
    side.ready()

    def call(count):
        for _ in range(count):
            side.step()

    count_steps(report, "training, bf16", call)


def count_steps(report, name, call):
    """Count what COUNTED names in a step of call(steps), once warm: by the difference of many steps
    and few.

    A CPU has neither copies between devices nor waits: there only values that are read are counted.
    """
    found = attempt(
        report, f"counting, {name}", lambda: [count_events(partial(call, n)) for n in (FEW, MANY)]
    )
    if found is None:
        return
    few, many = found
    counts = {
        key: (many.get(key, 0) - few.get(key, 0)) / (MANY - FEW)
        for key in sorted(few.keys() | many.keys())
    }
    report.found["counted_per_step"][name] = {
        key: round(count, 3) for key, count in counts.items() if count
    }
    report.write()


def count_events(call):
    """{event: how often it occurred in a call}, of those that COUNTED names, by torch.profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        synchronize()
    counts = {}
    for event in profiler.key_averages():
        for name in COUNTED:
            if event.key.startswith(name):
                counts[name] = counts.get(name, 0) + event.count
    return counts
