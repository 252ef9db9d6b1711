"""Which process does what: torchrun's environment, and one all-reduce of one flat vector per
optimizer step.

Training is data parallel: each process has the whole model on its own device and its own share of
every global batch. torch's DistributedDataParallel would wrap the model, bucket the gradients and
hook into autograd in order to overlap the all-reduce with the backward pass. LoRA gradients are
tens of megabytes: there is nothing worth overlapping.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class World(NamedTuple):
    """This process's place among all of a run.

    data_rank, data_size: it trains on share number `data_rank` of the `data_size` equal shares of
    each global batch. device: where it computes.
    """

    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks to the user: exactly one does."""
        return self.data_rank == 0


@contextmanager
def process_group() -> Iterator[World]:
    """Join the group that torchrun describes (NCCL on GPUs, gloo on CPUs); alone without
    torchrun. Raises ValueError if a node has more processes than GPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = World(data_rank=rank, data_size=size, device=_local_device())
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size == 1:
        yield world
        return
    if world.device.type == "cuda":
        dist.init_process_group("nccl", device_id=world.device)
    else:
        dist.init_process_group("gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise ValueError(
            f"--nproc-per-node asks for more processes than the {torch.cuda.device_count()} GPUs "
            f"here; start one process per GPU"
        )
    return device


def all_reduce_sum(vector: Tensor, world: World) -> None:
    """Sum `vector` over all processes, in place."""
    if world.data_size > 1:
        dist.all_reduce(vector)


def broadcast(value: T, world: World) -> T:
    """The main process's `value`, for everyone; any object that can be pickled."""
    if world.data_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=world.device)
    return values[0]


def barrier(world: World) -> None:
    """Wait until every process is here."""
    if world.data_size > 1:
        dist.barrier()
