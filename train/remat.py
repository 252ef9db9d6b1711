"""What a block keeps for the backward pass, and what it computes again (rematerialisation).

"all": every tensor that autograd asks for. "block": the inputs of each block only, so that the forward pass of a block
runs twice. Both give the same gradients bit for bit: everything random in a block follows from the samples' seeds.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RunBlock = Callable[..., Tensor] | None


def block_runner(activation_memory: Literal["block", "all"]) -> RunBlock:
    """The `run_block` of train.wan.Wan.forward."""
    return _recomputed if activation_memory == "block" else None


def _recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out
