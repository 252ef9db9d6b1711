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
    """Tensors in host memory, for a GPU pinned, which is handed out again once no tensor and no
    view of one holds it.

    Each thread has blocks of its own, because they are in its core's cache: as many as were held
    at once. Where no idle one is large enough, all idle ones are freed for a new one, so that
    blocks of a smaller shape don't pile up.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._thread = threading.local()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty."""
        # torch caches pinned memory itself, and knows when a copy is done with it
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        num_bytes = math.prod(shape) * dtype.itemsize
        blocks: list[_Block] = self._thread.__dict__.setdefault("blocks", [])
        large_enough = [
            block for block in blocks if block.is_idle and len(block.memory) >= num_bytes
        ]
        if large_enough:
            block = large_enough[-1]  # the one used last is warmest
            blocks.remove(block)
        else:
            blocks[:] = [block for block in blocks if not block.is_idle]
            block = _Block(num_bytes)
        blocks.append(block)
        return torch.from_numpy(block.lend(num_bytes)).view(dtype).view(shape)

    def for_batch(self, *shape: int) -> Tensor:
        """Float16 on the device: on a CPU the same memory, on a GPU torch's."""
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=torch.float16, device=self._device)
        return self.empty(shape, torch.float16)


class _Block:
    """Memory that is lent to one tensor at a time."""

    def __init__(self, num_bytes: int):
        self.memory: Bytes = np.empty(num_bytes, np.uint8)
        self._lent: weakref.ref[Bytes] | None = None

    @property
    def is_idle(self) -> bool:
        return self._lent is None or self._lent() is None

    def lend(self, num_bytes: int) -> Bytes:
        """Its first bytes. It is idle again once this array, which a tensor made of it holds, is
        freed.
        """
        view = self.memory[:num_bytes]
        self._lent = weakref.ref(view)
        return view
