"""A DiT of which parts are left out: attention heads and MLP channels where the time t does not
need them, tokens where the MLP does not (Dynamic Diffusion Transformer, Zhao et al. 2024).

Shapes as in models.py; H is the number of heads, and of groups of the MLP's hidden channels.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from layers.layout import Layout
from layers.modulation import modulated
from layers.packing import Packed

TEMPERATURE = 5.0  # of the sigmoid that stands for a switch in the backward pass
# Bias of the routers at the beginning: all is on, and noise turns off one in 150. (Published are
# 15, and 35 for tokens, which are further to come down from.)
ON = 5.0
NARROWER = 16  # so many times fewer numbers than a token has lie inside the tokens' router


def switched(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """Switches of the logits' shape, 1 where a logit is above 0 and else 0, in float32 or wider.

    With noise, the difference of two Gumbel draws, they are 1 where logit + noise is above 0, and
    their gradient is that of sigmoid((logit + noise) / TEMPERATURE) (straight-through). Infinite
    noise: they are 1, with gradient 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if noise is None:
        return (logits > 0).to(logits.dtype)
    soft = torch.sigmoid((logits + noise) / TEMPERATURE)
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def first_on(switches: Tensor) -> Tensor:
    """Switches (N, H - 1), with those of head, or group, 0 before them, which are on: (N, H)."""
    return nn.functional.pad(switches, (1, 0), value=1.0)  # (N, H)


def multiply_adds(tokens: int, width: int, hidden: int) -> tuple[int, int]:
    """Multiply-adds of a block's attention, and of its MLP, on one image."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width, 2 * tokens * width * hidden


class Slice(NamedTuple):
    """The weights of a block's heads and groups that are on, heads being their number."""

    heads: int
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]

    def attend(self, x: Tensor) -> Tensor:
        """Attention of tokens (N, T, D) by these heads: (N, T, D)."""
        parts = linear(x, *self.qkv).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, h, D / H)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (N, h, T, D / H) each
        out = scaled_dot_product_attention(q, k, v)
        return linear(out.transpose(1, 2).flatten(2), *self.proj)  # (N, T, D)


class DynamicBlock(nn.Module):
    """A block of adaLN-Zero, whose parts it takes over, with three routers.

    `router_heads` and `router_groups` see the embedding of t alone, `router_tokens` a token after
    attention. Head and group 0 are always on.
    """

    def __init__(self, block: Any, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn: Any = block.attn  # of timm, as the MLP
        self.mlp: Any = block.mlp
        self.adaLN_modulation: Any = block.adaLN_modulation
        self.heads = heads
        inside = max(1, width // NARROWER)
        self.router_heads = nn.Linear(width, heads - 1)
        self.router_groups = nn.Linear(width, heads - 1)
        self.router_tokens = nn.Sequential(
            nn.Linear(width, inside), nn.ReLU(), nn.Linear(inside, 1)
        )
        self.begin_all_on()

    def begin_all_on(self) -> None:
        """Fill the routers so that all is on, whatever t and the tokens."""
        into, out = (self.router_tokens.get_submodule(place) for place in ("0", "2"))
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        nn.init.xavier_uniform_(into.weight)
        nn.init.zeros_(into.bias)
        for router in (self.router_heads, self.router_groups, out):
            nn.init.zeros_(router.weight)
            nn.init.constant_(router.bias, ON)

    def forward(
        self, x: Tensor, c: Tensor, of_t: Tensor, layout: Layout, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) → (N, T, D), and the share (N,) of the block's multiply-adds that count.

        What is off is multiplied by 0. `c` (N, D) is the condition, `of_t` (N, D) the embedding of
        t, noise (N, 2·(H - 1) + T) that of the switches.
        """
        widths = [self.heads - 1, self.heads - 1, x.shape[1]]
        noises = [None] * 3 if noise is None else noise.split(widths, dim=1)
        heads = first_on(switched(self.router_heads(of_t), noises[0]))  # (N, H)
        groups = first_on(switched(self.router_groups(of_t), noises[1]))  # (N, H)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = layout.spread(
            self.adaLN_modulation(c)).chunk(6, dim=-1)  # (N, 1, D) each
        x = x + attn_gate * self.attend(modulated(self.norm1(x), attn_shift, attn_scale), heads)
        tokens = switched(self.router_tokens(x).squeeze(-1), noises[2])  # (N, T)
        inside = self.mlp.fc1(modulated(self.norm2(x), mlp_shift, mlp_scale))
        channels = groups.repeat_interleave(inside.shape[-1] // self.heads, dim=1)  # (N, hidden)
        inside = inside * channels.unsqueeze(1).to(inside.dtype)  # GELU(0) is 0
        out = self.mlp.fc2(self.mlp.act(inside))
        x = x + mlp_gate * (out * tokens.unsqueeze(-1).to(out.dtype))
        return x, self.share(heads, groups, tokens)

    def attend(self, x: Tensor, heads: Tensor) -> Tensor:
        """Attention of tokens (N, T, D), the outputs of heads times their switches (N, H)."""
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (N, T, H, D / H)
        out = out * heads[:, None, :, None].to(out.dtype)
        return self.attn.proj(out.flatten(2))  # (N, T, D)

    def share(self, heads: Tensor, groups: Tensor, tokens: Tensor) -> Tensor:
        """The share (N,) of the block's multiply-adds, without adaLN's and the routers', that
        switches of heads and groups (N, H) and of tokens (N, T) leave.
        """
        attention, mlp = multiply_adds(tokens.shape[1], self.attn.qkv.in_features,
                                       self.mlp.fc1.out_features)  # fmt: skip
        left = attention * heads.mean(dim=1) + mlp * groups.mean(dim=1) * tokens.mean(dim=1)
        return left / (attention + mlp)

    def sliced(self, heads: Sequence[int], groups: Sequence[int]) -> Slice:
        """Copies of the weights of some heads and groups, by their numbers."""
        count, device = self.heads, self.attn.qkv.weight.device
        of_heads, of_groups = (torch.tensor(one, device=device) for one in (heads, groups))

        def rows(layer, parts):
            """The weights of some outputs, of each of so many parts."""
            weight = layer.weight.unflatten(0, (parts, count, -1))  # (parts, H, d, D)
            bias = layer.bias.unflatten(0, (parts, count, -1))  # (parts, H, d)
            of = of_heads if layer is self.attn.qkv else of_groups
            return weight[:, of].flatten(0, 2), bias[:, of].flatten()  # (parts·h·d, D), (parts·h·d)

        def columns(layer, of):
            """The weights of some inputs."""
            weight = layer.weight.unflatten(1, (count, -1))[:, of].flatten(1)  # (D, h·d)
            return weight, layer.bias

        return Slice(
            len(heads), rows(self.attn.qkv, 3), columns(self.attn.proj, of_heads),
            rows(self.mlp.fc1, 1), columns(self.mlp.fc2, of_groups),
        )  # fmt: skip

    def computed(self, x: Tensor, c: Tensor, layout: Layout, left: Slice) -> Tensor:
        """As forward's tokens, for samples whose heads and groups are those of a Slice: nothing
        that is off is computed. On a GPU the CPU waits for the number of tokens.
        """
        attn_shift, attn_scale, attn_gate, *of_mlp = layout.spread(
            self.adaLN_modulation(c)).chunk(6, dim=-1)  # (N, 1, D) each
        x = x + attn_gate * left.attend(modulated(self.norm1(x), attn_shift, attn_scale))
        on = self.router_tokens(x).flatten() > 0  # (N·T,)
        place = on.nonzero().squeeze(1)  # (M,), of the tokens of all images
        image = place // x.shape[1]
        shift, scale, gate = (vector.squeeze(1)[image] for vector in of_mlp)  # (M, D) each
        rows = x.flatten(0, 1)  # (N·T, D)
        inside = linear(modulated(self.norm2(rows[place]), shift, scale), *left.fc1)
        out = gate * linear(self.mlp.act(inside), *left.fc2)  # (M, D)
        return rows.index_add(0, place, out.to(rows.dtype)).view_as(x)  # (N, T, D)


class Dynamic:
    """A DiT of adaLN-Zero whose blocks have routers: a mixin before models.DiT. A new one has all
    on, and is the DiT.

    Arguments as DiT's; there are two heads or more, and the MLP's hidden channels are a multiple of
    their number. Its names of weights are DiT's, and those of the routers.

    It is Scheduled: told the times of a trajectory, it copies the weights of the heads and groups
    that are on; a block keeps one such copy, so all of them take no more memory than the blocks.
    """

    config: dict[str, Any]
    blocks: nn.ModuleList
    t_embedder: Any
    final_layer: Any
    design: Any
    grid: Any
    grad_checkpointing: bool
    training: bool
    parameters: Callable[..., Iterator[nn.Parameter]]
    embed_conditions: Callable[..., list[Tensor]]
    tokens: Callable[..., tuple[Tensor, Layout]]
    images: Callable[..., Tensor]

    def __init__(
        self, input_size: int | Sequence[int] = 32, patch_size: int = 2, in_channels: int = 4,
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, num_classes: int = 1000, learn_sigma: bool = True,
        process: dict | None = None, extrapolation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(  # type: ignore[call-arg]
            input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
            class_dropout_prob, num_classes, learn_sigma, process=process,
            extrapolation=extrapolation,
        )  # fmt: skip
        hidden = int(hidden_size * mlp_ratio)
        if num_heads < 2 or hidden % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}, with {hidden} hidden channels in an MLP; a DynamicDiT "
                "has 2 heads or more, whose number divides that of the channels"
            )
        del self.config["block"]
        self.config = {"_class_name": type(self).__name__} | self.config
        blocks: Any = self.blocks
        self.blocks = nn.ModuleList(DynamicBlock(one, hidden_size, num_heads) for one in blocks)
        self.step: int | None = None  # the place in `widths` that is expected
        # Of each step and block the numbers of the heads, and of the groups, that are on
        self.widths: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = []
        self.slices: dict[int, tuple[Any, Slice]] = {}  # of each block the last one

    def initialize_weights(self) -> None:
        """As DiT's; all is on."""
        super().initialize_weights()  # type: ignore[misc]
        for block in self.blocks:
            if isinstance(block, DynamicBlock):  # DiT calls this before there are any
                block.begin_all_on()

    @property
    def routes(self) -> tuple[int, int]:
        """The shape of the noise of a sample's switches: depth, and 2·(H - 1) + T."""
        rows, columns = self.grid
        heads = self.config["num_heads"]
        return self.config["depth"], 2 * (heads - 1) + rows * columns

    @torch.no_grad()
    def schedule(self, times: Sequence[float]) -> None:
        """Find which heads and groups are on at these times, by one read from the device. What was
        known before is forgotten, for the weights may have changed.
        """
        t = torch.tensor(times, dtype=torch.float32, device=next(self.parameters()).device)
        of_t = self.t_embedder(t)  # (S, D)
        blocks: Any = self.blocks
        routers = [(block.router_heads, block.router_groups) for block in blocks]
        on = torch.stack([
            torch.stack([first_on(switched(router(of_t))) for router in both], dim=1)
            for both in routers
        ], dim=1)  # (S, depth, 2, H)  # fmt: skip
        self.slices = {}
        self.widths = [
            [tuple(_numbers(one) for one in block) for block in step] for step in on.tolist()
        ]

    def expect(self, step: int | None) -> None:
        """All samples of the next calls have the time at this place of the schedule; None: any."""
        self.step = step

    def left(self, number: int) -> Slice:
        """What the expected step leaves of the block with this number."""
        assert self.step is not None
        widths = self.widths[self.step][number]
        known, found = self.slices.get(number, (None, None))
        if known != widths or found is None:
            block: Any = self.blocks[number]
            found = block.sliced(*widths)
            self.slices[number] = widths, found
        return found

    def forward(
        self, x: Tensor | Packed, t: Tensor, y: Tensor | None = None,
        force_drop_ids: Tensor | None = None, noise: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """As DiT's. With noise (N, *routes), of whose tokens' part an image takes the first, a
        tuple: the output with switches so drawn and that with all on, (N, C_out, H, W) each, and
        the share (N,) of the blocks' multiply-adds that the former takes.

        Raises ValueError for packed images.
        """
        if isinstance(x, Packed):
            raise ValueError("a DynamicDiT does not take packed images")
        embeddings = self.embed_conditions(t, y, force_drop_ids)
        tokens, layout = self.tokens(x)  # (N, T, D)
        tokens, c = self.design.condition(tokens, embeddings)
        assert c is not None
        of_t = embeddings[0]
        if noise is None:
            tokens, _ = self.through(tokens, c, of_t, layout)
            return self.images(self.final_layer(tokens, c, layout), x)  # (N, C_out, H, W)
        count = len(tokens)
        noise = noise[..., : self.routes[1] - math.prod(self.grid) + tokens.shape[1]]
        noise = torch.cat([noise, torch.full_like(noise, math.inf)])  # (2N, *routes)
        tokens, c, of_t = (torch.cat([one, one]) for one in (tokens, c, of_t))  # (2N, ...)
        tokens, shares = self.through(tokens, c, of_t, layout, noise)
        drawn, complete = self.final_layer(tokens, c, layout).chunk(2)
        share = torch.stack(shares).mean(dim=0)[:count]  # (N,)
        return self.images(drawn, x), self.images(complete, x), share

    def through(
        self, tokens: Tensor, c: Tensor, of_t: Tensor, layout: Layout, noise: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens (N, T, D) past all blocks, and the share (N,) of each that the switches leave; no
        shares where a step is expected, for what is off is not computed then.
        """
        shares = []
        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            own = None if noise is None else noise[:, number]
            if self.step is not None and not self.training:
                tokens = block.computed(tokens, c, layout, self.left(number))
                continue
            if self.grad_checkpointing and self.training:
                tokens, share = checkpoint(
                    block, tokens, c, of_t, layout, own, use_reentrant=False,
                    preserve_rng_state=False,
                )  # fmt: skip
            else:
                tokens, share = block(tokens, c, of_t, layout, own)
            shares.append(share)
        return tokens, shares


def sorted_by_magnitude(tensors: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The state dict of a DiT, or of a DynamicDiT, that computes the same, its heads and its MLP's
    hidden channels in the order of their weights' squared norms, the largest first.

    So what is always on, head and group 0, is the strongest, as the paper has it.
    """
    found = dict(tensors)
    for name in tensors:
        if not name.endswith(".attn.qkv.weight"):
            continue
        block = name.removesuffix("attn.qkv.weight")
        qkv, proj = _parted(found, f"{block}attn.qkv", heads, 3), f"{block}attn.proj.weight"
        columns = found[proj].unflatten(1, (heads, -1))  # (D, H, d)
        strength = _squares(qkv[0], (0, 2, 3)) + _squares(columns, (0, 2))  # (H,)
        order = strength.argsort(descending=True, stable=True)
        for kind, values in zip(("weight", "bias"), qkv):
            found[f"{block}attn.qkv.{kind}"] = values[:, order].flatten(0, 2)  # (3·D, D), (3·D,)
        found[proj] = columns[:, order].flatten(1)
        into, out = found[f"{block}mlp.fc1.weight"], found[f"{block}mlp.fc2.weight"]
        strength = _squares(into, (1,)) + _squares(out, (0,))  # (hidden,)
        order = strength.argsort(descending=True, stable=True)
        found[f"{block}mlp.fc1.weight"] = into[order]
        found[f"{block}mlp.fc1.bias"] = found[f"{block}mlp.fc1.bias"][order]
        found[f"{block}mlp.fc2.weight"] = out[:, order]
    return found


def _parted(tensors, layer, heads, parts):
    """Weight (parts, H, d, D) and bias (parts, H, d) of a layer's outputs."""
    return [tensors[f"{layer}.{kind}"].unflatten(0, (parts, heads, -1))
            for kind in ("weight", "bias")]  # fmt: skip


def _squares(weights, axes):
    """The sum of squares over some axes, in float64, as weights may be halves."""
    return weights.double().square().sum(dim=axes)


def _numbers(switches):
    """The numbers of those that are on."""
    return tuple(number for number, on in enumerate(switches) if on)
