"""Attention by the package flash-attn-4 (the extra flash4): Hopper only.

The package's public function is an autograd function, which hides what runs inside. So its pair of
functions below that, pinned in configs/env/hopper.txt, is wrapped as operations of torch's own:
train/activations/runner.py can tell them from others and save what they put out.

Shapes: B samples, H heads, L queries, S keys, E width of a head.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from train.kernels.layout import empty_padded


def has_flash4(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        version("flash-attn-4")  # flash-attn 2 has the same module name
    except PackageNotFoundError:
        return False
    return (
        device.type == "cuda"
        and dtype != torch.float32
        and torch.cuda.get_device_capability(device)[0] == 9
    )


@torch.library.custom_op("newsreel::flash4_forward", mutates_args=())
def flash4_forward(
    q_BLHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, num_padding: int
) -> tuple[Tensor, Tensor]:
    """Attention by flash-attn-4: out [B, L, H, E], and the log of the sums, float32 [B, H, L]."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out_BLD = empty_padded(q_BLHE, q_BLHE.shape[2] * v_BSHE.shape[3], num_padding, q_BLHE.dtype)
    out_BLHE, lse_BHL = _flash_attn_fwd(
        q_BLHE, k_BSHE, v_BSHE, return_lse=True, out=out_BLD.unflatten(2, (q_BLHE.shape[2], -1))
    )[:2]
    return out_BLHE, lse_BHL


@torch.library.custom_op("newsreel::flash4_backward", mutates_args=())
def flash4_backward(
    q_BLHE: Tensor,
    k_BSHE: Tensor,
    v_BSHE: Tensor,
    out_BLHE: Tensor,
    lse_BHL: Tensor,
    dout_BLHE: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq_BLHE, dk_BSHE, dv_BSHE = _flash_attn_bwd(
        q_BLHE, k_BSHE, v_BSHE, out_BLHE, dout_BLHE, lse_BHL
    )[:3]
    return dq_BLHE, dk_BSHE, dv_BSHE


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout_BLHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *flash4_backward(*ctx.saved_tensors, dout_BLHE), None


flash4_forward.register_autograd(_backward, setup_context=_save_for_backward)
