"""Inputs of blocks that wait for the backward pass in the host's memory, and are back on the GPU a block ahead.

A block that computes again what it has not kept needs its inputs for that: the residual stream in float32 and what the
block before left to be added to it. At 1280x704x49 those of 30 blocks take 5.9 GiB, in which the results of 30 large
GEMMs can be kept instead. They go out over PCIe while the next blocks run, to pinned memory that stays from step to
step, and come back while the block behind them runs backward, on a stream of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Parked:
    """Stands for a tensor in autograd's graph. Those of the last block, needed first, stay where they are."""

    def __init__(self, block: int, host: Tensor, stays: Tensor | None):
        self.block, self.host, self.stays = block, host, stays
        self.coming: tuple[Tensor, torch.cuda.Event | None] | None = None


class HostInputs:
    """For a model of `num_blocks`. One micro-batch at a time: its backward pass before the next forward pass."""

    def __init__(self, num_blocks: int):
        self._num_blocks = num_blocks
        self._host: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._parked: dict[int, list[_Parked]] = {}

    def hooks(self, block: int, inputs: Sequence[Tensor]) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """For torch.autograd.graph.saved_tensors_hooks around block `block`, of which `inputs` are to be parked."""
        places = {tensor.data_ptr(): number for number, tensor in enumerate(inputs)}
        self._parked[block] = []

        def pack(tensor: Tensor) -> Any:
            number = places.get(tensor.data_ptr())
            return tensor if number is None else self._park(block, number, tensor)

        def unpack(packed: Any) -> Tensor:
            return self._back(packed) if isinstance(packed, _Parked) else packed

        return pack, unpack

    def _park(self, block: int, number: int, tensor: Tensor) -> _Parked:
        if block == self._num_blocks - 1:
            return _Parked(block, torch.empty(0), tensor.detach())
        if self._stream is None and tensor.is_cuda:
            self._stream = torch.cuda.Stream(tensor.device)
        if number not in self._host or self._host[number].numel() < self._num_blocks * tensor.nbytes:
            self._host[number] = torch.empty(self._num_blocks * tensor.nbytes, dtype=torch.uint8,
                                             pin_memory=tensor.is_cuda)
        host = self._host[number][block * tensor.nbytes:(block + 1) * tensor.nbytes].view(tensor.dtype)
        parked = _Parked(block, host.view(tensor.shape), None)
        self._copy(parked.host, tensor)
        self._parked[block].append(parked)
        return parked

    def _back(self, parked: _Parked) -> Tensor:
        if parked.stays is not None:
            tensor = parked.stays
        else:
            tensor, arrived = self._fetch(parked)
            parked.coming = None
            if arrived is not None:
                torch.cuda.current_stream(tensor.device).wait_event(arrived)
        for before in self._parked.get(parked.block - 1, ()):
            self._fetch(before)
        return tensor

    def _fetch(self, parked: _Parked) -> tuple[Tensor, torch.cuda.Event | None]:
        if parked.coming is None:
            tensor = torch.empty_like(parked.host, device=self._stream.device if self._stream else "cpu")
            parked.coming = tensor, self._copy(tensor, parked.host)
        return parked.coming

    def _copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Returns the event after it, None on the CPU."""
        if self._stream is None:
            to.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        for tensor in (to, source):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)  # it may be let go of before the copy is done
        return self._stream.record_event()
