"""The Triton kernels of pointwise_triton.py as autograd functions: shapes, strides, launches.

Shapes: B samples, L tokens, M = B * L rows, D model width, K any width, N = parts * D.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from train.kernels import pointwise_triton as kernels
from train.kernels.layout import Rows, empty_padded, evenly_strided

_GELU_BLOCK = 2048


class _Table(NamedTuple):
    """`Rows` as a kernel takes them: the address of row 0 of sample 0, and the elements from a
    sample and from a row to the next.
    """

    pointer: Tensor | None
    stride_b: int
    stride_r: int


def _table(rows: Rows | None) -> _Table:
    if rows is None:
        return _Table(None, 0, 0)
    if rows.boundary_B is None:
        return _Table(rows.values, 0, 0)
    return _Table(rows.values, rows.values.stride(0), rows.values.stride(1))


def _one_row_per_program(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(min(block // 512, 8), 1)}


class ResidualNorm(torch.autograd.Function):
    """pointwise.residual_norm: one pass forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        y_BLD: Tensor | None,
        gate: Rows | None,
        shift: Rows,
        scale: Rows,
        eps: float,
        dtype: torch.dtype,
        num_padding: int,
    ) -> tuple[Tensor, Tensor]:
        length, dim = x_BLD.shape[1:]
        num_rows = x_BLD.shape[0] * length
        assert x_BLD.is_contiguous() and (y_BLD is None or y_BLD.stride(-1) == 1)
        out_BLD = x_BLD if y_BLD is None else torch.empty_like(x_BLD)
        h_BLD = empty_padded(x_BLD, dim, num_padding, dtype)
        mean_M, rstd_M = x_BLD.new_empty(num_rows), x_BLD.new_empty(num_rows)
        boundary_B = scale.boundary_B if gate is None else gate.boundary_B
        gate_table, shift_table, scale_table = _table(gate), _table(shift), _table(scale)
        kernels.residual_norm_forward[(num_rows,)](
            x=x_BLD,
            y=y_BLD,
            gate=gate_table.pointer,
            shift=shift_table.pointer,
            scale=scale_table.pointer,
            boundary=boundary_B,
            x_out=out_BLD,
            h=h_BLD,
            mean_out=mean_M,
            rstd_out=rstd_M,
            length=length,
            eps=eps,
            y_stride=0 if y_BLD is None else y_BLD.stride(1),
            h_stride=h_BLD.stride(1),
            gate_b=gate_table.stride_b,
            gate_r=gate_table.stride_r,
            shift_b=shift_table.stride_b,
            shift_r=shift_table.stride_r,
            scale_b=scale_table.stride_b,
            scale_r=scale_table.stride_r,
            D=dim,
            HAS_Y=y_BLD is not None,
            HAS_GATE=gate is not None,
            PER_TOKEN=scale.boundary_B is not None,
            **_one_row_per_program(dim),
        )
        ctx.save_for_backward(out_BLD, mean_M, rstd_M)
        ctx.gate, ctx.scale, ctx.boundary_B = gate, scale, boundary_B
        ctx.y_dtype = None if y_BLD is None else y_BLD.dtype
        ctx.set_materialize_grads(False)
        return out_BLD, h_BLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # dx_out is None after the last norm of the model, whose x' nothing reads
        dx_out, dh = grads
        if not any(ctx.needs_input_grad[:2]) or dh is None:
            assert dh is not None or dx_out is None, "the norm's output is always used"
            return (None,) * 8
        x_BLD, mean_M, rstd_M = ctx.saved_tensors
        length, dim = x_BLD.shape[1:]
        has_y = ctx.y_dtype is not None
        dx_BLD = torch.empty_like(x_BLD)
        dy_BLD = torch.empty_like(x_BLD, dtype=ctx.y_dtype) if has_y else None
        dh_BLD = evenly_strided(dh)
        gate_table, scale_table = _table(ctx.gate), _table(ctx.scale)
        kernels.residual_norm_backward[(mean_M.numel(),)](
            dx_out=None if dx_out is None else dx_out.contiguous(),
            dh=dh_BLD,
            x=x_BLD,
            mean_in=mean_M,
            rstd_in=rstd_M,
            gate=gate_table.pointer,
            scale=scale_table.pointer,
            boundary=ctx.boundary_B,
            dx=dx_BLD,
            dy=dy_BLD,
            length=length,
            dh_stride=dh_BLD.stride(1),
            gate_b=gate_table.stride_b,
            gate_r=gate_table.stride_r,
            scale_b=scale_table.stride_b,
            scale_r=scale_table.stride_r,
            D=dim,
            HAS_DX_OUT=dx_out is not None,
            HAS_Y=has_y,
            HAS_GATE=ctx.gate is not None,
            PER_TOKEN=ctx.scale.boundary_B is not None,
            **_one_row_per_program(dim),
        )
        return dx_BLD, dy_BLD, None, None, None, None, None, None


class NormRope(torch.autograd.Function):
    """pointwise.split_norm_rope, of at most 3 parts of which 1 or 2 are normalised."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BLN: Tensor,
        weights: tuple[Tensor, ...],
        rope: tuple[Tensor, Tensor] | None,
        num_heads: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        assert x_BLN.is_contiguous() and 1 <= len(weights) <= 2
        dim = weights[0].shape[0]
        num_rows, num_parts = x_BLN.shape[0] * x_BLN.shape[1], x_BLN.shape[2] // dim
        out = x_BLN.new_empty(len(weights), *x_BLN.shape[:2], dim)
        rstd = torch.empty(len(weights), num_rows, dtype=torch.float32, device=x_BLN.device)
        cos, sin = rope if rope is not None else (None, None)
        kernels.norm_rope_forward[(num_rows, len(weights))](
            x=x_BLN,
            weight_0=weights[0],
            weight_1=weights[-1],
            cos=cos,
            sin=sin,
            out=out,
            rstd_out=rstd,
            num_rows=num_rows,
            length=x_BLN.shape[1],
            eps=eps,
            x_stride=x_BLN.shape[2],
            D=dim,
            HALF_HEAD=dim // num_heads // 2,
            ROPE=rope is not None,
            **_one_row_per_program(dim),
        )
        ctx.save_for_backward(x_BLN, rstd)
        ctx.weights, ctx.rope, ctx.num_heads = weights, rope, num_heads
        unchanged = (x_BLN[..., i * dim : (i + 1) * dim] for i in range(len(weights), num_parts))
        return *out.unbind(0), *unchanged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x_BLN, rstd = ctx.saved_tensors
        length, dim = x_BLN.shape[1], ctx.weights[0].shape[0]
        num_rows, num_parts = rstd.shape[1], len(grads)
        parts = [evenly_strided(grad) for grad in grads]
        strides = [grad.stride(1) for grad in parts]
        # the kernel takes three gradients; it never reads those beyond `num_parts`
        parts += parts[:1] * (3 - num_parts)
        strides += [0] * (3 - num_parts)
        cos, sin = ctx.rope if ctx.rope is not None else (None, None)
        dx_BLN = torch.empty_like(x_BLN)
        kernels.norm_rope_backward[(num_rows, num_parts)](
            x=x_BLN,
            weight_0=ctx.weights[0],
            weight_1=ctx.weights[-1],
            cos=cos,
            sin=sin,
            rstd_in=rstd,
            grad_0=parts[0],
            grad_1=parts[1],
            grad_2=parts[2],
            dx=dx_BLN,
            num_rows=num_rows,
            length=length,
            x_stride=x_BLN.shape[2],
            stride_0=strides[0],
            stride_1=strides[1],
            stride_2=strides[2],
            D=dim,
            HALF_HEAD=dim // ctx.num_heads // 2,
            ROPE=ctx.rope is not None,
            NUM_NORMED=len(ctx.weights),
            NUM_PARTS=num_parts,
            **_one_row_per_program(dim),
        )
        return dx_BLN, None, None, None, None


class Gelu(torch.autograd.Function):
    """pointwise.gelu_tanh."""

    @staticmethod
    def forward(ctx: Any, u_BLK: Tensor, num_padding: int) -> Tensor:
        assert u_BLK.is_contiguous()
        out_BLK = empty_padded(u_BLK, u_BLK.shape[2], num_padding, u_BLK.dtype)
        gelu(u_BLK, None, out_BLK)
        ctx.save_for_backward(u_BLK)
        return out_BLK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u_BLK,) = ctx.saved_tensors
        du_BLK = torch.empty_like(u_BLK)
        gelu(u_BLK, evenly_strided(grads[0]), du_BLK)
        return du_BLK, None


def gelu(u_BLK: Tensor, grad_BLK: Tensor | None, out_BLK: Tensor) -> None:
    """GELU of u, or with `grad_BLK` u's gradient, into `out_BLK`, which may be `grad_BLK`."""
    num_rows, width = u_BLK.shape[0] * u_BLK.shape[1], u_BLK.shape[2]
    kernels.gelu[(num_rows, triton.cdiv(width, _GELU_BLOCK))](
        u=u_BLK,
        grad=grad_BLK,
        out=out_BLK,
        width=width,
        u_stride=u_BLK.stride(1),
        grad_stride=0 if grad_BLK is None else grad_BLK.stride(1),
        out_stride=out_BLK.stride(1),
        BLOCK=_GELU_BLOCK,
        BACKWARD=grad_BLK is not None,
        num_warps=4,
    )
