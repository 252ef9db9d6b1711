"""Starts train/main.py as processes, as torchrun would, on a small run."""

import os
import sys
import time
from contextlib import ExitStack, suppress
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from loader.config import dump_toml
from loader.feed_config import FeedConfig
from loader.manifest import MANIFEST_FILE, encode_manifest, make_manifest
from tools.fake.batch import write_synthetic_dataset
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora.config import LoRAConfig
from train.main import main, train
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.parallel import mesh
from train.parallel.mesh import World
from train.records import METRICS_FILE, StepRecord, read_records
from train.sampling import SamplesConfig

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


def with_validation(run: TrainConfig, folder: Path) -> TrainConfig:
    """Trained on four clips, validated on twelve others, without samples."""
    train = write_synthetic_dataset(folder, {"96x64x9": 4}, split="train")
    val = write_synthetic_dataset(folder, {"96x64x9": 12}, split="val", seed=1)
    manifest = make_manifest(train.recipe, {**train.splits, **val.splits})
    (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    return msgspec.structs.replace(
        run,
        data=FeedConfig(datasets=[str(folder)], num_threads=1),
        samples=SamplesConfig(every=0),
        optim=OptimConfig(lr=1e-3),
    )


class Group:
    """What torchrun's agent is to the processes of a group: it keeps the store in which they meet.
    The store listens on a port that the system gives it: of a free one that is found before, any
    other process might be the first to make use.
    """

    def __init__(self, num_ranks: int):
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self.environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(num_ranks),
        }


class Rank:
    """One process of a run. It is forked from a server that has imported the trainer, which takes
    longer than the small run itself; the methods are those of subprocess.Popen. A daemon: one that
    hangs, or that a test which failed has left, does not outlive the tests.
    """

    def __init__(self, log: Path, argv: list[str], group: Group, environment: dict[str, str]):
        """environment: beside that of the group."""
        self._log, self._group = log, group
        self._process = fork_server().Process(
            target=_main, args=(log, argv, group.environment | environment), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended already."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """("", what it wrote to stderr). Raises TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"rank ran for more than {timeout} s: {self.said()}")
        return "", self.said()


@cache
def fork_server() -> ForkServerContext:
    """The one server that a process can have: whoever asks first decides what it has imported, so
    all tests have to ask here.
    """
    # the server takes no sys.path, only the environment
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    context = get_context("forkserver")
    context.set_forkserver_preload(
        [
            "train.main",
            "torch._dynamo",
            "bitsandbytes",
            # samples import these
            "diffusers.models.autoencoders.autoencoder_kl_wan",
            "diffusers.schedulers.scheduling_unipc_multistep",
        ]
    )
    return context


def _main(log: Path, argv: list[str], environment: dict[str, str]) -> None:
    """Of the forked process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.environ |= environment
    sys.argv = argv
    mesh.run_program(main)


def start(
    config: TrainConfig,
    output: Path,
    num_ranks: int,
    environment: dict[str, str] | None = None,
    **changes: Any,
) -> list[Rank]:
    """The processes that torchrun would start, with `environment` beside what torchrun sets."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "test.toml"
    path.write_text(dump_toml(msgspec.structs.replace(config, output=str(output), **changes)))
    group = Group(num_ranks)
    return [
        Rank(
            output / f"test-rank-{rank}.log",
            ["train/main.py", str(path)],
            group,
            {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {}),
        )
        for rank in range(num_ranks)
    ]


def finish(processes: list[Rank]) -> str:
    """Wait for all; returns what rank 0 said."""
    outputs = [process.communicate()[1] for process in processes]
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


def wait_for_records(processes: list[Rank], output: Path, num_records: int) -> None:
    """Wait until so many steps are logged."""
    metrics = output / METRICS_FILE
    are_running = True
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= num_records):
        assert are_running, processes[0].communicate()[1]
        # looked at before the file, to which a process that has ended adds nothing
        are_running = all(process.poll() is None for process in processes)
        time.sleep(0.002)
