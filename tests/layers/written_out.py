"""A network with rotated, and normalised, queries and keys, RMSNorm and SwiGLU, from its formulas
alone and LightningDiT's names of tensors, in float64: for comparison.
"""

import math

import torch
from torch.nn.functional import linear, silu

from models import get_2d_sincos_pos_embed

# Our name → LightningDiT's
NAMES = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}


def lightning_names(tensors):
    """A state dict of ours under LightningDiT's names, in float64."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor.double()
    return renamed


def turned(x, coordinates):
    """Queries or keys x (N, heads, T, d) of tokens at these rows and columns (T, 2), turned: pairs
    of neighbours are complex numbers, and each is multiplied by exp(i·coordinate·frequency).
    """
    d = x.shape[-1]
    frequencies = 10000.0 ** (-4 * torch.arange(d // 4).double() / d)
    angles = torch.cat([coordinates[:, :1] * frequencies, coordinates[:, 1:] * frequencies], dim=1)
    pairs = torch.view_as_complex(x.unflatten(-1, (d // 2, 2)).contiguous())  # (N, heads, T, d / 2)
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)  # (N, heads, T, d)


def coordinates_of(rows, columns):
    """Row and column of each token (T, 2), row by row."""
    return torch.tensor([[i, j] for i in range(rows) for j in range(columns)]).double()


def rms(x, weight):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def attention(weights, name, x, heads, coordinates):
    n, count, width = x.shape
    qkv = linear(x, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
    q, k, v = qkv.view(n, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    if f"{name}.q_norm.weight" in weights:
        q, k = rms(q, weights[f"{name}.q_norm.weight"]), rms(k, weights[f"{name}.k_norm.weight"])
    q, k = turned(q, coordinates), turned(k, coordinates)
    share = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(dim=-1)
    mixed = (share @ v).transpose(1, 2).reshape(n, count, width)
    return linear(mixed, weights[f"{name}.proj.weight"], weights[f"{name}.proj.bias"])


def swiglu(weights, name, x):
    first, second = linear(x, weights[f"{name}.w12.weight"], weights[f"{name}.w12.bias"]).chunk(
        2, dim=-1
    )
    return linear(silu(first) * second, weights[f"{name}.w3.weight"], weights[f"{name}.w3.bias"])


def regressed(weights, name, c, count):
    vectors = linear(silu(c), weights[f"{name}.1.weight"], weights[f"{name}.1.bias"])
    return [vector.unsqueeze(1) for vector in vectors.chunk(count, dim=-1)]


def condition(weights, t, y):
    """The embeddings of t and y, added."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    angles = t.float()[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    first, second = (
        (weights[f"t_embedder.mlp.{i}.weight"], weights[f"t_embedder.mlp.{i}.bias"]) for i in (0, 2)
    )
    of_t = linear(silu(linear(waves, *first)), *second)
    return of_t + weights["y_embedder.embedding_table.weight"][y]


def network(tensors, heads, x, t, y, absolute=False):
    """What the network with a state dict under LightningDiT's names makes of x (N, C, H, W);
    absolute: with the table of positions, too.
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    proj = weights["x_embedder.proj.weight"]
    p = proj.shape[-1]
    rows, columns = x.shape[2] // p, x.shape[3] // p
    patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = linear(patches, proj.flatten(1), weights["x_embedder.proj.bias"])  # (N, T, D)
    if absolute:
        tokens = tokens + torch.from_numpy(
            get_2d_sincos_pos_embed(proj.shape[0], (rows, columns))
        ).float()
    c, where = condition(weights, t, y), coordinates_of(rows, columns)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for i in range(depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = regressed(
            weights, f"{name}.adaLN_modulation", c, 6
        )
        seen = rms(tokens, weights[f"{name}.norm1.weight"]) * (1 + scale1) + shift1
        tokens = tokens + gate1 * attention(weights, f"{name}.attn", seen, heads, where)
        seen = rms(tokens, weights[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
        tokens = tokens + gate2 * swiglu(weights, f"{name}.mlp", seen)
    shift, scale = regressed(weights, "final_layer.adaLN_modulation", c, 2)
    last = rms(tokens, weights["final_layer.norm_final.weight"]) * (1 + scale) + shift
    out = linear(last, weights["final_layer.linear.weight"], weights["final_layer.linear.bias"])
    out = out.view(len(x), rows, columns, p, p, -1)  # channels innermost
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, rows * p, columns * p)
