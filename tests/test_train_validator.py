"""Validation as a run does it: what it stops, what it keeps, and which windows it compares."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import train_here

from train import checkpoint
from train.checkpoint import CheckpointConfig, CheckpointError
from train.config import TrainConfig
from train.early_stop import EarlyStopConfig
from train.evaluation import BEST_FOLDER
from train.lora import files
from train.optim import OptimConfig
from train.records import VALIDATION_FILE, ValidationRecord, read_records, read_status
from train.run import PATHS
from train.validate import Losses, ValidationConfig, measure

OFF = ValidationConfig(every=0, num_windows=2, num_train_windows=0)


def validations(output: Path) -> list[ValidationRecord]:
    return read_records(output / VALIDATION_FILE, ValidationRecord)


def whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def test_a_run_that_overfits_ends_well_and_leaves_its_best_step(
    validated_run: TrainConfig, tmp_path: Path
) -> None:
    """Trained on four clips without dropout; their loss goes on falling when that of twelve others
    rises.
    """
    lora = msgspec.structs.replace(validated_run.lora, dropout=0.0)
    changes: dict[str, Any] = {
        "num_steps": 60,
        "optim": OptimConfig(lr=3e-2),
        "lora": lora,
        "validation": ValidationConfig(every=3, num_windows=12, num_train_windows=4),
        "early_stop": EarlyStopConfig(patience=3),
        "checkpoint": CheckpointConfig(every=2, keep_newest=2, keep_every=10),
    }
    train_here(validated_run, tmp_path, **changes)
    validated = validations(tmp_path)
    by_step = {record.step: record for record in validated}
    best, last = min(validated, key=lambda record: record.relative_loss), validated[-1]
    assert 0 < best.step < last.step < 60
    assert [record.num_without_gain for record in validated[-3:]] == [1, 2, 3]
    # since the reference the loss has risen, that of the clips it is trained on has fallen
    reference = by_step[last.reference_step]
    assert last.difference > 0
    assert last.train_relative_loss is not None and reference.train_relative_loss is not None
    assert last.train_relative_loss < reference.train_relative_loss
    # it says so
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.best_step) == ("early_stop", best.step)
    assert status.step == last.step and f"the best was step {best.step}, whose" in status.reason
    # the files of the best step are in best/, and say which it was
    step_file = files.step_file(best.step, run=tmp_path.name)
    kept = tmp_path / checkpoint.FOLDER / f"step-{best.step:08d}" / step_file
    saved = tmp_path / BEST_FOLDER / files.DIFFUSERS_FILE
    assert torch.equal(whole(load_file(saved)), whole(load_file(kept)))
    with safe_open(saved, framework="pt") as file:
        training = json.loads(file.metadata()[files.TRAINING_KEY])
    assert training["step"] == best.step and not PATHS & training["config"].keys()
    assert (tmp_path / files.DIFFUSERS_FILE).exists()
    # LoRA files of every validated step, of multiples of ten and of the newest; states of the best
    # and the newest alone
    regular = range(10, last.step + 1, 10)
    newest = [step for step in range(1, last.step + 1) if step % 2 == 0 or step in by_step][-2:]
    expected = {*by_step, *regular, *newest} - {0}
    assert set(checkpoint.steps(tmp_path)) == expected
    states = set(checkpoint.steps_with_state(tmp_path))
    assert states == {best.step, *newest}
    # started again, it does not go on
    train_here(validated_run, tmp_path, **changes)
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.step) == ("early_stop", last.step)
    assert len(validations(tmp_path)) == len(validated)


def test_slow_steady_progress_is_not_stopped(validated_run: TrainConfig, tmp_path: Path) -> None:
    """A gain of a hundredth of a per cent each time, with a patience of one."""
    train_here(
        validated_run,
        tmp_path,
        num_steps=5,
        optim=OptimConfig(lr=1e-4),
        validation=ValidationConfig(every=1, num_windows=8, num_train_windows=0),
        early_stop=EarlyStopConfig(patience=1),
    )
    status, validated = read_status(tmp_path), validations(tmp_path)
    assert status is not None and (status.state, status.step) == ("done", 5)
    assert status.best_step == validated[-1].best_step != 0
    assert 0.999 < validated[-1].relative_loss < validated[0].relative_loss == 1.0
    assert all(record.num_without_gain == 0 for record in validated)


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


def test_what_validation_has_found_outlives_a_part_of_the_run_without_it(
    validated_run: TrainConfig, tmp_path: Path
) -> None:
    on = msgspec.structs.replace(OFF, every=1)
    few = CheckpointConfig(every=1, keep_newest=1)
    output, whole = tmp_path / "run", tmp_path / "whole"
    train_here(validated_run, output, num_steps=1, validation=on, checkpoint=few)
    before = validations(output)[-1]
    reference = before.step if before.is_improvement else before.reference_step
    train_here(validated_run, output, num_steps=3, validation=OFF, checkpoint=few)
    # the best one can still be gone on from
    assert checkpoint.steps_with_state(output) == [before.best_step, 3] == [1, 3]
    train_here(validated_run, output, num_steps=4, validation=on, checkpoint=few)
    train_here(validated_run, whole, num_steps=4, validation=on, checkpoint=few)
    ours, theirs = validations(output)[-1], validations(whole)[-1]
    # compared with what was the reference then, not with itself
    assert ours.reference_step == reference and ours.relative_loss == theirs.relative_loss
    assert ours.best_step == min(validations(output), key=lambda each: each.relative_loss).step


def test_a_run_that_goes_back_to_an_older_checkpoint_takes_best_back_with_it(
    validated_run: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on = msgspec.structs.replace(OFF, every=1)
    train_here(validated_run, tmp_path, num_steps=2, validation=on)
    assert [record.best_step for record in validations(tmp_path)] == [0, 1, 2]
    state = checkpoint.folder_of(tmp_path, 2) / checkpoint.STATE_FILE
    state.write_bytes(state.read_bytes()[:-1])
    train_here(validated_run, tmp_path, num_steps=1, validation=on)
    best = tmp_path / BEST_FOLDER / files.DIFFUSERS_FILE
    kept = checkpoint.folder_of(tmp_path, 1) / files.step_file(1, run=tmp_path.name)
    assert best.read_bytes() == kept.read_bytes() and files.steps_of(best) == 1
    assert "was of a later step, now it is of the best one so far, 1" in caplog.text


@pytest.mark.parametrize(("poisoned", "whose"), [(0, "the base model's"), (1, "the run's")])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_window(
    validated_run: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: int,
    whose: str,
) -> None:
    """It would make every later step as good, and a line that nobody can read."""
    measured: list[str] = []

    def measure_once_wrongly(**arguments: Any) -> Losses:
        losses = measure(**arguments)
        if len(measured) == poisoned:
            losses.loss_WU[1, 2] = float("nan")
        measured.append(losses.keys[1])
        return losses

    monkeypatch.setattr("train.validator.measure", measure_once_wrongly)
    on = msgspec.structs.replace(OFF, every=1)
    with pytest.raises(ValueError) as caught:
        train_here(validated_run, tmp_path, num_steps=1, validation=on)
    expected = f"validation: {whose} loss is not finite on 1 of 2 windows, the first of them "
    assert str(caught.value).startswith(f"{expected}{measured[0]} at sigma 0.893 ")
    assert "it does not show again" in str(caught.value)
    assert validations(tmp_path) == []


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
