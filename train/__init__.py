"""ONE trainer: torchrun train/main.py CONFIG.toml."""
