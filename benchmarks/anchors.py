"""What our network is measured against: diffusers' DiT, and its own formulas written out without modules."""

from diffusers import DiTTransformer2DModel
import torch
import torch.nn.functional as F


def diffusers_twin(network):
    """diffusers' network of the same sizes and, tensor by tensor, the same weights; its position table is its own.

    For adaLN-Zero with classes and label dropout.
    """
    c, source = network.config, network.state_dict()
    twin = DiTTransformer2DModel(
        num_attention_heads=c["num_heads"], attention_head_dim=c["hidden_size"] // c["num_heads"],
        in_channels=c["in_channels"], out_channels=network.out_channels, num_layers=c["depth"],
        sample_size=c["input_size"], patch_size=c["patch_size"], num_embeds_ada_norm=c["num_classes"], norm_eps=1e-6,
    )  # fmt: skip
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    target = {}
    for i, block in enumerate(twin.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # its default divides by 127, DiT by 128
        there, here = f"transformer_blocks.{i}", f"blocks.{i}"
        names |= {
            f"{there}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{there}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{there}.norm1.linear": f"{here}.adaLN_modulation.1", f"{there}.attn1.to_out.0": f"{here}.attn.proj",
            f"{there}.ff.net.0.proj": f"{here}.mlp.fc1", f"{there}.ff.net.2": f"{here}.mlp.fc2",
        }  # fmt: skip
        target[f"{there}.norm1.emb.class_embedder.embedding_table.weight"] = source["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            for name, third in zip(("to_q", "to_k", "to_v"), source[f"{here}.attn.qkv.{kind}"].chunk(3), strict=True):
                target[f"{there}.attn1.{name}.{kind}"] = third
    for there, here in names.items():
        target |= {f"{there}.{kind}": source[f"{here}.{kind}"] for kind in ("weight", "bias")}
    twin.to(source["pos_embed"]).eval().load_state_dict(target)  # strict: every weight of theirs is given
    return twin


class Twin(torch.nn.Module):
    """diffusers' network, called as ours is."""

    def __init__(self, network):
        super().__init__()
        self.theirs, self.num_classes, self.null_label = (
            diffusers_twin(network),
            network.num_classes,
            network.null_label,
        )

    def forward(self, x, t, y, force_drop_ids=None):
        """Noisy latents x (N, C, H, W), steps t (N,), labels y (N,) → (N, C_out, H, W); labels of force_drop_ids 1 are dropped."""
        if force_drop_ids is not None:
            y = torch.where(force_drop_ids == 1, self.null_label, y)
        return self.theirs(x, t, y).sample


class Plain(torch.nn.Module):
    """An adaLN-Zero DiT's forward pass as functions of PyTorch on its tensors: what its modules must not be slower than."""

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
        n, d, p, side = len(x), c["hidden_size"], c["patch_size"], c["input_size"] // c["patch_size"]
        x = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)  # (N, D, side, side)
        x = x.flatten(2).transpose(1, 2) + w["pos_embed"]  # (N, T, D)
        angles = t.float()[:, None] * 10000 ** (-torch.arange(128, device=x.device) / 128)  # (N, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 256)
        condition = self.linear(F.silu(self.linear(waves.to(x.dtype), "t_embedder.mlp.0")), "t_embedder.mlp.2")
        condition = F.silu(condition + F.embedding(y, w["y_embedder.embedding_table.weight"]))  # (N, D)
        for i in range(c["depth"]):
            x = self.block(x, condition, f"blocks.{i}", c["num_heads"])
        shift, scale = (
            self.linear(condition, "final_layer.adaLN_modulation.1").unsqueeze(1).chunk(2, dim=2)
        )  # (N, 1, D)
        x = self.linear(
            F.layer_norm(x, (d,), eps=1e-6) * (1 + scale) + shift, "final_layer.linear"
        )  # (N, T, P·P·C_out)
        x = x.view(n, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (N, C_out, side, P, side, P)
        return x.reshape(n, -1, side * p, side * p)

    def block(self, x, condition, name, heads):
        """Tokens x (N, T, D) and silu(c) (N, D) → (N, T, D)."""
        n, tokens, d = x.shape
        vectors = self.linear(condition, f"{name}.adaLN_modulation.1").unsqueeze(1).chunk(6, dim=2)  # (N, 1, D) each
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + vectors[1]) + vectors[0]
        q, k, v = self.linear(h, f"{name}.attn.qkv").view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, d)
        x = x + vectors[2] * self.linear(h, f"{name}.attn.proj")
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + vectors[4]) + vectors[3]
        h = F.gelu(self.linear(h, f"{name}.mlp.fc1"), approximate="tanh")
        return x + vectors[5] * self.linear(h, f"{name}.mlp.fc2")
