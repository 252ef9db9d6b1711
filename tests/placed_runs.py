"""Tiny runs whose weights are somewhere, and all that passes through them give."""

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from bench.our_step import update
from loader.feed_config import FeedConfig
from loader.shape import Bucket
from tools.fake.step import random_batch, random_transformer
from train import setup
from train.activations.budget import room_bytes
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.model.wan import TI2V_5B, WanConfig
from train.parallel.mesh import World
from train.run import Run
from train.step import Inputs, prepare

CPU, BUCKET = torch.device("cpu"), Bucket(96, 64, 5)
ALONE = World(0, 1, CPU)
TINY = msgspec.structs.replace(
    TI2V_5B,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=48,
    freq_dim=16,
    text_dim=16,
    num_layers=5,
)


def build(
    placement: Any = "streamed",
    resident_blocks: int = 0,
    wan: WanConfig = TINY,
    path: str = "",
    targets: tuple[str, ...] = lora.TARGETS,
    blocks: str = "",
    free_bytes: Callable[[torch.device], float] = room_bytes,
    world: World = ALONE,
    **changes: Any,
) -> Run:
    config = TrainConfig(
        output="",
        model=ModelConfig(
            path=path, dtype="float32", placement=placement, resident_blocks=resident_blocks
        ),
        data=FeedConfig(datasets=[""]),
        lora=LoRAConfig(targets=list(targets), rank=4, dropout=0.1, blocks=blocks),
        num_steps=1,
        global_batch=world.data_size,
    )
    config = msgspec.structs.replace(config, **changes)
    model = None if path else random_transformer(wan, CPU, torch.float32)
    run = setup.build(config, world, [BUCKET], model=model, free_bytes=free_bytes)
    for _, b in run.adapters.tensors().values():
        b.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    run.adapters.refresh()
    return run


def sample_of(run: Run, seed: int, text_dim: int = TINY.text_dim) -> Inputs:
    batch = random_batch(BUCKET, CPU, is_i2v=[bool(seed % 2)], text_dim=text_dim, seed=seed)
    return prepare(batch, run.laws)


def numbers(run: Run, text_dim: int = TINY.text_dim) -> list[Tensor]:
    """What passes of every kind give, one after another: two micro-batches and a step, losses
    without a gradient with and without the adapters, and a micro-batch again. Every rank has its
    own samples.
    """
    rank = run.world.data_rank
    samples = [sample_of(run, 3 * rank + number, text_dim) for number in range(3)]
    found = []

    def add_gradient(number: int) -> None:
        found.append(run.micro_step.forward(samples[number]).clone())
        run.micro_step.backward()
        found.append(run.flat.gradient.clone())

    run.flat.buffer.zero_()
    add_gradient(0)
    add_gradient(1)
    update(run)
    with torch.no_grad():
        found += [run.micro_step.losses(sample) for sample in samples[:2]]
        with run.adapters.switched_off():
            found.append(run.micro_step.losses(samples[2]))
    add_gradient(2)
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert all(bool(each.isfinite().all()) for each in expected)
    return all(map(torch.equal, found, expected))
