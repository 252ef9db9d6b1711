"""What a block saves for the backward pass, and what it computes again (rematerialisation), under
a byte budget. Pure arithmetic: train/activations/runner.py carries the plan out.

"all" saves every tensor that autograd asks for, "block" only the inputs of each block, so that
its forward pass runs twice. Between the two lies a budget such as "6GiB": the outputs of the
expensive operations are saved, those first that save most time per byte, in as many blocks as
they fit. Norms, rotations and GELU are always computed again, because they cost one pass over
memory each and would fill the budget. "auto" takes what the card has left, and saves all if all
fits. Whatever is saved, the gradients are the same, bit for bit with deterministic kernels
(cuDNN's and flash4's attention are not): everything random in a block follows from the samples'
seeds.

Time saved per byte: a GEMM's output saves 2 K operations for 2 bytes, whatever its width;
self-attention's 4 L; cross-attention's only 4 * 512. So self-attention comes first, the GEMMs
next, and cross-attention last. It comes second where its kernel is slow, at less than a third of a
GEMM's rate: torch's memory-efficient kernel and attention from GEMMs, all that V100 has.

The inputs of blocks can wait in the host's memory (train/activations/offload.py), which leaves
room to save more.

With sequence parallelism (train/parallel/sequence.py) a rank has a part of the tokens, and what it
gets from the others in a block's two exchanges can be saved as well. An exchange costs as much per
byte as a GEMM where the cards have PCIe alone, and then little more is in the way of saving it, so
these come before the GEMMs.

The plan is made for all shapes of a run before its first step, because shapes that run as CUDA
graphs keep their memory while the others run.
"""

from collections.abc import Sequence
from typing import NamedTuple

from loader.registered import registered_bytes
from train.activations.sizes import (
    NO_KERNELS,
    Shape,
    block_bytes,
    exchange_bytes,
    kernels_by_tag,
    output_bytes,
)
from train.model.attention import Choice
from train.model.wan import WanConfig

# by tag (train/model/tag.py), best first
_ORDER = (
    "attn1",
    "attn1.to_tokens",
    "attn1.to_heads",
    "attn1.out",
    "attn2.q",
    "attn2.out",
    "attn1.qkv",
    "ffn.up",
    "attn2.kv",
    "attn2",
)
_ORDER_SLOW_ATTENTION = ("attn1", "attn2", *_ORDER[1:-1])
# of the memory, at most, for shapes that run as CUDA graphs beside others that don't
GRAPH_SHARE = 0.25


class ShapePlan(NamedTuple):
    """What to save of one shape."""

    # per block that needs a gradient the operations whose outputs are saved, by tag; None:
    # everything
    saved: list[frozenset[str]] | None
    # what that takes at its peak, with what the block at work and gradients in flight need
    num_bytes: float
    # of the blocks' inputs, where they are offloaded to the host, else 0
    host_bytes: float = 0.0


def slow_attention(kernel: str, dtype_bytes: int) -> bool:
    """Whether this kernel is slow beside GEMMs in this type: float32 has slow GEMMs too."""
    return kernel in ("efficient", "gemm") and dtype_bytes == 2


def choose_saved(
    sizes: dict[str, int], num_blocks: int, budget_bytes: float, cross_first: bool = False
) -> list[frozenset[str]]:
    """Per block the operations whose outputs are saved: the best ones first, in as many blocks as
    the budget allows. `sizes` are bytes by tag, `cross_first` is for slow cross-attention.
    """
    saved: list[set[str]] = [set() for _ in range(num_blocks)]
    for name in _ORDER_SLOW_ATTENTION if cross_first else _ORDER:
        for block in saved:
            if name in sizes and sizes[name] <= budget_bytes:
                block.add(name)
                budget_bytes -= sizes[name]
    return [frozenset(block) for block in saved]


def plan_shape(
    config: WanConfig,
    shape: Shape,
    targets: Sequence[str],
    dtype_bytes: int,
    budget_bytes: float | None,
    room_bytes: float = 0.0,
    attention: Choice = NO_KERNELS,
    offload: bool = False,
    first_block: int = 0,
    weights_move: bool = False,
) -> ShapePlan:
    """What to save of `shape` under a budget, or (`budget_bytes` None) so that all of it fits
    into `room_bytes`.

    `attention`: the kernels that run; with `offload` the inputs of blocks go to the host where not
    all is saved. Blocks before `first_block` need no gradient and save nothing. weights_move:
    weights are on the card only while their block runs (train/placement/), so every block is a
    checkpoint, however much fits.
    """
    block = block_bytes(config, shape, targets, dtype_bytes, attention)
    num_blocks = config.num_layers - first_block
    everything_bytes = num_blocks * block.autograd + block.transient
    everything_fits = budget_bytes is None and everything_bytes <= room_bytes
    everything_fits = everything_fits and not weights_move
    if everything_fits or budget_bytes == float("inf"):
        return ShapePlan(None, everything_bytes)

    offloaded = []
    if offload:
        offloaded.append(block.stream)
        # an adapted ffn.down saves its output, which is the pending residual
        if "ffn.net.2" not in targets:
            offloaded.append(block.pending)
    # the inputs of all blocks, of which those of two at a time stay on the GPU, and the block at
    # work, which has recomputed everything
    inputs_bytes = num_blocks * (block.stream + block.pending)
    inputs_bytes -= max(num_blocks - 2, 0) * sum(offloaded)
    least_bytes = inputs_bytes + block.autograd + block.transient
    if budget_bytes is None:
        budget_bytes = max(room_bytes - least_bytes, 0.0)

    sizes = output_bytes(
        config,
        shape.num_tokens,
        shape.num_text_tokens,
        dtype_bytes,
        attention,
        num_parts=shape.num_parts,
    )
    sizes |= exchange_bytes(config, shape, dtype_bytes)
    saved = choose_saved(
        sizes,
        num_blocks,
        budget_bytes / shape.batch,
        cross_first=slow_attention(kernels_by_tag(shape, attention)["attn2"], dtype_bytes),
    )
    saved_bytes = shape.batch * sum(sizes[name] for names in saved for name in names)
    return ShapePlan(
        saved,
        num_bytes=least_bytes + saved_bytes,
        # the last block's stay on the GPU
        host_bytes=float(sum(registered_bytes((num_blocks - 1) * size) for size in offloaded)),
    )


def plan_run(
    config: WanConfig,
    shapes: Sequence[Shape],
    targets: Sequence[str],
    dtype_bytes: int,
    budget_bytes: float | None,
    room_bytes: float,
    max_graph_tokens: int,
    attention: Choice = NO_KERNELS,
    offload: bool = False,
    first_block: int = 0,
    weights_move: bool = False,
) -> dict[Shape, ShapePlan]:
    """`plan_shape` for every shape of a run; those up to `max_graph_tokens` keep their memory as
    CUDA graphs, where weights don't move.
    """
    assert not (weights_move and max_graph_tokens), "a graph would replay without the copies"
    graphs = [shape for shape in shapes if shape.batch * shape.num_tokens <= max_graph_tokens]
    others = [shape for shape in shapes if shape not in graphs]
    graph_room_bytes = room_bytes * (GRAPH_SHARE if others else 1.0)
    plans = {
        shape: plan_shape(
            config,
            shape,
            targets,
            dtype_bytes,
            budget_bytes,
            graph_room_bytes,
            attention,
            first_block=first_block,
        )
        for shape in graphs
    }
    # graphs share one pool of memory, because they never run at once
    room_bytes -= max((plan.num_bytes for plan in plans.values()), default=0.0)
    for shape in others:
        plans[shape] = plan_shape(
            config,
            shape,
            targets,
            dtype_bytes,
            budget_bytes,
            room_bytes,
            attention,
            offload,
            first_block,
            weights_move,
        )
    return plans


def describe(plan: ShapePlan) -> str:
    """One line for the log."""
    peak = f"{plan.num_bytes / 2**30:.1f} GiB at the peak beside the model, by the plan"
    if plan.saved is None:
        return f"everything is saved, nothing computed again; {peak}"
    counts = {name: sum(name in block for block in plan.saved) for name in _ORDER}
    what = ", ".join(f"{name} of {num}" for name, num in counts.items() if num)
    line = f"of {len(plan.saved)} blocks are saved: {what or 'only their inputs'}"
    if plan.host_bytes:
        line += f"; {plan.host_bytes / 2**30:.1f} GiB of their inputs wait in the host's memory"
    return f"{line}; {peak}"
