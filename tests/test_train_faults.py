"""What breaks a run ends it with a reason and a path, keeps what is good, and is in status.json."""

import logging
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_runs import NUM_STEPS, records, train_here

from loader.files import FolderInUseError, sole_writer
from loader.shape import Bucket
from train import checkpoint, setup
from train.checkpoint import CheckpointError
from train.config import TrainConfig
from train.lora import files
from train.model.identity import weights_xxh3
from train.optim import OptimConfig
from train.parallel.mesh import World
from train.records import METRICS_FILE, RecordError, read_status
from train.sampling import SamplesConfig
from train.tracking import WandbConfig

CONSTANT = OptimConfig(lr=1e-3)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def with_model(config: TrainConfig, folder: Path, **changes: Any) -> dict[str, Any]:
    return {"model": msgspec.structs.replace(config.model, path=str(folder), **changes)}


def break_weight(checkpoint_folder: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the base model with one element of one tensor changed."""
    shutil.copytree(checkpoint_folder, folder)
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_a_nan_at_the_first_step_is_located_and_not_blamed_on_the_learning_rate(
    run_config: TrainConfig, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "blocks.1.attn1.to_out.0.weight"
    model = break_weight(tiny_checkpoint, tmp_path / "model", name, float("nan"))
    with pytest.raises(ValueError) as caught, caplog.at_level(logging.WARNING):
        train_here(run_config, tmp_path / "run", **with_model(run_config, model))
    said = str(caught.value)
    assert said.startswith("step 3: 3 steps were skipped, the last 3 in a row")
    assert "blocks.1.attn1.out.weight (float32) is not finite" in said
    assert "samples " in said and "model.dtype float32" in said
    assert "not the learning rate" in said and "lower optim.lr" not in said
    # looked for once
    assert sum("was skipped" in record.message for record in caplog.records) == 1
    status = read_status(tmp_path / "run")
    assert status is not None and status.state == "failed" and "attn1.out" in status.reason
    assert [record.loss for record in records(tmp_path / "run")] == [None, None, None]
    assert not (tmp_path / "run" / files.DIFFUSERS_FILE).exists()


def test_parameters_that_the_last_update_broke_are_never_saved(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    train_here(run_config, tmp_path, optim=CONSTANT, num_steps=1)
    # its loss and its gradient are finite, the step is not
    lost = OptimConfig(lr=1e30, weight_decay=1e30)
    with pytest.raises(ValueError, match="parameters are not finite after the update") as caught:
        train_here(run_config, tmp_path / "lost", optim=lost, num_steps=1)
    assert "Start again with a lower optim.lr" in str(caught.value)
    assert not (tmp_path / "lost" / files.DIFFUSERS_FILE).exists()
    assert checkpoint.latest(tmp_path / "lost") is None


@pytest.fixture
def interrupted(run_config: TrainConfig, tmp_path: Path) -> Path:
    """The output of a run that has done two steps of what will be six."""
    output = tmp_path / "run"
    train_here(run_config, output, optim=CONSTANT, num_steps=2)
    return output


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    run_config: TrainConfig, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = interrupted.with_name("whole")
    train_here(run_config, whole, optim=CONSTANT, num_steps=3)
    newest = checkpoint.latest(interrupted)
    assert newest is not None
    data = bytearray((newest / checkpoint.STATE_FILE).read_bytes())
    data[len(data) // 2] ^= 4
    (newest / checkpoint.STATE_FILE).write_bytes(data)

    train_here(run_config, interrupted, optim=CONSTANT, num_steps=3)
    assert f"{newest}: state.pt is damaged" in caplog.text
    assert [record.step for record in records(interrupted)] == [1, 2, 3]
    ours, theirs = (folder / files.DIFFUSERS_FILE for folder in (interrupted, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert checkpoint.find_damage(newest) is None
    assert newest.with_name(f"damaged-{newest.name}").exists()


def test_other_base_weights_of_the_same_shape_are_refused(
    run_config: TrainConfig, interrupted: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint, moved)
    assert weights_xxh3(moved) == weights_xxh3(tiny_checkpoint)
    name = "blocks.0.ffn.net.2.weight"
    other = break_weight(tiny_checkpoint, tmp_path / "other", name, 1.0)
    with pytest.raises(CheckpointError, match=r"other base weights than those in .*/other; set"):
        train_here(
            run_config, interrupted, optim=CONSTANT, num_steps=3, **with_model(run_config, other)
        )
    train_here(
        run_config, interrupted, optim=CONSTANT, num_steps=3, **with_model(run_config, moved)
    )


def test_what_a_run_can_not_start_from_is_told_before_the_model_is_loaded(
    run_config: TrainConfig,
    interrupted: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("train.setup.load_transformer", never)
    monkeypatch.setitem(sys.modules, "wandb", None)
    other = break_weight(tiny_checkpoint, tmp_path / "other", "blocks.0.ffn.net.2.weight", 1.0)
    samples = SamplesConfig(shape="96x64x9", prompts=str(tmp_path / "absent"))
    for changes, said in (
        ({"seed": 4}, "seed: 3 then, 4 now"),
        ({"num_steps": 1}, "num_steps = 1: .*step-00000002 is 2 steps on already"),
        (with_model(run_config, other), "other base weights"),
        ({"samples": samples}, "samples.prompts = .*absent: not a file of tools.prompts"),
        ({"wandb": WandbConfig(project="p")}, "wandb.project = 'p': the package is missing"),
    ):
        with pytest.raises(ValueError, match=said):
            train_here(run_config, interrupted, **{"optim": CONSTANT, "num_steps": 3} | changes)
    init = msgspec.structs.replace(run_config.lora, init=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="absent"):
        train_here(run_config, tmp_path / "new", optim=CONSTANT, num_steps=3, lora=init)


def test_what_builds_a_run_and_does_not_go_on_minds_no_checkpoint(
    run_config: TrainConfig, interrupted: Path
) -> None:
    """As tools.doctor, tools.profile_step and bench.learn do, with settings of their own."""
    other = msgspec.structs.replace(run_config, output=str(interrupted), global_batch=1, seed=4)
    run = setup.build(other, World(0, 1, torch.device("cpu")), [Bucket(96, 64, 9)])
    assert run.config.seed == 4


def test_a_checkpoint_of_an_older_version_is_gone_on_from(
    run_config: TrainConfig, interrupted: Path
) -> None:
    newest = checkpoint.latest(interrupted)
    assert newest is not None
    state = torch.load(newest / checkpoint.STATE_FILE, weights_only=True)
    for key in ("base_weights", "faults"):
        del state[key]
    # a disabled scaler's state, and keys that have moved into a table
    state["scaler"] = {}
    for key in list(state["config"]):
        if key.startswith(("checkpoint.", "watch.")):
            del state["config"][key]
    state["config"] |= {"checkpoint_every": 1, "keep_checkpoints": 3}
    torch.save(state, newest / checkpoint.STATE_FILE)
    (newest / checkpoint.HASH_FILE).unlink()
    train_here(run_config, interrupted, optim=CONSTANT, num_steps=3)
    assert [record.step for record in records(interrupted)] == [1, 2, 3]


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(
    run_config: TrainConfig, interrupted: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*") if path.is_file()}
    with (
        sole_writer(interrupted, "a run (process 1 on here)"),
        pytest.raises(FolderInUseError, match=r"run: a run \(process 1 on here\) writes here"),
    ):
        train_here(run_config, interrupted, optim=CONSTANT, num_steps=3)
    del before[interrupted / ".lock"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_broken_line_of_metrics_is_named_with_what_to_do(
    run_config: TrainConfig, interrupted: Path
) -> None:
    path = interrupted / METRICS_FILE
    path.write_text('{"step": 1}\n{"st\x00\n')
    message = r"metrics.jsonl: line 2 is no record .* delete the line to go on"
    with pytest.raises(RecordError, match=message):
        train_here(run_config, interrupted, optim=CONSTANT, num_steps=3)
    status = read_status(interrupted)
    assert status is not None and "line 2" in status.reason


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write to it fails as on a full disk. Not as a
    fixture, which would last until pytest has written of the test, perhaps to a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_the_run_with_the_path_and_keeps_the_last_good_checkpoint(
    run_config: TrainConfig, interrupted: Path
) -> None:
    good = checkpoint.latest(interrupted)
    with full_disk(20_000), pytest.raises(OSError, match=r"File too large: .*state.pt"):
        train_here(run_config, interrupted, optim=CONSTANT, num_steps=3)
    assert checkpoint.latest_intact(interrupted) == (good, [])
    assert not list((interrupted / checkpoint.FOLDER).glob(".tmp-*"))
    status = read_status(interrupted)
    assert status is not None and "File too large" in status.reason


def test_a_full_disk_at_the_start_names_its_path(run_config: TrainConfig, tmp_path: Path) -> None:
    with full_disk(300), pytest.raises(OSError, match=r"File too large: .*config.toml"):
        train_here(run_config, tmp_path / "run", optim=CONSTANT, num_steps=1)


def test_a_full_disk_while_the_lora_is_saved_names_its_path(
    run_config: TrainConfig, interrupted: Path
) -> None:
    with full_disk(20_000), pytest.raises(OSError, match=r"File too large: .*lora.safetensors"):
        # nothing is left to train
        train_here(run_config, interrupted, optim=CONSTANT, num_steps=2)


def test_the_end_of_a_run_is_done(run_config: TrainConfig, interrupted: Path) -> None:
    status = read_status(interrupted)
    assert status is not None
    assert (status.state, status.reason, status.step, status.num_steps) == ("done", "", 2, 2)
    assert NUM_STEPS > 2
