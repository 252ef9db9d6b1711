"""Host memory of an exact size that a GPU copies to and from by itself: page-locked by registering
it with CUDA.

torch's own pinned allocator rounds up to a power of two: 9.05 GiB take 16. Memory that is mapped
from the kernel page by page and registered takes what was asked for. It is unregistered when its
object is closed or freed, and when the interpreter ends; a killed process leaves nothing behind.

What several processes of a host read is in memory once: `SharedPages`.
"""

import mmap
import os
import weakref
from typing import Any

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU's context


def registered_bytes(num_bytes: float) -> int:
    """What that much registered memory takes of the host: whole pages."""
    return -(-int(num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedPages:
    """Whole pages, at least `num_bytes`, that processes of one host have in common: new ones, or
    with `path` those of another process, which keeps its object until all have theirs.

    They are in no file system: they are gone with the last process that has them, also if that is
    killed, and no limit of /dev/shm counts. Whether the host has so much is the caller's to check
    (`available_bytes`): the kernel finds out when they are written, and ends the process. Raises
    OSError where they can't be opened.
    """

    def __init__(self, num_bytes: int, path: str = ""):
        size = registered_bytes(num_bytes)
        if path:
            descriptor = os.open(path, os.O_RDWR)
        else:
            descriptor = os.memfd_create("newsreel")
        self._close = weakref.finalize(self, os.close, descriptor)
        if not path:
            os.ftruncate(descriptor, size)
        # has a descriptor of its own
        self.mapped = mmap.mmap(descriptor, size)
        # for the other processes of this user
        self.path = path or f"/proc/{os.getpid()}/fd/{descriptor}"


class RegisteredMemory:
    """`tensor`: uint8 [num_bytes] in page-locked memory, beginning at a page. On a CPU ordinary
    memory. Raises MemoryError, OSError or RuntimeError where the host has not so much.

    Whoever closes it must have waited for all copies.
    """

    def __init__(
        self,
        num_bytes: int,
        device: torch.device,
        cudart: Any = None,
        shared: SharedPages | None = None,
    ):
        """cudart: for tests, instead of torch.cuda.cudart(). shared: these pages, not new ones."""
        on_cpu = device.type != "cuda" and cudart is None
        if num_bytes == 0 or (on_cpu and shared is None):
            self.tensor = torch.empty(num_bytes, dtype=torch.uint8)
            return
        if shared is None:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            pages = mmap.mmap(-1, registered_bytes(num_bytes), flags=private)
        else:
            pages = shared.mapped
        self.tensor = torch.frombuffer(pages, dtype=torch.uint8)
        if on_cpu:
            self.tensor = self.tensor[:num_bytes]
            return
        cudart = cudart or torch.cuda.cudart()
        address = self.tensor.data_ptr()
        error = int(cudart.cudaHostRegister(address, self.tensor.nbytes, _PORTABLE))
        if error:
            raise RuntimeError(f"cudaHostRegister of {self.tensor.nbytes:,} bytes: error {error}")
        self._unregister = weakref.finalize(self, cudart.cudaHostUnregister, address)
        self.tensor = self.tensor[:num_bytes]

    def close(self) -> None:
        """Give the memory back; `tensor` is not to be used any more."""
        if hasattr(self, "_unregister"):
            self._unregister()
        self.tensor = torch.empty(0, dtype=torch.uint8)


def check_available(num_bytes: float, num_processes: int, available: int) -> None:
    """Raises ValueError where this host can't pin that much for each of its processes."""
    needed = num_processes * num_bytes
    if needed > available:
        gib = 2**30
        raise ValueError(
            f"activation_offload: {num_processes} process(es) pin {num_bytes / gib:.1f} GiB each, "
            f"and {available / gib:.1f} GiB of this host are available, the limits of control "
            f"groups included; set it to false, free memory, or use smaller windows.buckets"
        )


def processes_here() -> int:
    """Processes of this run on this host, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
