"""Which process does what: torchrun's environment, one all-reduce of one flat vector per optimizer
step, and one of a single number on the CPU per micro-batch.

Training is data parallel: each process has the whole model on its own device and its own share of
every global batch. With sequence parallelism (sequence.py) a group of processes has one such share
together, and each of its samples. torch's DistributedDataParallel would wrap the model, bucket the
gradients and hook into autograd in order to overlap the all-reduce with the backward pass. LoRA
gradients are tens of megabytes: there is nothing worth overlapping.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

# Before there is a group. Its functions take the group of all processes as a default, and torch
# imports it with the first optimizer: then destroy_process_group leaves a reference to the group
# and gloo's threads running, of which one that still holds a tensor when Python ends aborts it.
import torch.distributed.nn.functional
from torch import Tensor

from train.parallel.meeting import meet, open_store

T = TypeVar("T")
# How long processes wait for another one in a collective. An odd clip of samples takes one of them
# hours on a slow card, and NCCL's own limit is ten minutes. In the loop what hangs is ended long
# before by train/watch.py.
WAIT = timedelta(hours=4)


class PeerLostError(Exception):
    """Another process of the run is gone. Why, its own last words say, not this error."""


class World(NamedTuple):
    """This process's place among all of a run.

    data_rank, data_size: it trains on share number `data_rank` of the `data_size` equal shares of
    each global batch. device: where it computes. sequence_rank, sequence_size: of each sample in
    that share it has part number `sequence_rank` of `sequence_size` equal parts, and the processes
    of its `sequence_group` have the others; None: it is alone. output_ranks: the processes that
    see the folder that the main one writes; None: all do.
    """

    data_rank: int
    data_size: int
    device: torch.device
    sequence_rank: int = 0
    sequence_size: int = 1
    sequence_group: dist.ProcessGroup | None = None
    output_ranks: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """Among all processes."""
        return self.data_rank * self.sequence_size + self.sequence_rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data_size * self.sequence_size

    @property
    def sees_output(self) -> bool:
        return self.output_ranks is None or self.rank in self.output_ranks

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks to the user: exactly one does."""
        return self.rank == 0


def run_program(main: Callable[[], None]) -> None:
    """Run a program that may be one of several processes, to the end of this one.

    Of several it does not get to the interpreter's end, so `main` must have closed what it opened.
    gloo's threads live as long as anything refers to a group: after an error, and wherever
    something keeps one beyond `process_group`, as sequence.py does. At the interpreter's end they
    would wait for a lost process, and one that still holds a tensor would abort this one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        main()
        return
    code: object = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        # what the interpreter makes of it
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


@contextmanager
def process_group(sequence: int = 1) -> Iterator[World]:
    """Join the group that torchrun describes (NCCL on GPUs, gloo on CPUs); alone without
    torchrun. Every `sequence` processes of a host train each sample together. Raises ValueError if
    a node has more processes than GPUs, or `sequence` can't be had, and PeerLostError.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _check_groups(sequence, size)
    world = World(
        data_rank=rank // sequence,
        data_size=size // sequence,
        device=_local_device(),
        sequence_rank=rank % sequence,
        sequence_size=sequence,
    )
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size == 1:
        yield world
        return
    with peers():
        store = meet(open_store(rank), rank, size)
        # gloo for the numbers on the CPU: they must not wait for the GPU
        on_gpu = world.device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            device_id=world.device if on_gpu else None,
            timeout=WAIT,
        )
    if sequence > 1:
        world = world._replace(sequence_group=_sequence_group(world))
    yield world
    # not after an error: it would wait for processes that are gone
    dist.destroy_process_group()


def _check_groups(sequence: int, size: int) -> None:
    """Raises ValueError if the processes of each host can't be divided into such groups."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if here % sequence:
        raise ValueError(
            f"parallel.sequence = {sequence}: this host has {here} processes of the run, and "
            f"groups do not cross hosts; start a multiple of {sequence} on each "
            f"(--nproc-per-node), or set parallel.sequence to what divides {here}"
        )


def _sequence_group(world: World) -> dist.ProcessGroup:
    """This process's, with a communicator of its own. Raises ValueError, on all processes, where
    the cards of a group differ.
    """
    size = world.sequence_size
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    # every process makes all groups, in one order
    groups = [
        dist.new_group(list(range(first, first + size)), backend=backend)
        for first in range(0, world.size, size)
    ]
    card = torch.cuda.get_device_name(world.device) if backend == "nccl" else "CPU"
    cards = gather(card, world)
    for first in range(0, world.size, size):
        members = sorted(set(cards[first : first + size]))
        if len(members) > 1:
            # each process draws the noise of the whole sample, and other cards draw other numbers
            raise ValueError(
                f"parallel.sequence = {size}: processes {first} to {first + size - 1} train each "
                f"sample together and have different cards ({', '.join(members)}), which draw "
                f"different noise; use equal cards, or parallel.sequence = 1"
            )
    return groups[world.data_rank]


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
    if world.size == 1:
        return number
    number_1 = torch.tensor([number])
    _all_reduce(number_1, dist.ReduceOp.MAX, world)
    return int(number_1)


def broadcast(value: T, world: World) -> T:
    """The main process's `value`, for everyone; any object that can be pickled."""
    if world.size == 1:
        return value
    values = [value]
    with peers():
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def from_main(work: Callable[[], T], world: World) -> T:
    """What `work` returns on the main process, for everyone; or what it raises there of what users
    are told, ValueError and OSError.
    """
    found: T | ValueError | OSError | None = None
    if world.is_main:
        try:
            found = work()
        except (ValueError, OSError) as error:
            found = error
    found = broadcast(found, world)
    if isinstance(found, ValueError | OSError):
        raise found
    return cast(T, found)


def gather(value: T, world: World) -> list[T]:
    """Everyone's `value`, by rank, for everyone; any object that can be pickled. Raises
    PeerLostError.
    """
    if world.size == 1:
        return [value]
    values = [value] * world.size
    with peers():
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
    with peers():
        # torch 2.13 has another name for it, and warns of this one
        gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather_into(whole, part, group=group)


def first_found(value: T | None, world: World) -> T | None:
    """What the first process of this one's sequence group has found that has found anything. Raises
    PeerLostError.
    """
    if world.sequence_group is None:
        return value
    values: list[T | None] = [None] * world.sequence_size
    with peers():
        dist.all_gather_object(values, value, group=world.sequence_group)
    return next((each for each in values if each is not None), None)


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
    if world.size == 1:
        return
    with peers():
        dist.all_reduce(tensor, operation)


@contextmanager
def peers() -> Iterator[None]:
    """Around a collective: what it raises where another process is gone becomes PeerLostError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # gloo and NCCL have no kinds for it; the first line tells enough
        cause = str(error).partition("\n")[0]
        raise PeerLostError(f"another process of this run is gone or late: {cause}") from error
