"""Weights in shares on the ranks of a run: the same bits as resident ones, also where the ranks
pass through the model a different number of times.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace
from placed_runs import CPU, build, numbers, same, sample_of
from soak_runs import struck_config
from trainer_runs import Group, finish, fork_server, start

from train.config import TrainConfig
from train.lora.files import DIFFUSERS_FILE
from train.parallel.mesh import World
from train.records import VALIDATION_FILE, ValidationRecord, read_records
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

NUM_RANKS = 2


def as_a_rank(rank: int, environment: dict[str, str]) -> None:
    """Of a process: fails unless sharded weights give what resident ones give."""
    os.environ |= environment
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    world = World(rank, NUM_RANKS, CPU)
    # one block stays, and the first two are not trained
    resident = build("resident", world=world, blocks="2-4")
    sharded = build("sharded", 1, world=world, blocks="2-4")
    assert sharded.weights is not None
    assert same(numbers(sharded), numbers(resident))
    # the first rank is done earlier, and the others still get its share
    with sharded.weights.uneven(), torch.no_grad():
        for seed in range(1 + 2 * rank):
            loss, expected = (
                run.micro_step.losses(sample_of(run, seed)) for run in (sharded, resident)
            )
            assert torch.equal(loss, expected)
    assert same(numbers(sharded), numbers(resident))
    dist.destroy_process_group()


def test_sharded_weights_give_the_bits_of_resident_ones_on_every_rank() -> None:
    group = Group(NUM_RANKS)
    ranks = [
        fork_server().Process(target=as_a_rank, args=(rank, group.environment), daemon=True)
        for rank in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * NUM_RANKS


def test_a_whole_run_with_sharded_weights_is_the_same(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    """With three windows and three clips, which two ranks can't have equally many of."""
    config = replace(
        struck_config(run_config, tmp_path / "dataset"),
        num_steps=2,
        validation=ValidationConfig(every=2, num_windows=3, num_train_windows=1),
        samples=SamplesConfig(every=2, num_clips=3, num_steps=1, shape="64x64x5"),
    )
    found = []
    for placement in ("resident", "sharded"):
        output = tmp_path / placement
        model = replace(config.model, placement=placement)
        said = finish(start(config, output, NUM_RANKS, model=model))
        assert ("in 2 shares on as many cards" in said) == (placement == "sharded")
        records = read_records(output / VALIDATION_FILE, ValidationRecord)
        losses = [(record.step, record.loss, record.gap) for record in records]
        found.append((losses, (output / DIFFUSERS_FILE).read_bytes()))
    assert len(found[0][0]) == 2 and found[0] == found[1]


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(ValueError, match='"sharded": one process has nobody to share weights'):
        build("sharded")
