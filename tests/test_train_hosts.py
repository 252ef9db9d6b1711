"""Several hosts, as far as one machine goes: processes that share a network but no output folder,
each of them the first one of its host.
"""

import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch.distributed as dist
from trainer_runs import (
    Group,
    Rank,
    finish,
    records,
    wait_for_records,
    with_validation,
)

from loader.config import dump_toml
from train import checkpoint
from train.config import TrainConfig
from train.lora import files
from train.parallel.beats import StoreBeats
from train.parallel.meeting import meet
from train.records import read_status
from train.sampling import SamplesConfig
from train.validate import ValidationConfig
from train.watch import WatchConfig


def start_hosts(
    config: TrainConfig, outputs: list[Path], init_is_everywhere: bool = False
) -> list[Rank]:
    """One process on each host; the first one's output is the run's."""
    group, processes = Group(len(outputs)), list[Rank]()
    for rank, output in enumerate(outputs):
        folder = output.with_name(f"{output.name}-host")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "test.toml"
        own = msgspec.structs.replace(config, output=str(output))
        if rank and own.lora.init and not init_is_everywhere:
            # a file of the first host
            own = msgspec.structs.replace(
                own, lora=msgspec.structs.replace(own.lora, init=str(folder / "nowhere"))
            )
        path.write_text(dump_toml(own))
        of_rank = {"RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank)}
        of_rank["LOCAL_WORLD_SIZE"] = "1"
        processes.append(Rank(folder / "said.log", ["train/main.py", str(path)], group, of_rank))
    return processes


def test_a_run_goes_on_over_two_hosts_of_which_one_has_the_checkpoints(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(two_ranks, first)
    for step in (5, 6):
        shutil.rmtree(first / checkpoint.FOLDER / f"step-{step:08d}")
    finish(start_hosts(run_config, [first, second]))
    name = files.DIFFUSERS_FILE
    assert (first / name).read_bytes() == (two_ranks / name).read_bytes()
    # the other host has written nothing
    assert not second.exists()


def test_a_lora_to_start_from_and_samples_need_one_host_only(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path
) -> None:
    init = two_ranks / files.DIFFUSERS_FILE
    config = msgspec.structs.replace(
        with_validation(run_config, tmp_path / "data"),
        lora=msgspec.structs.replace(run_config.lora, init=str(init)),
        validation=ValidationConfig(every=1, num_windows=4, num_train_windows=0),
        samples=SamplesConfig(every=1, num_clips=2, num_steps=2),
        num_steps=1,
    )
    first, second = tmp_path / "first", tmp_path / "second"
    finish(start_hosts(config, [first, second]))
    folder = first / "samples" / "step-00000001"
    assert len(list(folder.glob("*.mp4"))) == 2
    # gone on from, they are there for all hosts, also for the one that does not see them
    made = folder.stat().st_mtime_ns
    finish(start_hosts(config, [first, second], init_is_everywhere=True))
    assert folder.stat().st_mtime_ns == made
    assert not second.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_is_gone_or_hangs_ends_the_run(
    run_config: TrainConfig, tmp_path: Path, number: int
) -> None:
    config = msgspec.structs.replace(run_config, num_steps=5000, watch=WatchConfig(silent_s=5.0))
    first, second = tmp_path / "first", tmp_path / "second"
    processes = start_hosts(config, [first, second])
    try:
        wait_for_records(processes, first, 1)
        processes[1].send_signal(number)
        said = processes[0].communicate()[1]
    finally:
        processes[1].send_signal(signal.SIGKILL)
    assert processes[0].returncode == 1 and "Traceback" not in said
    expected = "gone or late" if number == signal.SIGKILL else "given no sign for 5 s"
    assert expected in said
    status = read_status(first)
    assert status is not None and status.state == "failed"
    assert records(first) and not second.exists()


def test_what_is_written_to_the_store_is_read_by_others_until_the_store_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    first, second = StoreBeats("one"), StoreBeats("one")
    assert second.read(0) is None
    first.write(0, b"\x00\xff")
    # nobody waits until it is written; on the same connection what comes next comes after it
    assert first.read(0) == b"\x00\xff"
    assert second.read(0) == b"\x00\xff"
    # of processes that torchrun has started again
    assert StoreBeats("two").read(0) is None
    first.remove(0)
    assert second.read(0) is None
    del server
    with pytest.raises(OSError, match=r"the store at 127.0.0.1 does not answer"):
        second.read(0)
    first.remove(0)
    monkeypatch.setattr("train.parallel.beats._TIMEOUT", timedelta(milliseconds=100))
    with pytest.raises(OSError, match=r"the store at 127.0.0.1 does not answer"):
        StoreBeats("one")


def test_processes_that_are_started_again_never_meet_those_that_are_gone() -> None:
    """The store stays, and the hosts don't start at the same time."""
    server = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )

    def come(rank: int) -> Any:
        store = dist.TCPStore("127.0.0.1", server.port)  # type: ignore[attr-defined]
        return meet(store, rank, 3)

    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            # the one that makes up the name comes last
            others = [pool.submit(come, rank) for rank in (1, 2)]
            time.sleep(0.1)
            assert not any(each.done() for each in others)
            stores = [pool.submit(come, 0).result(), *(each.result() for each in others)]
        assert not any(store.check(["found"]) for store in stores)
        stores[start].set("found", "")
        # answered on the same connection: now it is there for all
        assert stores[start].get("found") == b""
        assert all(store.check(["found"]) for store in stores)
