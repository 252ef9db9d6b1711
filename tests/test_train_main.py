"""The whole trainer, as processes: ranks, recomputation, refusals. Small, but nothing in it is
replaced.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from extras import needs_dali
from safetensors.torch import load_file
from trainer_runs import NUM_STEPS, ROOT, difference, finish, records, start

from loader.feed_config import FeedConfig
from train import checkpoint
from train.config import TrainConfig
from train.lora import files
from train.optim import OptimConfig


def test_two_ranks_equal_one_rank_with_two_micro_batches(two_ranks: Path, one_rank: Path) -> None:
    ours, theirs = (load_file(output / files.DIFFUSERS_FILE) for output in (two_ranks, one_rank))
    assert difference(ours, theirs) < 1e-6
    fresh_b = [tensor for name, tensor in ours.items() if name.endswith("lora_B.weight")]
    assert min(tensor.abs().max().item() for tensor in fresh_b) > 1e-4  # every adapter was trained
    for one, two in zip(records(one_rank), records(two_ranks), strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-5)


def test_torchrun_starts_it_and_only_the_newest_checkpoints_stay(
    run_config: TrainConfig, two_ranks: Path
) -> None:
    kept = sorted(path.name for path in (two_ranks / checkpoint.FOLDER).iterdir())
    assert kept == ["step-00000004", "step-00000005", "step-00000006"]
    run = subprocess.run(  # it finds nothing left to do, and says so
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "train/main.py",
            str(two_ranks / "test.toml"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    assert (
        "step-00000006" in run.stderr
        and sorted(p.name for p in (two_ranks / checkpoint.FOLDER).iterdir()) == kept
    )


def test_deterministic_algorithms_are_enough_for_training_and_change_no_bit_on_a_cpu(
    run_config: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    finish(start(run_config, tmp_path, 1, deterministic=True))
    assert (tmp_path / files.DIFFUSERS_FILE).read_bytes() == (
        one_rank / files.DIFFUSERS_FILE
    ).read_bytes()


def test_recomputing_blocks_changes_no_bit(
    run_config: TrainConfig, one_rank: Path, tmp_path: Path
) -> None:
    finish(start(run_config, tmp_path, 1, activation_memory="all"))
    assert (tmp_path / files.DIFFUSERS_FILE).read_bytes() == (
        one_rank / files.DIFFUSERS_FILE
    ).read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    (process,) = start(run_config, tmp_path, 1, optim=OptimConfig(lr=1e30, clip_norm=0.0))
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 1 and "a lower optim.lr" in said and "Traceback" not in said
    # three steps are left out before the run gives up; the last one has no checkpoint
    logged, folder = records(tmp_path), checkpoint.latest(tmp_path)
    assert folder is not None and folder.name == f"step-{len(logged) - 1:08d}"
    assert len(logged) < NUM_STEPS and [record.loss for record in logged[-3:]] == 3 * [None]
    for tensor in load_file(folder / files.step_file(len(logged) - 1, run=tmp_path.name)).values():
        assert tensor.isfinite().all()


@needs_dali
def test_raw_first_frames_train_like_the_stored_ones(
    run_config: TrainConfig, tiny_dataset: Path, tmp_path: Path
) -> None:
    """DALI decodes KEY.jpg and the VAE encodes it: the losses differ by what JPEG loses, and by
    no more.
    """
    losses = {}
    for condition in ("latent", "raw"):
        data = FeedConfig(
            datasets=[str(tiny_dataset)],
            num_threads=1,
            i2v_share=1.0,
            condition="raw" if condition == "raw" else "latent",
        )
        finish(start(run_config, tmp_path / condition, 1, data=data, num_steps=4))
        losses[condition] = [record.loss for record in records(tmp_path / condition)]
    assert losses["raw"] == pytest.approx(losses["latent"], rel=0.02)
    assert losses["raw"] != losses["latent"]
