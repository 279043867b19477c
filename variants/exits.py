"""A DiT of which only the first blocks run where noise is high, by a schedule that is fixed (early
exit by time: ASE, 2408.05927, ICML 2024; "a shallow network first": DuoDiff, 2410.09633).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import pairwise
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.layout import Layout
from layers.packing import Packed
from layers.parts import PAPERS, Parts
from layers.sizes import is_number

DESIGN = "adaln_zero"  # of the blocks
EXIT = re.compile(r"(\d{1,9}):((?:\d+\.?\d*|\.\d+)(?:e-?\d{1,3})?)", re.ASCII)  # 4:0.3


class Exits:
    """A DiT whose depth depends on the noise level of a sample: a mixin before models.DiT.

    `exits` are pairs (depth, level), levels rising and depths falling: from that noise level on, 0
    clean and 1 noise, so many of the blocks run, and then the exit's own final layer. A sample's
    level is a matter of its time t, which is t_clean without noise and t_noise with nothing else:
    0 and 1000 in diffusion, 1 and 0 in a flow. Other arguments are DiT's, and so are the names of
    its weights, beside exit_layers.N.

    It is a layers.schedule.Scheduled. Where it expects a step, all samples have its depth.
    Otherwise each has its own, and no sample pays for blocks that it does not need. Raises
    ValueError for arguments that do not fit.
    """

    config: dict[str, Any]
    blocks: nn.ModuleList
    final_layer: Any
    out_channels: int
    grad_checkpointing: bool
    training: bool
    embed_conditions: Callable[..., list[Tensor]]
    tokens: Callable[..., tuple[Tensor, Layout]]
    images: Callable[..., Tensor]

    def __init__(
        self, input_size: int | Sequence[int] = 32, patch_size: int = 2, in_channels: int = 4,
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, num_classes: int = 1000, learn_sigma: bool = True,
        exits: Sequence[Sequence[float]] = ((14, 0.5),), t_clean: float = 0.0,
        t_noise: float = 1000.0, process: dict | None = None, positions: str = PAPERS.positions,
        norm: str = PAPERS.norm, mlp: str = PAPERS.mlp, qk_norm: bool = PAPERS.qk_norm,
        extrapolation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(  # type: ignore[call-arg]
            input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
            class_dropout_prob, num_classes, learn_sigma, DESIGN, process, positions, norm, mlp,
            qk_norm, extrapolation,
        )  # fmt: skip
        self.exits = checked_exits(exits, depth)
        check_times(t_clean, t_noise)
        del self.config["block"]
        self.config = {"_class_name": type(self).__name__} | self.config
        self.config |= {"exits": [list(one) for one in self.exits]}
        self.config |= {"t_clean": t_clean, "t_noise": t_noise}
        last = hidden_size, patch_size, self.out_channels, Parts(positions, norm, mlp, qk_norm)
        self.exit_layers = nn.ModuleList(type(self.final_layer)(*last) for _ in self.exits)
        for layer in self.exit_layers:
            layer.load_state_dict(self.final_layer.state_dict())
        self.planned: list[int] = []  # the stages of a schedule's steps
        self.expected: int | None = None  # the stage of all samples, where it is known

    def schedule(self, times: Sequence[float]) -> None:
        """As layers.schedule.Scheduled: find the depth for each of these times."""
        self.planned = self.stages(torch.tensor(times, device="cpu")).tolist()

    def expect(self, step: int | None) -> None:
        """As layers.schedule.Scheduled: all samples now have the depth of this step."""
        self.expected = None if step is None else self.planned[step]

    def stages(self, t: Tensor) -> Tensor:
        """How many of the exits' levels times t (N,) have reached, int64 (N,): 0 is full depth."""
        clean, noise = self.config["t_clean"], self.config["t_noise"]
        found = torch.zeros_like(t, dtype=torch.long)
        for _, level in self.exits:
            first = clean + level * (noise - clean)
            found += t >= first if noise > clean else t <= first
        return found

    def shares(self) -> list[float]:
        """The share of the noise levels that each stage has, full depth first."""
        edges = [0.0, *(level for _, level in self.exits), 1.0]
        return [high - low for low, high in pairwise(edges)]

    def forward(
        self, x: Tensor | Packed, t: Tensor, y: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As DiT's, each sample with its depth. Raises ValueError for packed latents, too."""
        if isinstance(x, Packed):
            raise ValueError("a network with exits does not take packed images; give latents")
        c = reduce(torch.add, self.embed_conditions(t, y, force_drop_ids))  # (N, D)
        tokens, layout = self.tokens(x)  # (N, T, D)
        if self.expected is None:
            patches = self.sorted_out(tokens, c, self.stages(t), layout)
        else:
            depth, layer = self.ways()[self.expected]
            tokens = self.through(self.blocks[:depth], tokens, c, layout)
            patches = layer(tokens, c, layout)
        return self.images(patches, x)  # (N, C_out, H, W)

    def ways(self) -> list[tuple[int, nn.Module]]:
        """(how many blocks run, the layer after them) of each stage, full depth first."""
        depths = [len(self.blocks), *(depth for depth, _ in self.exits)]
        return list(zip(depths, [self.final_layer, *self.exit_layers], strict=True))

    def through(
        self, blocks: Iterable[nn.Module], tokens: Tensor, c: Tensor, layout: Layout
    ) -> Tensor:
        """Tokens (N, T, D) after some of the blocks."""
        for block in blocks:
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(
                    block, tokens, c, layout, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, c, layout)
        return tokens

    def sorted_out(self, tokens: Tensor, c: Tensor, stages: Tensor, layout: Layout) -> Tensor:
        """Patches (N, T, P·P·C_out) of samples of any stages (N,): these are sorted, the shallowest
        first, and leave one after the other.

        With gradients every part runs on one sample at least, which then counts for nothing: so
        all parameters have gradients, and processes that share them do the same.
        """
        least = int(torch.is_grad_enabled())
        order = stages.argsort(descending=True, stable=True)  # (N,)
        counts = stages.bincount(minlength=len(self.exits) + 1).tolist()
        tokens, c, begin, parts = tokens[order], c[order], 0, []
        for (depth, layer), count in zip(self.ways()[::-1], counts[::-1], strict=True):
            if not len(tokens):
                break
            tokens = self.through(self.blocks[begin:depth], tokens, c, layout)
            if rows := max(count, least):
                parts.append(layer(tokens[:rows], c[:rows], layout)[:count])
            rest = min(count, len(tokens) - least)
            tokens, c, begin = tokens[rest:], c[rest:], depth
        return torch.cat(parts)[order.argsort()]  # (N, T, P·P·C_out)


def read_exit(text: str) -> tuple[int, float]:
    """(depth, level) of "DEPTH:LEVEL". Raises ValueError for any other text."""
    match = EXIT.fullmatch(str(text))
    if match is None:
        raise ValueError(
            f"`exits` has {text!s:.60}; give DEPTH:LEVEL, such as 4:0.3: so many blocks from that "
            "noise level on"
        )
    return int(match[1]), float(match[2])


def written_exits(exits: Iterable[tuple[int, float]]) -> list[str]:
    """For each (depth, level) the one text that read_exit reads as it. Raises TypeError or
    ValueError for anything else.
    """
    return [f"{depth:d}:{float(level)!r}".removesuffix(".0") for depth, level in exits]


def checked_exits(exits: Sequence[Sequence[float]], depth: int) -> list[tuple[int, float]]:
    """Exits as a list of (depth, level). Raises ValueError for any that a network of so many blocks
    cannot have.
    """
    pairs = isinstance(exits, (list, tuple)) and all(
        isinstance(one, (list, tuple)) and len(one) == 2 for one in exits
    )
    if not pairs or not exits:
        raise ValueError(f"`exits` is {exits!r:.60}; give pairs of a depth and a noise level")
    for blocks, level in exits:
        if not isinstance(blocks, int) or isinstance(blocks, bool) or not 1 <= blocks < depth:
            raise ValueError(
                f"`exits` has the depth {blocks!r:.60}; it must be a whole number from 1 to "
                f"{depth - 1}, fewer than the network's {depth} blocks"
            )
        if not is_number(level) or not 0 <= level <= 1:
            raise ValueError(
                f"`exits` has the noise level {level!r:.60}; it must be from 0, clean, to 1, noise"
            )
    for (blocks, level), (later, higher) in pairwise(exits):
        if later >= blocks or higher <= level:
            raise ValueError(
                f"`exits` has {blocks}:{level:g} before {later}:{higher:g}; give them with rising "
                "noise levels and falling depths"
            )
    return [(int(blocks), float(level)) for blocks, level in exits]


def check_times(t_clean: float, t_noise: float) -> None:
    """Raise ValueError unless the two times are numbers, and differ."""
    for name, value in {"t_clean": t_clean, "t_noise": t_noise}.items():
        if not is_number(value):
            raise ValueError(f"`{name}` is {value!r:.60}; it must be a number")
    if t_clean == t_noise:
        raise ValueError(f"`t_clean` and `t_noise` are both {t_clean}; they must differ")
