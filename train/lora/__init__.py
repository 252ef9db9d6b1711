"""LoRA: adapters on a model, the linear layer that applies them, their files."""
