"""What runs between the large GEMMs. Imports nothing else of train.

layout           padded rows, the [W | B] buffer, modulation rows
dropout          which elements survive, by hash of the seed
pointwise        norms, rotation, GELU: `f` chooses, `f_eager` is the reference
lowrank          the narrow products of LoRA, the same way; sums_triton adds up their parts
attention_gemm   attention from GEMMs; attention_chunks: how much of it at a time
attention_shift  a shift of each row of logits, so that float16 rounds them less
attention_flash4 flash-attn-4 behind the same seam
refresh          the adapters' copies in the compute dtype, in one launch
X_launch         host code of the Triton kernels: shapes, tiles, launches, autograd
X_triton         device code; imported only where a kernel is launched
"""
