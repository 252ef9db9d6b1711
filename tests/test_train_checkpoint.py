"""A checkpoint is gone on from if and only if nothing that decides the result has changed."""

from pathlib import Path
from typing import Any

import pytest

from train import checkpoint

STATE: dict[str, Any] = {"step": 3, "config": {"seed": 1, "output": "a"}}


def save(output: Path, step: int = 3, keep: int = 2) -> Path:
    return checkpoint.save(output, step, STATE, save_lora=lambda folder: None, keep=keep)


def load(folder: Path, config: dict[str, object], **defaults: object) -> dict[str, Any]:
    return checkpoint.load(folder, config, changeable=frozenset({"output"}), defaults=defaults)


def test_the_newest_ones_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / checkpoint.FOLDER).iterdir())
    assert names == ["step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path) == tmp_path / checkpoint.FOLDER / names[-1]


def test_what_a_killed_run_left_is_neither_found_nor_kept(tmp_path: Path) -> None:
    unfinished = tmp_path / checkpoint.FOLDER / ".tmp-9"
    unfinished.mkdir(parents=True)
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path)
    assert not unfinished.exists()


def test_a_key_that_decides_the_result_may_not_change(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert load(folder, {"seed": 1, "output": "b"})["step"] == 3
    with pytest.raises(checkpoint.CheckpointError, match="seed: 1 then, 2 now"):
        load(folder, {"seed": 2, "output": "a"})


def test_a_key_that_an_older_program_did_not_have_counts_as_its_default(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert load(folder, {"seed": 1, "output": "a", "new": 5}, new=5)["step"] == 3
    with pytest.raises(checkpoint.CheckpointError, match="new: 5 then, 6 now"):
        load(folder, {"seed": 1, "output": "a", "new": 6}, new=5)


def test_a_damaged_state_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / checkpoint.STATE_FILE).write_bytes(b"half")
    with pytest.raises(checkpoint.CheckpointError, match=r"state.pt: can't be read .* delete this"):
        load(folder, {"seed": 1, "output": "a"})
