"""What happened since the last record, summed on the device: nothing waits for it until a record
is made.

Losses are means over all steps of the interval, because each step draws other timesteps, and apart
by task. Faults are counted from the start of the run, so they are part of a checkpoint.

A float16 gradient that overflows while the loss scale is above 2**-10 is normal: the step is left
out and the scale halved. Anything else that is not finite is a fault: the step is left out too,
and a run with MAX_IN_A_ROW of them in a row, or MAX_SKIPPED in all, ends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loader.batch import Batch
from train.flow import to_device
from train.optim import NUM_LOSSES, NUM_TASKS, FlatParameters
from train.stopwatch import Scalars

TASKS = ("t2v", "i2v", "image")
MAX_IN_A_ROW, MAX_SKIPPED = 3, 50
# below it no scale was small enough
SMALLEST_SCALE = 2.0**-10


class Faults(NamedTuple):
    """Counted since the start of the run. in_a_row: how many skipped steps the last ones were;
    newest: the global batch of the last skipped step, -1 without one.
    """

    num_overflows: int
    num_skipped: int
    in_a_row: int
    newest: int

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= MAX_IN_A_ROW or self.num_skipped >= MAX_SKIPPED


class Sums(NamedTuple):
    """A tally as numbers: means of losses over the interval, None without a sample."""

    loss: float | None
    task_losses: dict[str, float | None]
    grad_norm: float
    loss_scale: float
    faults: Faults


class Tally:
    """`step` after every optimizer step; `read_later` at a record, which starts a new interval."""

    def __init__(self, device: torch.device, scaling: bool):
        self._scaling = scaling
        # steps whose loss is finite, then the sums of the flat vector's losses over these
        self._sums = torch.zeros(1 + NUM_LOSSES, device=device)
        # as Faults; float64 counts far enough
        self._faults = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64, device=device)
        self._grad_norm = self._loss_scale = torch.zeros((), device=device)

    def step(self, flat: FlatParameters, grad_norm: Tensor, loss_scale: Tensor, index: int) -> None:
        """Count one step: its losses and the norm of its gradient over all processes, the scale
        after it; `index` is its global batch.
        """
        losses_are_finite = flat.losses.isfinite().all()
        gradient_is_finite = grad_norm.isfinite()
        overflowed = losses_are_finite & ~gradient_is_finite & (loss_scale > SMALLEST_SCALE)
        if not self._scaling:
            overflowed = torch.zeros_like(overflowed)
        skipped = ~(losses_are_finite & gradient_is_finite) & ~overflowed

        one = torch.ones(1, device=flat.losses.device)
        step_sums = torch.cat([one, flat.losses])
        self._sums += torch.where(losses_are_finite, step_sums, torch.zeros_like(step_sums))
        num_overflows, num_skipped, in_a_row, newest = self._faults.unbind()
        self._faults = torch.stack(
            [
                num_overflows + overflowed,
                num_skipped + skipped,
                torch.where(skipped, in_a_row + 1, torch.zeros_like(in_a_row)),
                torch.where(skipped, torch.full_like(newest, index), newest),
            ]
        )
        self._grad_norm, self._loss_scale = grad_norm, loss_scale

    def read_later(self) -> Scalars:
        """For `sums_of`; starts a new interval."""
        scalars = Scalars(self._grad_norm, self._loss_scale, *self._faults, *self._sums)
        self._sums = torch.zeros_like(self._sums)
        return scalars

    def faults(self) -> Faults:
        """So far; waits for the device."""
        return Faults(*(int(count) for count in self._faults.tolist()))

    def state(self) -> Tensor:
        """The faults so far, of a checkpoint."""
        return self._faults.cpu()

    def load_state(self, state: Tensor) -> None:
        self._faults.copy_(state)


def add_losses(
    flat: FlatParameters,
    losses_B: Tensor,
    batch: Batch,
    global_batch: int,
    sequence_rank: int = 0,
) -> None:
    """Add a micro-batch's losses to the vector that all processes sum. sequence_rank: of those
    that have parts of the losses the first one counts the samples.
    """
    flat.loss.add_(losses_B.mean() / (global_batch // len(batch.keys)))
    is_image = batch.bucket.num_frames == 1
    tasks = ["image" if is_image else "i2v" if i2v else "t2v" for i2v in batch.is_i2v]
    of_task_3B = to_device(
        [[task == each for each in tasks] for task in TASKS], torch.bool, losses_B.device
    )
    # not a product: a NaN of one task is none of another
    losses_3B = torch.where(of_task_3B, losses_B, torch.zeros_like(losses_B))
    flat.losses[1 : 1 + NUM_TASKS].add_(losses_3B.sum(dim=1))
    if sequence_rank == 0:
        flat.losses[1 + NUM_TASKS :].add_(of_task_3B.sum(dim=1))


def sums_of(values: Sequence[float]) -> Sums:
    """The numbers of `Tally.read_later`."""
    grad_norm, loss_scale, *rest = values
    faults = Faults(*(int(count) for count in rest[:4]))
    num_steps, loss, *tasks = rest[4:]
    means = [
        total / count if count else None
        for total, count in zip(tasks[:NUM_TASKS], tasks[NUM_TASKS:], strict=True)
    ]
    return Sums(
        loss=loss / num_steps if num_steps else None,
        task_losses=dict(zip(TASKS, means, strict=True)),
        grad_norm=grad_norm,
        loss_scale=loss_scale,
        faults=faults,
    )
