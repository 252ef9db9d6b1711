"""How attention from GEMMs is cut up, so that its scores fit into a scratch of bounded size: pure
arithmetic on shapes, which the kernels (train/kernels/attention_gemm.py), the activation plan and
tools.plan share.
"""

from typing import NamedTuple

SCRATCH_BYTES = 2**30
# Queries and keys are cut at multiples of this many: whole tiles of a GEMM.
GRAIN = 128
# Scores of fewer queries than this make a poor GEMM.
MIN_TILE = 256


class Chunk(NamedTuple):
    """What is worked on at a time: `heads` heads, and of them `queries` rows against `keys`
    columns. Scores are made for `tile` of these rows at a time, so that the row-wise kernel still
    finds them in the L2 cache; with `tile` = `queries` their place is the result's own.
    """

    heads: int
    queries: int
    keys: int
    tile: int


def chunk(
    num_heads: int,
    num_queries: int,
    num_keys: int,
    dtype_bytes: int,
    backward: bool,
    scratch_bytes: int = SCRATCH_BYTES,
    cache_bytes: int = 0,
) -> Chunk:
    """How to cut one sample's attention so that the results of the row-wise kernels need at most
    `scratch_bytes`, or what 128 rows need if that is more.

    Forward, a softmax needs its whole row, so queries are cut; backward keys, because then only
    dq is a sum over chunks and not both dk and dv. `cache_bytes` is what tiles of scores may take
    of the L2 cache; 0: no tiles.
    """
    element_bytes = dtype_bytes * _num_matrices(backward)
    heads, queries, keys = 1, num_queries, num_keys
    head_bytes = element_bytes * queries * row_stride(keys)
    if head_bytes <= scratch_bytes:
        heads = _equal_parts(num_heads, scratch_bytes // head_bytes, 1)
    elif backward:
        keys = _equal_parts(keys, scratch_bytes // (element_bytes * queries), GRAIN)
    else:
        queries = _equal_parts(queries, scratch_bytes // (element_bytes * row_stride(keys)), GRAIN)
    tile = cache_bytes // (element_bytes * heads * row_stride(keys))
    return Chunk(
        heads, queries, keys, _equal_parts(queries, tile, GRAIN) if tile >= MIN_TILE else queries
    )


def row_stride(num_keys: int) -> int:
    """Elements from a row of the scratch to the next: a multiple of 64, because cuBLAS has its
    fast kernels and Triton its wide loads for rows that start at multiples of 16 bytes.
    """
    return -(-num_keys // 64) * 64


def allocated_bytes(part: Chunk, dtype_bytes: int, backward: bool) -> int:
    """What one call allocates for the scores of this chunk."""
    rows = part.queries + (part.tile if part.tile < part.queries else 0)
    return _num_matrices(backward) * dtype_bytes * part.heads * rows * row_stride(part.keys)


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
