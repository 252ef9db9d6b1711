"""Inputs of blocks in the host's memory: what comes back, when, and what is released when."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from train.activations import offload
from train.activations.offload import CopyStream, HostInputs, check_host_memory
from train.activations.plan import ShapePlan
from train.parallel.mesh import World

CPU = torch.device("cpu")


def test_what_waits_in_the_hosts_memory_comes_back_though_its_place_is_reused() -> None:
    """Four blocks, two shapes in turn; the last block's inputs stay where they are."""
    host = HostInputs(4, [4 * 30, 2 * 30], CPU)
    for num_tokens in (5, 10, 5):
        packed = []
        for block in range(4):
            inputs = [torch.randn(num_tokens, 3), torch.randn(num_tokens, 3).half()][
                : 1 if block == 0 else 2
            ]
            pack, unpack = host.hooks(block, inputs)
            expected, other = [tensor.clone() for tensor in inputs], torch.randn(2)
            packed.append((unpack, [pack(tensor) for tensor in inputs], expected))
            assert pack(other) is other
            if block < 3:
                for tensor in inputs:
                    tensor.fill_(float("nan"))
        for unpack, offloaded, expected in reversed(packed):
            assert all(map(torch.equal, map(unpack, offloaded), expected))
    with pytest.raises(AssertionError, match="the next forward pass has overwritten"):
        host.hooks(0, [])
        unpack(offloaded[0])


class LateCopies(CopyStream):
    """As if the second stream did nothing until somebody waits for it: then all up to that event,
    in order.
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.num_done = 0

    def copy(self, destination: Tensor, source: Tensor) -> Any:
        # the memory, whatever tensor has it by then
        self.queue.append((destination.data.view(-1), source.data.view(-1)))
        return len(self.queue)

    def wait_for(self, event: Any) -> None:
        while self.num_done < event:
            destination, source = self.queue[self.num_done]
            destination.copy_(source)
            self.num_done += 1


def test_the_inputs_of_the_block_before_are_on_their_way_before_they_are_asked_for() -> None:
    copies = LateCopies()
    host = HostInputs(3, [4 * 30], CPU, copies)
    packed = []
    for block in range(3):
        x = torch.randn(10, 3)
        pack, unpack = host.hooks(block, [x])
        packed.append((unpack, pack(x)))
    # two went to the host, the last block's did not
    assert len(copies.queue) == 2
    for block, num_copies in ((2, 3), (1, 4), (0, 4)):
        unpack, offloaded = packed[block]
        unpack(offloaded)
        assert len(copies.queue) == num_copies


def test_no_memory_is_released_before_its_copy_was_waited_for() -> None:
    host = HostInputs(6, [4 * 30, 2 * 30], CPU, LateCopies())
    for _ in range(3):
        packed, memories = [], []
        for block in range(6):
            inputs = [torch.randn(10, 3), torch.randn(10, 3).half()]
            if block < 5:  # block 5's stay
                # .data does not hold it
                memories += [(weakref.ref(tensor), tensor.data.view(-1)) for tensor in inputs]
            expected = [tensor.clone() for tensor in inputs]
            pack, unpack = host.hooks(block, inputs)
            packed.append((unpack, [pack(tensor) for tensor in inputs], expected))
            del inputs
            free = [memory for holder, memory in memories if holder() is None]
            for memory in free:
                memory.fill_(float("nan"))  # somebody else has it now
            assert len(free) == 2 * max(min(block, 4) - 1, 0)
        while packed:
            unpack, offloaded, expected = packed.pop()
            assert all(map(torch.equal, map(unpack, offloaded), expected))


def test_memory_that_cannot_be_pinned_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(offload, "RegisteredMemory", fail)
    with pytest.raises(
        ValueError, match=r"activation_offload: 5\.0 GiB .* can't be pinned .*set it to false"
    ):
        HostInputs(6, [2**30], CPU)


def test_a_process_that_offloads_nothing_waits_for_those_that_do_and_counts_what_they_pin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cards of a run may have room for more or less."""
    world = World(data_rank=0, data_size=2, device=torch.device("cuda"))
    nothing, others_bytes, waited = [ShapePlan(None, 1.0)], [2**20], list[World]()
    monkeypatch.setattr("train.parallel.mesh.maximum", lambda number, _: max(number, *others_bytes))
    monkeypatch.setattr("train.parallel.mesh.barrier", waited.append)
    check_host_memory(nothing, world)
    assert waited == [world]
    others_bytes[0] = 2**60
    with pytest.raises(ValueError, match=r"activation_offload: 1 process\(es\) pin"):
        check_host_memory(nothing, world)
    others_bytes[0] = 0
    check_host_memory(nothing, world)
    assert waited == [world]
