"""What each switch of training costs or gains: time of a step and peak memory, as ratios to
training without any.

    python -m benchmarks.switches                                              # DiT-S/4, batch 16
    python -m benchmarks.switches --model DiT-XL/2 --batch-size 64 --rounds 20 # on a GPU
    torchrun --nproc_per_node=2 -m benchmarks.switches --sides plain bf16 no-read fsdp

All sides take turns in one process (or in each of several). Peak memory is measured in a process of
its own per side: the allocator's peak on a GPU, the resident set's elsewhere; not where there are
several processes.
"""

import argparse
from functools import partial
import os
import resource
import subprocess
import sys
from unittest.mock import patch

import torch
from accelerate import Accelerator

from benchmarks.sides import RATIO, ROOT, alternate, ratios, write
from models import DiT_models
from runtime.devices import tf32
from training import step as training_step
from training.sharding import shard_network
from training.state import Recipe, new_state
from training.step import draw, train_step

# Name → recipe, and what else is done (see Side). "plain" is the base: TF32 on, fused AdamW, EMA in
# bulk, one read a step.
SIDES = {
    "plain": {}, "bf16": {"bf16": True}, "grad-accum 4": {"grad_accum": 4},
    "grad-clip": {"grad_clip": 1.0}, "grad-checkpointing": {"also": "checkpointing"},
    "compile": {"also": "compile"}, "bf16 and compile": {"bf16": True, "also": "compile"},
    "three averages": {"ema_decay": (0.9999, 0.999, 0.99)}, "no-tf32": {"also": "no-tf32"},
    "no-read": {"also": "no-read"}, "AdamW not fused": {"also": "not-fused"},
    "EMA one by one": {"also": "one-by-one"}, "fsdp": {"also": "fsdp"},
}  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-S/4", help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="of each process (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[name for name in SIDES if name != "fsdp"]
    )
    # The process of its own
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser


class Side:
    """A training state with one switch set; calling it does a step."""

    def __init__(self, model, batch_size, accelerator, also=None, **recipe):
        torch.manual_seed(0)
        self.also, self.accelerator, self.device = also, accelerator, accelerator.device
        network = DiT_models[model]()
        network.grad_checkpointing = also == "checkpointing"
        if also == "fsdp":
            shard = partial(
                shard_network, device_type=self.device.type, processes=accelerator.num_processes
            )
            self.state = new_state(network, Recipe(**recipe), shard=shard)
        else:
            self.state = new_state(
                network.to(self.device), Recipe(**recipe), wrap=accelerator.prepare_model
            )
        if also == "compile":
            for block in self.state.network.blocks:
                block.compile()
        if also == "not-fused":
            for group in self.state.opt.param_groups:
                group.update(fused=False, foreach=False)
        self.latents = torch.randn(batch_size, *network.latent_shape, device=self.device)
        self.labels = torch.arange(batch_size, device=self.device)
        self.draws = draw(
            0, 0, batch_size, network.latent_shape, 0.1, self.state.process, self.device
        )

    def __call__(self):
        reduce = partial(self.accelerator.reduce, reduction="sum")
        step = partial(train_step, self.state, self.latents, self.labels, self.draws)
        with tf32(self.also != "no-tf32"):
            if self.also == "no-read":
                with patch.object(torch.Tensor, "tolist", lambda values: [0.0] * len(values)):
                    step()
            elif self.also == "one-by-one":
                with patch.object(training_step, "update_ema", one_by_one):
                    step(reduce)
            else:
                step(reduce)


@torch.no_grad()
def one_by_one(ema, network, decay):
    """The moving average as a loop over all parameters, the frozen table among them."""
    for average, value in zip(ema.parameters(), network.parameters()):
        average.mul_(decay).add_(value, alpha=1 - decay)


def main(argv=None):
    args = build_parser().parse_args(argv)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    sizes = args.model, args.batch_size
    if args.memory_of:
        side = Side(*sizes, accelerator, **SIDES[args.memory_of])
        for _ in range(3):
            side()
        peak = torch.cuda.max_memory_allocated() / 2**20 if side.device.type == "cuda" else None
        return print(peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    # First, while this process is small: a child's peak on Linux begins with its parent's.
    memory = peak_memory(*sizes, args.sides) if accelerator.num_processes == 1 else {}
    sides = {name: Side(*sizes, accelerator, **SIDES[name]) for name in args.sides}
    for side in sides.values():
        for _ in range(2):
            side()
    time = ratios(alternate(sides, args.rounds), args.sides[0])
    if accelerator.is_main_process:
        for name in args.sides:
            print(f"{name:20} time {time[name]}  memory {memory.get(name, '')}")
        settings = {"model": args.model, "batch_size": args.batch_size, "rounds": args.rounds}
        result = {RATIO: time, "peak memory as a ratio": memory}
        processes = accelerator.num_processes
        write(
            f"switches-{args.model.replace('/', '-')}-{processes}",
            {"settings": settings | {"processes": processes}, **result},
        )
    accelerator.end_training()


def peak_memory(model, batch_size, sides):
    """{side: its peak memory as a ratio to the first's}; on a CPU that of the whole process."""
    found = {}
    for name in sides:
        flags = ["--model", model, "--batch-size", str(batch_size), "--memory-of", name]
        command = [sys.executable, "-m", "benchmarks.switches", *flags]
        done = subprocess.run(
            command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        found[name] = float(done.stdout)
    return {name: round(value / found[sides[0]], 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
