"""The validation loss depends on weights and data alone: not on ranks, order or luck."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loader.feed_config import FeedConfig
from loader.shape import Bucket
from loader.walk import Walk, WalkPlace
from train import early_stop
from train.flow import NoiseLaws
from train.parallel.mesh import World
from train.step import Inputs
from train.validate import (
    LEVELS_U,
    Losses,
    by_category,
    by_level,
    headline,
    measure,
    paired_difference,
    relative_losses,
)
from train.windows import PER_PROGRAMME, Window, choose_windows, spread

CPU = torch.device("cpu")
BUCKET = Bucket(160, 96, 9)


def window(key: str, category: str, programme: str) -> Window:
    return Window(key, category, programme, "", WalkPlace(key, 0, 0, 0, BUCKET))


def losses(values: list[list[float]], tasks: list[str]) -> Losses:
    loss_WU = torch.tensor(values, dtype=torch.float64)
    names = [str(number) for number in range(len(values))]
    return Losses(names, tasks, ["a"] * len(values), loss_WU, loss_WU[:, :2])  # type: ignore[arg-type]


def test_categories_take_turns_and_a_programme_gives_at_most_two() -> None:
    common = [window(f"c{i:02d}", "common", f"p{i // 4}") for i in range(40)]
    rare = [window(f"r{i}", "rare", "q") for i in range(4)]
    chosen = spread([*common, *rare], 12)
    assert [w.key for w in chosen] == sorted(w.key for w in chosen) and len(chosen) == 12
    assert sum(w.category == "rare" for w in chosen) == PER_PROGRAMME
    for programme in {w.programme for w in chosen}:
        assert sum(w.programme == programme for w in chosen) <= PER_PROGRAMME


def test_too_few_programmes_give_fewer_windows_and_no_error() -> None:
    assert len(spread([window(f"{i}", "a", "p") for i in range(9)], 8)) == PER_PROGRAMME


def velocity_of_nothing(inputs: Inputs) -> Tensor:
    """A model that always says 0, whose loss is known: the mean square of what it must say."""
    return inputs.target_BCThw[:, :, int(inputs.num_clean_frames_B) :].square().mean()


def measured(dataset: Path, world_size: int) -> tuple[list[str], Tensor]:
    """As `world_size` ranks would, one after the other; their tables are added up as gloo would."""
    total = torch.zeros(())
    keys: list[str] = []
    with Walk(FeedConfig(datasets=[str(dataset)]), "val", CPU) as walk:
        windows = choose_windows(walk, 8, seed=0)
        for rank in range(world_size):
            found = measure(
                loss=velocity_of_nothing,
                walk=walk,
                windows=windows,
                i2v_share=0.5,
                laws=NoiseLaws(),
                seed=0,
                # a rank of `world_size`, that adds up nothing by itself
                world=_Alone(rank, world_size, CPU),
            )
            keys, total = found.keys, total + found.loss_WU
    return keys, total


class _Alone(World):
    """A rank without the others: mesh.all_reduce_sum sees a world of one."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.validate.mesh.all_reduce_sum", lambda vector, world: None)


@pytest.mark.usefixtures("alone")
def test_one_two_and_four_ranks_measure_the_same_bits(tiny_dataset: Path) -> None:
    keys, alone = measured(tiny_dataset, 1)
    assert len(keys) >= 2 and alone.shape == (len(keys), len(LEVELS_U)) and bool((alone > 0).all())
    for world_size in (2, 4):
        same_keys, shared = measured(tiny_dataset, world_size)
        assert same_keys == keys and torch.equal(shared, alone)


@pytest.mark.usefixtures("alone")
def test_noise_differs_between_levels_and_windows_and_not_between_validations(
    tiny_dataset: Path,
) -> None:
    _, first = measured(tiny_dataset, 1)
    _, second = measured(tiny_dataset, 1)
    assert torch.equal(first, second)
    assert len(set(first.flatten().tolist())) == first.numel()


def test_the_headline_weighs_levels_and_tasks_equally() -> None:
    # i2v: one window, half the base's loss; t2v: three windows at the base's
    base = losses([[1.0, 2.0, 4.0, 8.0]] * 4, ["i2v", "t2v", "t2v", "t2v"])
    now = losses([[0.5, 1.0, 2.0, 4.0], *[[1.0, 2.0, 4.0, 8.0]] * 3], base.tasks)  # type: ignore[arg-type]
    relative_W = relative_losses(now, base)
    assert relative_W.tolist() == [0.5, 1.0, 1.0, 1.0]
    assert headline(relative_W, base.tasks) == 0.75
    assert by_level(now, base) == [0.75] * 4
    assert by_category(base, base) == {"a": 1.0}


def test_losses_of_other_windows_are_not_compared() -> None:
    base = losses([[1.0] * 4] * 2, ["t2v", "t2v"])
    with pytest.raises(ValueError, match="other windows"):
        relative_losses(base._replace(keys=["7", "8"]), base)


def test_the_error_is_of_paired_differences() -> None:
    """Windows differ a hundredfold among each other, and by a hair between two validations."""
    reference_W = torch.tensor([0.01, 1.0, 10.0, 0.1], dtype=torch.float64)
    difference = paired_difference(reference_W - 0.001, reference_W, ["t2v"] * 4)
    assert math.isclose(difference.mean, -0.001) and difference.standard_error < 1e-12
    assert difference.is_improvement
    # as large a mean, but made by one window
    noisy = paired_difference(
        reference_W + torch.tensor([-0.1, 0.03, 0.03, 0.036]), reference_W, ["t2v"] * 4
    )
    assert noisy.mean < 0 and not noisy.is_improvement


TASKS = ["t2v"] * 8
SPREAD = torch.linspace(-0.02, 0.02, 8, dtype=torch.float64)


def run_of(means: list[float], warmup_steps: int = 0) -> early_stop.History:
    """The history of validations with these relative losses, each with noise that cancels out."""
    ones_W = torch.ones(8, dtype=torch.float64)
    history, _ = early_stop.judge(None, ones_W, TASKS, step=0, warmup_steps=warmup_steps)
    for step, mean in enumerate(means, start=1):
        noise = SPREAD if step % 2 else SPREAD.flip(0)
        history, _ = early_stop.judge(
            history, mean + noise, TASKS, step=step, warmup_steps=warmup_steps
        )
    return history


def test_the_first_validation_is_the_reference_and_counts_for_nothing() -> None:
    """Also where it is not the one before the first step, because it was turned on later."""
    first_W = 0.9 + SPREAD
    history, difference = early_stop.judge(None, first_W, TASKS, step=100, warmup_steps=0)
    assert (history.reference_step, history.num_without_gain, len(history.best)) == (100, 0, 1)
    assert difference.mean == 0.0 and not difference.is_improvement


def test_overfitting_is_stopped_and_the_best_step_named() -> None:
    history = run_of([0.8, 0.7, 0.75, 0.8, 0.9])
    assert history.reference_step == 2 and history.best_step == 2
    assert early_stop.should_stop(history, patience=3)
    assert not early_stop.should_stop(history, patience=4)
    assert not early_stop.should_stop(history, patience=0)


def test_slow_steady_progress_is_not_stopped() -> None:
    """Each gain is inside the error, their sum is not: the reference waits until it is."""
    history = run_of([1 - 0.004 * n for n in range(1, 40)])
    assert not early_stop.should_stop(history, patience=3)


def test_validations_in_the_warm_up_are_not_counted() -> None:
    assert run_of([1.1, 1.2, 1.3], warmup_steps=3).num_without_gain == 0


def test_an_unknown_error_decides_nothing() -> None:
    history = None
    for step in (0, 1, 2, 3, 4):
        history, difference = early_stop.judge(
            history, torch.tensor([0.5], dtype=torch.float64), ["t2v"], step=step, warmup_steps=0
        )
        assert difference.standard_error == math.inf
    assert history is not None
    assert history.num_without_gain == 0 and history.reference_step == 0


def test_the_best_five_are_kept_in_order() -> None:
    history = run_of([0.9, 0.5, 0.7, 0.6, 0.8, 0.4])
    assert [step for _, step in history.best] == [6, 2, 4, 3, 5]
