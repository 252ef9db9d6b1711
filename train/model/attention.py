"""Which attention kernel runs: chosen once, by name, logged, and never switched behind anyone's
back.

V100 (sm_70) has only torch's memory-efficient kernel; Ampere adds flash; on Hopper cuDNN's is the
fastest in torch, and the package flash-attn-4 (extra `flash4`) is faster still where there are
many keys. Forward and backward at 11,440 tokens, 24 x 128, bf16, one H200: flash4 9.3 ms, cuDNN
10.7, flash 18.1; fp16 efficient 42. With the 512 keys of cross-attention cuDNN takes 0.83 ms and
flash4 0.95, so "flash4" leaves cross-attention to cuDNN.
"""

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.kernels.layout import empty_padded

Attention = Callable[..., Tensor]  # (q, k, v, num_padding = 0): see choose_attention
AttentionName = Literal["auto", "flash4", "cudnn", "flash", "efficient", "math"]
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MANY_KEYS = 1024  # from here on flash4's share of "flash4"


def choose_attention(
    name: AttentionName, device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> tuple[str, Attention]:
    """(the name of the kernel, attention(q, k, v) -> out), all [B, H, L, E], no mask.
    `deterministic` leaves out the kernels whose backward pass gives other bits each time,
    whatever torch is told: flash4 and cuDNN.

    `attention(q, k, v, num_padding)` asks for so many free columns behind the output's rows of [B,
    L, H * E], which only flash4 grants: see train/lora/linear.py.

    Raises ValueError for a kernel that can't run here: it never becomes another one.
    """
    if name == "auto":
        name = _best(device, dtype, deterministic)
    if deterministic and name in ("flash4", "cudnn"):
        raise ValueError(
            f'model.attention = "{name}" gives other bits each time: with deterministic = true use '
            f'"flash", "efficient" or "auto"'
        )
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        raise ValueError(
            f"model.dtype = bfloat16: {torch.cuda.get_device_name(device)} would emulate it, many times "
            f'slower; set model.dtype = "float16"'
        )
    if name == "flash4" and not _has_flash4(device, dtype):
        raise ValueError(
            f'model.attention = "flash4" needs the package flash-attn-4 (the extra flash4), a Hopper GPU '
            f'and float16 or bfloat16, not {dtype} on {device.type}; set "auto" or "cudnn"'
        )
    backend = _BACKENDS["cudnn" if name == "flash4" else name]

    def attention(q: Tensor, k: Tensor, v: Tensor, num_padding: int = 0) -> Tensor:
        if name == "flash4" and k.shape[2] >= MANY_KEYS:
            out: Tensor = flash4_forward(*(x.transpose(1, 2) for x in (q, k, v)), num_padding)[
                0
            ].transpose(1, 2)
            return out
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    try:
        with warnings.catch_warnings(action="ignore"):  # in which torch says why not
            # as with text
            attention(
                *torch.zeros(3, 1, 24, 512, 128, device=device, dtype=dtype, requires_grad=True)
            )
    except RuntimeError as error:
        raise ValueError(
            f'model.attention = "{name}" can\'t run in {dtype} on this {device.type} ({error}); set '
            f'"auto"'
        ) from error
    return name, attention


def _best(device: torch.device, dtype: torch.dtype, deterministic: bool) -> AttentionName:
    if device.type == "cpu":
        return "flash"
    if dtype == torch.float32:
        return "efficient"
    if _has_flash4(device, dtype) and not deterministic:
        return "flash4"
    major, _ = torch.cuda.get_device_capability(device)
    return "cudnn" if major >= 9 and not deterministic else "flash" if major >= 8 else "efficient"


def _has_flash4(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        version("flash-attn-4")  # flash-attn 2 has the same module name
    except PackageNotFoundError:
        return False
    return (
        device.type == "cuda"
        and dtype != torch.float32
        and torch.cuda.get_device_capability(device)[0] == 9
    )


# Operations of torch's own, so that train/activations/runner.py can tell them from others and save
# what they put out. The package's public function is an autograd function, which hides them; the
# pair below it is pinned in configs/env/hopper.txt.


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


def _keep_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout_BLHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *flash4_backward(*ctx.saved_tensors, dout_BLHE), None


flash4_forward.register_autograd(_backward, setup_context=_keep_for_backward)

# what calls attention, in the forward pass: the activation plan may save their outputs
OPERATIONS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.newsreel.flash4_forward.default,
}
