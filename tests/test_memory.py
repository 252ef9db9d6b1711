"""Host memory comes back to those who ask, never while somebody can still see it."""

import threading

import torch

from loader.memory import HostMemory


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = HostMemory(pinned=False)
    tensor = memory.empty((3, 5), torch.float16)
    assert tensor.shape == (3, 5) and tensor.dtype == torch.float16
    place = tensor.data_ptr()
    del tensor
    assert memory.empty((4, 2), torch.uint8).data_ptr() == place  # and less of it will do


def test_memory_is_left_alone_while_a_view_of_it_is_held() -> None:
    memory = HostMemory(pinned=False)
    held = [memory.empty((64,), torch.int16).fill_(i)[8:16].view(2, 4) for i in range(5)]
    for _ in range(5):
        memory.empty((64,), torch.int16).fill_(-1)
    assert [sorted(set(view.flatten().tolist())) for view in held] == [[i] for i in range(5)]


def test_memory_of_a_former_size_is_given_up() -> None:
    memory = HostMemory(pinned=False)
    small = [memory.empty((8,), torch.uint8) for _ in range(3)]
    large = memory.empty((80,), torch.uint8)
    assert sorted(len(block) for block, _ in memory._thread.blocks) == [8, 8, 8, 80]
    del small
    other = memory.empty((90,), torch.uint8)
    assert sorted(len(block) for block, _ in memory._thread.blocks) == [80, 90]
    assert large.data_ptr() != other.data_ptr()


def test_threads_do_not_share_memory() -> None:
    memory = HostMemory(pinned=False)
    places = []

    def ask() -> None:
        tensor = memory.empty((64,), torch.uint8)
        places.append(tensor.data_ptr())
        barrier.wait()

    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(places)) == 4
