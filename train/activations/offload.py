"""Inputs of blocks that wait for the backward pass in the host's memory.

A block that is recomputed needs its inputs for that: the residual stream in float32 and, unless
an adapted ffn.down saves it anyway, the pending residual of the block before. At 1280x704x49
those of 30 blocks take 3.9 and 2.0 GiB, in which the results of 30 large GEMMs can be saved
instead.

The copies run on a stream of their own. While the next blocks run forward, the inputs go over
PCIe to pinned memory, which is allocated once. While a block runs backward, those of the block
before it come back. So the inputs of two blocks at a time are on the GPU. A tensor is released
only after the stream of the computation has waited for its copy: the allocator can then hand its
memory out again at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loader.host_memory import available_bytes
from loader.registered import RegisteredMemory, check_available, processes_here
from train.activations.plan import ShapePlan
from train.parallel import mesh
from train.parallel.mesh import World


def check_host_memory(plans: Iterable[ShapePlan], world: World) -> None:
    """Has this host what all of its processes pin? Nobody takes any before everybody has looked.
    All processes call it. Raises ValueError.
    """
    if world.device.type != "cuda":
        return
    # by the card with the least room: where another one has room for all, it offloads nothing, and
    # would not come to the barrier
    host_bytes = mesh.maximum(int(max(plan.host_bytes for plan in plans)), world)
    if host_bytes:
        check_available(host_bytes, processes_here(), available_bytes())
        mesh.barrier(world)


class CopyStream:
    """Copies between host and GPU beside the computation; on the CPU they happen at once.

    Neither tensor of a copy may be released before `wait_for` its event, or overwritten.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, destination: Tensor, source: Tensor) -> Any:
        """Start a copy of what the computation has written so far; returns its event."""
        return self.run(lambda: destination.copy_(source, non_blocking=True))

    def run(self, work: Callable[[], Any]) -> Any:
        """Start `work` after what the computation has started so far; returns its event."""
        if self._stream is None:
            work()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        return self._stream.record_event()

    def wait_for(self, event: Any) -> None:
        """Let the computation's stream wait; the host does not."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Outgoing(NamedTuple):
    """A tensor that is held until its copy to the host is done."""

    block: int
    tensor: Tensor
    copied: Any  # the event of its copy


class _Incoming(NamedTuple):
    tensor: Tensor
    copied: Any


class _Offloaded:
    """Stands for a tensor in autograd's graph.

    `resident` is the tensor itself where it stays on the GPU: that of the last block, which the
    backward pass needs first.
    """

    def __init__(self, forward_pass: int, block: int, host: Tensor, resident: Tensor | None):
        self.forward_pass, self.block = forward_pass, block
        self.host, self.resident = host, resident
        self.incoming: _Incoming | None = None


class HostInputs:
    """Host memory for the inputs of `num_blocks` blocks: `num_bytes` gives the size of each of a
    block's inputs, in their order.

    One micro-batch at a time: its backward pass comes before the next forward pass. Raises
    ValueError where the host has not that much memory to pin (loader/registered.py).
    """

    def __init__(
        self,
        num_blocks: int,
        num_bytes: Sequence[int],
        device: torch.device,
        copies: CopyStream | None = None,
    ):
        self._num_blocks, self._device, self._forward_pass = num_blocks, device, 0
        self._copies = CopyStream(device) if copies is None else copies
        try:
            self._memory = [RegisteredMemory((num_blocks - 1) * size, device) for size in num_bytes]
        except (RuntimeError, OSError, MemoryError) as error:
            sizes = " + ".join(f"{(num_blocks - 1) * size / 2**30:.1f}" for size in num_bytes)
            raise ValueError(
                f"activation_offload: {sizes} GiB of the host's memory can't be pinned ({error}); "
                f"set it to false, or free memory"
            ) from error
        self._host = [memory.tensor for memory in self._memory]
        self._offloaded: dict[int, list[_Offloaded]] = {}
        self._outgoing: deque[_Outgoing] = deque()

    def hooks(
        self, block: int, inputs: Sequence[Tensor]
    ) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """For torch.autograd.graph.saved_tensors_hooks around block `block`, whose `inputs` are
        to be offloaded. What else autograd saves there stays as it is.
        """
        if block == 0:
            self._forward_pass += 1
            self._release_before(self._num_blocks)
        numbers = {tensor.data_ptr(): number for number, tensor in enumerate(inputs)}
        self._offloaded[block] = []

        def pack(tensor: Tensor) -> Any:
            number = numbers.get(tensor.data_ptr())
            return tensor if number is None else self._offload(block, number, tensor)

        def unpack(packed: Any) -> Tensor:
            return self._restore(packed) if isinstance(packed, _Offloaded) else packed

        return pack, unpack

    def _offload(self, block: int, number: int, tensor: Tensor) -> _Offloaded:
        if block == self._num_blocks - 1:
            return _Offloaded(self._forward_pass, block, torch.empty(0), tensor.detach())
        place = self._host[number][block * tensor.nbytes : (block + 1) * tensor.nbytes]
        host = place.view(tensor.dtype).view(tensor.shape)
        offloaded = _Offloaded(self._forward_pass, block, host, None)
        self._outgoing.append(_Outgoing(block, tensor, self._copies.copy(host, tensor)))
        # inputs of this block and of the one before may still be on their way, older ones are not
        self._release_before(block - 1)
        self._offloaded[block].append(offloaded)
        return offloaded

    def _restore(self, offloaded: _Offloaded) -> Tensor:
        assert offloaded.forward_pass == self._forward_pass, (
            "the next forward pass has overwritten what this backward pass needs"
        )
        self._release_before(self._num_blocks)
        if offloaded.resident is not None:
            tensor = offloaded.resident
        else:
            tensor, copied = self._fetch(offloaded)
            offloaded.incoming = None
            self._copies.wait_for(copied)
        # the backward pass comes to the block before next
        for before in self._offloaded.get(offloaded.block - 1, ()):
            self._fetch(before)
        return tensor

    def _fetch(self, offloaded: _Offloaded) -> _Incoming:
        if offloaded.incoming is None:
            tensor = torch.empty_like(offloaded.host, device=self._device)
            copied = self._copies.copy(tensor, offloaded.host)
            offloaded.incoming = _Incoming(tensor, copied)
        return offloaded.incoming

    def _release_before(self, block: int) -> None:
        while self._outgoing and self._outgoing[0].block < block:
            outgoing = self._outgoing.popleft()
            self._copies.wait_for(outgoing.copied)
