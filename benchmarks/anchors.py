"""What our network is measured against: diffusers' DiT, and its own formulas written out without
modules.
"""

from diffusers import DiTTransformer2DModel
import torch
import torch.nn.functional as F

from checkpoints.diffusers_format import OWN, config_to_diffusers, to_diffusers


def diffusers_twin(network):
    """diffusers' network of the same sizes and, tensor by tensor, the same weights; its position
    table is its own.

    For adaLN-Zero with classes and label dropout.
    """
    config = config_to_diffusers(network.config, null_label=network.null_label)
    twin = DiTTransformer2DModel(**{key: value for key, value in config.items() if key != OWN})
    for block in twin.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # its default divides by 127, DiT by 128
    tensors = to_diffusers(network.state_dict(), network.config, null_label=network.null_label)
    # strict: every weight of theirs is given
    twin.to(network.pos_embed).eval().load_state_dict(tensors)
    return twin


class Twin(torch.nn.Module):
    """diffusers' network, called as ours is."""

    def __init__(self, network):
        super().__init__()
        self.theirs, self.learn_sigma = diffusers_twin(network), network.learn_sigma
        self.num_classes, self.null_label = network.num_classes, network.null_label

    def forward(self, x, t, y, force_drop_ids=None):
        """Noisy latents x (N, C, H, W), steps t (N,), labels y (N,), dropped where force_drop_ids
        is 1 → (N, C_out, H, W).
        """
        if force_drop_ids is not None:
            y = torch.where(force_drop_ids == 1, self.null_label, y)
        return self.theirs(x, t, y).sample


class Plain(torch.nn.Module):
    """An adaLN-Zero DiT's forward pass as functions of PyTorch on its tensors: what its modules
    must not be slower than.
    """

    def __init__(self, network):
        super().__init__()
        self.network, self.tensors = network, dict(network.named_parameters())
        self.num_classes, self.null_label = network.num_classes, network.null_label

    def linear(self, x, name):
        """x (..., D_in) → (..., D_out)."""
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def forward(self, x, t, y, force_drop_ids=None):
        """As Twin's."""
        c, w = self.network.config, self.tensors
        if force_drop_ids is not None:
            y = torch.where(force_drop_ids == 1, self.null_label, y)
        n, d, p, side = (
            len(x), c["hidden_size"], c["patch_size"], c["input_size"] // c["patch_size"],
        )  # fmt: skip
        # (N, D, side, side)
        x = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
        x = x.flatten(2).transpose(1, 2) + w["pos_embed"]  # (N, T, D)
        # (N, 128)
        angles = t.float()[:, None] * 10000 ** (-torch.arange(128, device=x.device) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 256)
        condition = self.linear(
            F.silu(self.linear(waves.to(x.dtype), "t_embedder.mlp.0")), "t_embedder.mlp.2"
        )
        # (N, D)
        condition = F.silu(condition + F.embedding(y, w["y_embedder.embedding_table.weight"]))
        for i in range(c["depth"]):
            x = self.block(x, condition, f"blocks.{i}", c["num_heads"])
        shift, scale = (
            self.linear(condition, "final_layer.adaLN_modulation.1").unsqueeze(1).chunk(2, dim=2)
        )  # (N, 1, D)
        x = self.linear(
            F.layer_norm(x, (d,), eps=1e-6) * (1 + scale) + shift, "final_layer.linear"
        )  # (N, T, P·P·C_out)
        # (N, C_out, side, P, side, P)
        x = x.view(n, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(n, -1, side * p, side * p)

    def block(self, x, condition, name, heads):
        """Tokens x (N, T, D) and silu(c) (N, D) → (N, T, D)."""
        n, tokens, d = x.shape
        # (N, 1, D) each
        vectors = self.linear(condition, f"{name}.adaLN_modulation.1").unsqueeze(1).chunk(6, dim=2)
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + vectors[1]) + vectors[0]
        q, k, v = (
            self.linear(h, f"{name}.attn.qkv").view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, d)
        x = x + vectors[2] * self.linear(h, f"{name}.attn.proj")
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + vectors[4]) + vectors[3]
        h = F.gelu(self.linear(h, f"{name}.mlp.fc1"), approximate="tanh")
        return x + vectors[5] * self.linear(h, f"{name}.mlp.fc2")
