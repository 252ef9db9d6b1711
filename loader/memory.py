"""Host memory for megabytes a sample: the same over and over, since fresh pages cost more than reading into them."""

import math
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class HostMemory:
    """Tensors in host memory, pinned or not, which is handed out again once nobody holds them or a view of them.

    Each thread has blocks of its own, for they are in its core's cache. Where no idle one is large enough, all idle
    ones are given up for a new one, so that a change of shapes leaves nothing behind.
    """

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._thread = threading.local()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty."""
        if self._pinned:  # torch keeps such memory itself, and knows when a copy is done with it
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        num_bytes = math.prod(shape) * dtype.itemsize
        blocks: list[tuple[Bytes, weakref.ref[Bytes]]] = getattr(self._thread, "blocks", [])
        idle = [block for block, holder in blocks if holder() is None]
        block = next((block for block in reversed(idle) if len(block) >= num_bytes), None)  # the one used last
        blocks = [(other, holder) for other, holder in blocks
                  if other is not block and (block is not None or holder() is not None)]
        if block is None:
            block = np.empty(num_bytes, np.uint8)
        view = block[:num_bytes]  # torch holds it, and it the block, as long as there is a tensor of it
        self._thread.blocks = [*blocks, (block, weakref.ref(view))]
        return torch.from_numpy(view).view(dtype).view(shape)
