"""Frozen weights in the host's memory, registered, so that the card copies them by itself while it
computes.

The processes of a host read one copy: the first of them loads it into memory that all map and
each registers with its own card. It is gone with the last process, however that ends.

Each block passes over PCIe twice per micro-batch, forward and backward. Beside a forward pass of a
few thousand tokens and more that costs no time (tools.plan says from how many), and a gibibyte of
the card buys more when it holds what would be recomputed.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from loader.host_memory import available_bytes
from loader.registered import RegisteredMemory, SharedPages, registered_bytes
from train.parallel import mesh
from train.parallel.mesh import World
from train.placement.layout import BlockLayout


class HostWeights:
    """The Source of streamed blocks; `layouts` in the order of their places. On all processes
    together. Raises ValueError, on all of them, where a host has not that much memory.
    """

    def __init__(self, layouts: Sequence[BlockLayout], dtype: torch.dtype, world: World):
        self._world = world
        sizes = [layout.num_elements * dtype.itemsize for layout in layouts]
        ends = list(accumulate(sizes))
        self.num_bytes = ends[-1]
        self._shared = _shared_pages(self.num_bytes, world)
        problem = ""
        try:
            self._memory = RegisteredMemory(self.num_bytes, world.device, shared=self._shared)
        except (RuntimeError, OSError, MemoryError) as error:
            problem = f"can't be pinned ({error})"
        # every process has mapped it by then: the first one's pages need no name any more
        _raise_together(problem, self.num_bytes, world)
        self._flat = [
            self._memory.tensor[end - size : end].view(dtype)
            for size, end in zip(sizes, ends, strict=True)
        ]

    couples = False

    @property
    def loads(self) -> bool:
        return mesh.is_first_here()

    def slot_elements(self, place: int) -> int:
        return len(self._flat[place])

    def keep(self, place: int, slot: Tensor) -> None:
        flat = self._flat[place]
        flat.copy_(slot[: len(flat)])

    def loaded(self) -> None:
        # the first process here has loaded them for everyone
        mesh.barrier(self._world)

    def fill(self, place: int, slot: Tensor) -> None:
        flat = self._flat[place]
        slot[: len(flat)].copy_(flat, non_blocking=True)

    def any_passes(self, passes: bool) -> bool:
        raise AssertionError("nobody needs the others")

    def describe(self) -> str:
        return f"wait in the host's memory ({self.num_bytes / 2**30:.1f} GiB, once per host)"


def check_host(num_bytes: int, available: int) -> str:
    """Empty, or why a host with so much available can't hold the weights."""
    if num_bytes <= available:
        return ""
    return (
        f"is more than the {available / 2**30:.1f} GiB of this host that are available, the limits "
        f"of control groups included"
    )


def _shared_pages(num_bytes: int, world: World) -> SharedPages | None:
    """Of the first process of each host, and everyone there opens them; None for a process alone,
    which needs none.
    """
    pages, problem = None, ""
    if mesh.is_first_here():
        problem = check_host(registered_bytes(num_bytes), available_bytes())
        if not problem and world.size > 1:
            try:
                pages = SharedPages(num_bytes)
            except OSError as error:
                problem = f"can't be taken ({error})"
    _raise_together(problem, num_bytes, world)
    if world.size == 1:
        return None
    path = mesh.from_first_here(pages.path if pages else "", world)
    if pages is None:
        try:
            pages = SharedPages(num_bytes, path)
        except OSError as error:
            problem = f"can't be shared with this process ({error})"
    _raise_together(problem, num_bytes, world)
    return pages


def _raise_together(problem: str, num_bytes: int, world: World) -> None:
    problems = [each for each in mesh.gather(problem, world) if each]
    if problems:
        raise ValueError(
            f"model.placement: {num_bytes / 2**30:.1f} GiB of the host's memory for streamed "
            f"weights: {problems[0]}; free memory, keep more blocks on the card "
            f'(model.resident_blocks), or set model.placement = "resident"'
        )
