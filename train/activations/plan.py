"""What a block keeps for the backward pass, and what it computes again (rematerialisation), under
a byte budget.

"all" keeps every tensor that autograd asks for, "block" only the inputs of each block, so that
its forward pass runs twice. Between the two lies a budget such as "6GiB": the outputs of the
expensive operations are kept, those that save most time per byte first, in as many blocks as they
fit; norms, rotations and GELU are always computed again, because they cost a pass over memory
each and would fill it. "auto" takes what the card has left, and keeps all if all fits. Whatever
is kept, the gradients are the same, bit for bit with deterministic kernels (cuDNN's and flash4's
attention are not): everything random in a block follows from the samples' seeds.

Time saved per byte: a GEMM's output saves 2 K operations for 2 bytes, whatever its width;
self-attention's 4 L; cross- attention's only 4 * 512. So self-attention comes first, the GEMMs
next, and cross-attention last; but second where attention is slow, less than a third of a GEMM's
rate: torch's memory-efficient kernel, all that V100 has.

The inputs of blocks can wait in the host's memory (train/activations/offload.py), which leaves
room to keep more.

The plan is made for all shapes of a run before its first step, because shapes that run as CUDA
graphs keep their memory while the others run.
"""

import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from loader.shape import Bucket
from train.activations.offload import HostInputs
from train.model.wan import Block, RunBlock, Wan, WanConfig

_ORDER = ("attn1", "attn1.out", "attn2.q", "attn2.out", "attn1.qkv", "ffn.up", "attn2.kv", "attn2")
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.newsreel.flash4_forward.default,  # train/model/attention.py
}
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
# of the memory, at most, for shapes that run as CUDA graphs beside others that don't
GRAPH_SHARE = 0.25


class Shape(NamedTuple):
    """A micro-batch: samples, video tokens and text tokens of each."""

    batch: int
    num_tokens: int
    num_text_tokens: int


class Kept(NamedTuple):
    """Per block the operations whose outputs are kept, or None: everything. `num_bytes`: what
    that takes at its peak, with what the block at work and the gradients on their way need.
    `host_bytes`: of the blocks' inputs, where they wait in the host's memory, else 0.
    """

    blocks: list[frozenset[str]] | None
    num_bytes: float
    host_bytes: float = 0.0


def parse_activation_memory(text: str) -> float | None:
    """Bytes that all blocks together may keep: "all" inf, "block" 0, "6GiB" or "6.5GiB", "auto"
    None.

    Raises ValueError.
    """
    if text in ("all", "block", "auto"):
        return {"all": float("inf"), "block": 0.0, "auto": None}[text]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)GiB", text)
    if match is None:
        raise ValueError(
            f'activation_memory = "{text}": use "auto", "all", "block" or a budget such as "6.5GiB"'
        )
    return float(match.group(1)) * 2**30


def output_bytes(
    config: WanConfig, num_tokens: int, num_text_tokens: int, dtype_bytes: int
) -> dict[str, int]:
    """Per sample, what each expensive operation of one block puts out. Attention's holds a
    float32 per head and row.
    """
    row, statistics = config.dim * dtype_bytes, 4 * config.num_attention_heads
    return {
        "attn1": num_tokens * (row + statistics),
        "attn1.qkv": num_tokens * 3 * row,
        "attn1.out": num_tokens * row,
        "attn2": num_tokens * (row + statistics),
        "attn2.q": num_tokens * row,
        "attn2.kv": num_text_tokens * 2 * row,
        "attn2.out": num_tokens * row,
        "ffn.up": num_tokens * config.ffn_dim * dtype_bytes,
    }


def autograd_bytes(
    config: WanConfig, shape: Shape, targets: Sequence[str], dtype_bytes: int, attention: str = ""
) -> float:
    """What autograd keeps of one block and sample when nothing is computed again: the residual
    stream before each norm, q, k and q of cross-attention after theirs, what `output_bytes`
    counts (the output projections' results only pass through), and the input of each adapted
    GEMM, which flash4's attention has put out in the layout that one needs.
    """
    row = shape.num_tokens * config.dim * dtype_bytes
    sizes = output_bytes(config, shape.num_tokens, shape.num_text_tokens, dtype_bytes)
    total = 3.0 * 4 * shape.num_tokens * config.dim + 3 * row
    total += sum(size for name, size in sizes.items() if not name.endswith(".out"))
    for name, layers in GROUPS.items():
        # ffn.down keeps what GELU reads
        shared = name == "ffn.down" or (name, attention) == ("attn1.out", "flash4")
        if not set(layers).isdisjoint(targets) and not shared:
            total += (
                (shape.num_text_tokens if name == "attn2.kv" else shape.num_tokens)
                * config.dim
                * dtype_bytes
            )
    return total


def transient_bytes(config: WanConfig, shape: Shape, dtype_bytes: int) -> float:
    """Gradients on their way through one block and sample, at their most: that of the stream, and
    two of the feed-forward's width.
    """
    return shape.num_tokens * (12.0 * config.dim + 2 * dtype_bytes * config.ffn_dim)


def slow_attention(name: str, dtype_bytes: int) -> bool:
    """Whether this kernel is slow beside GEMMs in this type: float32 has slow GEMMs too."""
    return name == "efficient" and dtype_bytes == 2


def choose_kept(
    sizes: dict[str, int], num_blocks: int, budget_bytes: float, cross_first: bool = False
) -> list[frozenset[str]]:
    """Per block the operations whose outputs are kept: the best ones first, in as many blocks as
    the budget allows.
    """
    kept: list[set[str]] = [set() for _ in range(num_blocks)]
    for name in ("attn1", "attn2", *_ORDER[1:-1]) if cross_first else _ORDER:
        for block in kept:
            if sizes[name] <= budget_bytes:
                block.add(name)
                budget_bytes -= sizes[name]
    return [frozenset(block) for block in kept]


def plan_shape(
    config: WanConfig,
    shape: Shape,
    targets: Sequence[str],
    dtype_bytes: int,
    budget_bytes: float | None,
    room_bytes: float = 0.0,
    attention: str = "",
    offload: bool = False,
) -> Kept:
    """What to keep of `shape` under a budget, or (`budget_bytes` None) so that all of it fits
    into `room_bytes`.

    `attention` is the kernel's name; with `offload` the inputs of blocks go to the host where not
    all is kept.
    """
    batch, blocks = shape.batch, config.num_layers
    one_block = autograd_bytes(config, shape, targets, dtype_bytes, attention)
    stream, row = (size * shape.num_tokens * config.dim for size in (4.0, dtype_bytes))
    at_work = batch * transient_bytes(config, shape, dtype_bytes)
    everything = Kept(None, batch * blocks * one_block + at_work)
    leave = (stream if offload else 0.0) + (row if offload and "ffn.net.2" not in targets else 0.0)
    inputs = batch * (blocks * (stream + row) - max(blocks - 2, 0) * leave + one_block) + at_work
    if budget_bytes is None:
        budget_bytes = (
            float("inf") if everything.num_bytes <= room_bytes else max(room_bytes - inputs, 0.0)
        )
    if budget_bytes == float("inf"):
        return everything
    sizes = output_bytes(config, shape.num_tokens, shape.num_text_tokens, dtype_bytes)
    kept = choose_kept(sizes, blocks, budget_bytes / batch, slow_attention(attention, dtype_bytes))
    return Kept(
        kept,
        inputs + batch * sum(sizes[name] for block in kept for name in block),
        sum(
            pinned_bytes(batch * (blocks - 1) * size) for size in (stream, leave - stream) if leave
        ),
    )


def pinned_bytes(num_bytes: float) -> float:
    """What torch takes of the host for that much pinned memory: the next power of two, by its
    source; not measured.
    """
    return 2.0 ** math.ceil(math.log2(num_bytes)) if num_bytes > 0 else 0.0


def plan_run(
    config: WanConfig,
    shapes: Sequence[Shape],
    targets: Sequence[str],
    dtype_bytes: int,
    budget_bytes: float | None,
    room_bytes: float,
    max_graph_tokens: int,
    attention: str = "",
    offload: bool = False,
) -> dict[Shape, Kept]:
    """`plan_shape` for every shape of a run; those up to `max_graph_tokens` keep their memory as
    CUDA graphs.
    """
    graphs = [shape for shape in shapes if shape.batch * shape.num_tokens <= max_graph_tokens]
    others = [shape for shape in shapes if shape not in graphs]
    plans = {
        shape: plan_shape(
            config,
            shape,
            targets,
            dtype_bytes,
            budget_bytes,
            room_bytes * (GRAPH_SHARE if others else 1.0),
            attention,
        )
        for shape in graphs
    }
    room_bytes -= max((plan.num_bytes for plan in plans.values()), default=0.0)
    return plans | {
        shape: plan_shape(
            config, shape, targets, dtype_bytes, budget_bytes, room_bytes, attention, offload
        )
        for shape in others
    }


def room_bytes(device: torch.device) -> float:
    """What this process can still take on a GPU, less a twentieth for what does not fit exactly.

    Raises ValueError on a CPU."""
    if device.type != "cuda":
        raise ValueError(
            'activation_memory = "auto" asks the GPU how much is free; on a CPU use "block" or "all"'
        )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    capped = torch.cuda.get_per_process_memory_fraction(
        device
    ) * total - torch.cuda.memory_reserved(device)
    return 0.95 * min(free, capped)


def raw_bytes(buckets: Sequence[Bucket], clips: bool) -> float:
    """An allowance, not measured, for condition = "raw": DALI, and eight activations of the VAE
    at its widest (160 channels at half the size) of one frame, or of the 16 that a clip is worked
    off in.
    """
    num_pixels = max(bucket.width_px * bucket.height_px for bucket in buckets)
    return 2.0**30 + 8 * (16 if clips else 1) * 160 * 2 * num_pixels / 4


def describe(config: WanConfig, kept: Kept) -> str:
    """One line for the log."""
    if kept.blocks is None:
        what = "everything is kept, nothing computed again"
    else:
        counts = {name: sum(name in block for block in kept.blocks) for name in _ORDER}
        what = (
            ", ".join(f"{name} of {num}" for name, num in counts.items() if num)
            or "only their inputs"
        )
        what = f"of {config.num_layers} blocks are kept: {what}"
        if kept.host_bytes:
            what += f"; {kept.host_bytes / 2**30:.1f} GiB of their inputs wait in the host's memory"
    return f"{what}; {kept.num_bytes / 2**30:.1f} GiB at the peak beside the model, by the plan"


def block_runner(model: Wan, plans: dict[Shape, Kept]) -> RunBlock:
    """The `run_block` of Wan.forward."""
    if all(plan.blocks is None for plan in plans.values()):
        return None
    first = model.blocks[0]
    assert isinstance(first, Block)
    left_too = first.ffn.down.num_spare == 0  # an adapted ffn.down needs it kept, as its own output
    most = max(
        (shape.batch * shape.num_tokens for shape, plan in plans.items() if plan.host_bytes),
        default=0,
    )
    dtype_bytes = model.patch_embedding.weight.element_size()
    host = (
        HostInputs(
            model.config.num_layers,
            [most * model.config.dim * size for size in (4, *([dtype_bytes] if left_too else []))],
            model.scale_shift_table.device,
        )
        if most
        else None
    )

    def run_block(
        index: int,
        block: Block,
        x_BLD: Tensor,
        left_BLD: Tensor | None,
        left_gate_BRD: Tensor | None,
        text_BSD: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        inputs = (x_BLD, left_BLD, left_gate_BRD, text_BSD, *rest)
        plan = plans[Shape(x_BLD.shape[0], x_BLD.shape[1], text_BSD.shape[1])]
        if plan.blocks is None:
            out: tuple[Tensor, Tensor] = block(*inputs)
            return out
        parked = [x_BLD, *([left_BLD] if left_too and left_BLD is not None else [])]
        # ffn.down's output costs nothing where it is kept anyway: it is the next block's input
        kept = plan.blocks[index] | (set() if left_too and plan.host_bytes else {"ffn.down"})
        with (
            saved_tensors_hooks(*host.hooks(index, parked))
            if host and plan.host_bytes
            else nullcontext()
        ):
            out = checkpoint(
                block,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(_contexts, block, kept),
            )
        return out

    return run_block


def _contexts(block: Block, kept: frozenset[str]) -> Any:
    """The context managers of one checkpoint call, which know an operation by its bias, or by its
    place.
    """
    names = {
        module.bias.data_ptr(): name
        for name, module in block.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
    }
    # forward, then recomputation
    attentions = {False: iter(("attn1", "attn2")), True: iter(("attn1", "attn2"))}

    def policy(context: Any, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        name = None
        if operation in _ATTENTION:
            name = next(attentions[context.is_recompute])
        elif operation == torch.ops.aten.addmm.default:
            name = names.get(arguments[0].data_ptr())
        return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
