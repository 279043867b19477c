"""Parts of benchmarks.gpu: what the device can do at most, and training steps.

They need no diffusers.
"""

from statistics import median

import torch

from benchmarks.gpu_worker import attempt, take_turns
from benchmarks.networks import random_network, trained
from benchmarks.sides import LIMIT, best_product, device, share_of_limit, synchronize, timed
from runtime.devices import tf32
from training.cost import training_flops
from training.state import Recipe, new_state
from training.step import draw, train_step

STEPS = 2  # in a turn
PRODUCTS = (
    20  # in a turn: one is over too soon to be timed well, or to meet the clock that long work has
)
UNIT = 16  # batches are multiples of it
KEPT_FREE = 0.08  # of the memory, for what the allocator cannot use
SMALLER = 0.85  # a batch that did not fit, as a share of it the next
# name → whether blocks are compiled, and whether activations are computed again in the backward
# pass
SIDES = {
    "eager": (False, False), "compiled": (True, False), "compiled, checkpointing": (True, True),
}  # fmt: skip


# ---- the device ----


def products(dtype, matrix_sides=None):
    """(a call that multiplies the best two matrices PRODUCTS times, its operations); once on a CPU.
    """
    product, operations = best_product(dtype, matrix_sides)
    times = PRODUCTS if torch.cuda.is_available() else 1

    def call():
        for _ in range(times):
            product()

    return call, times * operations


def limits(report, rounds, mebibytes, matrix_sides=None):
    """The device's own limits: matrix products in bfloat16 and float32 (TF32 on a GPU), and
    copying.
    """
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device())
        report.set(device={
            "name": found.name, "GiB": round(found.total_memory / 2**30, 1),
            "capability": f"{found.major}.{found.minor}", "CUDA": torch.version.cuda,
            "multiprocessors": found.multi_processor_count,
        })  # fmt: skip
    full = "TF32" if torch.cuda.is_available() else "float32"
    with tf32(True):
        sides = {"bfloat16": products(torch.bfloat16, matrix_sides)}
        sides[full] = products(torch.float32, matrix_sides)
        source = torch.randn(mebibytes * 2**18, device=device())
        goal = torch.empty_like(source)
        sides["copy"] = (
            (lambda: goal.copy_(source)),
            2 * 4 * source.numel(),
        )  # bytes, read and written

        def show(seconds):
            rates = {name: sides[name][1] / median(times) for name, times in seconds.items()}
            report.set(
                teraflops_per_second={
                    k: float(f"{v / 1e12:.4g}") for k, v in rates.items() if k != "copy"
                }
            )
            report.set(copy_terabytes_per_second=float(f"{rates['copy'] / 1e12:.4g}"))

        calls = {name: call for name, (call, _) in sides.items()}
        for call in calls.values():
            call()
        take_turns(report, calls, rounds, show)
    report.add(**report.found)


# ---- training steps ----


class Steps:
    """Training steps of a state with its switches set one way: calling it does STEPS, after `ready`
    has done one.

    `compiled` are the blocks' calls, of compile_blocks, or None.
    """

    def __init__(self, state, compiled=None, checkpointing=False):
        self.state, self.compiled, self.checkpointing = state, compiled, checkpointing
        self.batch = 0

    def resize(self, batch):
        """Take batches of so many random latents from here on."""
        network, on = self.state.network, device()
        shape = network.latent_shape
        self.batch, self.latents = batch, torch.randn(batch, *shape, device=on)
        self.labels = torch.arange(batch, device=on) % network.num_classes
        self.draws = draw(0, 0, batch, shape, 0.1, self.state.process, on)

    def ready(self):
        """Set the switches and do a step; the report of it.

        Raises RuntimeError if that left out the optimizer.
        """
        network = self.state.network
        network.grad_checkpointing = self.checkpointing
        for block, call in zip(network.blocks, self.compiled or [None] * len(network.blocks)):
            block._compiled_call_impl = call
        self.state.opt.zero_grad(set_to_none=True)  # of a step that ran out of memory
        report = self.step()
        if report["bad"]:
            raise RuntimeError("loss or gradient is not finite, so that a step is not a whole one")
        return report

    def step(self):
        return train_step(self.state, self.latents, self.labels, self.draws)

    def __call__(self):
        for _ in range(STEPS):
            self.step()

    def peak(self, batch):
        """The bytes that the allocator holds at most in steps of this batch."""
        self.resize(batch)
        torch.cuda.reset_peak_memory_stats()
        self.ready()
        self.step()
        synchronize()
        return torch.cuda.max_memory_allocated()

    def operations(self):
        """Those of a call that the network needs; what checkpointing computes again is not in it.
        """
        return training_flops(self.state.network.config) * self.batch * STEPS


def compile_blocks(network):
    """The blocks' calls, compiled as train.py does.

    But a run has one size of batch: a second one is compiled anew, not as a variable.
    """
    for block in network.blocks:
        block.compile(dynamic=False)
    return [block._compiled_call_impl for block in network.blocks]


def batch_that_fits(peak, available, most):
    """The largest multiple of UNIT, up to `most`, whose steps fit: peak(batch) → bytes, or it
    raises torch.OutOfMemoryError.

    From two small batches follows how much one image takes; the one that follows is tried, and
    smaller ones if need be.
    """
    low = peak(UNIT)
    try:
        high = peak(2 * UNIT)
    except torch.OutOfMemoryError:
        return UNIT
    each = max(1, (high - low) / UNIT)
    batch = int((available * (1 - KEPT_FREE) - low) / each) // UNIT * UNIT + UNIT
    return fitting(peak, min(most, max(batch, 2 * UNIT)))


def fitting(peak, batch):
    """The first batch, from this one down, whose peak(batch) does not raise torch.OutOfMemoryError.
    """
    while True:
        try:
            peak(batch)
            return batch
        except torch.OutOfMemoryError:
            if batch == UNIT:
                raise
        torch.cuda.empty_cache()  # only here: the error itself holds on to tensors
        batch = max(UNIT, int(batch * SMALLER) // UNIT * UNIT)


def settle(side, batch, most):
    """Choose the side's batch, so that it fits, and do its first steps: the seconds that these
    took.

    `batch` is that of a side that takes about as much memory, None if memory has to be asked. A CPU
    has `most`. Compilation is in the seconds.
    """
    if not torch.cuda.is_available():
        side.resize(most)
        return timed(side.ready)
    torch.cuda.empty_cache()
    if batch is None:
        free, _ = torch.cuda.mem_get_info()
        probe = Steps(side.state, checkpointing=side.checkpointing)  # for which nothing is compiled
        batch = batch_that_fits(probe.peak, free + torch.cuda.memory_allocated(), most)
    return timed(lambda: fitting(side.peak, batch))


def training(report, model, most, rounds, matrix_sides=None):
    """Training steps from latents in bf16, the batch found by memory: images per second, share of
    the limit, peak memory.
    """
    with tf32(True):
        state = new_state(trained(random_network(model)), Recipe(bf16=True))
        limit = products(torch.bfloat16, matrix_sides)
        calls, sides, began, batch = compile_blocks(state.network), {}, {}, None
        for name, (compiled, checkpointing) in SIDES.items():
            side = Steps(state, calls if compiled else None, checkpointing)
            first = attempt(report, name, settle, side, None if checkpointing else batch, most)
            if first is not None:
                sides[name], began[name], batch = side, round(first, 1), batch or side.batch
                compete(report, sides, began, limit, 1)
        if sides:
            compete(report, sides, began, limit, rounds)
            report.add(**report.found)


def compete(report, sides, began, limit, rounds):
    """Let the sides and the limit's product take turns, and report each side's figures."""
    memory = {}

    def ready(name):
        if name != LIMIT:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what another batch left is of no use to this one
            sides[name].ready()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def call(name):
        sides[name]()
        if torch.cuda.is_available():
            memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def show(seconds):
        limit_times = seconds[LIMIT], limit[1]
        report.set(rounds=len(limit_times[0]), sides={
            name: {
                "batch": side.batch,
                "images per second": round(side.batch * STEPS / median(seconds[name]), 2),
                "share of the limit": share_of_limit(seconds[name], side.operations(), limit_times),
                "peak memory in GiB": memory.get(name),
                "seconds until its first steps": began[name],
            } for name, side in sides.items()
        })  # fmt: skip

    calls = {name: lambda name=name: call(name) for name in sides} | {LIMIT: limit[0]}
    take_turns(report, calls, rounds, show, ready)
