"""What a network costs: parameters, operations and memory, counted on tensors without contents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from checkpoints.loading import load_pretrained
from checkpoints.networks import ExitDiT, Network, create_network, reads_text, sample_condition
from processes.table import process_of
from sampling.sampler import Sampler
from vae import LatentShape, PixelSpace

TRAINING_BYTES = 4 * 5  # of a parameter in float32: weight, gradient, two moments, average
# On which operations of a checkpoint are counted: samples, and steps of a solver, asking once each
SAMPLES, STEPS_COUNTED = 8, 50
COUNTED = {"diffusion": "ddim", "flow": "euler"}
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # PyTorch leaves it out


class Cost(NamedTuple):
    """What one network takes; sizes in bytes."""

    parameters: int
    macs: int
    training_flops: int
    weights: int
    training: int
    per_image: int


def count(config: dict, bf16: bool = False, grad_checkpointing: bool = False) -> Cost:
    """The Cost of the DiT with these arguments. Raises ValueError if they do not fit together."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_network(config).parameters())
    flops = training_flops(config)
    copies, per_image = kept(config, bf16, grad_checkpointing)
    if grad_checkpointing:
        # One block, as it is without
        per_image += (kept(config, bf16, False)[1] - per_image) // config["depth"]
    return Cost(
        parameters, flops // 6, flops, 4 * parameters, TRAINING_BYTES * parameters + copies,
        per_image,
    )  # fmt: skip


class Sampled(NamedTuple):
    """Multiply-adds of a network's step on one sample: their mean over samples and `steps` of a
    `solver`, and those of a step that leaves nothing out.
    """

    macs: float
    most: int
    steps: int
    solver: str


def sampled(checkpoint: Path | str) -> Sampled:
    """What a checkpoint's network takes as it is sampled, without guidance: counted on SAMPLES
    samples, seed 0, of the classes in turn.

    Raises ValueError for a checkpoint that cannot be loaded, and for a network that reads text.
    """
    network, _ = load_pretrained(checkpoint)
    if reads_text(network):
        raise ValueError(f"`ckpt` {checkpoint} reads text; give a network that takes labels")
    process, steps = process_of(network), STEPS_COUNTED
    solver = COUNTED[process.word]
    sampler = Sampler(network, PixelSpace(), None, steps, solver, process=process)
    labels = torch.arange(SAMPLES) % max(1, network.config["num_classes"])
    with torch.no_grad(), counted() as counter:
        sampler.numbered_latents(0, range(SAMPLES), labels)
    macs = counter.get_total_flops() / 2 / SAMPLES / steps
    return Sampled(macs, most_macs(network.config), steps, solver)


def most_macs(config: dict) -> int:
    """The multiply-adds on one latent, of a network with exits at its full depth."""
    with torch.device("meta"):
        network = create_network(config)
    if isinstance(network, ExitDiT):
        network.expected = 0
    return forward_flops(network, None) // 2


def counted() -> FlopCounterMode:
    """A context that counts floating-point operations, attention on a CPU included."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(display=False, custom_mapping={ON_CPU: attention})


def kept(config: dict, bf16: bool, grad_checkpointing: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass: (whatever the batch, per image)."""
    one, two = (kept_for_backward(config, n, bf16, grad_checkpointing) for n in (1, 2))
    return 2 * one - two, two - one


def kept_for_backward(config: dict, batch_size: int, bf16: bool, grad_checkpointing: bool) -> int:
    """Bytes that a forward pass in training keeps for the backward pass.

    The bytes are counted on tensors without contents.
    """
    kept: dict[int, torch.Tensor] = {}
    with FakeTensorMode():
        network = create_network(config).train()
        network.grad_checkpointing = grad_checkpointing
        parameters = {p.untyped_storage()._cdata for p in network.parameters()}

        def keep(tensor):
            if tensor.untyped_storage()._cdata not in parameters:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        x = torch.zeros(batch_size, *network.latent_shape)  # (N, C, *space)
        condition = sample_condition(network, batch_size)
        if isinstance(network, ExitDiT):  # the memory that a batch of full depth takes
            network.expected = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = network(x, torch.zeros(batch_size), condition)
        del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def training_flops(config: dict, space: tuple[int, ...] | None = None) -> int:
    """Floating-point operations (2 per multiply-add) that training on one latent takes, (C, *space)
    or the network's own.

    Of a network with exits it is the mean over noise levels that are equally likely.

    The forward pass is counted, and twice as much for the backward pass. Counted on the network
    with this configuration; what gradient checkpointing computes again is not in it.
    """
    with torch.device("meta"):
        network = create_network(config)
    if not isinstance(network, ExitDiT):
        return 3 * forward_flops(network, space)
    total = 0.0
    for stage, share in enumerate(network.shares()):
        network.expected = stage
        total += share * forward_flops(network, space)
    return 3 * round(total)


def forward_flops(network: Network, space: tuple[int, ...] | None) -> int:
    """The operations of a network on "meta" on one latent, its own if `space` is None."""
    shape = (network.in_channels, *space) if space else network.latent_shape
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape), torch.zeros(1), sample_condition(network, 1))
    return counter.get_total_flops()


def flops_per_image(
    config: dict, sizes: Sequence[tuple[int, int]] | None, shape: LatentShape
) -> float:
    """training_flops, their mean over images of these heights and widths in pixels, each alone in
    its row; those of the network's own size for None.
    """
    if sizes is None:
        return training_flops(config)
    # Of T tokens they are a + b·T + c·T², which three counts tell
    side = config["patch_size"]
    if "extrapolation" in config:
        config = config | {"extrapolation": "interpolate"}  # of any grid
    few, more, many = (training_flops(config, (side, n * side)) for n in (1, 2, 3))
    square = (many - 2 * more + few) / 2
    linear = more - few - 3 * square
    tokens = [height * width // (shape.ratio * side) ** 2 for height, width in sizes]
    mean, of_squares = (sum(n**power for n in tokens) / len(tokens) for power in (1, 2))
    return few - linear - square + linear * mean + square * of_squares
