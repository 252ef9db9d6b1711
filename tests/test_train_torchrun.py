"""Under torchrun itself: it passes signals on, starts a killed process again, repeats the reason
of a failure. Each test starts several interpreters, so they are soak tests; what the processes do
is tested without torchrun in tests/test_train_survive.py.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainer_runs import NUM_STEPS, ROOT, records

from loader.config import dump_toml
from train import checkpoint
from train.config import TrainConfig
from train.lora import files
from train.optim import OptimConfig
from train.records import METRICS_FILE, read_status

pytestmark = pytest.mark.soak


def torchrun(
    config: TrainConfig, output: Path, *options: str, **changes: Any
) -> subprocess.Popen[str]:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "test.toml"
    path.write_text(dump_toml(msgspec.structs.replace(config, output=str(output), **changes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    command += ["--nproc-per-node", "2", "train/main.py", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, bufsize=-1
    )


def wait_for_steps(process: subprocess.Popen[str], output: Path, number: int) -> None:
    metrics = output / METRICS_FILE
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= number):
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_saves_the_last_step_within_its_thirty_seconds(
    run_config: TrainConfig, tmp_path: Path, number: signal.Signals
) -> None:
    process = torchrun(run_config, tmp_path, num_steps=5000, optim=OptimConfig(lr=1e-3))
    wait_for_steps(process, tmp_path, 3)
    begin_s = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and time.monotonic() - begin_s < 30, said
    status, newest = read_status(tmp_path), checkpoint.latest(tmp_path)
    assert status is not None and status.state == "stopped" and newest is not None
    assert status.reason == f"{number.name}: stopped after step {status.step}, which is saved"
    assert checkpoint.step_of(newest) == status.step


def test_max_restarts_goes_on_after_a_kill_to_the_same_bytes(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path
) -> None:
    process = torchrun(run_config, tmp_path, "--max-restarts", "3")
    wait_for_steps(process, tmp_path, 2)
    status = read_status(tmp_path)
    assert status is not None
    os.kill(status.pid, signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "resumed from" in said
    assert [record.step for record in records(tmp_path)] == list(range(1, NUM_STEPS + 1))
    ours, theirs = (folder / files.DIFFUSERS_FILE for folder in (tmp_path, two_ranks))
    assert ours.read_bytes() == theirs.read_bytes()
    ended = read_status(tmp_path)
    assert ended is not None and ended.state == "done"


def test_torchruns_last_block_has_the_reason(run_config: TrainConfig, tmp_path: Path) -> None:
    data = msgspec.structs.replace(run_config.data, datasets=[str(tmp_path / "nowhere")])
    process = torchrun(run_config, tmp_path, data=data)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    block = said[said.rindex("train/main.py FAILED") :]
    assert "DatasetError" in block and "nowhere" in block
