"""What weights cost that are not on the card: `python -m bench.placement [--cases t2v,i2v]`; with
those in shares on all cards: `torchrun --nproc-per-node 2 -m bench.placement`.

Random weights of Wan2.2-A14B's size, drawn on the card and never written to disk. T2V at 832x480x49
and I2V at 832x480x17, rank 16 on the six q/k/v, a whole optimizer step, interleaved, CUDA events.
"resident" has all weights on the card, "streamed" in the host's memory, "sharded" in shares on all
cards; they have the same activation plan: the outputs of self-attention saved in all blocks, the
inputs of blocks offloaded. With several processes each has its own sample, and the gradient is
summed over them.

Beside what the others hold, the process may take what a card of 32 GiB has: so the streamed run is
capped, and the resident one, which could not fit, is not. First all must give the same gradient,
bit for bit, with deterministic attention. What tools.plan says of the run stands beside
what was measured.

`python -m bench.placement_peers`: streamed against diffusers + PEFT.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

import msgspec
import torch
from torch import Tensor

from bench.our_step import ADAPTERS, add_gradients, our_config, our_run, update
from bench.placement_timing import (
    Subject,
    allocated,
    cap_beside,
    host_to_device_gb_s,
    print_rows,
    rounds_of,
    rows_of,
    say,
)
from bench.results import check_start, save
from loader import models
from loader.batch import Batch
from loader.models import ModelKind
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket
from tools.budget import CONTEXT_BYTES, GIB, budget
from tools.fake.step import random_batch, random_transformer
from train.activations.plan import describe
from train.activations.sizes import output_bytes
from train.config import TrainConfig
from train.model.attention import choose_attention
from train.model.wan import T2V_A14B, WanConfig
from train.parallel import mesh
from train.parallel.mesh import World
from train.run import Run

# the bars: streamed in times of resident; its peak
MAX_RATIO, MAX_PEAK_GIB = 1.02, 24.0


class Case(NamedTuple):
    kind: ModelKind
    shape: str


CASES = {"t2v": Case(models.T2V_A14B, "832x480x49"), "i2v": Case(models.I2V_A14B, "832x480x17")}


def config_of(
    case: Case,
    wan: WanConfig,
    placement: str,
    dtype: torch.dtype,
    attention: str,
    num_gpus: int = 1,
) -> TrainConfig:
    """One sample a card and step; the outputs of self-attention are saved in all blocks, nothing
    else.
    """
    num_tokens = case.kind.layout.num_tokens(case.kind.layout.parse(case.shape))
    sizes = output_bytes(wan, num_tokens, MAX_TEXT_TOKENS, dtype.itemsize)
    config = our_config(
        ADAPTERS["r16"],
        dtype,
        attention,
        kind=case.kind,
        global_batch=num_gpus,
        activation_memory=f"{(wan.num_layers * sizes['attn1'] + 1) / GIB:.12f}GiB",
        activation_offload=True,
        cuda_graph_tokens=0,
    )
    model = msgspec.structs.replace(config.model, placement=placement)
    return msgspec.structs.replace(config, model=model)


def our_subject(config: TrainConfig, bucket: Bucket, wan: WanConfig, world: World) -> Subject:
    device, dtype = world.device, getattr(torch, config.model.dtype)
    before = allocated(device)
    run = our_run(config, bucket, random_transformer(wan, device, dtype), world)
    run.model.train()

    def step(batch: Batch) -> Tensor:
        loss = add_gradients(run, [batch])
        mesh.all_reduce_sum(run.flat.buffer, world)
        update(run)
        return loss

    # the optimizer's state comes with the first step
    held = allocated(device) - before + 8 * run.flat.vector.numel()
    return Subject(step, held, run)


def check_bits(runs: dict[str, Run], batch: Batch, device: torch.device) -> None:
    """Ends the program unless all have the same loss and gradient, with deterministic attention."""
    name: Any = "flash" if device.type == "cuda" else "auto"
    torch.use_deterministic_algorithms(True)
    found = {}
    for subject, run in runs.items():
        dtype = getattr(torch, run.config.model.dtype)
        # the run's own kernel need not repeat its bits
        own = run.micro_step._attention
        run.micro_step._attention = choose_attention(name, device, dtype, True).attention
        loss = add_gradients(run, [batch])
        found[subject] = loss.item(), run.flat.gradient.clone()
        run.micro_step._attention = own
    torch.use_deterministic_algorithms(False)
    (first, (loss_value, gradient)), *rest = found.items()
    assert bool(gradient.isfinite().all()) and bool(gradient.any())
    for subject, (other_loss, other) in rest:
        difference = (other - gradient).abs().max().item()
        if other_loss != loss_value or not torch.equal(other, gradient):
            sys.exit(
                f"a check failed: the gradient of {subject} is off {first}'s by {difference:.3g}, "
                f"losses {other_loss} and {loss_value}: nothing was timed"
            )
    say(f"check: same loss {loss_value:.6f} and same bits of the gradient: {', '.join(found)}")


def planned(config: TrainConfig, wan: WanConfig, bucket: Bucket, card_name: str) -> str:
    """What tools.plan says of this run on this card."""
    for one in budget(config, wan, {bucket: 1.0}, config.global_batch).cards:
        if one.card.name.split("-")[0] in card_name:
            times = "no time" if one.step_s is None else f"{one.step_s.slow:.3f} s"
            return f"{times}, {(one.num_bytes - CONTEXT_BYTES) / GIB:.2f} GiB ({one.card.name})"
    return f"no rates for {card_name}"


def compare(
    name: str,
    wan: WanConfig,
    world: World,
    dtype: torch.dtype,
    attention: str,
    num_rounds: int,
    deadline_s: float,
    note: Callable[[list[dict[str, Any]]], None],
    case: Case | None = None,
) -> list[dict[str, Any]]:
    """Resident against the others; prints as it goes, and calls note(rows) after each round."""
    case, device = case or CASES[name], world.device
    sharded = ("sharded",) if world.size > 1 else ()
    wan = msgspec.structs.replace(wan, in_channels=case.kind.in_channels)
    bucket = case.kind.layout.parse(case.shape)
    is_i2v = [bool(case.kind.condition)]
    batch = random_batch(
        bucket,
        device,
        is_i2v=is_i2v,
        text_dim=wan.text_dim,
        seed=world.data_rank,
        kind=case.kind,
    )
    subjects = {}
    for placement in ("resident", *sharded, "streamed"):
        begin_s = time.perf_counter()
        config = config_of(case, wan, placement, dtype, attention, world.size)
        subjects[placement] = our_subject(config, bucket, wan, world)
        say(f"{name}: {placement} is set up in {time.perf_counter() - begin_s:.1f} s")
    runs = {key: subject.run for key, subject in subjects.items() if subject.run is not None}
    streamed = runs["streamed"]
    assert streamed.plans[bucket] == runs["resident"].plans[bucket] and streamed.weights is not None
    say(f"{name} {case.shape}: {describe(streamed.plans[bucket])}\n  {streamed.weights.describe()}")
    check_bits(runs, batch, device)
    held = sum(subject.held_bytes for subject in subjects.values())
    cap_beside(held - subjects["streamed"].held_bytes, device)

    def is_over() -> bool:
        # processes that wait for each other do the same number of rounds
        return mesh.maximum(int(time.perf_counter() > deadline_s), world) > 0

    for found in rounds_of(subjects, held, batch, device, num_rounds, is_over):
        rows = rows_of(name, found, "resident")
        note(rows)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    print_rows(rows, "resident")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for placement, run in runs.items():
        say(f"tools.plan, {placement}: {planned(run.config, wan, bucket, card)}")
    ratio, peak_gib = rows[-1]["ratio"], rows[-1]["peak_gib"]
    for what, value, bar in (
        ("streamed, of resident", ratio, MAX_RATIO),
        ("streamed, peak GiB", peak_gib, MAX_PEAK_GIB),
    ):
        say(f"{name}: {what}: {value:.4g}, bar {bar}: {'held' if value <= bar else 'MISSED'}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="t2v,i2v")
    parser.add_argument("--attention", default="cudnn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--budget-s", type=float, default=400.0, help="one round a case from then on"
    )
    parser.add_argument("--layers", type=int, default=T2V_A14B.num_layers)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := {*arguments.cases.split(",")} - CASES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; cases are {', '.join(CASES)}")
    check_start("bench.placement", arguments.json)
    with mesh.process_group() as world:
        run_cases(arguments, world)


def run_cases(arguments: argparse.Namespace, world: World) -> None:
    begin_s = time.perf_counter()
    wan = msgspec.structs.replace(T2V_A14B, num_layers=arguments.layers)
    rate = host_to_device_gb_s(world.device)
    say(f"{torch.cuda.get_device_name()}: host to device {rate:.1f} GB/s, registered memory")
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "processes": world.size,
        "host_to_device_gb_s": rate,
        "rows": [],
    }
    deadline_s = begin_s + arguments.budget_s
    for name in arguments.cases.split(","):
        done = result["rows"]

        def note(rows: list[dict[str, Any]], done: list[dict[str, Any]] = done) -> None:
            result["rows"] = done + rows
            save(arguments.json if world.is_main else None, result)

        compare(
            name,
            wan,
            world,
            torch.bfloat16,
            arguments.attention,
            arguments.rounds,
            deadline_s,
            note,
        )
        gc.collect()
        torch.cuda.empty_cache()
    say(f"took {time.perf_counter() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
