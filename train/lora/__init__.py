"""LoRA on the frozen transformer.

adapters   the modules, and how they are attached to a model
linear     the arithmetic: one GEMM for the layer and its adapters
nf4        frozen weights in 4 bits
config     the [lora] table
formats    LoRA files of others, read
start      adapters that start from a file
files      what diffusers and ComfyUI load
"""
