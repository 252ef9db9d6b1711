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
