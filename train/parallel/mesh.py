"""Which process does what: torchrun's environment, one all-reduce of one flat vector per optimizer
step, and one of a single number on the CPU per micro-batch.

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


class PeerLostError(Exception):
    """Another process of the run is gone. Why, its own last words say, not this error."""


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
        # gloo for the numbers on the CPU: they must not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=world.device)
    else:
        dist.init_process_group("gloo")
    yield world
    # not after an error: it would wait for processes that are gone
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
    """Sum `vector` over all processes, in place. Raises PeerLostError."""
    _all_reduce(vector, dist.ReduceOp.SUM, world)


def maximum(number: int, world: World) -> int:
    """The largest `number` of all processes, by way of the CPU: it waits for the processes, not
    for their GPUs. Raises PeerLostError.
    """
    if world.data_size == 1:
        return number
    number_1 = torch.tensor([number])
    _all_reduce(number_1, dist.ReduceOp.MAX, world)
    return int(number_1)


def broadcast(value: T, world: World) -> T:
    """The main process's `value`, for everyone; any object that can be pickled."""
    if world.data_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=world.device)
    return values[0]


def gather(value: T, world: World) -> list[T]:
    """Everyone's `value`, by rank, for everyone; any object that can be pickled."""
    if world.data_size == 1:
        return [value]
    values = [value] * world.data_size
    dist.all_gather_object(values, value)
    return values


def new_group() -> dist.ProcessGroup:
    """All processes, with communicators of their own: what is started there waits for nothing that
    others have started. Called by all together.
    """
    return dist.new_group()


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `whole`, flat, with everyone's `part`, by rank, on the current stream. Raises
    PeerLostError.
    """
    with _naming_lost_peers():
        dist.all_gather_into_tensor(whole, part, group=group)


def is_first_here() -> bool:
    """Whether this process is the first of the run's on its host, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def from_first_here(value: T, world: World) -> T:
    """That of the first process on this host, for everyone there."""
    host = os.environ.get("GROUP_RANK", "0")
    found = gather((host, is_first_here(), value), world)
    (first,) = (each for there, is_first, each in found if there == host and is_first)
    return first


def barrier(world: World) -> None:
    """Wait until every process is here. Raises PeerLostError."""
    maximum(0, world)


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType, world: World) -> None:
    if world.data_size == 1:
        return
    with _naming_lost_peers():
        dist.all_reduce(tensor, operation)


@contextmanager
def _naming_lost_peers() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # gloo and NCCL have no kinds for it; the first line tells enough
        cause = str(error).partition("\n")[0]
        raise PeerLostError(f"another process of this run is gone or late: {cause}") from error
