"""A small Wan2.2 that has learned something: python -m bench.learn.

footage        what it is trained on, in one small file
vae dit        the VAE and the transformer, trained
training       one step of a small network as a CUDA graph
lora           a LoRA on the held-out subject, and samples
controls       LoRAs that are wrong on purpose
verdicts       what must hold, read from an evaluation (must_hold.sh)
"""
