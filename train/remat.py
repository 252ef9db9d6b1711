"""What a block keeps for the backward pass, and what it computes again (rematerialisation), under a byte budget.

"all" keeps every tensor that autograd asks for, "block" only the inputs of each block, so that its forward pass runs
twice. Between the two lies a budget such as "6GiB": the outputs of the expensive operations are kept, those that save
most time per byte first, in as many blocks as they fit; norms, rotations and GELU are always computed again, because
they cost a pass over memory each and would fill it. Whatever is kept, the gradients are the same bit for bit:
everything random in a block follows from the samples' seeds.

Time saved per byte: a GEMM's output saves 2 K operations for 2 bytes, whatever its width; self-attention's 4 L; cross-
attention's only 4 * 512. So self-attention comes first, the GEMMs next, smallest first, and cross-attention last.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from train.wan import Block, Wan, WanConfig

RunBlock = Callable[..., Tensor] | None
_ORDER = ("attn1", "attn1.out", "attn2.q", "attn2.out", "attn1.qkv", "ffn.up", "attn2.kv", "attn2")
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


def parse_activation_memory(text: str) -> float:
    """Bytes that all blocks together may keep: "all" inf, "block" 0, "6GiB" or "6.5GiB". Raises ValueError."""
    if text in ("all", "block"):
        return float("inf") if text == "all" else 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)GiB", text)
    if match is None:
        raise ValueError(f'activation_memory = "{text}": use "all", "block" or a budget such as "6.5GiB"')
    return float(match.group(1)) * 2**30


def output_bytes(config: WanConfig, num_tokens: int, num_text_tokens: int, dtype_bytes: int) -> dict[str, int]:
    """Per sample, what each expensive operation of one block puts out. Attention's holds a float32 per head and row."""
    row, statistics = config.dim * dtype_bytes, 4 * config.num_attention_heads
    return {"attn1": num_tokens * (row + statistics), "attn1.qkv": num_tokens * 3 * row, "attn1.out": num_tokens * row,
            "attn2": num_tokens * (row + statistics), "attn2.q": num_tokens * row,
            "attn2.kv": num_text_tokens * 2 * row, "attn2.out": num_tokens * row,
            "ffn.up": num_tokens * config.ffn_dim * dtype_bytes}


def choose_kept(sizes: dict[str, int], num_blocks: int, budget_bytes: float) -> list[frozenset[str]]:
    """Per block the operations whose outputs are kept: the best ones first, in as many blocks as the budget allows."""
    kept: list[set[str]] = [set() for _ in range(num_blocks)]
    for name in _ORDER:
        for block in kept:
            if sizes[name] <= budget_bytes:
                block.add(name)
                budget_bytes -= sizes[name]
    return [frozenset(block) for block in kept]


def block_runner(model: Wan, budget_bytes: float) -> RunBlock:
    """The `run_block` of Wan.forward. The plan is made anew for each shape, from the tokens of the micro-batch."""
    if budget_bytes == float("inf"):
        return None
    dtype_bytes = model.patch_embedding.weight.element_size()
    plans: dict[tuple[int, int, int], list[frozenset[str]]] = {}

    def run_block(index: int, block: Block, x_BLD: Tensor, text_BSD: Tensor, *rest: Any) -> Tensor:
        batch, num_tokens, num_text_tokens = *x_BLD.shape[:2], text_BSD.shape[1]
        if (batch, num_tokens, num_text_tokens) not in plans:
            sizes = output_bytes(model.config, num_tokens, num_text_tokens, dtype_bytes)
            plans[batch, num_tokens, num_text_tokens] = choose_kept(sizes, len(model.blocks), budget_bytes / batch)
        kept = plans[batch, num_tokens, num_text_tokens][index]
        contexts = partial(_contexts, block, kept) if kept else noop_context_fn
        out: Tensor = checkpoint(block, x_BLD, text_BSD, *rest, use_reentrant=False, preserve_rng_state=False,
                                 context_fn=contexts)
        return out

    return run_block


def _contexts(block: Block, kept: frozenset[str]) -> Any:
    """The context managers of one checkpoint call, which know an operation by its weight, or by its place."""
    names = {module.weight.data_ptr(): name for name, module in block.named_modules()
             if isinstance(getattr(module, "weight", None), nn.Parameter)}
    attentions = {False: iter(("attn1", "attn2")), True: iter(("attn1", "attn2"))}  # forward, then recomputation

    def policy(context: Any, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        name = None
        if operation in _ATTENTION:
            name = next(attentions[context.is_recompute])
        elif operation == torch.ops.aten.addmm.default:
            name = names.get(arguments[2].data_ptr())
        return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
