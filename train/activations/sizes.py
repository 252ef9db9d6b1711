"""What a block and its backward pass take on a device, in bytes, by the shape of a micro-batch.
Pure arithmetic, for plan.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from train.kernels.attention_chunks import chunk, copies_bytes, has_shift, scores_bytes
from train.model.attention import Choice
from train.model.wan import WanConfig

# the layers of each GEMM of a block, by their names in diffusers
GROUPS = {
    "attn1.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.out": ("attn1.to_out.0",),
    "attn2.q": ("attn2.to_q",),
    "attn2.kv": ("attn2.to_k", "attn2.to_v"),
    "attn2.out": ("attn2.to_out.0",),
    "ffn.up": ("ffn.net.0.proj",),
    "ffn.down": ("ffn.net.2",),
}
_FLOAT32_BYTES = 4
# they put out the layout with padding that an adapted projection needs
_PADDING_KERNELS = ("flash4", "gemm")
NO_KERNELS = Choice("", "", ())


class Shape(NamedTuple):
    """A micro-batch: samples, video tokens and text tokens of each. The video tokens are one of
    `num_parts` equal parts; other ranks have the others.
    """

    batch: int
    num_tokens: int
    num_text_tokens: int
    num_parts: int = 1

    @property
    def num_all_tokens(self) -> int:
        return self.num_tokens * self.num_parts


class BlockBytes(NamedTuple):
    """Of one block and micro-batch."""

    stream: float  # an input: the residual stream, float32
    pending: float  # an input: the pending residual, in the compute dtype
    autograd: float  # what autograd saves when nothing is computed again
    transient: float  # gradients in flight while the block runs backward


def block_bytes(
    config: WanConfig,
    shape: Shape,
    targets: Sequence[str],
    dtype_bytes: int,
    attention: Choice = NO_KERNELS,
) -> BlockBytes:
    """`attention`: the kernels that run."""
    num_elements = shape.batch * shape.num_tokens * config.dim
    return BlockBytes(
        stream=float(_FLOAT32_BYTES * num_elements),
        pending=float(dtype_bytes * num_elements),
        autograd=shape.batch * autograd_bytes(config, shape, targets, dtype_bytes, attention),
        transient=transient_bytes(config, shape, dtype_bytes, attention),
    )


def output_bytes(
    config: WanConfig,
    num_tokens: int,
    num_text_tokens: int,
    dtype_bytes: int,
    attention: Choice = NO_KERNELS,
    num_parts: int = 1,
) -> dict[str, int]:
    """Per sample, what each expensive operation of one block puts out, by tag; num_parts: as in
    Shape.
    """
    row = config.dim * dtype_bytes

    def attention_row(num_queries: int, num_keys: int) -> int:
        # attention saves the logarithm of its sums as well, a float32 per head and row, and GEMMs
        # the shift of the row
        has_column = attention.kernel_for(num_queries, num_keys) == "gemm" and has_shift(num_keys)
        per_head = _FLOAT32_BYTES + (dtype_bytes if has_column else 0)
        return row + per_head * config.num_attention_heads

    # of a part of the heads and all tokens as much as of all heads and a part of the tokens
    all_tokens = num_tokens * num_parts
    return {
        "attn1": num_tokens * attention_row(all_tokens, all_tokens),
        "attn1.qkv": num_tokens * 3 * row,
        "attn1.out": num_tokens * row,
        "attn2": num_tokens * attention_row(num_tokens, num_text_tokens),
        "attn2.q": num_tokens * row,
        "attn2.kv": num_text_tokens * 2 * row,
        "attn2.out": num_tokens * row,
        "ffn.up": num_tokens * config.ffn_dim * dtype_bytes,
    }


def exchange_bytes(config: WanConfig, shape: Shape, dtype_bytes: int) -> dict[str, int]:
    """Per sample, what the exchanges of one block put out, by tag; none without other ranks."""
    if shape.num_parts == 1:
        return {}
    video = shape.num_tokens * config.dim * dtype_bytes
    return {"attn1.to_heads": 3 * video, "attn1.to_tokens": video}


def autograd_bytes(
    config: WanConfig,
    shape: Shape,
    targets: Sequence[str],
    dtype_bytes: int,
    attention: Choice = NO_KERNELS,
) -> float:
    """What autograd saves of one block and sample when nothing is computed again."""
    video = float(shape.num_tokens * config.dim * dtype_bytes)
    text = float(shape.num_text_tokens * config.dim * dtype_bytes)
    # the residual stream before each of the three norms
    total = 3.0 * _FLOAT32_BYTES * shape.num_tokens * config.dim
    # q and k of self-attention and q of cross-attention, after their norms
    total += 3 * video
    # the outputs, but those of the output projections only pass through
    outputs = output_bytes(
        config,
        shape.num_tokens,
        shape.num_text_tokens,
        dtype_bytes,
        attention,
        num_parts=shape.num_parts,
    )
    total += sum(size for name, size in outputs.items() if not name.endswith(".out"))
    # the input of each adapted GEMM, where it is not one of the above: ffn.down saves what GELU
    # reads, and some attention kernels put out the layout that their projection needs
    counted = {"ffn.down"} | {
        f"{name}.out"
        for name, kernel in kernels_by_tag(shape, attention).items()
        if kernel in _PADDING_KERNELS
    }
    if shape.num_parts > 1:
        # v as it comes from the others; q and k are counted, but the attention's output is not
        # what the projection reads
        total += video
        counted.discard("attn1.out")
    for name, layers in GROUPS.items():
        if name not in counted and not set(layers).isdisjoint(targets):
            total += text if name == "attn2.kv" else video
    return total


def transient_bytes(
    config: WanConfig, shape: Shape, dtype_bytes: int, attention: Choice = NO_KERNELS
) -> float:
    """Gradients in flight through one block, at their most: that of the stream, and beside it two
    of the feed-forward's width, or those of attention with the scratch of its kernel. By then what
    the feed-forward has saved is released.
    """
    num_rows = shape.batch * shape.num_tokens
    wide = dtype_bytes * num_rows * config.ffn_dim
    # of the output; of q, k and v, each and as one
    in_attention = 7 * dtype_bytes * num_rows * config.dim
    if shape.num_parts > 1:
        # what is sent and received at a time
        in_attention += 2 * dtype_bytes * num_rows * config.dim
    in_attention += scratch_bytes(config, shape, dtype_bytes, attention) - wide
    return 12.0 * num_rows * config.dim + max(2 * wide, in_attention)


def scratch_bytes(
    config: WanConfig, shape: Shape, dtype_bytes: int, attention: Choice = NO_KERNELS
) -> int:
    """What the attention kernels of a block allocate for themselves at a time: scores and copies
    of q and k, if they are GEMMs.
    """
    all_tokens, num_heads = shape.num_all_tokens, config.num_attention_heads
    parts = {
        "attn1": (num_heads // shape.num_parts, all_tokens, all_tokens),
        "attn2": (num_heads, shape.num_tokens, shape.num_text_tokens),
    }
    sizes = [0]
    for name, kernel in kernels_by_tag(shape, attention).items():
        if kernel == "gemm":
            heads, num_queries, num_keys = parts[name]
            part = chunk(heads, num_queries, num_keys, dtype_bytes, backward=True)
            size = scores_bytes(part, dtype_bytes, backward=True)
            width = config.attention_head_dim
            sizes.append(size + copies_bytes(part, num_keys, width, dtype_bytes))
    return max(sizes)


def kernels_by_tag(shape: Shape, attention: Choice) -> dict[str, str]:
    """The kernel of each attention of a block."""
    return {
        "attn1": attention.kernel_for(shape.num_all_tokens, shape.num_all_tokens),
        "attn2": attention.kernel_for(shape.num_tokens, shape.num_text_tokens),
    }
