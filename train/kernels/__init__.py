"""What runs between the large GEMMs. Imports nothing else of train.

layout           padded rows, the [W | B] buffer, modulation rows
dropout          which elements survive, by hash of the seed
pointwise        norms, rotation, GELU: `f` chooses, `f_eager` is the reference
lowrank          the narrow products of LoRA, the same way
refresh          the adapters' copies in the compute dtype, in one launch
X_launch         host code of the Triton kernels: shapes, tiles, launches, autograd
X_triton         device code; imported only where a kernel is launched
"""
