"""One sample on several ranks against the same on one: what each process computes, for the tests of
sequence parallelism.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from trainer_runs import Group, fork_server

from bench.our_step import update
from loader.feed_config import FeedConfig
from loader.models import TI2V_5B, ModelKind
from loader.shape import Bucket
from tools.fake.step import random_batch, random_transformer
from train import setup
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora.config import LoRAConfig
from train.model import wan
from train.model.config import ModelConfig
from train.model.wan import WanConfig
from train.optim import OptimConfig
from train.parallel import mesh
from train.parallel.config import ParallelConfig
from train.parallel.mesh import World
from train.run import Run
from train.step import prepare
from train.tally import add_losses

CPU = torch.device("cpu")
# 24 tokens, 8 a frame: with two ranks the first frame ends inside of the first rank's, with four
# inside of the second one's
BUCKET = Bucket(128, 64, 9)
TINY = msgspec.structs.replace(
    wan.TI2V_5B,
    num_attention_heads=4,
    attention_head_dim=12,
    ffn_dim=48,
    freq_dim=16,
    text_dim=16,
    num_layers=3,
)
NUM_STEPS = 5


class Case(NamedTuple):
    """A run: what its samples are, and what it saves for the backward pass."""

    is_i2v: tuple[bool, ...] = (False,)
    activation_memory: str = "block"
    activation_offload: bool = False
    placement: str = "resident"
    targets: tuple[str, ...] = lora.TARGETS
    blocks: str = ""
    kind: ModelKind = TI2V_5B

    @property
    def model(self) -> WanConfig:
        return msgspec.structs.replace(
            TINY, in_channels=self.kind.in_channels, out_channels=self.kind.out_channels
        )

    def config(self, sequence: int) -> TrainConfig:
        # one rank has nobody to share weights with
        placement: Any = self.placement if sequence > 1 else "resident"
        return TrainConfig(
            output="",
            model=ModelConfig(
                path="",
                dtype="float32",
                placement=placement,
                expert="high" if self.kind.boundary else None,
            ),
            data=FeedConfig(datasets=[""], i2v_share=self.kind.i2v_share or 0.0),
            lora=LoRAConfig(targets=list(self.targets), rank=4, dropout=0.2, blocks=self.blocks),
            optim=OptimConfig(lr=1e-3),
            num_steps=1,
            micro_batch=len(self.is_i2v),
            global_batch=2 * len(self.is_i2v),
            activation_memory=self.activation_memory,
            activation_offload=self.activation_offload,
            parallel=ParallelConfig(sequence=sequence),
        )


class Found(NamedTuple):
    """The flat gradient of two micro-batches, their losses, and how far the parameters have moved
    after NUM_STEPS steps.
    """

    gradient: Tensor
    losses: Tensor
    moved: Tensor


def train_on(case: Case, world: World) -> Found:
    """On all processes of `world` together."""
    config = case.config(world.sequence_size)
    run = setup.build(
        config, world, [BUCKET], model=random_transformer(case.model, CPU, torch.float32)
    )
    for _, b in run.adapters.tensors().values():
        b.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    run.adapters.refresh()
    start = run.flat.vector.detach().clone()
    first: tuple[Tensor, Tensor] | None = None
    for step in range(NUM_STEPS):
        _sum_gradients(run, case, step)
        first = first or (run.flat.gradient.clone(), run.flat.losses.clone())
        update(run)
    assert first is not None
    return Found(*first, run.flat.vector.detach() - start)


def _sum_gradients(run: Run, case: Case, step: int) -> None:
    """As train/main.py does it, of two micro-batches."""
    run.flat.buffer.zero_()
    for number in range(2):
        batch = random_batch(
            BUCKET,
            CPU,
            is_i2v=case.is_i2v,
            text_dim=TINY.text_dim,
            seed=2 * step + number,
            kind=case.kind,
        )
        losses_B = run.micro_step.forward(prepare(batch, run.laws))
        global_batch = run.config.global_batch
        add_losses(run.flat, losses_B, batch, global_batch, run.world.sequence_rank)
        run.micro_step.backward()
    mesh.all_reduce_sum(run.flat.buffer, run.world)


def together(num_ranks: int, cases: Sequence[Case], folder: Path) -> list[tuple[Found, Found]]:
    """(on one rank, on `num_ranks` that share each sample) of each case."""
    group = Group(num_ranks)
    path = folder / "found.pt"
    processes = [
        fork_server().Process(
            target=_rank,
            args=(group.environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cases, path),
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600 + 10 * len(cases))
    assert [process.exitcode for process in processes] == [0] * num_ranks
    found = torch.load(path, weights_only=True)
    return [(Found(*one), Found(*several)) for one, several in found]


def _rank(environment: dict[str, str], cases: Sequence[Case], path: Path) -> None:
    """Of a forked process."""
    os.environ |= environment
    torch.set_num_threads(1)
    with mesh.process_group(int(environment["WORLD_SIZE"])) as world:
        several = [train_on(case, world) for case in cases]
        if world.is_main:
            one = [train_on(case, World(0, 1, CPU)) for case in cases]
            pairs = [(tuple(a), tuple(b)) for a, b in zip(one, several, strict=True)]
            torch.save(pairs, path)
        mesh.barrier(world)
