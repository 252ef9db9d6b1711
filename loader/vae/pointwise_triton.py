"""The Triton kernel of `loader.vae.pointwise.finish`: it reads and writes every tensor once, in
float32 inside.

One kernel, compiled for what each place in the encoder needs: pointers that are None and constants
in capitals drop the code that they stand for. Only elementwise arithmetic and row reductions, so it
compiles for sm_70 as well; no tl.dot.

A program works on some pixels (R) of one frame of the buffer. The channels (C) of a Wan VAE are 3
or 5 times a power of two, so they are cut into that many PARTS of WIDTH channels. All parts have
one layout: no lane is masked off, the squares of the parts add up elementwise, and the one
reduction that remains stays inside a warp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loader.vae.pending import NORM_EPS, Pending

# pixels x channels of a part in a program: 8 values a thread, one access of 16 bytes in fp16
TILE = 1024
NUM_WARPS = 4


@triton.jit
def _cell_mean(
    source,
    source_bias,
    frame_exists,
    cell_R1,
    channel_1C,
    inside_R1,
    row_width,
    SOURCE_C: tl.constexpr,
    SPACE_FACTOR: tl.constexpr,
):
    """The mean over the SPACE_FACTOR x SPACE_FACTOR pixels of a cell, in the frame that `source`
    points at. `cell_R1` is the cell's first pixel; a frame that doesn't exist is zeros.
    """
    NUM_PIXELS: tl.constexpr = SPACE_FACTOR * SPACE_FACTOR
    exists_R1 = inside_R1 & frame_exists
    offset_RC = cell_R1 * SOURCE_C + channel_1C
    total_RC = tl.load(source + offset_RC, mask=exists_R1, other=0.0).to(tl.float32)
    for j in tl.static_range(1, NUM_PIXELS):
        neighbour = source + (j // SPACE_FACTOR * row_width + j % SPACE_FACTOR) * SOURCE_C
        total_RC += tl.load(neighbour + offset_RC, mask=exists_R1, other=0.0).to(tl.float32)
    total_RC *= 1.0 / NUM_PIXELS
    if source_bias is not None:
        bias_1C = tl.load(source_bias + channel_1C).to(tl.float32)
        total_RC += tl.where(exists_R1, bias_1C, 0.0)
    return total_RC


@triton.jit
def _shortcut(
    source,
    source_bias,
    first_frame,
    pixel_R1,
    inside_R1,
    height,
    width,
    FIRST_C: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCE_C: tl.constexpr,
    TIME_FACTOR: tl.constexpr,
    SPACE_FACTOR: tl.constexpr,
):
    """WIDTH channels of the shortcut, from FIRST_C on: channel TIME_FACTOR * c + t is the mean of
    source channel c in frame t of a cell.

    `source` points at its frame number `first_frame`, which the output frame starts with; frames
    before number 0 are zeros.
    """
    row_width = width * SPACE_FACTOR
    cell_R1 = (pixel_R1 // width * row_width + pixel_R1 % width) * SPACE_FACTOR
    channel_1C = FIRST_C // TIME_FACTOR + tl.arange(0, WIDTH // TIME_FACTOR)[None, :]
    mean_RC = _cell_mean(
        source,
        source_bias,
        first_frame >= 0,
        cell_R1,
        channel_1C,
        inside_R1,
        row_width,
        SOURCE_C,
        SPACE_FACTOR,
    )
    if TIME_FACTOR == 2:
        frame_size = height * SPACE_FACTOR * row_width * SOURCE_C
        next_RC = _cell_mean(
            source + frame_size,
            source_bias,
            first_frame >= -1,
            cell_R1,
            channel_1C,
            inside_R1,
            row_width,
            SOURCE_C,
            SPACE_FACTOR,
        )
        mean_RC = tl.interleave(mean_RC, next_RC)
    return mean_RC


@triton.jit
def _copy(source, target, offset_RC, written_R1, exists):
    value_RC = tl.load(source + offset_RC, mask=written_R1 & exists, other=0.0)
    tl.store(target + offset_RC, value_RC, mask=written_R1)


# sizes differ from chunk to chunk and shape to shape: none is worth a compilation of its own
SIZES = ["frames", "height", "width", "num_past", "past_frames", "source_frames"]


@triton.jit(do_not_specialize=SIZES)
def _finish(
    x,
    bias,
    residual,
    source,
    source_bias,
    gamma,
    past,
    buffer,
    frames,
    height,
    width,
    num_past,
    past_frames,
    source_frames,
    eps,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SOURCE_C: tl.constexpr,
    TIME_FACTOR: tl.constexpr,
    SPACE_FACTOR: tl.constexpr,
    STORES_SUM: tl.constexpr,
    SILU: tl.constexpr,
    PADDING: tl.constexpr,
):
    C: tl.constexpr = PARTS * WIDTH
    slot = tl.program_id(1)
    sample = slot // (num_past + frames)
    frame = slot % (num_past + frames) - num_past
    out_width = width + PADDING
    num_pixels = (height + PADDING) * out_width
    out_R1 = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel_1C = tl.arange(0, WIDTH)[None, :]
    out_RC = out_R1 * C + channel_1C
    written_R1 = out_R1 < num_pixels
    buffer += slot.to(tl.int64) * num_pixels * C
    if frame < 0:
        # one that the convolution remembers; PADDING is 0 wherever there is a past
        if past is not None:
            index = frame + past_frames
            past += (sample * past_frames + index).to(tl.int64) * num_pixels * C
            for i in tl.static_range(PARTS):
                _copy(past, buffer, out_RC + i * WIDTH, written_R1, index >= 0)
    else:
        pixel_R1, inside_R1 = out_R1, written_R1
        if PADDING > 0:
            row_R1, column_R1 = out_R1 // out_width, out_R1 % out_width
            pixel_R1 = row_R1 * width + column_R1
            inside_R1 = (row_R1 < height) & (column_R1 < width)
        in_RC = pixel_R1 * C + channel_1C
        start = (sample * frames + frame).to(tl.int64) * height * width * C
        x += start
        if residual is not None:
            residual += start
        # where a clip's first frame is alone, its partners would lie before the source
        first_frame = frame * TIME_FACTOR - (frames * TIME_FACTOR - source_frames)
        if source is not None:
            frame_size = height * width * SPACE_FACTOR * SPACE_FACTOR * SOURCE_C
            source += (sample * source_frames + first_frame).to(tl.int64) * frame_size

        # the sum, part by part
        parts = ()
        square_RC = tl.zeros([ROWS, WIDTH], tl.float32)
        for i in tl.static_range(PARTS):
            part_RC = tl.load(x + in_RC + i * WIDTH, mask=inside_R1, other=0.0).to(tl.float32)
            if bias is not None:
                part_RC += tl.load(bias + i * WIDTH + channel_1C).to(tl.float32)
            if residual is not None:
                address_RC = residual + in_RC + i * WIDTH
                part_RC += tl.load(address_RC, mask=inside_R1, other=0.0).to(tl.float32)
            if source is not None:
                part_RC += _shortcut(
                    source,
                    source_bias,
                    first_frame,
                    pixel_R1,
                    inside_R1,
                    height,
                    width,
                    i * WIDTH,
                    WIDTH,
                    SOURCE_C,
                    TIME_FACTOR,
                    SPACE_FACTOR,
                )
            # with a shortcut the sum is stored here, without one below: the other way round an H200
            # moves 1.7 for 3.3 TB/s and 0.7 for 3.2 (bench/records/2026-11-27_encode_h200.md)
            if STORES_SUM and source is not None:
                tl.store(x + in_RC + i * WIDTH, part_RC, mask=inside_R1)
            square_RC += part_RC * part_RC
            # Triton knows no unpacking
            parts = parts + (part_RC,)  # type: ignore[assignment]  # noqa: RUF005

        # its norm and SiLU
        if gamma is not None:
            scale_R1 = tl.rsqrt(tl.sum(square_RC, 1) * (1.0 / C) + eps)[:, None]
        for i in tl.static_range(PARTS):
            part_RC = parts[i]
            if STORES_SUM and source is None:
                tl.store(x + in_RC + i * WIDTH, part_RC, mask=inside_R1)
            if gamma is not None:
                gamma_1C = tl.load(gamma + i * WIDTH + channel_1C).to(tl.float32)
                part_RC = part_RC * scale_R1 * gamma_1C
            if SILU:
                # v / (1 + e^-v) with two instructions of the special function unit; a division
                # would take several more
                root_RC = tl.rsqrt(1.0 + tl.exp2(part_RC * -1.4426950408889634))
                part_RC = part_RC * root_RC * root_RC
            if PADDING > 0:
                part_RC = tl.where(inside_R1, part_RC, 0.0)
            tl.store(buffer + out_RC + i * WIDTH, part_RC, mask=written_R1)


def split_channels(num_channels: int) -> tuple[int, int]:
    """(PARTS, WIDTH): their product is the number of channels, and WIDTH a power of two."""
    width = num_channels & -num_channels
    return num_channels // width, width


def finish(
    pending: Pending,
    buffer_BTHWC: Tensor,
    gamma_C: Tensor | None,
    past_BPHWC: Tensor | None,
    silu: bool,
    stores_sum: bool,
) -> None:
    """`loader.vae.pointwise.finish_eager` as one kernel.

    A shortcut must make one output channel of each source channel and frame of a cell, as those
    of every Wan VAE do.
    """
    x_BTHWC, shortcut = pending.x_BTHWC, pending.shortcut
    batch, frames, height, width, channels = x_BTHWC.shape
    slots = buffer_BTHWC.shape[1]
    padding = buffer_BTHWC.shape[2] - height
    assert buffer_BTHWC.shape == (batch, slots, height + padding, width + padding, channels)
    assert slots == frames or (padding == 0 and past_BPHWC is not None)
    source_BTHWC, source_bias_C, time_factor, space_factor = None, None, 1, 1
    if shortcut is not None:
        (source_BTHWC, source_bias_C), time_factor, space_factor = shortcut
        assert source_BTHWC.shape[-1] * time_factor == channels and time_factor <= 2
    for tensor in (x_BTHWC, pending.residual_BTHWC, source_BTHWC, past_BPHWC, buffer_BTHWC):
        assert tensor is None or tensor.is_contiguous()
    num_parts, part_width = split_channels(channels)
    rows = TILE // part_width
    # no two threads may share an element: one would read x after the other has stored the sum
    assert rows * part_width >= 32 * NUM_WARPS
    grid = (triton.cdiv((height + padding) * (width + padding), rows), batch * slots)
    with torch.cuda.device_of(x_BTHWC):
        _finish[grid](
            x_BTHWC,
            pending.bias_C,
            pending.residual_BTHWC,
            source_BTHWC,
            source_bias_C,
            gamma_C,
            past_BPHWC,
            buffer_BTHWC,
            frames,
            height,
            width,
            slots - frames,
            0 if past_BPHWC is None else past_BPHWC.shape[1],
            0 if source_BTHWC is None else source_BTHWC.shape[1],
            NORM_EPS,
            PARTS=num_parts,
            WIDTH=part_width,
            ROWS=rows,
            SOURCE_C=0 if source_BTHWC is None else source_BTHWC.shape[-1],
            TIME_FACTOR=time_factor,
            SPACE_FACTOR=space_factor,
            STORES_SUM=stores_sum,
            SILU=silu,
            PADDING=padding,
            num_warps=NUM_WARPS,
        )
