"""The losses of images of their own sizes, packed into rows of tokens."""

from collections.abc import Callable, Iterable, Sequence
import math

import torch
from torch import Tensor

from layers.packing import Packed, pack
from processes.process import Process


def first_numbers(noise: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise (n, C, *space) in a shape of as many numbers or fewer: (n, *shape), of each sample its
    first numbers.
    """
    if noise.shape[1:] == tuple(shape):
        return noise
    return noise.flatten(1)[:, : math.prod(shape)].unflatten(1, tuple(shape))  # (n, *shape)


def packed_losses(
    process: Process, network: Callable[[Packed, Tensor], Tensor], latents: Iterable[Tensor],
    t: Tensor, noise: Tensor, patch_size: int, length: int,
) -> dict[str, Tensor]:  # fmt: skip
    """{name: (n,)} for each part of a process's loss, as process.losses has them of images that are
    not packed.

    `latents` are n of shapes (C, h, w), their times t are (n,), and of noise (n, C, H, W) each has
    its first numbers. They are packed into rows of `length` tokens; network(packed, t) returns
    patches (R, L, C_out, P, P). Raises ValueError for a latent that no row has room for.
    """
    both = [
        torch.cat([latent, first_numbers(own[None], latent.shape)[0]])  # (2·C, h, w)
        for latent, own in zip(latents, noise)
    ]
    packed = pack(both, patch_size, length)
    x_start, eps = packed.taken(packed.tokens).chunk(2, dim=1)  # (M, C, P, P) each
    first = first_tokens(packed)

    def of_tokens(x, t):
        """What the network makes of tokens x (M, C, P, P) at times t (M,): (M, C_out, P, P)."""
        return packed.taken(network(packed._replace(tokens=packed.placed(x)), t[first]))

    losses = process.losses(of_tokens, x_start, packed.per_token(t), eps)  # (M,) each
    return {name: packed.mean(values) for name, values in losses.items()}


def first_tokens(packed: Packed) -> Tensor:
    """The place (n,) of each image's first token among all M."""
    of = packed.taken(packed.image)  # (M,)
    places = torch.arange(len(of), device=of.device)
    return of.new_full((packed.images,), len(of)).scatter_reduce(0, of, places, "amin")


def check_room(sizes: Sequence[tuple[int, int]], unit: int, length: int) -> None:
    """Raise ValueError for an image, of these heights and widths in pixels, that no row of so many
    tokens of `unit` pixels along a side has room for.
    """
    height, width = max(set(sizes), key=math.prod)
    tokens = height * width // unit**2
    if tokens > length:
        raise ValueError(
            f"`pack` {length} is too short for an image of {height}x{width}, which has {tokens} "
            f"tokens; give at least {tokens}, or a smaller `image_size`"
        )


def told(sizes: Sequence[tuple[int, int]], unit: int, length: int) -> str:
    """A line for a log: how many tokens images of these sizes have."""
    tokens = [height * width // unit**2 for height, width in sizes]
    return (
        f"packed in rows of {length} tokens: images of {min(tokens)} to {max(tokens)}, "
        f"{sum(tokens) / len(tokens):.1f} on average"
    )
