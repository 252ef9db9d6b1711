"""One sample on several ranks is the same sample: gradients, losses, steps, dropout, whatever is
saved for the backward pass; and it goes on from one number of ranks to another.
"""

import shutil
import signal
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sequence_runs import CPU, TINY, Case, Found, together
from trainer_runs import difference, finish, records, start, wait_for_records

from loader.models import I2V_A14B, T2V_A14B
from train import checkpoint, flow
from train.config import TrainConfig
from train.kernels.dropout import dropout_keys, dropout_survivors, keys_from
from train.lora import adapters as lora
from train.lora import files
from train.model.wan import latent_grid, patchify, unpatchify, velocity_tokens
from train.parallel.config import ParallelConfig
from train.parallel.mesh import World, process_group
from train.parallel.sequence import check_heads, check_sequence
from train.watch import WatchConfig

QKV = lora.TARGETS[:3]
PLACED = [Case((True,), placement=where) for where in ("resident", "streamed", "sharded")]
CASES = [
    Case(),
    # attention and exchanges are saved in some blocks
    Case((False, True), "0.00005GiB", activation_offload=True),
    Case((True,), "all", targets=QKV, blocks="1-2"),
    *PLACED,
    Case(kind=T2V_A14B),
    Case((True,), kind=I2V_A14B),
]


def check(found: Sequence[tuple[Found, Found]]) -> None:
    for one, several in found:
        for ours, theirs, limit in (
            (several.gradient, one.gradient, 1e-5),
            (several.moved, one.moved, 1e-4),
        ):
            error = ((ours - theirs).norm() / theirs.norm()).item()
            assert error < limit, error
        # also how many samples they are of
        torch.testing.assert_close(several.losses, one.losses, rtol=1e-5, atol=0.0)


def test_two_ranks_of_a_sample_give_the_gradient_and_the_steps_of_one(tmp_path: Path) -> None:
    found = together(2, CASES, tmp_path)
    check(found)
    of_case = dict(zip(CASES, found, strict=True))
    (_, resident), *moved = (of_case[case] for case in PLACED)
    for _, several in moved:
        assert all(map(torch.equal, several, resident))


@pytest.mark.soak
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_plan_gives_the_gradient_and_the_steps_of_one_rank(
    num_ranks: int, tmp_path: Path
) -> None:
    grid = product(
        ((False,), (True,), (True, False)),
        ("block", "all", "0.00002GiB", "0.00005GiB", "0.0001GiB"),
        (False, True),
        ("resident", "streamed", "sharded"),
        (lora.TARGETS, QKV),
    )
    cases = [
        Case(*each)
        for each in grid
        if not (each[1] == "all" and (each[2] or each[3] != "resident"))
    ]
    memories = ("block", "all", "0.00005GiB")
    cases += [Case((False, False), memory, kind=T2V_A14B) for memory in memories]
    cases += [Case((True,), memory, kind=I2V_A14B) for memory in memories]
    check(together(num_ranks, cases, tmp_path))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_run_goes_on_from_one_rank_to_two_and_back(
    run_config: TrainConfig, one_rank: Path, tmp_path: Path, num_ranks: int
) -> None:
    """From step 4 to 5 on two ranks that share each sample, or on two groups of two, and from there
    to the end on one rank.
    """
    shutil.copytree(one_rank, tmp_path, dirs_exist_ok=True)
    for step in (5, 6):
        shutil.rmtree(tmp_path / checkpoint.FOLDER / f"step-{step:08d}")
    split = ParallelConfig(sequence=2)
    finish(start(run_config, tmp_path, num_ranks, parallel=split))
    loss = records(tmp_path)[-1].loss
    assert loss == pytest.approx(records(one_rank)[-1].loss, rel=1e-4)
    ours, theirs = (load_file(folder / files.DIFFUSERS_FILE) for folder in (tmp_path, one_rank))
    assert difference(ours, theirs) < 1e-5
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    shutil.rmtree(tmp_path / checkpoint.FOLDER / "step-00000006")
    finish(start(run_config, tmp_path, 1))
    assert difference(load_file(tmp_path / files.DIFFUSERS_FILE), theirs) < 1e-5


def test_a_rank_that_is_killed_amid_an_exchange_ends_the_run(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    processes = start(
        run_config,
        tmp_path,
        2,
        parallel=ParallelConfig(sequence=2),
        num_steps=1000,
        watch=WatchConfig(silent_s=5.0),
    )
    wait_for_records(processes, tmp_path, 1)
    processes[1].send_signal(signal.SIGKILL)
    said = processes[0].communicate()[1]
    assert processes[0].returncode == 1 and "is gone or late" in said and "Traceback" not in said


def test_what_can_not_be_divided_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sequence(2, {"832x480x9": 1170, "1280x704x49": 11440})
    with pytest.raises(ValueError, match=r"= 4: .*832x480x9 has 1,170.*; use 1 or 2, or train"):
        check_sequence(4, {"832x480x9": 1170, "1280x704x49": 11440})
    check_heads(4, 24)
    with pytest.raises(ValueError, match="= 5: does not divide the model's 24 heads; use 1 or 2 "):
        check_heads(5, 24)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="= 4: this host has 2 processes of the run"),
        process_group(4),
    ):
        pass


def test_ranks_of_a_sample_count_as_one_of_data() -> None:
    worlds = [World(rank // 2, 2, CPU, rank % 2, 2) for rank in range(4)]
    assert [world.rank for world in worlds] == [0, 1, 2, 3]
    assert {world.size for world in worlds} == {4}
    assert [world.is_main for world in worlds] == [True, False, False, False]


def test_dropout_of_a_part_is_that_part_of_the_mask() -> None:
    key_B = dropout_keys(torch.tensor([2**62 + 5, 77]), 3)[2]
    whole = dropout_survivors(key_B, 50, 16, 0.3)
    for first in (1, 25, 49):
        part = dropout_survivors(keys_from(key_B, first), 50 - first, 16, 0.3)
        assert torch.equal(part, whole[:, first:])


def test_losses_of_tokens_add_up_to_those_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, target = torch.randn(2, 2, 48, 3, 4, 8, generator=generator)
    clean_frames_B = torch.tensor([0, 1])
    patch_size = TINY.patch_size
    grid = latent_grid(velocity.shape, patch_size)
    tokens = velocity_tokens(velocity, patch_size)
    assert torch.equal(unpatchify(tokens, grid, patch_size), velocity)
    assert not torch.equal(tokens, patchify(velocity, patch_size))
    parts = [
        flow.token_losses(
            tokens[:, first : first + 6],
            velocity_tokens(target, patch_size)[:, first : first + 6],
            clean_frames_B * grid.rows * grid.columns,
            first,
            grid.num_tokens,
        )
        for first in range(0, grid.num_tokens, 6)
    ]
    torch.testing.assert_close(
        torch.stack(parts).sum(0), flow.sample_losses(velocity, target, clean_frames_B)
    )
