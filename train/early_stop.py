"""Which validation was the best, and when to stop: pure bookkeeping over paired differences.

A run is better than its reference when the paired difference over the validation windows is
beyond one standard error; only then does the reference move to it. So a slow, steady gain, each
step of it inside the noise, adds up until it counts, and one lucky validation does not set a bar
that the next ones can't reach. After `patience` validations in a row without such a gain the run
ends, and ends well.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta
from torch import Tensor

from train.validate import Difference, headline, paired_difference

NUM_BEST = 5


class EarlyStopConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[early_stop]` table."""

    # validations in a row, after the warm-up, without a gain beyond its standard error; 0: never
    # stop. With a decaying learning rate the later part of a run gains by the decay alone.
    patience: Annotated[int, Meta(ge=0)] = 3


class History(NamedTuple):
    """What the validations so far have shown; part of a checkpoint.

    reference_W: relative loss of each window at `reference_step`. best: (headline, step), the best
    first, at most NUM_BEST.
    """

    reference_W: Tensor
    reference_step: int
    num_without_gain: int
    best: tuple[tuple[float, int], ...]

    @property
    def best_step(self) -> int:
        return self.best[0][1]


def _begin(relative_W: Tensor, tasks: Sequence[str], step: int) -> History:
    """The history after the first validation, which is the first reference."""
    best = ((headline(relative_W, tasks), step),)
    return History(relative_W, reference_step=step, num_without_gain=0, best=best)


def judge(
    history: History | None,
    relative_W: Tensor,
    tasks: Sequence[str],
    *,
    step: int,
    warmup_steps: int,
) -> tuple[History, Difference]:
    """The history with the validation of `step` in it, and how that differs from the reference;
    history: None before the first one, which has only itself to differ from.
    """
    if history is None:
        return _begin(relative_W, tasks, step), paired_difference(relative_W, relative_W, tasks)
    difference = paired_difference(relative_W, history.reference_W, tasks)
    best = tuple(sorted([*history.best, (headline(relative_W, tasks), step)])[:NUM_BEST])
    if difference.is_improvement:
        return History(relative_W, step, num_without_gain=0, best=best), difference
    # an error that can't be told (a task with one window) decides nothing, neither way
    counts = step > warmup_steps and math.isfinite(difference.standard_error)
    counted = history.num_without_gain + (1 if counts else 0)
    return history._replace(num_without_gain=counted, best=best), difference


def should_stop(history: History, patience: int) -> bool:
    return 0 < patience <= history.num_without_gain
