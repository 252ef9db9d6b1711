"""Run blocks by an activation plan: torch.utils.checkpoint, the planned operations whose outputs
are saved, and hooks that offload the blocks' inputs.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from train.activations.offload import HostInputs
from train.activations.plan import ShapePlan
from train.activations.saved import contexts
from train.activations.sizes import Shape
from train.model.wan import Block, BlockInputs, RunBlock, Wan

_FLOAT32_BYTES = 4


def block_runner(
    model: Wan, plans: dict[Shape, ShapePlan], first_block: int = 0, num_parts: int = 1
) -> RunBlock:
    """The `run_block` of Wan.forward for micro-batches of these shapes. Blocks before `first_block`
    need no gradient, and are no part of the plans. num_parts: of a sample's tokens, one of which
    passes through. Raises ValueError where the host can't pin what
    the plans offload.
    """
    if all(plan.saved is None for plan in plans.values()):
        return None
    first = model.blocks[first_block]
    assert isinstance(first, Block)
    # an adapted ffn.down saves its output, the next block's pending residual, on the GPU
    offloads_pending = first.ffn.down.num_padding == 0
    host = _host_inputs(model, plans, len(model.blocks) - first_block, offloads_pending)

    def run_block(
        index: int,
        block: Block,
        x_BLD: Tensor,
        pending_BLD: Tensor | None,
        pending_gate_BRD: Tensor | None,
        tables_BR6D: Tensor,
        inputs: BlockInputs,
    ) -> tuple[Tensor, Tensor]:
        plan = plans[Shape(x_BLD.shape[0], x_BLD.shape[1], inputs.text_BSD.shape[1], num_parts)]
        if plan.saved is None or index < first_block:
            # where no input and no parameter needs a gradient, autograd saves nothing
            out: tuple[Tensor, Tensor] = block(
                x_BLD, pending_BLD, pending_gate_BRD, tables_BR6D, inputs
            )
            return out
        saved = plan.saved[index - first_block]
        offloading: AbstractContextManager[Any] = nullcontext()
        if host is not None and plan.host_bytes:
            offloaded = [x_BLD]
            if offloads_pending and pending_BLD is not None:
                offloaded.append(pending_BLD)
            offloading = saved_tensors_hooks(*host.hooks(index - first_block, offloaded))
        # to save ffn.down's output costs nothing unless it is offloaded: as the next block's
        # input it is there anyway
        if not (offloads_pending and plan.host_bytes):
            saved |= {"ffn.down"}
        with offloading:
            out = checkpoint(
                block,
                x_BLD,
                pending_BLD,
                pending_gate_BRD,
                tables_BR6D,
                inputs,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(contexts, saved),
            )
        return out

    return run_block


def _host_inputs(
    model: Wan, plans: dict[Shape, ShapePlan], num_blocks: int, offloads_pending: bool
) -> HostInputs | None:
    """Host memory for the largest shape that offloads, None if none does. num_blocks: of those
    that need a gradient.
    """
    num_tokens = [
        shape.batch * shape.num_tokens for shape, plan in plans.items() if plan.host_bytes
    ]
    if not num_tokens:
        return None
    element_bytes = [_FLOAT32_BYTES]
    if offloads_pending:
        element_bytes.append(model.patch_embedding.weight.element_size())
    num_elements = max(num_tokens) * model.config.dim
    return HostInputs(
        num_blocks,
        [num_elements * size for size in element_bytes],
        model.scale_shift_table.device,
    )
