"""Networks that followed DiT, each in a file."""
