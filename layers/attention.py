"""Attention that timm does not have."""

from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention to another sequence (Vaswani et al. 2017, 3.2), laid out as timm's."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens x (N, T, D) and a sequence c (N, K, D) → (N, T, D). mask (N, 1, 1, K), bool, says
        which of the sequence are attended to; None: all.
        """
        keys, values = self.kv(c).chunk(2, dim=-1)  # (N, K, D) each
        parts = (self.q(x), keys, values)  # and below (N, heads, T or K, D / heads) each
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # (N, T, D)
