"""What a transformer is built of beyond timm's layers: positions, norms, MLPs, packing."""
