"""The Wan transformer.

config       the [model] table
wan          the modules and the forward pass
load         weights from a diffusers folder
identity     which weights a folder holds, told without reading them all
attention    which kernel runs, by name
tag          names of the operations that the activation plan chooses from
"""
