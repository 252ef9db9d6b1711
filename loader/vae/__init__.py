"""The VAE of Wan: what turns frames into latents.

encoder      pixels to normalised latents, for Wan2.2 and Wan2.1
blocks       its layers in plain PyTorch: the reference, and what runs on a CPU
fused        the same with one pass over memory between two convolutions, on a GPU
pending      what stands between two convolutions, as a value
pointwise    that pass: `finish` chooses, `finish_eager` is the reference; *_triton is device code
memory       how many windows and frames at a time, for a budget
check        whether a card and a number format encode rightly
"""
