"""Inputs of blocks that wait for the backward pass in the host's memory, and are back on the GPU
a block ahead.

A block that computes again what it has not kept needs its inputs for that: the residual stream in
float32 and, unless an adapted ffn.down keeps it anyway, what the block before left to be added to
it. At 1280x704x49 those of 30 blocks take 3.9 and 2.0 GiB, in which the results of 30 large GEMMs
can be kept instead. They go out over PCIe while the next blocks run, to pinned memory that stays
from step to step, and come back while the block behind them runs backward, on a stream of their
own. Those of two blocks at a time are on the GPU: whoever lets go of one has waited for its copy,
so that the allocator can hand its memory out again at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Parked:
    """Stands for a tensor in autograd's graph. Those of the last block, needed first, stay where
    they are.
    """

    def __init__(self, pass_: int, block: int, host: Tensor, stays: Tensor | None):
        self.pass_, self.block, self.host, self.stays = pass_, block, host, stays
        self.coming: tuple[Tensor, torch.cuda.Event | None] | None = None


class HostInputs:
    """For a model of `num_blocks`, with room for inputs of so many bytes each (`num_bytes`, in
    their order).

    One micro-batch at a time: its backward pass before the next forward pass. Raises ValueError
    where the host has not that much memory to pin (remat.pinned_bytes of each).
    """

    def __init__(self, num_blocks: int, num_bytes: Sequence[int], device: torch.device):
        self._num_blocks, self._pass = num_blocks, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            self._host = [
                torch.empty(
                    (num_blocks - 1) * size, dtype=torch.uint8, pin_memory=self._stream is not None
                )
                for size in num_bytes
            ]
        except RuntimeError as error:
            sizes = " + ".join(f"{(num_blocks - 1) * size / 2**30:.1f}" for size in num_bytes)
            raise ValueError(
                f"activation_offload: {sizes} GiB of the host's memory, each as the next power of two, "
                f"can't be pinned ({error}); set it to false, or free memory"
            ) from error
        self._parked: dict[int, list[_Parked]] = {}
        self._leaving: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def hooks(
        self, block: int, inputs: Sequence[Tensor]
    ) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """For torch.autograd.graph.saved_tensors_hooks around block `block`, of which `inputs`
        are to be parked.
        """
        if block == 0:
            self._pass += 1
            self._let_go_before(self._num_blocks)
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
            return _Parked(self._pass, block, torch.empty(0), tensor.detach())
        host = self._host[number][block * tensor.nbytes : (block + 1) * tensor.nbytes].view(
            tensor.dtype
        )
        parked = _Parked(self._pass, block, host.view(tensor.shape), None)
        self._leaving.append((block, tensor, self._copy(parked.host, tensor)))
        self._let_go_before(block - 1)
        self._parked[block].append(parked)
        return parked

    def _back(self, parked: _Parked) -> Tensor:
        assert parked.pass_ == self._pass, (
            "the next forward pass has overwritten what this backward pass needs"
        )
        self._let_go_before(self._num_blocks)
        if parked.stays is not None:
            tensor = parked.stays
        else:
            tensor, arrived = self._fetch(parked)
            parked.coming = None
            self._wait_for(arrived)
        for before in self._parked.get(parked.block - 1, ()):
            self._fetch(before)
        return tensor

    def _fetch(self, parked: _Parked) -> tuple[Tensor, torch.cuda.Event | None]:
        if parked.coming is None:
            tensor = torch.empty_like(
                parked.host, device=self._stream.device if self._stream else "cpu"
            )
            parked.coming = tensor, self._copy(tensor, parked.host)
        return parked.coming

    def _copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Returns the event after it, None on the CPU. Neither tensor may be let go of before
        that is waited for.
        """
        if self._stream is None:
            to.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def _let_go_before(self, block: int) -> None:
        while self._leaving and self._leaving[0][0] < block:
            self._wait_for(self._leaving.popleft()[2])

    def _wait_for(self, event: torch.cuda.Event | None) -> None:
        if event is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)
