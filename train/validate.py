"""Validation: the loss on fixed windows of the val split, at fixed noise levels, with fixed noise.

    losses = measure(run, windows, chosen, config)     [windows, noise levels], on all ranks
    record = summarise(losses, base, ...)              what is reported

A training loss is mostly the luck of its timesteps. Here nothing is drawn anew: each window is one
task (text to video, or image to video), is noised at the same four levels with noise from
(seed, key, level) drawn on the CPU, runs alone and without any dropout. So the value depends on
weights and data alone, whatever the number of ranks, and the losses of two checkpoints differ
window by window, which is what makes a small difference measurable. (On a GPU it depends on the
attention kernel too, in the sixth digit, and runs with model.attention = "auto" may choose others.)

The headline is the mean over tasks and noise levels of loss / loss of the base model: each level
weighs the same, though the loss at high noise is many times that at low noise.

Shapes: W windows, U = 4 noise levels; B = 1, C latent channels, T/h/w latent frames, rows, columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from loader.batch import Batch
from loader.order import is_i2v, sample_seed
from loader.walk import Walk
from train import flow
from train.flow import NoiseLaws
from train.parallel import mesh
from train.parallel.mesh import World
from train.step import Inputs, noised_inputs
from train.windows import Window

Task = Literal["t2v", "i2v"]
# of the run's own law: quantiles of u, so that a shifted or logit-normal run is measured where it
# is trained
LEVELS_U: tuple[float, ...] = (0.125, 0.375, 0.625, 0.875)
# Training windows are measured at these levels alone: the middle ones, where a clip that is known
# by heart shows first.
TRAIN_LEVELS, ALL_LEVELS = slice(1, 3), slice(None)
NUM_PSNR_LEVELS = 2  # the lower noise levels, where a one-step estimate is a picture


class ValidationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[validation]` table."""

    # optimizer steps between validations; 0: none
    every: Annotated[int, Meta(ge=0)] = 500
    # of the val split, at most two a programme
    num_windows: Annotated[int, Meta(ge=1)] = 64
    # of the train split, for the gap that overfitting opens
    num_train_windows: Annotated[int, Meta(ge=0)] = 16
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class Losses(NamedTuple):
    """What was measured of some windows: float64, one row per window in the order of the keys."""

    keys: list[str]
    tasks: list[Task]
    categories: list[str]
    # mean squared error of the velocity over the frames that are noised
    loss_WU: Tensor
    # of the clean latent estimated in one step, in dB of the latent's own range; lower levels
    psnr_WP: Tensor


def measure(
    *,
    loss: Callable[[Inputs], Tensor],
    walk: Walk,
    windows: Sequence[Window],
    i2v_share: float,
    laws: NoiseLaws,
    seed: int,
    world: World,
    levels: slice = ALL_LEVELS,
    uneven: Callable[[], AbstractContextManager[None]] = nullcontext,
    gets_on: Callable[[], None] = lambda: None,
) -> Losses:
    """Losses of `windows`, shared out to the ranks and gathered on all of them.

    loss(inputs): the model's, without gradients and without dropout. `windows` are of `walk`. laws:
    the run's own, of an expert its part alone.
    levels: of LEVELS_U; the PSNR of a level that is not measured is 0. uneven: surrounds the
    passes, of which ranks make different numbers (`Run.uneven`). gets_on: called after each pass.
    """
    tasks = [_task(window, i2v_share, seed) for window in windows]
    num_columns = len(LEVELS_U) + NUM_PSNR_LEVELS
    # Each entry is written by one rank and is zero on the others, so that their sum is exact.
    table = torch.zeros(len(windows), num_columns, dtype=torch.float64, device=world.device)
    with uneven():
        for row in range(world.rank, len(windows), world.size):
            window, task = windows[row], tasks[row]
            batch = walk.batch(window.place, is_i2v=task == "i2v", seed=seed)
            for level in range(len(LEVELS_U))[levels]:
                sigma, inputs = inputs_at(level, batch, window.key, laws, seed)
                with torch.no_grad():
                    value = loss(inputs).double()
                gets_on()
                table[row, level] = value
                if level < NUM_PSNR_LEVELS:
                    # x0 = x_s - s v, so its error is s times the velocity's
                    range_ = (batch.latent_BCTHW.amax() - batch.latent_BCTHW.amin()).double()
                    psnr_db = 10 * torch.log10(range_.square() / (sigma**2 * value))
                    table[row, len(LEVELS_U) + level] = psnr_db
    mesh.all_reduce_sum(table, world)
    table = table.cpu()
    return Losses(
        keys=[window.key for window in windows],
        tasks=tasks,
        categories=[window.category for window in windows],
        loss_WU=table[:, : len(LEVELS_U)][:, levels],
        psnr_WP=table[:, len(LEVELS_U) :],
    )


def _task(window: Window, i2v_share: float, seed: int) -> Task:
    chosen = is_i2v(seed, 0, window.key, window.place.bucket.num_frames, i2v_share)
    return "i2v" if chosen else "t2v"


def inputs_at(
    level: int, batch: Batch, key: str, laws: NoiseLaws, seed: int
) -> tuple[float, Inputs]:
    """(the noise level, what the model gets) of the window `key`, which is `batch`, at number
    `level` of LEVELS_U.
    """
    sigma = flow.sigma_at(LEVELS_U[level], laws.of(batch.bucket))
    seed = sample_seed(seed, level, key)
    device = batch.latent_BCTHW.device
    shape = batch.latent_BCTHW.shape[1:]
    # on the CPU: a GPU draws other numbers from the same seed
    noise_BCThw = flow.sample_noise([seed], shape, torch.device("cpu")).to(device)
    # what one loss is worth in training has no part in how far the model is off
    return sigma, noised_inputs(batch, noise_BCThw, [sigma], [seed], weights=[1.0])


def relative_losses(losses: Losses, base: Losses) -> Tensor:
    """Each window's mean over the levels of loss / the base's mean loss of that task: float64 [W].

    Raises ValueError if the base was measured on other windows.
    """
    if losses.keys != base.keys or losses.tasks != base.tasks:
        raise ValueError("validation: the base was measured on other windows than this step")
    relative_W = torch.empty(len(losses.keys), dtype=torch.float64)
    for rows in _rows_by(losses.tasks).values():
        base_U = base.loss_WU[rows].mean(dim=0)
        relative_W[rows] = (losses.loss_WU[rows] / base_U).mean(dim=1)
    return relative_W


def headline(relative_W: Tensor, tasks: Sequence[str]) -> float:
    """The mean over tasks, each of which weighs the same, of the mean over its windows."""
    means = [float(relative_W[rows].mean()) for rows in _rows_by(tasks).values()]
    return sum(means) / len(means)


class Difference(NamedTuple):
    """Of two headlines measured on the same windows; negative is better."""

    mean: float
    # of the paired differences over windows; infinite where a task has one window alone
    standard_error: float

    @property
    def is_improvement(self) -> bool:
        return self.mean < -self.standard_error


def paired_difference(relative_W: Tensor, reference_W: Tensor, tasks: Sequence[str]) -> Difference:
    """This step's headline minus the reference's, with the standard error of that difference."""
    difference_W = relative_W - reference_W
    means, variances = [], []
    for rows in _rows_by(tasks).values():
        values = difference_W[rows]
        means.append(float(values.mean()))
        variances.append(float(values.var()) / len(rows) if len(rows) > 1 else math.inf)
    num_tasks = len(means)
    return Difference(sum(means) / num_tasks, math.sqrt(sum(variances)) / num_tasks)


def by_level(losses: Losses, base: Losses) -> list[float]:
    """Per noise level the mean over tasks of loss / base loss."""
    per_task = [
        losses.loss_WU[rows].mean(dim=0) / base.loss_WU[rows].mean(dim=0)
        for rows in _rows_by(losses.tasks).values()
    ]
    return [float(value) for value in torch.stack(per_task).mean(dim=0)]


def by_task(relative_W: Tensor, tasks: Sequence[str]) -> dict[str, float]:
    return {task: float(relative_W[rows].mean()) for task, rows in _rows_by(tasks).items()}


def by_category(losses: Losses, base: Losses) -> dict[str, float]:
    """Per category the mean over noise levels of its windows' loss / their base loss."""
    return {
        name: float((losses.loss_WU[rows].mean(dim=0) / base.loss_WU[rows].mean(dim=0)).mean())
        for name, rows in _rows_by(losses.categories).items()
    }


def _rows_by(labels: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows[label].append(row)
    return dict(sorted(rows.items()))
