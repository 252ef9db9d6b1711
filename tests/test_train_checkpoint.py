"""A checkpoint is gone on from if and only if its files are intact and nothing that decides the
result has changed; and what is deleted is decided by one pure function.
"""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from loader.files import file_xxh3
from train import checkpoint
from train.checkpoint import CheckpointConfig, CheckpointError, keep, retain
from train.signals import Stopped

STATE: dict[str, Any] = {"step": 3, "config": {"seed": 1, "output": "a"}}


def save(output: Path, step: int = 3) -> Path:
    def save_lora(folder: Path) -> None:
        (folder / f"step-{step}.safetensors").write_bytes(b"lora" * 10)

    return checkpoint.save(output, step, STATE, save_lora)


def load(folder: Path, config: dict[str, object], **defaults: object) -> dict[str, Any]:
    state = checkpoint.read_state(folder)
    checkpoint.check_config(
        folder,
        state["config"],
        config,
        changeable=frozenset({"output"}),
        defaults=defaults,
    )
    return state


def flip_bit(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_the_newest_the_best_and_the_regular_ones_stay() -> None:
    steps = range(100, 3001, 100)
    assert keep(steps, newest=3, best=[1700, 500]) == {2800, 2900, 3000, 1700, 500}
    assert keep(steps, newest=1, best=[], every=1000) == {1000, 2000, 3000}
    assert keep(steps, newest=0, best=[50]) == set()
    assert keep([], newest=3, best=[], every=10) == set()


def test_only_the_best_one_and_the_newest_keep_their_state() -> None:
    config = CheckpointConfig(keep_newest=2, keep_every=1000)
    steps = range(100, 2001, 100)
    kept = retain(steps, steps, config, best=[500, 900], validated=[500, 900, 1500])
    assert kept.states == {500, 1900, 2000}
    assert kept.loras == {500, 900, 1000, 1500, 1900, 2000}


def test_lora_files_of_later_steps_do_not_cost_the_checkpoint_that_was_just_written() -> None:
    """Of a run that has gone back to step 500: the newer states were damaged, or deleted."""
    config = CheckpointConfig(keep_newest=2, keep_every=1000)
    steps = [500, 501, 600, 700, 800, 1000]
    kept = retain(steps, [500, 501], config, best=[500], validated=[500])
    assert kept.states == {500, 501}
    assert kept.loras == {500, 501, 1000}


def test_what_does_not_stay_is_deleted_and_a_lora_stays_without_its_state(tmp_path: Path) -> None:
    folders = {step: save(tmp_path, step) for step in (1, 2, 3, 4)}
    checkpoint.prune(tmp_path, checkpoint.Retention(states={1, 4}, loras={3, 4}))
    assert checkpoint.steps(tmp_path) == [1, 3, 4]
    assert not (folders[3] / checkpoint.STATE_FILE).exists()
    assert (folders[3] / "step-3.safetensors").exists()
    assert checkpoint.latest(tmp_path) == folders[4]
    assert checkpoint.steps_with_state(tmp_path) == [1, 4]


def test_what_a_killed_run_left_is_neither_found_nor_kept(tmp_path: Path) -> None:
    unfinished = tmp_path / checkpoint.FOLDER / ".tmp-9"
    unfinished.mkdir(parents=True)
    assert checkpoint.latest_intact(tmp_path) == (None, [])
    save(tmp_path)
    assert not unfinished.exists()


def test_a_kill_between_the_old_one_and_the_new_one_of_a_step_costs_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    newest, replace = save(tmp_path, 3), os.replace

    def killed(source: Path, target: Path) -> None:
        if target == newest:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("train.checkpoint.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path) == [2]
    checkpoint.bring_back(tmp_path)
    assert checkpoint.latest_intact(tmp_path) == (newest, [])
    # of one that was being deleted nothing comes back
    half = newest.rename(newest.with_name(f".tmp-{newest.name}"))
    (half / "step-3.safetensors").unlink()
    checkpoint.bring_back(tmp_path)
    assert checkpoint.steps(tmp_path) == [2]


def test_a_bit_flipped_in_any_file_is_found_and_the_one_before_is_used(tmp_path: Path) -> None:
    before, newest = save(tmp_path, 2), save(tmp_path, 3)
    assert checkpoint.latest_intact(tmp_path) == (newest, [])
    for path in sorted(newest.iterdir()):
        # in the hashes every bit, since they are what vouches for the others
        whole = path.name == checkpoint.HASH_FILE
        places = range(path.stat().st_size) if whole else [0, path.stat().st_size // 2]
        for byte in places:
            for bit in range(8) if whole else [0, 7]:
                flip_bit(path, byte, bit)
                intact, damaged = checkpoint.latest_intact(tmp_path)
                assert intact == before, (path.name, byte, bit)
                assert len(damaged) == 1 and str(newest) in damaged[0]
                flip_bit(path, byte, bit)
    assert checkpoint.latest_intact(tmp_path) == (newest, [])


def test_a_file_that_is_missing_or_too_much_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path)
    more = folder / "more.safetensors"
    more.touch()
    assert checkpoint.find_damage(folder) == (
        "checkpoint.xxh3 and the files there differ: ['more.safetensors']"
    )
    more.unlink()
    # a file manager's and a storage's
    (folder / ".DS_Store").touch()
    (folder / "@eaDir").mkdir()
    assert checkpoint.find_damage(folder) is None
    (folder / "step-3.safetensors").unlink()
    assert "step-3.safetensors" in str(checkpoint.find_damage(folder))


def test_without_any_intact_one_the_run_does_not_start_again_in_silence(tmp_path: Path) -> None:
    for step in (2, 3):
        flip_bit(save(tmp_path, step) / checkpoint.STATE_FILE, 100, 3)
    with pytest.raises(CheckpointError, match=r"step-00000003: state.pt is damaged.*step-00000002"):
        checkpoint.latest_intact(tmp_path)


def test_one_without_hashes_of_an_older_version_is_gone_on_from(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 2), save(tmp_path, 3)
    for folder in (older, newest):
        (folder / checkpoint.HASH_FILE).unlink()
    assert checkpoint.latest_intact(tmp_path) == (newest, [])
    (newest / checkpoint.STATE_FILE).write_bytes(b"half")
    assert checkpoint.latest_intact(tmp_path).folder == older


def test_what_the_disk_can_not_read_any_more_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, newest = save(tmp_path, 2), save(tmp_path, 3)

    def fail(path: Path) -> str:
        if path.parent == newest:
            raise OSError(fault, os.strerror(fault))
        return file_xxh3(path)

    monkeypatch.setattr("train.checkpoint.file_xxh3", fail)
    fault = errno.EIO
    intact, damaged = checkpoint.latest_intact(tmp_path)
    assert intact == before and "state.pt can't be read (Input/output error)" in damaged[0]
    # what a user can mend is not gone round
    fault = errno.EACCES
    with pytest.raises(PermissionError, match=r"state\.pt"):
        checkpoint.latest_intact(tmp_path)


def test_a_file_of_something_else_is_no_state(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / checkpoint.HASH_FILE).unlink()
    others: list[object] = [{"state_dict": {}}, [1, 2], torch.zeros(2)]
    for other in others:
        torch.save(other, folder / checkpoint.STATE_FILE)
        assert checkpoint.find_damage(folder) == "state.pt is not the state of a run"


def test_a_signal_while_a_state_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise Stopped("SIGTERM before or after the steps", 15)

    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(Stopped):
        checkpoint.read_state(folder)


def test_damaged_ones_are_set_aside_so_that_they_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 2)
    newest = save(tmp_path, 3)
    checkpoint.set_aside_after(tmp_path, 2)
    assert not newest.exists()
    assert sorted(os.listdir(newest.parent)) == ["damaged-step-00000003", "step-00000002"]
    assert checkpoint.find_damage(save(tmp_path, 3)) is None


def test_an_error_on_the_way_leaves_the_last_good_one_alone_and_gives_its_room_back(
    tmp_path: Path,
) -> None:
    good = save(tmp_path, 2)

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder / "lora"))

    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path, 3, STATE, fail)
    assert os.listdir(good.parent) == [good.name]


def test_a_key_that_decides_the_result_may_not_change(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert load(folder, {"seed": 1, "output": "b"})["step"] == 3
    with pytest.raises(CheckpointError, match="seed: 1 then, 2 now"):
        load(folder, {"seed": 2, "output": "a"})


def test_a_key_that_an_older_program_did_not_have_counts_as_its_default(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert load(folder, {"seed": 1, "output": "a", "new": 5}, new=5)["step"] == 3
    with pytest.raises(CheckpointError, match="new: 5 then, 6 now"):
        load(folder, {"seed": 1, "output": "a", "new": 6}, new=5)
