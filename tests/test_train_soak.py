"""Struck by signals in every phase, a run ends with the files of one that was left in peace.

A few rounds always run. `pytest -m soak tests/test_train_soak.py` strikes 30 times with SIGTERM and
30 times with SIGKILL; NEWSREEL_SOAK=100 in the environment 100 times with each.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace
from soak_runs import PHASES, Chain, Hit, differences, hits, struck_config
from trainer_runs import records, train_here

from tools.fake.batch import write_synthetic_dataset
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.optim import OptimConfig
from train.records import VALIDATION_FILE

NUM_OF_EACH = int(os.environ.get("NEWSREEL_SOAK", "30"))


@pytest.fixture(scope="session")
def struck(run_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return struck_config(run_config, tmp_path_factory.mktemp("struck_dataset"))


@pytest.fixture(scope="session")
def whole(struck: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chain = Chain(struck, tmp_path_factory.mktemp("never") / "struck")
    chain.finish()
    return chain.output


def strike_all(
    config: TrainConfig, whole: Path, folder: Path, wanted: list[Hit]
) -> Counter[tuple[str, str]]:
    """Every hit lands; returns how many of each signal have met the run in each phase: a SIGTERM
    that comes while a checkpoint is written waits for the next micro-step.
    """
    number, chain = 0, Chain(config, folder / "0" / "struck")
    met: Counter[tuple[str, str]] = Counter()
    for hit in wanted:
        while not chain.strike(hit):
            # that run is over: the hit is for the next one
            assert differences(chain.output, whole) == [], (chain.output, hit)
            number += 1
            chain = Chain(config, folder / str(number) / "struck")
        met[hit.number.name, chain.phase_found()] += 1
    chain.finish()
    assert differences(chain.output, whole) == []
    return met


def test_struck_in_every_phase_it_ends_with_the_same_files(
    struck: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    # of the phases two are met by each signal
    terms = [hit for hit in hits(num_terms=4, num_kills=0, seed=1) if hit.phase in PHASES[::2]]
    kills = [hit for hit in hits(num_terms=0, num_kills=4, seed=1) if hit.phase in PHASES[1::2]]
    wanted = [hit for pair in zip(terms, kills, strict=True) for hit in pair]
    assert {hit.phase for hit in wanted} == set(PHASES)
    strike_all(struck, whole, tmp_path, wanted)


@pytest.mark.soak
def test_struck_a_hundred_times_it_ends_with_the_same_files(
    struck: TrainConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = hits(num_terms=NUM_OF_EACH, num_kills=NUM_OF_EACH, seed=2)
    met = strike_all(struck, whole, tmp_path, wanted)
    with capsys.disabled():
        print(f"\n{len(wanted)} hits, by signal and the phase that they met: {dict(met)}")
    assert {phase for _, phase in met} == set(PHASES)


def test_samples_that_a_kill_has_cut_short_are_made_when_the_run_goes_on(
    struck: TrainConfig, tmp_path: Path
) -> None:
    output = tmp_path / "struck"
    train_here(struck, output, num_steps=2, optim=OptimConfig(lr=1e-3))
    made = output / "samples" / "step-00000002"
    before = json.loads((made / "samples.json").read_bytes())
    shutil.rmtree(made)
    validation = (output / VALIDATION_FILE).read_bytes()
    train_here(struck, output, num_steps=2, optim=OptimConfig(lr=1e-3))
    again = json.loads((made / "samples.json").read_bytes())
    assert (again["lora_xxh3"], again["clips"]) == (before["lora_xxh3"], before["clips"])
    # the validation was whole, and is not made again
    assert (output / VALIDATION_FILE).read_bytes() == validation


def test_the_epoch_never_goes_back_with_two_datasets(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    names = []
    for name, num_samples in (("a", 4), ("b", 10)):
        write_synthetic_dataset(tmp_path / name, {"64x64x1": num_samples}, seed=ord(name))
        names.append(str(tmp_path / name))
    config = replace(run_config, data=replace(run_config.data, datasets=names))
    train_here(config, tmp_path / "run", num_steps=20, checkpoint=CheckpointConfig(every=100))
    epochs = [record.epoch for record in records(tmp_path / "run")]
    # seven batches of two are an epoch of both
    assert epochs == [step // 7 for step in range(20)]
