"""What a training step of Wan with LoRA needs: parameters, floating-point operations and bytes
moved, counted from the shapes of its layers.

Attention counts 4 L S dim operations forward (S keys) and 2.5 times that backward, as fused kernels
do it. A GEMM of [M, K] by [K, N] counts 2 M K N.
"""

from collections.abc import Collection
from typing import NamedTuple

from loader.sample import MAX_TEXT_TOKENS
from train.activations.plan import ShapePlan
from train.activations.sizes import GROUPS, Shape, exchange_bytes
from train.model.wan import WanConfig

KERNELS_PER_BLOCK = 70  # forward and backward, at 832x480x9 on an H200
_STREAM_BYTES = 4  # the residual stream is float32


class Layer(NamedTuple):
    """A linear layer of a block. on_video: whether its rows are video tokens, not text tokens."""

    width: int
    num_out: int
    on_video: bool


class GemmFlops(NamedTuple):
    """Operations of one GEMM for one sample, adapters included."""

    forward: float
    backward: float


class Step(NamedTuple):
    """What one sample's forward and backward pass needs; bytes are those moved between the
    GEMMs.
    """

    gemm_flops: float
    # of each attention, by tag
    attention_flops: dict[str, float]
    moved_bytes: float
    num_kernels: float


class Parameters(NamedTuple):
    """Of the frozen base: GEMMs' in the compute dtype, the rest in float32."""

    half: int
    full: int


def layers(config: WanConfig) -> dict[str, Layer]:
    """Every linear layer of a block, by its name in diffusers."""
    dim, ffn_dim = config.dim, config.ffn_dim
    found = {
        f"attn{i}.to_{name}": Layer(dim, dim, on_video=i == 1 or name in ("q", "out.0"))
        for i in (1, 2)
        for name in ("q", "k", "v", "out.0")
    }
    found["ffn.net.0.proj"] = Layer(dim, ffn_dim, on_video=True)
    found["ffn.net.2"] = Layer(ffn_dim, dim, on_video=True)
    return found


def num_parameters(config: WanConfig) -> Parameters:
    """See train/model/load.py for what is held in which dtype."""

    def linear(width: int, num_out: int) -> int:
        return (width + 1) * num_out

    dim, patch = config.dim, 4  # a token is 1 x 2 x 2 latent cells
    block = sum(linear(layer.width, layer.num_out) for layer in layers(config).values())
    patch_embedding = linear(patch * config.in_channels, dim)
    text_embedding = linear(config.text_dim, dim) + linear(dim, dim)
    projection = linear(dim, patch * config.out_channels)
    # four norms of q and k, weight and bias of one norm, and a table of six rows
    block_rows = 12 * dim
    time_embedding = linear(config.freq_dim, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    return Parameters(
        half=config.num_layers * block + patch_embedding + text_embedding + projection,
        full=config.num_layers * block_rows + 2 * dim + time_embedding,
    )


def num_adapter_parameters(
    config: WanConfig, targets: list[str], rank: int, num_adapted: int | None = None
) -> int:
    """num_adapted: blocks with adapters; None: all."""
    num_blocks = config.num_layers if num_adapted is None else num_adapted
    adapted = [layer for name, layer in layers(config).items() if name in targets]
    return num_blocks * rank * sum(layer.width + layer.num_out for layer in adapted)


def gemm_flops(
    config: WanConfig, num_tokens: int, targets: list[str], rank: int, is_first_block: bool
) -> dict[str, GemmFlops]:
    """Per GEMM of a block, for one sample; see train/lora/linear.py for the products.

    The text needs no gradient, nor does the first block's input.
    """
    flops = {}
    for group, names in GROUPS.items():
        members = [layers(config)[name] for name in names]  # they read the same input
        width, on_video = members[0].width, members[0].on_video
        num_out = sum(layer.num_out for layer in members)
        low = rank * sum(name in targets for name in names)
        needs_dx = on_video and not (is_first_block and group == "attn1.qkv")

        # operations per row and pair of (in, out)
        each = 2.0 * (num_tokens if on_video else MAX_TEXT_TOKENS)
        forward = each * (low * width + (width + low) * num_out)  # x A^T, [x | low] [W | B]^T
        backward = each * low * (num_out + width)  # dB = dy^T low, dA = dlow^T x
        backward += each * num_out * low  # dlow = dy B
        if needs_dx:
            backward += each * (low * width + num_out * width)  # dx = dlow A + dy W
        flops[group] = GemmFlops(forward, backward)
    return flops


def attention_flops(config: WanConfig, num_tokens: int, num_parts: int = 1) -> dict[str, float]:
    """Forward operations of a block's two attentions for one sample, or for one of `num_parts`
    equal parts of its tokens (all tokens for a part of the heads).
    """
    return {
        "attn1": 4.0 * num_tokens**2 * num_parts * config.dim,
        "attn2": 4.0 * num_tokens * MAX_TEXT_TOKENS * config.dim,
    }


def step_of(
    config: WanConfig,
    num_tokens: int,
    targets: list[str],
    rank: int,
    dtype_bytes: int,
    activations: ShapePlan,
    first_block: int = 0,
    num_parts: int = 1,
) -> Step:
    """Count one sample, or one of `num_parts` equal parts of it, of `num_tokens` video tokens:
    forward, the backward pass with respect to activations and adapters, and what is recomputed.
    Blocks before `first_block` have no adapters
    and run forward only; those after it count as adapted.
    """
    num_blocks = config.num_layers - first_block
    attention_once = attention_flops(config, num_tokens, num_parts)
    frozen = gemm_flops(config, num_tokens, [], rank, is_first_block=True)
    first = gemm_flops(config, num_tokens, targets, rank, is_first_block=True)
    other = gemm_flops(config, num_tokens, targets, rank, is_first_block=False)
    gemm_total = sum(sum(gemm) for gemm in first.values())
    gemm_total += (num_blocks - 1) * sum(sum(gemm) for gemm in other.values())
    gemm_total += first_block * sum(gemm.forward for gemm in frozen.values())
    attention = {
        name: (first_block + 3.5 * num_blocks) * flops for name, flops in attention_once.items()
    }

    # passes over the rows between the GEMMs, by their width: of the residual stream, of dim in the
    # compute dtype, of the feed-forward
    stream = _STREAM_BYTES * num_tokens * config.dim
    row = dtype_bytes * num_tokens * config.dim
    wide = dtype_bytes * num_tokens * config.ffn_dim
    forward_bytes = _forward_bytes(config, num_tokens, dtype_bytes)
    backward_bytes = 9 * stream + 17 * row + 3 * wide
    moved = config.num_layers * forward_bytes + num_blocks * backward_bytes
    moved += num_blocks * dtype_bytes * num_tokens * _adapter_columns(config, targets)
    # about a third of them run forward
    num_kernels = (num_blocks + 0.3 * first_block) * KERNELS_PER_BLOCK

    if activations.saved is not None:
        for saved in activations.saved:
            for name, flops in attention_once.items():
                attention[name] += flops * (name not in saved)
            # ffn.down's output is saved in any case: it is the next block's input
            gemm_total += sum(
                gemm.forward
                for name, gemm in other.items()
                if name not in saved and name != "ffn.down"
            )
            if "ffn.net.2" in targets:  # but not its x A^T, which B reads
                gemm_total += 2.0 * num_tokens * config.ffn_dim * rank
        moved += num_blocks * forward_bytes
        num_kernels += 0.3 * num_blocks * KERNELS_PER_BLOCK
    return Step(gemm_total, attention, moved, num_kernels)


def forward_of(
    config: WanConfig,
    num_tokens: int,
    targets: list[str],
    rank: int,
    dtype_bytes: int,
    num_parts: int = 1,
) -> Step:
    """Count the forward pass alone of one sample, or of one of `num_parts` equal parts of it, of
    `num_tokens` video tokens.
    """
    gemms = gemm_flops(config, num_tokens, targets, rank, is_first_block=False)
    attention_once = attention_flops(config, num_tokens, num_parts)
    return Step(
        gemm_flops=config.num_layers * sum(gemm.forward for gemm in gemms.values()),
        attention_flops={name: config.num_layers * each for name, each in attention_once.items()},
        moved_bytes=config.num_layers * _forward_bytes(config, num_tokens, dtype_bytes),
        num_kernels=0.3 * config.num_layers * KERNELS_PER_BLOCK,
    )


def _forward_bytes(config: WanConfig, num_tokens: int, dtype_bytes: int) -> float:
    """Moved between the GEMMs of a block: three norms, q/k/v, q, GELU."""
    stream = _STREAM_BYTES * num_tokens * config.dim
    row = dtype_bytes * num_tokens * config.dim
    wide = dtype_bytes * num_tokens * config.ffn_dim
    return 6 * stream + 12 * row + 2 * wide


def exchanged_bytes(
    config: WanConfig,
    shape: Shape,
    targets: Collection[str],
    dtype_bytes: int,
    activations: ShapePlan,
    first_block: int = 0,
) -> float:
    """What a rank sends to those that share its samples, for one micro-batch: forward, backward,
    and where it is done again.
    """
    sizes = exchange_bytes(config, shape, dtype_bytes)
    num_blocks = config.num_layers - first_block
    # the first block's q, k and v need no gradient if nothing of them is adapted
    needs_gradient = not set(GROUPS["attn1.qkv"]).isdisjoint(targets)
    num_backward = num_blocks if needs_gradient else num_blocks - 1
    total = sum(sizes.values()) * float(config.num_layers + num_backward)
    for saved in activations.saved or ():
        total += sum(size for name, size in sizes.items() if name not in saved)
    # what it would send to itself stays
    return shape.batch * total * (shape.num_parts - 1) / shape.num_parts


def forward_exchanged_bytes(config: WanConfig, shape: Shape, dtype_bytes: int) -> float:
    """Of `exchanged_bytes` those of the forward pass."""
    sizes = exchange_bytes(config, shape, dtype_bytes)
    each = float(shape.batch * config.num_layers * sum(sizes.values()))
    return each * (shape.num_parts - 1) / shape.num_parts


def _adapter_columns(config: WanConfig, targets: list[str]) -> int:
    """Columns that the narrow products of a block's adapters read or write, per video token: x
    twice, the low-rank part of dx twice, dy once (twice on a V100).
    """
    num_columns = 0
    for names in GROUPS.values():
        layer = layers(config)[names[0]]
        if layer.on_video and not set(names).isdisjoint(targets):
            num_columns += 4 * layer.width + len(names) * layer.num_out
    return num_columns
