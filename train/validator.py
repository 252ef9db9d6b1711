"""Validation as a run does it: its windows, the base's losses, and what came of it so far.

    validator = open_validator(run)          None where there is nothing to validate on
    record = validator.validate(step)        on all ranks together
    validator.stops(patience)                whether the run should end

The base is the same model with its adapters switched off, measured once on these windows. What
decides later validations (the base's losses, the reference, the best steps) is in `state_dict`.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import torch

from loader.dataset import stored_latents
from loader.walk import Walk
from train import early_stop
from train.early_stop import History
from train.records import ValidationRecord
from train.run import Run
from train.validate import (
    ALL_LEVELS,
    LEVELS_U,
    TRAIN_LEVELS,
    Losses,
    by_category,
    by_level,
    by_task,
    headline,
    inputs_at,
    measure,
    relative_losses,
)
from train.windows import Window, choose_windows

log = logging.getLogger(__name__)
# called after each pass, of which a slow card takes an hour for all windows of a large model
GetsOn = Callable[[], None]


class _Split:
    """Windows of one split, measured at these `levels`, and the base's losses on them once they
    were measured.
    """

    def __init__(self, run: Run, walk: Walk, windows: list[Window], levels: slice):
        self.walk, self.windows, self.levels = walk, windows, levels
        self._run = run
        self.base: Losses | None = None

    def measure(self, gets_on: GetsOn, switched_off: bool = False) -> Losses:
        run, config = self._run, self._run.config
        was_training = run.model.training
        run.model.eval()  # no dropout
        try:
            with run.adapters.switched_off() if switched_off else nullcontext():
                losses = measure(
                    loss=run.micro_step.loss,
                    walk=self.walk,
                    windows=self.windows,
                    i2v_share=config.data.i2v_share,
                    laws=run.laws,
                    seed=config.validation.seed,
                    world=run.world,
                    levels=self.levels,
                    uneven=run.uneven,
                    gets_on=gets_on,
                )
        finally:
            run.model.train(was_training)
        self._check_finite(losses, is_base=switched_off)
        return losses

    def _check_finite(self, losses: Losses, is_base: bool) -> None:
        """Raises ValueError: no step could be compared with what is not a number."""
        lost = (~losses.loss_WU.isfinite()).nonzero().tolist()
        if not lost:
            return
        row, column = lost[0]
        window, config = self.windows[row], self._run.config
        is_i2v, seed = losses.tasks[row] == "i2v", config.validation.seed
        batch = self.walk.batch(window.place, is_i2v=is_i2v, seed=seed)
        level = range(len(LEVELS_U))[self.levels][column]
        sigma, inputs = inputs_at(level, batch, window.key, self._run.laws, seed)
        found = self._run.find_non_finite(inputs) or "it does not show again"
        whose, advice = "the run's", "start a new output with a lower optim.lr"
        if is_base:
            whose, advice = "the base model's", "check model.path and the dataset"
        raise ValueError(
            f"validation: {whose} loss is not finite on {len({row for row, _ in lost})} of "
            f"{len(losses.keys)} windows, the first of them {window.key} at sigma {sigma:.3f} "
            f"(model.dtype {config.model.dtype}). {found}. Try another model.dtype, or {advice}"
        )

    def measure_base(self, gets_on: GetsOn) -> Losses:
        """Before anything else that is measured, and once."""
        if self.base is None:
            self.base = self.measure(gets_on, switched_off=True)
        return self.base


class Validator:
    def __init__(self, run: Run, val: _Split, train: _Split | None):
        self._run, self._val, self._train = run, val, train
        self._history: History | None = None

    def validate(self, step: int, gets_on: GetsOn = lambda: None) -> ValidationRecord:
        """Measure, compare with the reference, and move it if this step is better. Raises
        ValueError for a loss that is not finite.
        """
        begin_s = time.perf_counter()
        base = self._val.measure_base(gets_on)
        losses = self._val.measure(gets_on)
        relative_W = relative_losses(losses, base)
        reference_step = step if self._history is None else self._history.reference_step
        self._history, difference = early_stop.judge(
            self._history,
            relative_W,
            losses.tasks,
            step=step,
            warmup_steps=self._run.config.optim.warmup_steps,
        )
        train_loss, gap = self._compare_with_training(losses, base, gets_on)
        error = difference.standard_error
        return ValidationRecord(
            step=step,
            relative_loss=headline(relative_W, losses.tasks),
            loss=float(losses.loss_WU.mean()),
            by_task=by_task(relative_W, losses.tasks),
            by_level=by_level(losses, base),
            by_category=by_category(losses, base),
            psnr_db=[float(value) for value in losses.psnr_WP.mean(dim=0)],
            train_relative_loss=train_loss,
            gap=gap,
            difference=difference.mean,
            standard_error=error if error != float("inf") else None,
            is_improvement=difference.is_improvement,
            reference_step=reference_step,
            best_step=self._history.best_step,
            num_without_gain=self._history.num_without_gain,
            num_windows=len(losses.keys),
            interval=_interval(self._run),
            elapsed_s=time.perf_counter() - begin_s,
        )

    @property
    def best_steps(self) -> list[int]:
        """The best first; empty before the first validation."""
        return [] if self._history is None else [step for _, step in self._history.best]

    def stops(self, patience: int) -> bool:
        return self._history is not None and early_stop.should_stop(self._history, patience)

    def state_dict(self) -> dict[str, Any]:
        history = self._history
        return {
            "val_base": _losses_state(self._val.base),
            "train_base": _losses_state(self._train.base if self._train else None),
            "history": None if history is None else history._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of other windows: the split has changed."""
        for split, name in ((self._val, "val_base"), (self._train, "train_base")):
            if split is None or state[name] is None:
                continue
            base = Losses(**state[name])
            if base.keys != [window.key for window in split.windows]:
                raise ValueError(
                    "validation: the windows are not those of the checkpoint, so losses can't be "
                    "compared; restore the dataset, or choose another output"
                )
            # older versions measured all levels of both
            if base.loss_WU.shape[1] == len(LEVELS_U):
                base = base._replace(loss_WU=base.loss_WU[:, split.levels])
            split.base = base
        if state["history"] is not None:
            history = History(**state["history"])
            self._history = history._replace(best=tuple((v, s) for v, s in history.best))

    def close(self) -> None:
        self._val.walk.close()
        if self._train:
            self._train.walk.close()

    def _compare_with_training(
        self, losses: Losses, base: Losses, gets_on: GetsOn
    ) -> tuple[float | None, float | None]:
        """(relative loss of the train windows, how much higher the val windows' is), both at
        TRAIN_LEVELS.
        """
        if self._train is None:
            return None, None
        base_of_train = self._train.measure_base(gets_on)
        train_loss = fmean(by_level(self._train.measure(gets_on), base_of_train))
        return train_loss, fmean(by_level(losses, base)[TRAIN_LEVELS]) - train_loss


def best_steps_in(state: dict[str, Any] | None) -> list[int]:
    """Those of a checkpoint's `Validator.state_dict`, the best first; None: it has none."""
    history = state["history"] if state else None
    return [step for _, step in history["best"]] if history else []


def _interval(run: Run) -> tuple[float, float] | None:
    """Of sigma, where an expert is measured; None for a whole model."""
    expert, boundary = run.laws.expert, run.laws.boundary
    if expert is None:
        return None
    return (boundary, 1.0) if expert == "high" else (0.0, boundary)


def _losses_state(losses: Losses | None) -> dict[str, Any] | None:
    return None if losses is None else losses._asdict()


def open_validator(run: Run) -> Validator | None:
    """None if `validation.every` is 0, or, with a warning, if the datasets have no val split.
    Raises DatasetError for datasets that can't be used.
    """
    config, device = run.config, run.world.device
    if config.validation.every == 0:
        return None
    val = _open_split(run, "val", config.validation.num_windows, device)
    if val is None:
        if run.world.is_main:
            log.warning("validation: the datasets have no val split, so nothing is validated")
        return None
    train = None
    if config.validation.num_train_windows:
        train = _open_split(run, "train", config.validation.num_train_windows, device)
    return Validator(run, val, train)


def _open_split(run: Run, split: Any, num_windows: int, device: torch.device) -> _Split | None:
    # also where training makes its first frames anew: equal for every run
    data, reads_given = stored_latents(run.config.data), bool(run.kind.condition)
    walk = Walk(data, split, device, reads_given=reads_given)
    if not walk.places:
        walk.close()
        return None
    windows = choose_windows(walk, num_windows, run.config.validation.seed)
    return _Split(run, walk, windows, levels=TRAIN_LEVELS if split == "train" else ALL_LEVELS)
