"""Where the GEMM weights of a block lie when they are moved as one: one flat buffer a block, so one
copy. Pure arithmetic.

Each matrix lies there as it would on the card: with the adapters' columns behind it where it has
any (train/kernels/layout.py), rows and beginning aligned alike. So a GEMM reads the same
layout whether its weight is resident or not, and gives the same bits.

Biases, norms, tables and adapters are small and stay on the card.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.kernels.layout import round_up, row_stride
from train.model.wan import Block, Projections, WanConfig

# torch's allocator begins each tensor at a multiple of it
_ALIGNMENT_BYTES = 512


class Matrix(NamedTuple):
    """One weight of a block."""

    name: str  # of the parameter in its block, such as "attn1.qkv.weight"
    num_out: int
    width: int
    num_low: int  # columns of the adapters behind it
    first: int  # element of the flat buffer

    @property
    def stride(self) -> int:
        return row_stride(self.width, self.num_low)

    def view(self, flat: Tensor) -> Tensor:
        """W [N, K] in a block's flat buffer."""
        end = self.first + self.num_out * self.stride
        return flat[self.first : end].view(self.num_out, self.stride)[:, : self.width]


class BlockLayout(NamedTuple):
    matrices: tuple[Matrix, ...]
    num_elements: int


def block_layout(
    config: WanConfig, targets: Sequence[str], rank: int, dtype: torch.dtype
) -> BlockLayout:
    """Of a block whose layers `targets` have adapters of `rank`."""
    with torch.device("meta"):
        block = Block(config)
    matrices, first = [], 0
    for name, module in block.named_modules():
        if not isinstance(module, Projections):
            continue
        num_out, width = module.weight.shape
        num_low = rank * sum(layer in targets for layer in module.names)
        matrix = Matrix(f"{name}.weight", num_out, width, num_low, first)
        matrices.append(matrix)
        first = round_up(first + num_out * matrix.stride, _ALIGNMENT_BYTES // dtype.itemsize)
    return BlockLayout(tuple(matrices), first)


def layouts(
    config: WanConfig,
    blocks: Sequence[int],
    adapted: Sequence[int],
    targets: Sequence[str],
    rank: int,
    dtype: torch.dtype,
) -> dict[int, BlockLayout]:
    """Of each of `blocks`; those in `adapted` have adapters."""
    with_adapters = block_layout(config, targets, rank, dtype)
    without = block_layout(config, (), 0, dtype)
    return {index: with_adapters if index in adapted else without for index in blocks}


def spread(num_blocks: int, num_moved: int) -> tuple[int, ...]:
    """Which of the blocks have their weights moved, `num_moved` of them: evenly spread, so that
    what comes for the next one has the time of those between.
    """
    return tuple((2 * i + 1) * num_blocks // (2 * num_moved) for i in range(num_moved))
