"""Host memory comes back to those who ask, never while somebody can still see it."""

import threading

import torch

from loader.pinned import HostMemory


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = HostMemory(torch.device("cpu"))
    tensor = memory.empty((3, 5), torch.float16)
    assert tensor.shape == (3, 5) and tensor.dtype == torch.float16
    place = tensor.data_ptr()
    del tensor
    assert memory.empty((4, 2), torch.uint8).data_ptr() == place  # and less of it will do


def test_memory_is_left_alone_while_a_view_of_it_is_held() -> None:
    memory = HostMemory(torch.device("cpu"))
    held = [memory.empty((64,), torch.int16).fill_(i)[8:16].view(2, 4) for i in range(5)]
    for _ in range(5):
        memory.empty((64,), torch.int16).fill_(-1)
    assert [sorted(set(view.flatten().tolist())) for view in held] == [[i] for i in range(5)]


def test_memory_of_a_former_size_is_given_up() -> None:
    memory = HostMemory(torch.device("cpu"))
    small = [memory.empty((8,), torch.uint8) for _ in range(3)]
    large = memory.empty((80,), torch.uint8)
    assert sorted(len(block.memory) for block in memory._thread.blocks) == [8, 8, 8, 80]
    del small
    other = memory.empty((90,), torch.uint8)
    assert sorted(len(block.memory) for block in memory._thread.blocks) == [80, 90]
    assert large.data_ptr() != other.data_ptr()


def test_a_thread_gets_no_memory_of_another_one() -> None:
    memory = HostMemory(torch.device("cpu"))
    place = memory.empty((64,), torch.uint8).data_ptr()  # idle from here on
    found = []
    thread = threading.Thread(target=lambda: found.append(memory.empty((64,), torch.uint8)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != place == memory.empty((64,), torch.uint8).data_ptr()
