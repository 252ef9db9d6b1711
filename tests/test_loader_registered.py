"""Registered host memory: exact sizes, released in any case, and what the host has."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from loader.host_memory import (
    available_bytes,
    cgroup_room_bytes,
    cgroups,
    meminfo_bytes,
    total_bytes,
)
from loader.registered import (
    RegisteredMemory,
    SharedPages,
    check_available,
    registered_bytes,
)

CPU, GIB = torch.device("cpu"), 2**30


class Cudart:
    """Notes what is registered; `error` is what registering answers."""

    def __init__(self, error: int = 0):
        self.error, self.registered = error, dict[int, int]()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            self.registered[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_memory_is_as_large_as_asked_for_and_begins_at_a_page() -> None:
    cudart = Cudart()
    memory = RegisteredMemory(3 * mmap.PAGESIZE + 1, CPU, cudart)
    assert memory.tensor.shape == (3 * mmap.PAGESIZE + 1,)
    assert cudart.registered == {memory.tensor.data_ptr(): 4 * mmap.PAGESIZE}
    assert memory.tensor.data_ptr() % mmap.PAGESIZE == 0
    memory.tensor.fill_(7)
    assert memory.tensor.sum() == 7 * len(memory.tensor)
    assert registered_bytes(9.05 * GIB) < 9.06 * GIB


@pytest.mark.parametrize("way", ["close", "free"])
def test_memory_is_unregistered_once_when_it_is_closed_or_freed(way: str) -> None:
    cudart = Cudart()
    memory = RegisteredMemory(10, CPU, cudart)
    assert cudart.registered
    if way == "close":
        memory.close()
        memory.close()
    del memory
    gc.collect()
    assert not cudart.registered


def test_what_cuda_refuses_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"cudaHostRegister of 4,096 bytes: error 2"):
        RegisteredMemory(10, CPU, Cudart(error=2))


def test_without_a_gpu_it_is_ordinary_memory() -> None:
    memory = RegisteredMemory(10, CPU)
    assert memory.tensor.shape == (10,)
    memory.close()


def test_a_control_group_has_what_its_limit_leaves_and_its_cached_files() -> None:
    stat = "anon 5\ninactive_file 3\nactive_file 4\n"
    assert cgroup_room_bytes("100\n", "60\n", stat) == 47
    assert cgroup_room_bytes("100", "120", "") == 0
    assert cgroup_room_bytes("max\n", "60\n", stat) is None
    assert cgroup_room_bytes("", "", "") is None
    # version 1: of the group alone, and with those inside
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 3\ntotal_active_file 4\n"
    assert cgroup_room_bytes("100\n", "60\n", stat) == 47


@pytest.mark.parametrize(
    ("proc_self_cgroup", "limits"),
    [
        ("0::/\n", ["memory.max"]),
        ("0::/a/b\n", ["a/b/memory.max", "a/memory.max", "memory.max"]),
        (
            "9:name=systemd:/\n4:cpu,memory:/docker/x\n1:cpu:/\n",
            [
                "memory/docker/x/memory.limit_in_bytes",
                "memory/docker/memory.limit_in_bytes",
                "memory/memory.limit_in_bytes",
            ],
        ),
        ("4:memory:/\n0::/\n", ["memory/memory.limit_in_bytes", "memory.max"]),
        ("", ["memory.max"]),
    ],
)
def test_limits_of_both_versions_of_control_groups_count(
    proc_self_cgroup: str, limits: list[str]
) -> None:
    found = cgroups(proc_self_cgroup)
    assert [group.limit for group in found] == [Path("/sys/fs/cgroup") / each for each in limits]
    assert all(group.used.parent == group.stat.parent == group.limit.parent for group in found)


def test_the_host_has_what_the_kernel_says() -> None:
    meminfo = "MemTotal: 9 kB\nMemAvailable:   5 kB\nBuffers: 1 kB"
    assert meminfo_bytes(meminfo, "MemAvailable") == 5120
    assert 0 < available_bytes() <= total_bytes()


def test_all_processes_of_a_host_must_fit() -> None:
    check_available(13.6 * GIB, 2, available=28 * GIB)
    with pytest.raises(ValueError, match=r"pin 13\.6 GiB each, and 28\.0 GiB of this host"):
        check_available(13.6 * GIB, 3, available=28 * GIB)


def test_shared_pages_are_one_memory_and_in_no_file_system() -> None:
    pages = SharedPages(mmap.PAGESIZE + 1)
    other = SharedPages(mmap.PAGESIZE + 1, pages.path)
    cudart = Cudart()
    ours, theirs = (
        RegisteredMemory(5000, CPU, shared=pages),
        RegisteredMemory(5000, CPU, cudart, shared=other),
    )
    assert ours.tensor.shape == theirs.tensor.shape == (5000,)
    assert list(cudart.registered.values()) == [2 * mmap.PAGESIZE]
    ours.tensor.fill_(7)
    assert theirs.tensor.sum() == 7 * 5000
    assert "/proc/" in pages.path
    del theirs, other
    gc.collect()
    assert not cudart.registered
    path = pages.path
    del ours, pages
    gc.collect()
    with pytest.raises(OSError):
        SharedPages(1, path)
