"""Validation as a run does it: what it stops, what it keeps, and which windows it compares."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from trainer_runs import train_here

from train import checkpoint
from train.checkpoint import CheckpointError
from train.config import TrainConfig
from train.records import VALIDATION_FILE, ValidationRecord, read_records
from train.validate import ValidationConfig

OFF = ValidationConfig(every=0, num_windows=2, num_train_windows=0)


def validations(output: Path) -> list[ValidationRecord]:
    return read_records(output / VALIDATION_FILE, ValidationRecord)


def forget_validation(output: Path) -> None:
    """As a version without validation wrote its checkpoint."""
    newest = checkpoint.latest(output)
    assert newest is not None
    state = checkpoint.read_state(newest)
    del state["validation"]
    for key in list(state["config"]):
        if key.startswith("validation."):
            del state["config"][key]
    torch.save(state, newest / checkpoint.STATE_FILE)
    (newest / checkpoint.HASH_FILE).unlink()


@pytest.mark.parametrize("older", [False, True], ids=["validation off", "an older version"])
def test_windows_may_change_as_long_as_none_were_measured(
    validated_run: TrainConfig, tmp_path: Path, older: bool
) -> None:
    train_here(validated_run, tmp_path, num_steps=2, validation=OFF)
    if older:
        forget_validation(tmp_path)
    changes: dict[str, Any] = {"every": 1, "num_windows": 4, "num_train_windows": 2, "seed": 7}
    on = msgspec.structs.replace(OFF, **changes)
    train_here(validated_run, tmp_path, num_steps=3, validation=on)
    assert [record.num_windows for record in validations(tmp_path)] == [4]
    # from here on there is something to compare with
    other = msgspec.structs.replace(on, seed=8)
    with pytest.raises(CheckpointError, match=r"validation\.seed: 7 then, 8 now"):
        train_here(validated_run, tmp_path, num_steps=4, validation=other)


def test_training_windows_are_measured_at_the_middle_levels_which_older_checkpoints_had_too(
    validated_run: TrainConfig, tmp_path: Path
) -> None:
    windows = ValidationConfig(every=1, num_windows=2, num_train_windows=2)
    train_here(validated_run, tmp_path, num_steps=1, validation=windows)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    state = checkpoint.read_state(newest)
    base = state["validation"]["train_base"]
    assert base["loss_WU"].shape == (2, 2)
    # an older version had a column for each level
    base["loss_WU"] = torch.cat([torch.zeros(2, 1), base["loss_WU"], torch.zeros(2, 1)], dim=1)
    torch.save(state, newest / checkpoint.STATE_FILE)
    (newest / checkpoint.HASH_FILE).unlink()
    train_here(validated_run, tmp_path, num_steps=2, validation=windows)
    whole = tmp_path / "whole"
    train_here(validated_run, whole, num_steps=2, validation=windows)
    ours, theirs = validations(tmp_path)[-1], validations(whole)[-1]
    assert (ours.train_relative_loss, ours.gap) == (theirs.train_relative_loss, theirs.gap)
