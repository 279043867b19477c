"""Labels to images against diffusers' pipeline, and what computing less twice would gain.

    python -m benchmarks.sampling        # S/2, 4 images; minutes on a CPU
    # on a GPU:
    python -m benchmarks.sampling --model DiT-XL/2 --batch-size 32 --mixed-precision bf16 --steps 50

The same random weights, labels, guidance (4.0, all channels in both) and DDIM steps, from labels to
decoded images, with the autoencoder of examples/digits, which is small. All sides take turns in one
process. "computed once" is ours with what is equal across a guided batch computed once: the
embedding of t, the patches of both halves, and the modulation of the null label.
"""

import argparse
from functools import partial

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
import torch

from benchmarks.anchors import diffusers_twin
from benchmarks.networks import random_network, twin_of
from benchmarks.sides import (
    LIMIT, RATIO, ROOT, alternate, best_product, compare, device, table, write,
)  # fmt: skip
from runtime.devices import tf32
from models import DiT_models, Modulation
from sampling.sampler import Sampler
from sampling.speed import PRECISIONS, prepare
from training.cost import training_flops
from vae import load_vae

VAE = ROOT / "examples" / "digits" / "vae"
GUIDANCE = 4.0


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=DiT_models, default="DiT-S/2", metavar="MODEL",
        help="(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=4, help="images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--mixed-precision", choices=PRECISIONS, default="no", help="(default: %(default)s)"
    )
    return parser


def once(network, n):
    """The network changed such that, of a guided batch of 2n, it computes once what is equal across
    it.
    """

    def wrap(module, distinct, spread):
        compute = module.forward
        module.forward = lambda values: spread(compute(distinct(values)))

    wrap(network.t_embedder, lambda t: t[:1], lambda vector: vector.expand(2 * n, -1))
    wrap(network.x_embedder, lambda x: x[:n], lambda tokens: tokens.repeat(2, 1, 1))
    for module in network.modules():
        if isinstance(module, Modulation):
            wrap(module, lambda c: c[: n + 1], lambda v: torch.cat([v[:n], v[n:].expand(n, -1)]))
    return network


def pipeline(network, dtype):
    """diffusers' pipeline around its own network with these weights."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = DiTPipeline(diffusers_twin(network), AutoencoderKL.from_pretrained(VAE), scheduler)
    pipe.to(device(), dtype or torch.float32).set_progress_bar_config(disable=True)
    return pipe


def draw_images(network, space, labels, sampler, steps, mixed_precision):
    """Images uint8 (n, H, W, 3), on the CPU, of labels (n,) with guidance."""
    options = dict(cfg_scale=GUIDANCE, cfg_channels="all", mixed_precision=mixed_precision)
    drawing = Sampler(network, space, None, steps, sampler, **options)
    return drawing.decode(drawing.numbered_latents(0, range(len(labels)), labels)).cpu()


def peak(call):
    """The GiB that a GPU's allocator held at most during a call; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def measure(args):
    """({side: seconds of each round}, {side: peak memory in GiB}, the product's operations)."""
    dtype, n = PRECISIONS[args.mixed_precision], args.batch_size
    network, space = random_network(args.model), load_vae(str(VAE), device())
    networks = {name: twin_of(network) for name in ("ours", "ours, compiled", "computed once")}
    for name, one in networks.items():
        prepare(one, args.mixed_precision, "compiled" in name)
    once(networks["computed once"], n)
    labels = torch.arange(n, device=device())
    how = "ddim", args.steps, args.mixed_precision
    pipe = pipeline(network, dtype)
    draws = dict(generator=torch.Generator(device()).manual_seed(0), output_type="np")
    sides = {name: partial(draw_images, one, space, labels, *how) for name, one in networks.items()}
    sides["diffusers"] = partial(
        pipe, labels.tolist(), GUIDANCE, num_inference_steps=args.steps, **draws
    )
    for side in sides.values():
        side()
    memory = {name: peak(side) for name, side in sides.items()}
    sides[LIMIT], product_operations = best_product(dtype or torch.float32)
    return alternate(sides, args.rounds), memory, product_operations


def main(argv=None):
    args = build_parser().parse_args(argv)
    with tf32(True):
        seconds, memory, product_operations = measure(args)
    operations = (
        training_flops(random_network(args.model).config) // 3 * 2 * args.batch_size * args.steps
    )
    found, shares = compare(seconds, "ours", operations, product_operations)
    print(f"{args.model}, {args.batch_size} images in {args.steps} guided steps")
    table(
        {name: (found[name], shares[name], memory[name]) for name in found},
        ("ratio to ours, quartiles", "share", "GiB"),
    )
    result = {RATIO: found, "share of the limit": shares, "peak memory in GiB": memory}
    name = f"sampling-{args.model.replace('/', '-')}-{device().type}-{args.mixed_precision}"
    write(name, {"settings": vars(args), **result})


if __name__ == "__main__":
    main()
