"""bench.step builds and runs a step of every model, tiny: what it times is that model's."""

import msgspec
import pytest
import torch

from bench.our_step import ADAPTERS, MODELS, add_gradients, our_config, our_run
from bench.step import planned
from loader.shape import Bucket
from tools.fake.step import random_batch, random_transformer

CPU, BUCKET = torch.device("cpu"), Bucket(64, 64, 9)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_each_model_runs_with_its_own_inputs(name: str) -> None:
    model = MODELS[name]
    assert model.wan.in_channels == model.kind.in_channels
    assert model.wan.out_channels == model.kind.out_channels
    wan = msgspec.structs.replace(
        model.wan,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=48,
        freq_dim=16,
        text_dim=16,
    )
    config = our_config(ADAPTERS["r16"], torch.float32, "math", kind=model.kind)
    run = our_run(config, BUCKET, random_transformer(wan, CPU, torch.float32))
    assert run.kind.name == model.kind.name and run.laws.expert == config.model.expert
    is_i2v = model.kind.i2v_share != 0.0
    batch = random_batch(BUCKET, CPU, is_i2v=[is_i2v], text_dim=16, kind=model.kind)
    loss = add_gradients(run, [batch])
    assert loss.isfinite() and run.flat.gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("placement", "capped", "kernel", "expected"),
    [
        # measured on 2026-11-28 under a cap of 32 GiB: 4.4555 s, 28.6 GiB
        ("auto", True, "cudnn", "planned for H200, 32 GiB of it, cudnn attention: 4.51"),
        ("resident", False, "flash4", "planned for H200, flash4 attention: 3.72"),
        ("auto", False, "math", "planned: no rates for NVIDIA H200 with math attention"),
    ],
)
def test_the_plan_beside_the_rows_is_of_the_same_kernel_and_memory(
    placement: str, capped: bool, kernel: str, expected: str
) -> None:
    wan, kind = MODELS["t2v-a14b"]
    config = our_config(
        ADAPTERS["r16"],
        torch.bfloat16,
        "auto",
        kind=kind,
        placement=placement,
        activation_memory="auto",
        activation_offload=True,
    )
    found = planned(config, wan, kind.layout.parse("832x480x49"), "NVIDIA H200", kernel, capped)
    assert found.startswith(expected)
