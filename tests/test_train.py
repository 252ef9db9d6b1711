"""The whole trainer, as processes: ranks, resume after SIGKILL, precision. Small, but nothing in
it is replaced.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loader.config import dump_toml
from loader.feed_config import FeedConfig
from tools.fake.batch import write_synthetic_dataset
from train import checkpoint
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora import files
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.records import METRICS_FILE

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 6


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two buckets, I2V, caption and LoRA dropout, two micro-batches a step on one rank."""
    dataset = tmp_path_factory.mktemp("dataset")
    write_synthetic_dataset(dataset, {"96x64x9": 10, "64x64x1": 6}, samples_per_shard=4)
    return TrainConfig(
        output="",
        model=ModelConfig(path=str(tiny_checkpoint), dtype="float32"),
        data=FeedConfig(datasets=[str(dataset)], num_threads=1),
        num_steps=NUM_STEPS,
        global_batch=2,
        micro_batch=1,
        lora=LoRAConfig(targets=list(lora.TARGETS), rank=4, alpha=6.0, dropout=0.1),
        seed=3,
        checkpoint_every=1,
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
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs[0]


def records(output: Path) -> list[dict[str, float]]:
    return [msgspec.json.decode(line) for line in (output / METRICS_FILE).read_bytes().splitlines()]


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


@pytest.fixture(scope="module")
def two_ranks(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was never stopped, on two ranks."""
    output = tmp_path_factory.mktemp("two_ranks")
    finish(start(base, output, 2))
    return output


@pytest.fixture(scope="module")
def one_rank(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one_rank")
    finish(start(base, output, 1))
    return output


def test_two_ranks_equal_one_rank_with_two_micro_batches(two_ranks: Path, one_rank: Path) -> None:
    ours, theirs = (load_file(output / files.DIFFUSERS_FILE) for output in (two_ranks, one_rank))
    assert difference(ours, theirs) < 1e-6
    fresh_b = [tensor for name, tensor in ours.items() if name.endswith("lora_B.weight")]
    assert min(tensor.abs().max().item() for tensor in fresh_b) > 1e-4  # every adapter was trained
    for one, two in zip(records(one_rank), records(two_ranks), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def kill_and_resume(base: TrainConfig, output: Path, step: int, delay_s: float) -> None:
    """SIGKILL both ranks `delay_s` after `step` was logged, then run to the end."""
    processes = start(base, output, 2)
    metrics = output / METRICS_FILE
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        time.sleep(0.002)
    time.sleep(delay_s)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    finish(start(base, output, 2))


@pytest.mark.parametrize(("step", "delay_s"), [(2, 0.0), (4, 0.02)])
def test_killed_and_resumed_ends_with_the_same_bytes(
    base: TrainConfig, two_ranks: Path, tmp_path: Path, step: int, delay_s: float
) -> None:
    kill_and_resume(base, tmp_path, step, delay_s)
    for name in (files.DIFFUSERS_FILE, files.COMFYUI_FILE):
        assert (tmp_path / name).read_bytes() == (two_ranks / name).read_bytes()
    ours, theirs = records(tmp_path), records(two_ranks)
    assert [r["step"] for r in ours] == list(range(1, NUM_STEPS + 1))
    assert [(r["loss"], r["grad_norm"], r["lr"]) for r in ours] == [
        (r["loss"], r["grad_norm"], r["lr"]) for r in theirs
    ]


@pytest.mark.soak
@pytest.mark.parametrize("step", range(NUM_STEPS))
@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.01, 0.02, 0.04])
def test_killed_at_any_moment_ends_with_the_same_bytes(
    base: TrainConfig, two_ranks: Path, tmp_path: Path, step: int, delay_s: float
) -> None:
    kill_and_resume(base, tmp_path, step, delay_s)
    assert (tmp_path / files.DIFFUSERS_FILE).read_bytes() == (
        two_ranks / files.DIFFUSERS_FILE
    ).read_bytes()


def test_resumed_on_one_rank_it_goes_on_with_the_same_samples(
    base: TrainConfig, two_ranks: Path, tmp_path: Path
) -> None:
    finish(
        start(
            base,
            tmp_path,
            2,
            num_steps=3,
            optim=msgspec.structs.replace(base.optim, schedule="constant"),
        )
    )
    said = finish(
        start(base, tmp_path, 1, optim=msgspec.structs.replace(base.optim, schedule="constant"))
    )
    assert "resumed from" in said and "step-00000003" in said
    assert "8 batches of 2 an epoch; samples left out each epoch" in said
    whole = tmp_path / "whole"
    finish(start(base, whole, 2, optim=msgspec.structs.replace(base.optim, schedule="constant")))
    ours, theirs = (
        load_file(tmp_path / files.DIFFUSERS_FILE),
        load_file(whole / files.DIFFUSERS_FILE),
    )
    for key in ours:
        assert (ours[key] - theirs[key]).norm() / theirs[key].norm() < 1e-4
    # other samples have other losses
    for one, two in zip(records(tmp_path), records(whole), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_deterministic_algorithms_are_enough_for_training_and_change_no_bit_on_a_cpu(
    base: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    finish(start(base, tmp_path, 1, deterministic=True))
    assert (tmp_path / files.DIFFUSERS_FILE).read_bytes() == (
        one_rank / files.DIFFUSERS_FILE
    ).read_bytes()


def test_deterministic_refuses_attention_that_is_not(base: TrainConfig, tmp_path: Path) -> None:
    (process,) = start(
        base,
        tmp_path,
        1,
        deterministic=True,
        model=msgspec.structs.replace(base.model, attention="cudnn"),
    )
    said = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 1
        and 'with deterministic = true use "gemm", "flash"' in said
        and "Traceback" not in said
    )


def test_recomputing_blocks_changes_no_bit(
    base: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    finish(start(base, tmp_path, 1, activation_memory="all"))
    assert (tmp_path / files.DIFFUSERS_FILE).read_bytes() == (
        one_rank / files.DIFFUSERS_FILE
    ).read_bytes()


def test_float16_with_loss_scaling_and_8_bit_adamw_resumes_exactly(
    base: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "model": msgspec.structs.replace(base.model, dtype="float16"),
        "checkpoint_every": 7,
        "optim": msgspec.structs.replace(
            base.optim, name="adamw8bit", schedule="constant", loss_scale=2.0**40
        ),
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(base, whole, 1, num_steps=28, **changes))
    finish(start(base, parts, 1, num_steps=14, **changes))  # the scale is still on its way down
    finish(start(base, parts, 1, num_steps=28, **changes))
    assert (parts / files.DIFFUSERS_FILE).read_bytes() == (
        whole / files.DIFFUSERS_FILE
    ).read_bytes()
    scales = [record["loss_scale"] for record in records(whole)]
    # halved until gradients fit
    assert scales[0] == 2.0**39 and scales[13] < 2.0**30 and scales[-1] == scales[-2]
    assert records(whole)[0]["loss"] == pytest.approx(records(one_rank)[0]["loss"], rel=1e-2)
    folder = checkpoint.latest(whole)
    assert folder is not None
    (state,) = torch.load(folder / checkpoint.STATE_FILE, weights_only=True)["optimizer"][
        "state"
    ].values()
    assert any(
        value.dtype == torch.uint8 for value in state["__bnb_optimizer_quant_state__"].values()
    )


def test_a_changed_configuration_is_refused_by_name(
    base: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    constant = OptimConfig(lr=1e-3)
    (process,) = start(base, tmp_path, 1, num_steps=2, optim=constant)
    finish([process])
    changes: dict[str, Any]
    for changes, expected in (
        ({"seed": 4}, "seed: 3 then, 4 now"),
        ({"num_steps": 1}, "num_steps = 1: .* is 2 steps on already; ask for as many or more"),
    ):
        (process,) = start(base, tmp_path, 1, **({"num_steps": 2, "optim": constant} | changes))
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and re.search(expected, said) and "Traceback" not in said


def test_a_run_that_goes_on_needs_its_first_lora_no_more(
    base: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init.safetensors"
    shutil.copy(one_rank / files.DIFFUSERS_FILE, init)
    changes: dict[str, Any] = {
        "lora": msgspec.structs.replace(base.lora, init=str(init)),
        "optim": OptimConfig(lr=1e-3),
    }
    finish(start(base, tmp_path / "run", 1, num_steps=1, **changes))
    init.unlink()
    finish(start(base, tmp_path / "run", 1, num_steps=2, **changes))
    assert len(records(tmp_path / "run")) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
    base: TrainConfig, tmp_path: Path
) -> None:
    (process,) = start(base, tmp_path, 1, optim=OptimConfig(lr=1e30, clip_norm=0.0))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "a lower optim.lr" in said and "Traceback" not in said
    folder = checkpoint.latest(tmp_path)
    assert (
        folder is not None
        and folder.name == f"step-{len(records(tmp_path)):08d}" != f"step-{NUM_STEPS:08d}"
    )


def test_torchrun_starts_it_and_only_the_newest_checkpoints_stay(
    base: TrainConfig, two_ranks: Path
) -> None:
    kept = sorted(path.name for path in (two_ranks / checkpoint.FOLDER).iterdir())
    assert kept == ["step-00000004", "step-00000005", "step-00000006"]
    run = subprocess.run(  # it finds nothing left to do, and says so
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "train/main.py",
            str(two_ranks / "test.toml"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    assert (
        "step-00000006" in run.stderr
        and sorted(p.name for p in (two_ranks / checkpoint.FOLDER).iterdir()) == kept
    )


def test_raw_first_frames_train_like_the_stored_ones(
    base: TrainConfig, tiny_dataset: Path, tmp_path: Path
) -> None:
    """DALI decodes KEY.jpg and the VAE encodes it: the losses differ by what JPEG loses."""
    losses = {}
    for condition in ("latent", "raw"):
        data = FeedConfig(
            datasets=[str(tiny_dataset)],
            num_threads=1,
            i2v_share=1.0,
            condition="raw" if condition == "raw" else "latent",
        )
        finish(start(base, tmp_path / condition, 1, data=data, num_steps=4))
        losses[condition] = [record["loss"] for record in records(tmp_path / condition)]
    assert losses["raw"] == pytest.approx(losses["latent"], rel=0.02)
    assert losses["raw"] != losses["latent"]
