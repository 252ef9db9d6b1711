"""A trainer that is killed, and one that goes on from its checkpoint, end with the same bytes."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import NUM_STEPS, finish, records, start, wait_for_records

from train import checkpoint
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.lora import files
from train.optim import OptimConfig


def kill_and_resume(run_config: TrainConfig, output: Path, step: int, delay_s: float) -> None:
    """SIGKILL both ranks `delay_s` after `step` was logged, then run to the end."""
    processes = start(run_config, output, 2)
    wait_for_records(processes, output, step)
    time.sleep(delay_s)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    finish(start(run_config, output, 2))


@pytest.mark.parametrize(("step", "delay_s"), [(2, 0.0), (4, 0.02)])
def test_killed_and_resumed_ends_with_the_same_bytes(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path, step: int, delay_s: float
) -> None:
    kill_and_resume(run_config, tmp_path, step, delay_s)
    for name in (files.DIFFUSERS_FILE, files.COMFYUI_FILE):
        assert (tmp_path / name).read_bytes() == (two_ranks / name).read_bytes()
    ours, theirs = records(tmp_path), records(two_ranks)
    assert [r.step for r in ours] == list(range(1, NUM_STEPS + 1))
    assert [(r.loss, r.grad_norm, r.lr) for r in ours] == [
        (r.loss, r.grad_norm, r.lr) for r in theirs
    ]


@pytest.mark.soak
@pytest.mark.parametrize("step", range(NUM_STEPS))
@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.01, 0.02, 0.04])
def test_killed_at_any_moment_ends_with_the_same_bytes(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path, step: int, delay_s: float
) -> None:
    kill_and_resume(run_config, tmp_path, step, delay_s)
    assert (tmp_path / files.DIFFUSERS_FILE).read_bytes() == (
        two_ranks / files.DIFFUSERS_FILE
    ).read_bytes()


def test_resumed_on_one_rank_it_goes_on_with_the_same_samples(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path
) -> None:
    finish(
        start(
            run_config,
            tmp_path,
            2,
            num_steps=3,
            optim=msgspec.structs.replace(run_config.optim, schedule="constant"),
        )
    )
    said = finish(
        start(
            run_config,
            tmp_path,
            1,
            optim=msgspec.structs.replace(run_config.optim, schedule="constant"),
        )
    )
    assert "resumed from" in said and "step-00000003" in said
    assert "8 batches of 2 an epoch; samples left out each epoch" in said
    whole = tmp_path / "whole"
    finish(
        start(
            run_config,
            whole,
            2,
            optim=msgspec.structs.replace(run_config.optim, schedule="constant"),
        )
    )
    ours, theirs = (
        load_file(tmp_path / files.DIFFUSERS_FILE),
        load_file(whole / files.DIFFUSERS_FILE),
    )
    for key in ours:
        assert (ours[key] - theirs[key]).norm() / theirs[key].norm() < 1e-4
    # other samples have other losses
    for one, two in zip(records(tmp_path), records(whole), strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-5)


def test_float16_with_loss_scaling_and_8_bit_adamw_resumes_exactly(
    run_config: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "model": msgspec.structs.replace(run_config.model, dtype="float16"),
        "checkpoint": CheckpointConfig(every=7),
        "optim": msgspec.structs.replace(
            run_config.optim, name="adamw8bit", schedule="constant", loss_scale=2.0**40
        ),
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(run_config, whole, 1, num_steps=28, **changes))
    # the scale is still on its way down
    finish(start(run_config, parts, 1, num_steps=14, **changes))
    finish(start(run_config, parts, 1, num_steps=28, **changes))
    assert (parts / files.DIFFUSERS_FILE).read_bytes() == (
        whole / files.DIFFUSERS_FILE
    ).read_bytes()
    scales = [record.loss_scale or 0.0 for record in records(whole)]
    # halved until gradients fit
    assert scales[0] == 2.0**39 and scales[13] < 2.0**30 and scales[-1] == scales[-2]
    assert records(whole)[0].loss == pytest.approx(records(one_rank)[0].loss, rel=1e-2)
    folder = checkpoint.latest(whole)
    assert folder is not None
    saved = torch.load(folder / checkpoint.STATE_FILE, weights_only=True)
    (state,) = saved["optimizer"]["state"].values()
    in_8_bit = state["__bnb_optimizer_quant_state__"].values()
    assert any(value.dtype == torch.uint8 for value in in_8_bit)


def test_a_run_that_goes_on_needs_its_first_lora_no_more(
    run_config: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init.safetensors"
    shutil.copy(one_rank / files.DIFFUSERS_FILE, init)
    changes: dict[str, Any] = {
        "lora": msgspec.structs.replace(run_config.lora, init=str(init)),
        "optim": OptimConfig(lr=1e-3),
    }
    finish(start(run_config, tmp_path / "run", 1, num_steps=1, **changes))
    init.unlink()
    finish(start(run_config, tmp_path / "run", 1, num_steps=2, **changes))
    assert len(records(tmp_path / "run")) == 2
