"""How many windows the fused encoder takes at a time, and how many frames of each: a function of
the window's shape and of a budget, never of what a card has free.

The batch decides the last bits of a half-precision latent, so it must not depend on the machine.
Memory goes to the first stage, which has the most pixels. While the pass between two of its
convolutions runs, four tensors of that stage stand: the convolution's output, the residual stream,
the next convolution's input and output. Measured on an H200 (1280x704, fp16, 160 channels): 0.269
GiB for each frame more in a chunk and for each image more in a batch, which is these four.
"""

from typing import NamedTuple

from loader.shape import Bucket

NUM_STAGE_TENSORS = 4
# What one window stores between chunks, and the two past frames in each buffer, in frames of a
# chunk. An upper bound: the first stage's convolutions store eight frames of one tensor each,
# those of all later stages together less than that.
PAST_FRAMES = 6
# weights, workspaces and the attention's scores
FIXED_GIB = 1.0
# more images a batch gain nothing (an H200 took 3.35 ms an image in batches of 16, 3.49 of 32)
MAX_BATCH = 16


class EncodePlan(NamedTuple):
    """`batch` windows at a time, `chunk_frames` of their frames after the first at a time."""

    batch: int
    chunk_frames: int


def plan_encoding(
    bucket: Bucket, memory_gib: float, num_bytes_per_pixel: float
) -> EncodePlan | None:
    """The largest chunk that fits into `memory_gib`, and then the largest batch; None if nothing
    does.

    `num_bytes_per_pixel` are those of one tensor of the first stage, for each pixel of a frame
    (`VAEEncoder.stage_bytes_per_pixel`).
    """
    pixels = bucket.width_px * bucket.height_px
    frame_gib = NUM_STAGE_TENSORS * num_bytes_per_pixel * pixels / 2**30
    num_frames = int((memory_gib - FIXED_GIB) / frame_gib)
    if bucket.num_frames == 1:
        batch = min(num_frames, MAX_BATCH)
        return EncodePlan(batch, 4) if batch > 0 else None
    chunk_frames = min(bucket.num_frames - 1, (num_frames - PAST_FRAMES) // 4 * 4)
    if chunk_frames < 4:
        return None
    return EncodePlan(min(num_frames // (chunk_frames + PAST_FRAMES), MAX_BATCH), chunk_frames)
