"""A frozen weight in NF4 (bitsandbytes, blocks of 64, statistics quantised too), unpacked
whenever a GEMM needs it.

A quarter of bfloat16's bytes, for an error of a few per cent in each weight. The GEMM is the same
as for a dense weight: the unpacked weight gets B's columns behind it and is freed after use, in
the forward and in the backward pass.
"""

import torch
from torch import Tensor


class NF4Weight:
    """The [W | B] buffer of train/kernels/layout.py with W in NF4.

    `b_NR` (compute dtype, zeros at first) are B's columns, which LoRA.refresh renews.
    """

    def __init__(self, weight_NK: Tensor, num_low: int):
        import bitsandbytes.functional as bnb  # slow to import, and probes for CUDA as it loads

        self._packed, self._state = bnb.quantize_4bit(
            weight_NK.contiguous(), quant_type="nf4", compress_statistics=True
        )
        self.b_NR = torch.zeros(
            weight_NK.shape[0], num_low, dtype=weight_NK.dtype, device=weight_NK.device
        )

    @property
    def packed_bytes(self) -> int:
        """What the quantised weight takes, without its statistics."""
        num_bytes: int = self._packed.nbytes
        return num_bytes

    def dense(self) -> Tensor:
        """[W | B] in the compute dtype, [N, K + R]: a new tensor."""
        import bitsandbytes.functional as bnb

        weight_NK = bnb.dequantize_4bit(self._packed, self._state)
        return torch.cat([weight_NK, self.b_NR], 1)
