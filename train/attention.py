"""Which attention kernel runs: chosen once, by name, logged, and never switched behind anyone's back.

V100 (sm_70) has only torch's memory-efficient kernel; Ampere adds flash; on Hopper cuDNN's is the fastest by far
(forward and backward at 11,440 tokens, 24 x 128, fp16, one H200: cuDNN 10.9 ms, flash 18.0, efficient 42.0).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionName = Literal["auto", "cudnn", "flash", "efficient", "math"]
_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def choose_attention(name: AttentionName, device: torch.device, dtype: torch.dtype) -> tuple[str, Attention]:
    """(the name of the kernel, attention(q, k, v) -> out), all [B, H, L, E], no mask.

    A kernel that can't run here raises torch's own RuntimeError at the first call: it never becomes another one.
    """
    if name == "auto":
        name = _best(device, dtype)
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"model.dtype = bfloat16: {torch.cuda.get_device_name(device)} would emulate it, many times "
                         f"slower; set model.dtype = \"float16\"")
    backend = _BACKENDS[name]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return name, attention


def _best(device: torch.device, dtype: torch.dtype) -> AttentionName:
    if device.type == "cpu":
        return "flash"
    if dtype == torch.float32:
        return "efficient"
    major, _ = torch.cuda.get_device_capability(device)
    return "cudnn" if major >= 9 else "flash" if major >= 8 else "efficient"
