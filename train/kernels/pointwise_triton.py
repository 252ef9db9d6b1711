"""Triton code of the work between the GEMMs. Each kernel reads and writes every tensor once, and
computes in float32.

The reference implementations are in pointwise.py, the launches in pointwise_launch.py. Only
elementwise arithmetic and row reductions and no tl.dot, so all of it compiles for sm_70 as well.
One program works on one row of D channels. Modulation tables are [B, 2, D], of which a token
before its sample's boundary uses row 0 (layout.Rows).

The backward kernels return gradients for activations only: tables, gates and norm weights are
frozen.
"""

import triton
import triton.language as tl


@triton.jit
def modulation_row(table, row, length, boundary, stride_b, stride_r, PER_TOKEN: tl.constexpr):
    """Where the modulation row of this token starts (layout.Rows)."""
    if PER_TOKEN:
        sample = row // length
        late = (row % length) >= tl.load(boundary + sample)
        table += sample * stride_b + late.to(tl.int64) * stride_r
    return table


@triton.jit
def residual_norm_forward(
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
    # the residual stream, with what is pending added to it
    value = tl.load(x + row * D + d, mask=ok, other=0.0)
    if HAS_Y:
        branch = tl.load(y + row * y_stride + d, mask=ok, other=0.0).to(tl.float32)
        if HAS_GATE:
            branch *= tl.load(
                modulation_row(gate, row, length, boundary, gate_b, gate_r, True) + d,
                mask=ok,
                other=0.0,
            )
        value += branch
        tl.store(x_out + row * D + d, value, mask=ok)
    # LayerNorm in two passes over registers: the variance of centred values does not cancel
    mean = tl.sum(value, 0) / D
    centred = tl.where(ok, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    scale_D = tl.load(
        modulation_row(scale, row, length, boundary, scale_b, scale_r, PER_TOKEN) + d,
        mask=ok,
        other=0.0,
    )
    shift_D = tl.load(
        modulation_row(shift, row, length, boundary, shift_b, shift_r, PER_TOKEN) + d,
        mask=ok,
        other=0.0,
    )
    tl.store(h + row * h_stride + d, centred * rstd * scale_D + shift_D, mask=ok)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit
def residual_norm_backward(
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
        modulation_row(scale, row, length, boundary, scale_b, scale_r, PER_TOKEN) + d,
        mask=ok,
        other=0.0,
    )
    # LayerNorm backward: less the mean of the gradient and its part along the normalised row
    grad = rstd * (grad - tl.sum(grad, 0) / D - normalised * (tl.sum(grad * normalised, 0) / D))
    # plus what reaches x' by the residual stream, if anything used that
    if HAS_DX_OUT:
        grad += tl.load(dx_out + row * D + d, mask=ok, other=0.0)
    tl.store(dx + row * D + d, grad, mask=ok)
    if HAS_Y:
        if HAS_GATE:
            grad *= tl.load(
                modulation_row(gate, row, length, boundary, gate_b, gate_r, True) + d,
                mask=ok,
                other=0.0,
            )
        tl.store(dy + row * D + d, grad, mask=ok)


@triton.jit
def norm_rope_forward(
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
    # RMSNorm over all heads together
    weight = weight_0 if part == 0 else weight_1
    value = tl.load(x + row * x_stride + part * D + d, mask=ok, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    value *= rstd * tl.load(weight + d, mask=ok, other=0.0)
    if ROPE:
        # neighbouring channels are a pair; every head uses the same angles
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
def norm_rope_backward(
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
    # the gradients of the parts are three tensors, each with rows of its own stride
    start = (
        grad_0 + row * stride_0
        if part == 0
        else (grad_1 + row * stride_1 if part == 1 else grad_2 + row * stride_2)
    )
    grad = tl.load(start + d, mask=ok, other=0.0).to(tl.float32)
    if part < NUM_NORMED:
        if ROPE:
            # back by the same angle
            pair = tl.arange(0, BLOCK // 2)
            angle = (row % length) * HALF_HEAD + pair % HALF_HEAD
            cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
            even, odd = tl.split(tl.reshape(grad, (BLOCK // 2, 2)))
            grad = tl.reshape(
                tl.join(even * cosine + odd * sine, odd * cosine - even * sine), (BLOCK,)
            )
        # RMSNorm backward: less the gradient's part along the normalised row
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
    """tanh GELU of float32 values, and its derivative, by tanh(z) = 2 sigmoid(2 z) - 1.

    Few operations: where another kernel applies GELU on its way, it waits for them.
    """
    square = value * value
    decay = tl.exp2(value * (-2.302208198 - 0.1029432397 * square))  # e^(-2 z), at most inf
    root = tl.rsqrt(1.0 + decay)
    # sigmoid = 1 / (1 + decay). A division would also guard against denominators near float32's
    # limit, and take five instructions instead of two
    sigmoid = root * root
    result = value * sigmoid
    return result, sigmoid + (result - result * sigmoid) * (
        1.5957691216057308 + 0.2140644488 * square
    )


@triton.jit
def gelu(
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
    """tanh GELU of u, or (BACKWARD) grad times its derivative."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < width
    result, slope = gelu_and_slope(
        tl.load(u + row * u_stride + d, mask=ok, other=0.0).to(tl.float32)
    )
    if BACKWARD:
        result = slope * tl.load(grad + row * grad_stride + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + d, result, mask=ok)
