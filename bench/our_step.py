"""Our own step in benchmarks: put together by train.setup, as train/main.py's is, with random
weights and batches.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from loader import models
from loader.batch import Batch
from loader.feed_config import FeedConfig
from loader.models import Expert, ModelKind
from loader.shape import Bucket
from train import optim, setup
from train.activations.budget import room_bytes
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora.config import SELF_AND_CROSS_QKV, LoRAConfig
from train.model import wan
from train.model.config import ModelConfig
from train.model.wan import Wan, WanConfig
from train.optim import OptimConfig
from train.parallel.mesh import World
from train.run import Run
from train.step import prepare


class Adapters(NamedTuple):
    targets: tuple[str, ...]
    rank: int
    dropout: float


ADAPTERS = {
    "r16": Adapters(SELF_AND_CROSS_QKV, 16, 0.0),
    "r32": Adapters(lora.TARGETS, 32, 0.1),
}


class Model(NamedTuple):
    wan: WanConfig
    kind: ModelKind


MODELS = {
    "ti2v-5b": Model(wan.TI2V_5B, models.TI2V_5B),
    "t2v-a14b": Model(wan.T2V_A14B, models.T2V_A14B),
    "i2v-a14b": Model(wan.I2V_A14B, models.I2V_A14B),
    "wan2.1-1.3b": Model(wan.WAN21_1_3B, models.WAN21_T2V),
}


def our_config(
    adapters: Adapters,
    dtype: torch.dtype,
    attention: str,
    blocks: str = "",
    kind: ModelKind = models.TI2V_5B,
    placement: str = "resident",
    **changes: Any,
) -> TrainConfig:
    """A run of one sample a step on these adapters, alpha = rank, in these blocks, of a model of
    `kind`; `changes` are its other keys.
    """
    name = str(dtype).removeprefix("torch.")
    share = 0.4 if kind.i2v_share is None else kind.i2v_share
    expert: Expert | None = None if kind.boundary is None else "high"
    config = TrainConfig(
        output="",
        model=ModelConfig(
            path="",
            expert=expert,
            dtype=name,  # type: ignore[arg-type]
            attention=attention,  # type: ignore[arg-type]
            placement=placement,  # type: ignore[arg-type]
        ),
        data=FeedConfig(datasets=[""], i2v_share=share),
        lora=LoRAConfig(
            targets=list(adapters.targets),
            rank=adapters.rank,
            alpha=float(adapters.rank),
            dropout=adapters.dropout,
            blocks=blocks,
        ),
        optim=OptimConfig(lr=1e-5, loss_scale=1024.0),
        num_steps=1,
        global_batch=1,
        seed=1,
        activation_memory="all",
    )
    return msgspec.structs.replace(config, **changes)


def our_run(
    config: TrainConfig,
    bucket: Bucket,
    model: Wan,
    world: World | None = None,
    free_bytes: Callable[[torch.device], float] = room_bytes,
    tensor_cores: bool = True,
    kernels: Sequence[str] | None = None,
) -> Run:
    """The parts of a run on `model`, with B other than zero, so that every gradient is."""
    device = model.scale_shift_table.device
    world = world or World(data_rank=0, data_size=1, device=device)
    run = setup.build(
        config,
        world,
        [bucket],
        model=model,
        free_bytes=free_bytes,
        tensor_cores=tensor_cores,
        kernels=kernels,
    )
    generator = torch.Generator(device).manual_seed(2)
    for _, b in run.adapters.tensors().values():
        b.normal_(std=0.02, generator=generator)
    run.adapters.refresh()
    return run


def add_gradients(run: Run, batches: Sequence[Batch]) -> Tensor:
    """Zero the gradient, then forward and backward of each batch; returns the last one's loss."""
    run.flat.buffer.zero_()
    for batch in batches:
        losses_B = run.micro_step.forward(prepare(batch, run.laws))
        run.micro_step.backward()
    return losses_B.mean()


def update(run: Run) -> None:
    """What train/main.py does from the gradient on: clip, step, refresh."""
    run.scaler.unscale_(run.optimizer)
    optim.clip_gradient(run.flat.gradient, run.config.optim.clip_norm)
    run.scaler.step(run.optimizer)
    optim.update_scale(run.scaler, run.scales_loss)
    run.adapters.refresh()
