"""Frozen weights in equal shares on the cards of a run: what FSDP does for weights that are not
trained, without wrapping a parameter.

The slots are filled by all-gather, each card giving its share, instead of by copies from the
host. It is for hosts that have no memory to stream from, and for cards with a fast link between
them. It couples the processes: all have to pass through the model equally often and in the same
order, also where they have different numbers of windows to validate (`MovedWeights.uneven`).

The all-gathers have a communicator of their own. Every process starts them and the sums of the
gradient in the same order, so neither can wait for the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.kernels.layout import round_up
from train.parallel import mesh
from train.parallel.mesh import World
from train.placement.layout import BlockLayout

# a share begins where a copy is fast
_ALIGNMENT_BYTES = 512


class CardShares:
    """The Source of sharded blocks; `layouts` in the order of their places. On all processes
    together. Raises ValueError where there is nobody to share with.
    """

    # everyone keeps a part of everything
    loads = couples = True

    def __init__(self, layouts: Sequence[BlockLayout], dtype: torch.dtype, world: World):
        if world.size == 1:
            raise ValueError(
                'model.placement = "sharded": one process has nobody to share weights with; start '
                'one per GPU with torchrun, or set "streamed"'
            )
        self._world, self._group = world, mesh.new_group()
        self._sizes = [
            round_up(-(-layout.num_elements // world.size), _ALIGNMENT_BYTES // dtype.itemsize)
            for layout in layouts
        ]
        self._shares = [torch.empty(size, dtype=dtype, device=world.device) for size in self._sizes]

    def slot_elements(self, place: int) -> int:
        return self._sizes[place] * self._world.size

    def keep(self, place: int, slot: Tensor) -> None:
        size = self._sizes[place]
        begin = self._world.rank * size
        self._shares[place].copy_(slot[begin : begin + size])

    def loaded(self) -> None:
        pass

    def fill(self, place: int, slot: Tensor) -> None:
        whole = slot[: self.slot_elements(place)]
        mesh.all_gather(whole, self._shares[place], self._group)

    def any_passes(self, passes: bool) -> bool:
        return mesh.maximum(int(passes), self._world) > 0

    def describe(self) -> str:
        num_bytes = sum(share.nbytes for share in self._shares)
        return (
            f"are in {self._world.size} shares on as many cards, {num_bytes / 2**30:.1f} GiB each,"
        )
