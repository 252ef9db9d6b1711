"""Host memory for megabytes a sample: the same over and over, since fresh pages cost more than
reading into them.
"""

import math
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class HostMemory:
    """Tensors in host memory, for a GPU pinned, which is handed out again once nobody holds them
    or a view of them.

    Each thread has blocks of its own, for they are in its core's cache: as many as were held at
    once. Where no idle one is large enough, all idle ones are given up for a new one, so that
    blocks of a smaller shape don't stay behind.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._thread = threading.local()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty."""
        # torch keeps such memory itself, and knows when a copy is done with it
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        num_bytes = math.prod(shape) * dtype.itemsize
        blocks: list[tuple[Bytes, weakref.ref[Bytes]]] = getattr(self._thread, "blocks", [])
        idle = [block for block, holder in blocks if holder() is None]
        # the one used last
        block = next((block for block in reversed(idle) if len(block) >= num_bytes), None)
        blocks = [
            (other, holder)
            for other, holder in blocks
            if other is not block and (block is not None or holder() is not None)
        ]
        if block is None:
            block = np.empty(num_bytes, np.uint8)
        # torch holds it, and it the block, as long as there is a tensor of it
        view = block[:num_bytes]
        self._thread.blocks = [*blocks, (block, weakref.ref(view))]
        return torch.from_numpy(view).view(dtype).view(shape)

    def for_batch(self, *shape: int) -> Tensor:
        """Float16 on the device: on a CPU the same memory, on a GPU torch's."""
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=torch.float16, device=self._device)
        return self.empty(shape, torch.float16)
