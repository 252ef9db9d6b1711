"""Triton kernels for the work between the GEMMs: each reads and writes every tensor once, in
float32 inside.

Their eager twins stand in train/kernels/pointwise.py, which also chooses: kernels on a GPU, twins
on the CPU. Only elementwise arithmetic and row reductions, so they compile for sm_70 as well; no
tl.dot. One program works on one row of D channels. `rows` are modulation tables [B, 2, D] of
which a token before its sample's boundary uses row 0.

The backward kernels return gradients for activations only: tables, gates and norm weights are
frozen.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.pointwise import Rows, empty_with_spare


@triton.jit
def _row(table, row, length, boundary, stride_b, stride_r, PER_TOKEN: tl.constexpr):
    """Where the modulation row of this token starts."""
    if PER_TOKEN:
        sample = row // length
        late = (row % length) >= tl.load(boundary + sample)
        table += sample * stride_b + late.to(tl.int64) * stride_r
    return table


@triton.jit
def _residual_norm_forward(
    x,
    y,
    gate,
    shift,
    scale,
    boundary,
    x_out,
    h,
    mean_out,
    rstd_out,
    length,
    eps,
    y_stride,
    h_stride,
    gate_b,
    gate_r,
    shift_b,
    shift_r,
    scale_b,
    scale_r,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    ok = d < D
    value = tl.load(x + row * D + d, mask=ok, other=0.0)
    if HAS_Y:
        branch = tl.load(y + row * y_stride + d, mask=ok, other=0.0).to(tl.float32)
        if HAS_GATE:
            branch *= tl.load(
                _row(gate, row, length, boundary, gate_b, gate_r, True) + d, mask=ok, other=0.0
            )
        value += branch
        tl.store(x_out + row * D + d, value, mask=ok)
    mean = tl.sum(value, 0) / D
    centred = tl.where(ok, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    scale_D = tl.load(
        _row(scale, row, length, boundary, scale_b, scale_r, PER_TOKEN) + d, mask=ok, other=0.0
    )
    shift_D = tl.load(
        _row(shift, row, length, boundary, shift_b, shift_r, PER_TOKEN) + d, mask=ok, other=0.0
    )
    tl.store(h + row * h_stride + d, centred * rstd * scale_D + shift_D, mask=ok)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _residual_norm_backward(
    dx_out,
    dh,
    x,
    mean_in,
    rstd_in,
    gate,
    scale,
    boundary,
    dx,
    dy,
    length,
    dh_stride,
    gate_b,
    gate_r,
    scale_b,
    scale_r,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DX_OUT: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    ok = d < D
    mean, rstd = tl.load(mean_in + row), tl.load(rstd_in + row)
    normalised = tl.where(ok, (tl.load(x + row * D + d, mask=ok, other=0.0) - mean) * rstd, 0.0)
    grad = tl.load(dh + row * dh_stride + d, mask=ok, other=0.0).to(tl.float32)
    grad *= tl.load(
        _row(scale, row, length, boundary, scale_b, scale_r, PER_TOKEN) + d, mask=ok, other=0.0
    )
    grad = rstd * (grad - tl.sum(grad, 0) / D - normalised * (tl.sum(grad * normalised, 0) / D))
    if HAS_DX_OUT:
        grad += tl.load(dx_out + row * D + d, mask=ok, other=0.0)
    tl.store(dx + row * D + d, grad, mask=ok)
    if HAS_Y:
        if HAS_GATE:
            grad *= tl.load(
                _row(gate, row, length, boundary, gate_b, gate_r, True) + d, mask=ok, other=0.0
            )
        tl.store(dy + row * D + d, grad, mask=ok)


@triton.jit
def _norm_rope_forward(
    x,
    weight_0,
    weight_1,
    cos,
    sin,
    out,
    rstd_out,
    num_rows,
    length,
    eps,
    x_stride,
    D: tl.constexpr,
    HALF_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Part p = program_id(1) of each row: RMSNorm with weight_p, then rotation of pairs; out is
    [parts, rows, D].
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    ok = d < D
    weight = weight_0 if part == 0 else weight_1
    value = tl.load(x + row * x_stride + part * D + d, mask=ok, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    value *= rstd * tl.load(weight + d, mask=ok, other=0.0)
    if ROPE:
        pair = tl.arange(0, BLOCK // 2)
        angle = (row % length) * HALF_HEAD + pair % HALF_HEAD
        cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
        even, odd = tl.split(tl.reshape(value, (BLOCK // 2, 2)))
        value = tl.reshape(
            tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (BLOCK,)
        )
    tl.store(out + (part * num_rows + row) * D + d, value, mask=ok)
    tl.store(rstd_out + part * num_rows + row, rstd)


@triton.jit
def _norm_rope_backward(
    x,
    weight_0,
    weight_1,
    cos,
    sin,
    rstd_in,
    grad_0,
    grad_1,
    grad_2,
    dx,
    num_rows,
    length,
    x_stride,
    stride_0,
    stride_1,
    stride_2,
    D: tl.constexpr,
    HALF_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    NUM_NORMED: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Parts from NUM_NORMED on pass through: their gradient is copied to its place in dx [rows,
    parts * D].
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    ok = d < D
    start = (
        grad_0 + row * stride_0
        if part == 0
        else (grad_1 + row * stride_1 if part == 1 else grad_2 + row * stride_2)
    )
    grad = tl.load(start + d, mask=ok, other=0.0).to(tl.float32)
    if part < NUM_NORMED:
        if ROPE:
            pair = tl.arange(0, BLOCK // 2)
            angle = (row % length) * HALF_HEAD + pair % HALF_HEAD
            cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
            even, odd = tl.split(tl.reshape(grad, (BLOCK // 2, 2)))
            grad = tl.reshape(
                tl.join(even * cosine + odd * sine, odd * cosine - even * sine), (BLOCK,)
            )
        weight = weight_0 if part == 0 else weight_1
        rstd = tl.load(rstd_in + part * num_rows + row)
        normalised = (
            tl.load(x + row * x_stride + part * D + d, mask=ok, other=0.0).to(tl.float32) * rstd
        )
        grad *= tl.load(weight + d, mask=ok, other=0.0)
        grad = rstd * (grad - normalised * (tl.sum(grad * normalised, 0) / D))
    tl.store(dx + row * (NUM_PARTS * D) + part * D + d, grad, mask=ok)


@triton.jit
def gelu_and_slope(value):
    """tanh GELU of float32 values, and its derivative, by tanh(z) = 2 sigmoid(2 z) - 1: few
    operations, because where GELU rides on another pass they are what that pass waits for.
    """
    square = value * value
    decay = tl.exp2(value * (-2.302208198 - 0.1029432397 * square))  # e^(-2 z), at most inf
    root = tl.rsqrt(1.0 + decay)
    # a division would guard against denominators near float32's limit: five instructions for two
    sigmoid = root * root
    result = value * sigmoid
    return result, sigmoid + (result - result * sigmoid) * (
        1.5957691216057308 + 0.2140644488 * square
    )


@triton.jit
def _gelu(
    u,
    grad,
    out,
    width,
    u_stride,
    grad_stride,
    out_stride,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """tanh GELU of u, or grad times its derivative."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < width
    result, slope = gelu_and_slope(
        tl.load(u + row * u_stride + d, mask=ok, other=0.0).to(tl.float32)
    )
    if BACKWARD:
        result = slope * tl.load(grad + row * grad_stride + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + d, result, mask=ok)


@triton.jit
def _refresh(table, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """A row of `table` is a copy: addresses from and to, elements, width of a row, elements
    between rows, and the bits of a float32 factor. Sizes are multiples of 8 elements, addresses
    of 16 bytes: so a thread moves eight at a time.
    """
    row = table + tl.program_id(1) * 6
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    destination = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(HALF)), 16)
    size, width, stride = tl.load(row + 2), tl.load(row + 3).to(tl.int32), tl.load(row + 4)
    i, lane = (tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)) * 8, tl.arange(0, 8)
    ok = (i < size)[:, None]
    value = tl.load(source + i[:, None] + lane[None, :], mask=ok, other=0.0)
    value *= tl.load(row + 5).to(tl.int32).to(tl.float32, bitcast=True)
    place = tl.multiple_of((i // width) * stride + i % width, 8)
    tl.store(destination + place[:, None] + lane[None, :], value, mask=ok)


def _launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(min(block // 512, 8), 1)}


def _strides(rows: Rows | None) -> tuple[int, int]:
    return (
        (0, 0)
        if rows is None or rows.boundary_B is None
        else (rows.values.stride(0), rows.values.stride(1))
    )


class ResidualNorm(torch.autograd.Function):
    """(x + gate * y, its modulated LayerNorm): see elementwise.residual_norm. One pass forward,
    one backward.
    """

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
        num_spare: int,
    ) -> tuple[Tensor, Tensor]:
        length, dim = x_BLD.shape[1:]
        num_rows = x_BLD.shape[0] * length
        assert x_BLD.is_contiguous() and (y_BLD is None or y_BLD.stride(-1) == 1)
        out_BLD = x_BLD if y_BLD is None else torch.empty_like(x_BLD)
        h_BLD = empty_with_spare(x_BLD, dim, num_spare, dtype)
        mean_M, rstd_M = x_BLD.new_empty(num_rows), x_BLD.new_empty(num_rows)
        boundary_B = scale.boundary_B if gate is None else gate.boundary_B
        _residual_norm_forward[(num_rows,)](
            x_BLD,
            y_BLD,
            None if gate is None else gate.values,
            shift.values,
            scale.values,
            boundary_B,
            out_BLD,
            h_BLD,
            mean_M,
            rstd_M,
            length,
            eps,
            0 if y_BLD is None else y_BLD.stride(1),
            h_BLD.stride(1),
            *_strides(gate),
            *_strides(shift),
            *_strides(scale),
            D=dim,
            HAS_Y=y_BLD is not None,
            HAS_GATE=gate is not None,
            PER_TOKEN=scale.boundary_B is not None,
            **_launch(dim),
        )
        ctx.save_for_backward(out_BLD, mean_M, rstd_M)
        ctx.gate, ctx.scale, ctx.boundary_B = gate, scale, boundary_B
        ctx.y_dtype = None if y_BLD is None else y_BLD.dtype
        ctx.set_materialize_grads(False)
        return out_BLD, h_BLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dx_out, dh = grads
        if not any(ctx.needs_input_grad[:2]) or dh is None:
            assert dh is not None or dx_out is None, "the norm's output is always used"
            return (None,) * 8
        x_BLD, mean_M, rstd_M = ctx.saved_tensors
        length, dim = x_BLD.shape[1:]
        gate, scale = ctx.gate, ctx.scale
        has_y = ctx.y_dtype is not None
        dx_BLD = torch.empty_like(x_BLD)
        dy_BLD = torch.empty_like(x_BLD, dtype=ctx.y_dtype) if has_y else None
        dh_BLD = (
            dh if dh.stride(-1) == 1 and dh.stride(0) == length * dh.stride(1) else dh.contiguous()
        )
        _residual_norm_backward[(mean_M.numel(),)](
            None if dx_out is None else dx_out.contiguous(),
            dh_BLD,
            x_BLD,
            mean_M,
            rstd_M,
            None if gate is None else gate.values,
            scale.values,
            ctx.boundary_B,
            dx_BLD,
            dy_BLD,
            length,
            dh_BLD.stride(1),
            *_strides(gate),
            *_strides(scale),
            D=dim,
            HAS_DX_OUT=dx_out is not None,
            HAS_Y=has_y,
            HAS_GATE=gate is not None,
            PER_TOKEN=scale.boundary_B is not None,
            **_launch(dim),
        )
        return dx_BLD, dy_BLD, None, None, None, None, None, None


class NormRope(torch.autograd.Function):
    """Split x into parts of D, RMSNorm and rotate the first ones: see
    elementwise.split_norm_rope.
    """

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
        _norm_rope_forward[(num_rows, len(weights))](
            x_BLN,
            weights[0],
            weights[-1],
            cos,
            sin,
            out,
            rstd,
            num_rows,
            x_BLN.shape[1],
            eps,
            x_BLN.shape[2],
            D=dim,
            HALF_HEAD=dim // num_heads // 2,
            ROPE=rope is not None,
            **_launch(dim),
        )
        ctx.save_for_backward(x_BLN, rstd)
        ctx.weights, ctx.rope, ctx.num_heads = weights, rope, num_heads
        return (
            *out.unbind(0),
            *(x_BLN[..., i * dim : (i + 1) * dim] for i in range(len(weights), num_parts)),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x_BLN, rstd = ctx.saved_tensors
        length, dim = x_BLN.shape[1], ctx.weights[0].shape[0]
        parts = [
            g if g.stride(-1) == 1 and g.stride(0) == length * g.stride(1) else g.contiguous()
            for g in grads
        ]
        strides = [g.stride(1) for g in parts]
        padded, padded_strides = (parts + parts[:1] * 2)[:3], [*strides, 0, 0][:3]
        cos, sin = ctx.rope if ctx.rope is not None else (None, None)
        dx_BLN = torch.empty_like(x_BLN)
        _norm_rope_backward[(rstd.shape[1], len(parts))](
            x_BLN,
            ctx.weights[0],
            ctx.weights[-1],
            cos,
            sin,
            rstd,
            *padded,
            dx_BLN,
            rstd.shape[1],
            length,
            x_BLN.shape[2],
            *padded_strides,
            D=dim,
            HALF_HEAD=dim // ctx.num_heads // 2,
            ROPE=ctx.rope is not None,
            NUM_NORMED=len(ctx.weights),
            NUM_PARTS=len(parts),
            **_launch(dim),
        )
        return dx_BLN, None, None, None, None


class Gelu(torch.autograd.Function):
    """tanh GELU, the result with spare columns: see elementwise.gelu_tanh."""

    @staticmethod
    def forward(ctx: Any, u_BLK: Tensor, num_spare: int) -> Tensor:
        assert u_BLK.is_contiguous()
        out_BLK = empty_with_spare(u_BLK, u_BLK.shape[2], num_spare, u_BLK.dtype)
        gelu(u_BLK, None, out_BLK)
        ctx.save_for_backward(u_BLK)
        return out_BLK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u_BLK,), grad = ctx.saved_tensors, grads[0]
        grad = (
            grad
            if grad.stride(-1) == 1 and grad.stride(0) == grad.shape[1] * grad.stride(1)
            else grad.contiguous()
        )
        du_BLK = torch.empty_like(u_BLK)
        gelu(u_BLK, grad, du_BLK)
        return du_BLK, None


def gelu(u_BLK: Tensor, grad_BLK: Tensor | None, out_BLK: Tensor) -> None:
    """GELU of u, or with `grad_BLK` u's gradient, into `out_BLK`, which may be `grad_BLK`."""
    num_rows, width = u_BLK.shape[0] * u_BLK.shape[1], u_BLK.shape[2]
    _gelu[(num_rows, triton.cdiv(width, 2048))](
        u_BLK,
        grad_BLK,
        out_BLK,
        width,
        u_BLK.stride(1),
        0 if grad_BLK is None else grad_BLK.stride(1),
        out_BLK.stride(1),
        BLOCK=2048,
        BACKWARD=grad_BLK is not None,
        num_warps=4,
    )


def copy_table(copies: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """What `refresh` copies: (destination, of which rows may lie apart; float32 source; factor).
    Valid as long as these tensors keep their memory. Ranks and widths must be multiples of 8.
    """
    assert all(
        source.is_contiguous()
        and source.dtype == torch.float32
        and destination.stride(1) == 1
        and destination.dtype == copies[0][0].dtype
        for destination, source, _ in copies
    )
    assert all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[1] % 8 == 0 and tensor.stride(0) % 8 == 0
        for destination, source, _ in copies
        for tensor in (destination, source)
    ), "moved 8 at a time"
    factors = torch.tensor([factor for _, _, factor in copies]).view(torch.int32).tolist()
    rows = [
        (
            source.data_ptr(),
            destination.data_ptr(),
            source.numel(),
            source.shape[1],
            destination.stride(0),
            bits,
        )
        for (destination, source, _), bits in zip(copies, factors, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(copies[0][0].device)


def refresh(table: Tensor, max_size: int, dtype: torch.dtype) -> None:
    """All copies of `table`, none of which has more than `max_size` elements, to `dtype` in one
    kernel.
    """
    kind = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]
    _refresh[(triton.cdiv(max_size, 4096), table.shape[0])](
        table, HALF=kind, BLOCK=4096, num_warps=8
    )
