"""How attention from GEMMs is cut up, so that its scores fit into a scratch of bounded size: pure
arithmetic on shapes, which the kernels (train/kernels/attention_gemm.py), the activation plan and
tools.plan share.
"""

from typing import NamedTuple

# Twice and half as much differ by 5% (bench/records/2026-11-26_attention_h200.md).
SCRATCH_BYTES = 2**30
# Queries and keys are cut at multiples of this many: whole tiles of a GEMM.
GRAIN = 128
# From so many keys on, rows of logits are shifted (train/kernels/attention_shift.py). Without that,
# at logits of deviation 4, the error is 1.8e-3 at 5,070 keys and 2.0e-3 at 11,440, and 2e-3 is the
# limit; at 7,800 (832x480x17 of A14B) single heads reach 2.2e-3 on a CPU, 0.7e-3 with it. Of short
# rows, as in cross-attention, its copies and samples would take a larger share.
SHIFT_MIN_KEYS = 6144
# It takes so many columns more in q and k.
SHIFT_COLUMNS = 8


class Chunk(NamedTuple):
    """What is worked on at a time: `heads` heads, and of them `queries` rows against `keys`
    columns.
    """

    heads: int
    queries: int
    keys: int


def chunk(
    num_heads: int,
    num_queries: int,
    num_keys: int,
    dtype_bytes: int,
    backward: bool,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Chunk:
    """How to cut one sample's attention so that its scores need at most `scratch_bytes`, or what
    128 rows or columns need if that is more.

    Forward, a softmax needs its whole row, so queries are cut; backward keys, because then only
    dq is a sum over chunks and not both dk and dv.
    """
    element_bytes = dtype_bytes * _num_matrices(backward)
    head_bytes = element_bytes * num_queries * row_stride(num_keys)
    if head_bytes <= scratch_bytes:
        return Chunk(_equal_parts(num_heads, scratch_bytes // head_bytes, 1), num_queries, num_keys)
    if backward:
        most_keys = scratch_bytes // (element_bytes * num_queries)
        return Chunk(1, num_queries, _equal_parts(num_keys, most_keys, GRAIN))
    most_queries = scratch_bytes // (element_bytes * row_stride(num_keys))
    return Chunk(1, _equal_parts(num_queries, most_queries, GRAIN), num_keys)


def row_stride(num_keys: int) -> int:
    """Elements from a row of the scratch to the next: a multiple of 64, because cuBLAS has its
    fast kernels and Triton its wide loads for rows that start at multiples of 16 bytes.
    """
    return -(-num_keys // 64) * 64


def has_shift(num_keys: int) -> bool:
    """Whether rows of so many logits are shifted."""
    return num_keys >= SHIFT_MIN_KEYS


def scores_bytes(part: Chunk, dtype_bytes: int, backward: bool) -> int:
    """What one call allocates for the scores of this chunk."""
    return _num_matrices(backward) * dtype_bytes * part.heads * part.queries * row_stride(part.keys)


def copies_bytes(part: Chunk, num_keys: int, width: int, dtype_bytes: int) -> int:
    """And for wider copies of its q and k, if its rows are shifted: 1% of a scratch of 1 GiB.
    `num_keys`: of all chunks; `width`: of a head.
    """
    rows = part.heads * (part.queries + part.keys) if has_shift(num_keys) else 0
    return dtype_bytes * rows * (width + SHIFT_COLUMNS)


def _num_matrices(backward: bool) -> int:
    """Forward P; backward P and dS."""
    return 2 if backward else 1


def _equal_parts(total: int, most: int, grain: int) -> int:
    """The size of about equal parts of `total`: a multiple of `grain`, at most `most`."""
    most = max(most // grain * grain, grain)
    if total <= most:
        return total
    part = -(-total // -(-total // most))
    return min(-(-part // grain) * grain, most)
