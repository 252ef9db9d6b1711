"""wandb gets a run's numbers and nothing else, offline with the real package; without it a line
says what to do.
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainer_runs import train_here

from train.config import TrainConfig
from train.progress import Progress
from train.records import StepRecord
from train.tracking import FOLDER, ID_FILE, Tracker, WandbConfig, open_tracker

OFFLINE = WandbConfig(project="newsreel", mode="offline")


class Recorder:
    """Stands where a wandb run does."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


def test_without_a_project_nothing_is_opened_or_imported(tmp_path: Path) -> None:
    assert open_tracker(WandbConfig(), tmp_path, "run", {}) is None
    assert not (tmp_path / FOLDER).exists()


def test_a_missing_package_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'the package is missing .* pip install "newsreel\[wandb'):
        open_tracker(OFFLINE, tmp_path, "run", {})


def test_measured_numbers_under_tensorboards_tags_and_no_picture(tmp_path: Path) -> None:
    recorder = Recorder()
    tracker = Tracker(recorder, media=False)
    with Progress(tmp_path, 0, 8, is_evaluated=True, tracker=tracker) as opened:
        opened.write(StepRecord(step=3, loss=0.5, lr=1e-4))
    assert recorder.logged == [({"loss/all": 0.5, "optimizer/lr": 1e-4}, 3)]
    tracker.log_sheet(tmp_path / "absent.png", 3)
    assert len(recorder.logged) == 1 and recorder.finished


def test_a_run_and_its_resumption_are_one_offline_run_that_holds_no_path(
    run_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    # its caches belong to the test
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    output = tmp_path / "run"
    config = msgspec.structs.replace(
        run_config,
        wandb=OFFLINE,
        optim=msgspec.structs.replace(run_config.optim, schedule="constant"),
    )
    train_here(config, output, num_steps=1)
    first_id = (output / FOLDER / ID_FILE).read_text()
    train_here(config, output, num_steps=2)
    assert (output / FOLDER / ID_FILE).read_text() == first_id
    stored = list(output.glob(f"{FOLDER}/offline-run-*-{first_id}/*.wandb"))
    assert len(stored) >= 1 and wandb.run is None
    data = b"".join(path.read_bytes() for path in stored)
    assert b"loss/all" in data and b"lora.rank" in data
    # paths, captions and the machine stay here
    for private in (str(tmp_path), run_config.model.path, run_config.data.datasets[0]):
        assert private.encode() not in data, private
    names = {path.name for path in output.glob(f"{FOLDER}/offline-run-*/**/*") if path.is_file()}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log"}, names


def test_the_lora_files_do_not_say_where_numbers_went(
    run_config: TrainConfig, one_rank: Path
) -> None:
    from safetensors import safe_open

    path = min((one_rank / "checkpoints").glob("step-00000006/*step-00000006.safetensors"))
    with safe_open(path, framework="np") as file:
        text = json.dumps(file.metadata())
    assert "wandb" not in text and run_config.model.path not in text
