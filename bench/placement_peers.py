"""Streamed weights against diffusers + PEFT with checkpointing: see bench.placement."""

from typing import Any

import torch
from torch import Tensor

from bench import step_subjects as subjects
from bench.our_step import ADAPTERS, our_run, update
from bench.placement import CASES, config_of
from bench.placement_timing import Subject, allocated, print_rows, rounds_of, rows_of
from loader.batch import Batch
from tools.fake.step import random_batch
from train.flow import NoiseLaws
from train.model.wan import WanConfig
from train.step import prepare


def against_peers(
    wan: WanConfig, device: torch.device, attention: str, num_rounds: int, deadline_s: float
) -> list[dict[str, Any]]:
    """T2V; all have the same random weights, sample and noise. Prints as it goes."""
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
    found = rounds_of(
        {
            "streamed": Subject(our_step, our_bytes),
            "eager, checkpointing": Subject(lambda batch: peer(batch, None), peer_bytes),
            "compiled, checkpointing": Subject(lambda batch: peer(batch, compiled), peer_bytes),
        },
        our_bytes + peer_bytes,
        batch,
        device,
        num_rounds,
        deadline_s,
    )
    rows = rows_of("t2v", found, "streamed")
    print_rows(rows, "streamed")
    return rows
