"""Starts train/main.py as processes, as torchrun would, on a small run."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from loader.config import dump_toml
from loader.feed_config import FeedConfig
from tools.fake.batch import write_synthetic_dataset
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora.config import LoRAConfig
from train.main import train
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.parallel.mesh import World
from train.records import METRICS_FILE, StepRecord, read_records

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 6


def small_run(checkpoint: Path, dataset: Path) -> TrainConfig:
    """Two buckets, I2V, caption and LoRA dropout, two micro-batches a step on one rank."""
    write_synthetic_dataset(dataset, {"96x64x9": 10, "64x64x1": 6}, samples_per_shard=4)
    return TrainConfig(
        output="",
        model=ModelConfig(path=str(checkpoint), dtype="float32"),
        data=FeedConfig(datasets=[str(dataset)], num_threads=1),
        num_steps=NUM_STEPS,
        global_batch=2,
        micro_batch=1,
        lora=LoRAConfig(targets=list(lora.TARGETS), rank=4, alpha=6.0, dropout=0.1),
        seed=3,
        checkpoint=CheckpointConfig(every=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, schedule="cosine"),
    )


def start(
    config: TrainConfig, output: Path, num_ranks: int, **changes: Any
) -> list[subprocess.Popen[str]]:
    """The processes that torchrun would start, without waiting for torchrun's own imports."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "test.toml"
    path.write_text(dump_toml(msgspec.structs.replace(config, output=str(output), **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return [
        subprocess.Popen(
            [sys.executable, "train/main.py", str(path)],
            cwd=ROOT,
            text=True,
            stderr=subprocess.PIPE,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> str:
    """Wait for all; returns what rank 0 said."""
    outputs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs[0]


def records(output: Path) -> list[StepRecord]:
    return read_records(output / METRICS_FILE, StepRecord)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


def train_here(config: TrainConfig, output: Path, **changes: Any) -> None:
    """The whole run in this process, on one rank."""
    config = msgspec.structs.replace(config, output=str(output), **changes)
    with ExitStack() as stack:
        train(config, World(data_rank=0, data_size=1, device=torch.device("cpu")), stack)
