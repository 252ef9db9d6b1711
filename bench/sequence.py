"""One sample on several GPUs against one GPU and against data parallelism:

    torchrun --nproc-per-node 2 -m bench.sequence [--sequence 2] [--json FILE]
    torchrun --nproc-per-node 4 -m bench.sequence --sequence 2      two samples at a time
    ... --model t2v-a14b --shapes 832x480x49=block

also with NCCL_P2P_DISABLE=1. The trainer's step with random weights of the real size; each shape
comes with its activation_memory, the same on all sides (a budget in GiB is divided by the ranks).
First, in the same call, the flat gradient of all ranks together is compared with that of one rank,
in float32 and at reduced depth. The bytes that a rank sends are counted and compared with what
tools.plan says.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import torch
from torch import Tensor

from bench.our_step import ADAPTERS, MODELS, Model, add_gradients, our_config, our_run, update
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket
from tools.counts import exchanged_bytes
from tools.fake.step import random_batch, random_transformer
from train.activations.budget import parse_activation_memory
from train.activations.plan import plan_shape
from train.activations.sizes import Shape
from train.parallel import mesh, sequence
from train.parallel.config import ParallelConfig
from train.parallel.mesh import World
from train.run import Run

NUM_WARMUP, NUM_EXCHANGES = 2, 20
CHECK_LIMIT = 1e-5
# in half precision two orders of summing differ by more; a wrong exchange by about 1
HALF_LIMIT = 0.05


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


def gradient_error(
    model: Model, bucket: Bucket, dtype: torch.dtype, num_layers: int, world: World
) -> float:
    """How far all ranks' gradient together is off one rank's, relative. Each group has the same
    sample, so their mean is that sample's gradient.
    """
    shallow = model._replace(wan=msgspec.structs.replace(model.wan, num_layers=num_layers))
    found = []
    for of in (world, alone(world)):
        run = build(shallow, Case(bucket, "block"), dtype, of)
        sum_gradients(run, model, bucket, seed=0)
        found.append(run.flat.gradient.clone())
    together, one = found
    return ((together - one).norm() / one.norm()).item()


def alone(world: World) -> World:
    return World(data_rank=0, data_size=1, device=world.device)


def data_parallel(world: World) -> World:
    return World(data_rank=world.rank, data_size=world.size, device=world.device)


def seconds(work: Callable[[], None], device: torch.device) -> float:
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


def predicted_bytes(model: Model, case: Case, dtype: torch.dtype, run_shape: Shape) -> float:
    """What tools.plan says that a rank sends in a micro-batch."""
    config = our_config(ADAPTERS["r16"], dtype, "auto", kind=model.kind)
    budget_bytes = parse_activation_memory(case.activation_memory)
    assert budget_bytes is not None, 'a benchmark names what is saved, "auto" would differ'
    plan = plan_shape(
        model.wan,
        run_shape,
        config.lora.targets,
        dtype.itemsize,
        budget_bytes / run_shape.num_parts,
    )
    return exchanged_bytes(model.wan, run_shape, config.lora.targets, dtype.itemsize, plan)


def compare(
    model: Model, case: Case, dtype: torch.dtype, world: World, rounds: int
) -> dict[str, Any]:
    """One GPU, all of them on shared samples, all of them on samples of their own, and one GPU
    again, because clocks change.
    """
    one: list[Measured] = []
    sides: dict[str, Measured] = {}
    for name, of in (
        ("one", alone(world)),
        ("sequence", world),
        ("data parallel", data_parallel(world)),
        ("one", alone(world)),
    ):
        # who does not take part waits; memory is given back between sides
        if name != "one" or world.is_main:
            measured = measure(model, case, dtype, of, rounds)
            one += [measured] if name == "one" else []
            sides[name] = measured
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        mesh.barrier(world)
    size, layout = world.sequence_size, model.kind.layout
    shape = Shape(1, layout.num_tokens(case.bucket) // size, MAX_TEXT_TOKENS, num_parts=size)
    predicted, together = predicted_bytes(model, case, dtype, shape), sides["sequence"]
    found: dict[str, Any] = {
        "activation_memory": case.activation_memory,
        "sent_bytes": together.sent_bytes,
        "predicted_bytes": predicted,
        "exchange_bytes_a_second": exchange_rate(model, case.bucket, dtype, world),
    }
    if world.is_main:
        one_s = statistics.median([s for each in one for s in each.step_s])
        sequence_s = statistics.median(together.step_s)
        ddp_s = statistics.median(sides["data parallel"].step_s)
        found |= {
            "one_s": [statistics.median(each.step_s) for each in one],
            "sequence_s": sequence_s,
            "data_parallel_s": ddp_s,
            "n": rounds,
            "attention": {name: each.attention for name, each in sides.items()},
            # of one sample on the cards of a group
            "speed_of_a_sample": one_s / sequence_s,
            "samples_a_second_of_one": world.data_size * one_s / sequence_s,
            "data_parallel_of_one": world.size * one_s / ddp_s,
            "activation_gib": {name: each.activation_bytes / 2**30 for name, each in sides.items()},
        }
    return found


def report(
    model: Model,
    cases: Sequence[Case],
    dtype: torch.dtype,
    world: World,
    *,
    rounds: int,
    check_layers: int,
) -> dict[str, Any]:
    """Raises AssertionError where the gradients differ, before anything is timed."""
    smallest = min((case.bucket for case in cases), key=model.kind.layout.num_tokens)
    errors = {}
    for each, limit in {torch.float32: CHECK_LIMIT, dtype: HALF_LIMIT}.items():
        error = gradient_error(model, smallest, each, check_layers, world)
        limit = CHECK_LIMIT if each == torch.float32 else limit
        assert error < limit, f"the gradient of {world.sequence_size} ranks is off by {error}"
        errors[str(each)] = error
    card = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    result: dict[str, Any] = {
        "card": card,
        "processes": world.size,
        "sequence": world.sequence_size,
        "model": model.kind.name,
        "NCCL_P2P_DISABLE": os.environ.get("NCCL_P2P_DISABLE", "0"),
        "gradient_error": errors,
    }
    for case in cases:
        result[str(case.bucket)] = compare(model, case, dtype, world, rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence", type=int, default=2)
    parser.add_argument("--model", choices=sorted(MODELS), default="ti2v-5b")
    parser.add_argument(
        "--shapes",
        default="1280x704x49=all,1280x704x121=block",
        help="shape = activation_memory, ...",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check-layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, cases = MODELS[arguments.model], []
    for pair in arguments.shapes.split(","):
        shape, _, memory = pair.partition("=")
        cases.append(Case(model.kind.layout.parse(shape), memory or "block"))
    with mesh.process_group(arguments.sequence) as world:
        if world.sequence_size < 2:
            raise SystemExit("--sequence 1 has nothing to compare with: use 2 or more")
        result = report(
            model,
            cases,
            torch.bfloat16,
            world,
            rounds=arguments.rounds,
            check_layers=arguments.check_layers,
        )
        if world.is_main:
            print(json.dumps(result, indent=1))
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
