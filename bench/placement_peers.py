"""Streamed weights against diffusers + PEFT with checkpointing, eager and compiled: `python -m
bench.placement_peers`. T2V-A14B at 832x480x49, as in bench.placement.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import msgspec
import torch
from torch import Tensor

from bench import step_subjects as subjects
from bench.our_step import ADAPTERS, our_run, update
from bench.placement import CASES, config_of
from bench.placement_timing import Subject, allocated, print_rows, rounds_of, rows_of, say
from bench.results import check_start, save
from loader.batch import Batch
from tools.fake.step import random_batch
from train.flow import NoiseLaws
from train.model.wan import T2V_A14B, WanConfig
from train.step import prepare


def against_peers(
    wan: WanConfig, device: torch.device, attention: str, num_rounds: int, deadline_s: float
) -> Iterator[list[dict[str, Any]]]:
    """T2V; all have the same random weights, sample and noise. Rows, after each round."""
    case, dtype = CASES["t2v"], torch.bfloat16
    bucket = case.kind.layout.parse(case.shape)
    batch = random_batch(bucket, device, is_i2v=[False], kind=case.kind)
    subjects.only_attention("cudnn")
    before = allocated(device)
    reference = subjects.reference_model(wan, device, dtype)
    ours = subjects.our_model(reference, wan, dtype)
    peer_bytes = (allocated(device) - before) // 2
    run = our_run(config_of(case, wan, "streamed", dtype, attention), bucket, ours)
    del ours
    our_bytes = allocated(device) - before - peer_bytes + 8 * run.flat.vector.numel()

    def our_step(batch: Batch) -> Tensor:
        run.flat.buffer.zero_()
        # the noise that the peers have
        losses_B = run.micro_step.forward(prepare(batch, NoiseLaws()))
        run.micro_step.backward()
        update(run)
        return losses_B.mean()

    peer_step = subjects.peer_step(reference, ADAPTERS["r16"], dtype)
    reference.enable_gradient_checkpointing()
    compiled = subjects.compile_blocks(reference)

    def peer(batch: Batch, blocks: Any) -> Tensor:
        subjects.use_compiled(reference, blocks)
        return peer_step(batch)

    # both peers are one model
    rows: list[dict[str, Any]] = []
    for found in rounds_of(
        {
            "streamed": Subject(our_step, our_bytes),
            "eager, checkpointing": Subject(lambda batch: peer(batch, None), peer_bytes),
            "compiled, checkpointing": Subject(lambda batch: peer(batch, compiled), peer_bytes),
        },
        our_bytes + peer_bytes,
        batch,
        device,
        num_rounds,
        lambda: time.perf_counter() > deadline_s,
    ):
        rows = rows_of("t2v", found, "streamed")
        yield rows
    print_rows(rows, "streamed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", default="cudnn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=400.0, help="one round from then on")
    parser.add_argument("--layers", type=int, default=T2V_A14B.num_layers)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_start("bench.placement_peers", arguments.json)
    begin_s, device = time.perf_counter(), torch.device("cuda")
    for rows in against_peers(
        msgspec.structs.replace(T2V_A14B, num_layers=arguments.layers),
        device,
        arguments.attention,
        arguments.rounds,
        begin_s + arguments.budget_s,
    ):
        save(arguments.json, {"card": torch.cuda.get_device_name(), "rows": rows})
    say(f"took {time.perf_counter() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
