"""ONE trainer: torchrun train/main.py CONFIG.toml. Its map is in README.md, "The house"."""
