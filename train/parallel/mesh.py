"""Data parallelism by hand: torchrun's environment, and one all-reduce of one flat vector per
optimizer step.

torch's DistributedDataParallel would wrap the model, bucket the gradients and hook into autograd
in order to overlap the all-reduce with the backward pass. LoRA gradients are tens of megabytes:
there is nothing worth overlapping.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


@contextmanager
def process_group() -> Iterator[World]:
    """Join the group that torchrun describes (NCCL on GPUs, gloo on CPUs); alone without
    torchrun.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node asks for more processes than the {torch.cuda.device_count()} GPUs here"
            )
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        yield World(rank, size, device)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def all_reduce_sum(vector: Tensor, world: World) -> None:
    """Sum `vector` over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(vector)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
