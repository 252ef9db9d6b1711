"""One side of bench.sequence: a run on one GPU or on several, its steps by the clock, and the bytes
that its ranks exchange.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.our_step import ADAPTERS, Model, add_gradients, our_config, our_run, update
from loader.shape import Bucket
from tools.fake.step import random_batch, random_transformer
from train.activations.budget import parse_activation_memory
from train.parallel import mesh, sequence
from train.parallel.config import ParallelConfig
from train.parallel.mesh import World
from train.run import Run

NUM_WARMUP, NUM_EXCHANGES = 2, 20


class Case(NamedTuple):
    """A shape, and what is saved for the backward pass of one whole sample."""

    bucket: Bucket
    activation_memory: str


class Measured(NamedTuple):
    """Of one side: a step's seconds, what a micro-batch takes beside what stays, what this rank
    sends in one.
    """

    step_s: list[float]
    activation_bytes: int
    sent_bytes: float
    attention: str


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of everything that is exchanged while the block runs, whichever thread asks for it:
    autograd's does on a GPU.
    """
    num_bytes: list[int] = []
    exchange = sequence.all_to_all

    def counting(send_P: Tensor, group: str) -> Tensor:
        num_bytes.append(send_P.nbytes)
        return exchange(send_P, group)

    with mock.patch.object(sequence, "all_to_all", counting):
        yield num_bytes


def build(model: Model, case: Case, dtype: torch.dtype, world: World) -> Run:
    """A run of `world`, one sample for each of its data ranks."""
    memory, size = case.activation_memory, world.sequence_size
    if memory.endswith("GiB"):
        num_bytes = parse_activation_memory(memory)
        assert num_bytes is not None
        memory = f"{num_bytes / size / 2**30:.6f}GiB"
    config = our_config(
        ADAPTERS["r16"],
        dtype,
        "auto",
        kind=model.kind,
        global_batch=world.data_size,
        activation_memory=memory,
        parallel=ParallelConfig(sequence=size),
    )
    transformer = random_transformer(model.wan, world.device, dtype)
    return our_run(config, case.bucket, transformer, world)


def sum_gradients(run: Run, model: Model, bucket: Bucket, seed: int) -> None:
    """The gradient of one sample for each data rank, summed over all processes of the run."""
    batch = random_batch(
        bucket,
        run.world.device,
        is_i2v=[bool(model.kind.condition)],
        text_dim=model.wan.text_dim,
        seed=seed,
        kind=model.kind,
    )
    add_gradients(run, [batch])
    mesh.all_reduce_sum(run.flat.buffer, run.world)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Of `work` alone: what was queued before it is waited for first."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin_s


def measure(model: Model, case: Case, dtype: torch.dtype, world: World, rounds: int) -> Measured:
    """Steps of the processes of `world`."""
    run, device = build(model, case, dtype, world), world.device

    def step() -> None:
        sum_gradients(run, model, case.bucket, seed=world.data_rank)
        update(run)

    for _ in range(NUM_WARMUP):
        step()
    activation_bytes = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
    with counted() as exchanged:
        step()
    if device.type == "cuda":
        activation_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    step_s = []
    for _ in range(rounds):
        mesh.barrier(world)
        step_s.append(seconds(step, device))
    # of what is exchanged a rank keeps its own part
    size = world.sequence_size
    sent_bytes = sum(exchanged) * (size - 1) / size
    return Measured(step_s, activation_bytes, sent_bytes, run.kernels.names)


def exchange_rate(model: Model, bucket: Bucket, dtype: torch.dtype, world: World) -> float:
    """Bytes a second that a rank sends in one exchange of q."""
    group = world.sequence_group
    assert group is not None
    num_tokens = model.kind.layout.num_tokens(bucket) // world.sequence_size
    heads, width = model.wan.num_attention_heads, model.wan.attention_head_dim
    q_BLHE = torch.randn(1, num_tokens, heads, width, device=world.device).to(dtype)

    def exchanges() -> None:
        for _ in range(NUM_EXCHANGES):
            sequence.tokens_to_heads(q_BLHE, group.group_name)

    exchanges()
    sent = NUM_EXCHANGES * q_BLHE.nbytes * (world.sequence_size - 1) / world.sequence_size
    return sent / seconds(exchanges, world.device)
