"""What a run looks at besides its own loss: validation and samples, at the steps that are due.

Both take minutes. So a checkpoint is written before them, and a signal that asks to stop ends the
process at once: the run that goes on makes first what is missing of them.
"""

import logging
from contextlib import ExitStack
from functools import partial
from typing import Any

from loader.files import write_atomic
from train import checkpoint
from train.lora import files as lora_files
from train.open_sampler import open_sampler
from train.parallel.mesh import from_main
from train.progress import Progress
from train.run import Resumed, Run
from train.sampling import Sampler
from train.signals import Signals
from train.status import Status
from train.validator import Validator, best_steps_in, open_validator
from train.watch import Watch

log = logging.getLogger(__name__)
BEST_FOLDER = "best"


class Evaluation:
    """Of a run with or without a validator and a sampler; on all ranks together."""

    def __init__(self, run: Run, stack: ExitStack):
        self._run = run
        self._validator: Validator | None = open_validator(run)
        self._sampler: Sampler | None = open_sampler(run)
        # of a run that validates no more: what it had found, for when it does again
        self._found_before: dict[str, Any] | None = None
        if self._validator:
            stack.callback(self._validator.close)

    def resume(self, resumed: Resumed) -> None:
        """Raises ValueError if the checkpoint is of other windows."""
        self._found_before = resumed.validation
        if self._validator and resumed.validation:
            self._validator.load_state_dict(resumed.validation)
        if self._run.world.is_main:
            self._mend_best()

    def _mend_best(self) -> None:
        """Of a run that has gone back to an older checkpoint best/ may hold a later step's LoRA."""
        output, expert = self._run.config.output_dir, self._run.config.model.expert
        paths = [output / BEST_FOLDER / name for name in lora_files.result_files(expert)]
        held = {lora_files.steps_of(path) for path in paths}
        # older versions did not say which step it is
        if not self.best_steps or None in held or held == {self.best_steps[0]}:
            return
        best = self.best_steps[0]
        folder = checkpoint.folder_of(output, best)
        names = [
            lora_files.step_file(best, run="*", expert=expert, comfyui=comfyui)
            for comfyui in (False, True)
        ]
        found = [sorted(folder.glob(name)) for name in names]
        if not all(found):
            log.warning("%s is of a later step than the best one so far, %d", paths[0], best)
            return
        for path, sources in zip(paths, found, strict=True):
            write_atomic(path, sources[0].read_bytes())
        log.warning("%s was of a later step, now it is of the best one so far, %d", paths[0], best)

    def validates(self, step: int) -> bool:
        """Whether the run is validated after `step` finished steps; before the first one it is."""
        every = self._run.config.validation.every
        return self._validator is not None and self._run.is_due(step, every)

    def samples(self, step: int) -> bool:
        due = self.stops or self._run.is_due(step, self._run.config.samples.every)
        return self._sampler is not None and due

    def is_complete(self, step: int, is_validated: bool) -> bool:
        """Whether nothing that was due after `step` is missing: `is_validated` says the checkpoint,
        samples are there or not. On all processes together, and the same on all of them.
        """
        return is_validated and not self._lacks_samples(step)

    def _lacks_samples(self, step: int) -> bool:
        if self._sampler is None or not self.samples(step):
            return False
        # a step's folder appears when it is whole; other hosts may not see it
        return not from_main(self._sampler.folder_of(step).exists, self._run.world)

    @property
    def stops(self) -> bool:
        """Whether the run should end early."""
        patience = self._run.config.early_stop.patience
        return self._validator is not None and self._validator.stops(patience)

    @property
    def best_steps(self) -> list[int]:
        """By validation, the best first."""
        if self._validator:
            return self._validator.best_steps
        return best_steps_in(self._found_before)

    def of_checkpoint(self) -> tuple[dict[str, Any] | None, list[int]]:
        """`validation` and `best_steps` of Run.save_checkpoint."""
        found = self._validator.state_dict() if self._validator else self._found_before
        return found, self.best_steps

    def evaluate(
        self,
        step: int,
        feed_state: dict[str, Any],
        *,
        progress: Progress | None,
        signals: Signals,
        status: Status,
        watch: Watch,
        is_validated: bool = False,
    ) -> None:
        """Do what is due after `step`, whose checkpoint is written; is_validated: but for the
        validation.
        """
        with signals.at_once(status.stopped_at_once):
            if self.validates(step) and not is_validated:
                self._validate(step, feed_state, progress, watch)
            if self._sampler and self.samples(step):
                with watch.busy("makes samples"), self._run.exported():
                    gets_on = partial(watch.mark, "makes samples")
                    event = self._sampler.sample(step, gets_on)
                if progress:
                    progress.show_samples(event, self._sampler.folder_of(step))

    def _validate(
        self, step: int, feed_state: dict[str, Any], progress: Progress | None, watch: Watch
    ) -> None:
        assert self._validator is not None
        with watch.busy("validates"):
            with self._run.exported():
                record = self._validator.validate(step, partial(watch.mark, "validates"))
                if progress:
                    progress.write_validation(record)
                    if record.best_step == step:
                        folder = self._run.config.output_dir / BEST_FOLDER
                        folder.mkdir(exist_ok=True)
                        # whose step its name does not tell
                        lora_files.save_both(
                            self._run.adapters,
                            folder,
                            self._run.config.model.expert,
                            training=self._run.training(step),
                        )
            if step > 0:
                # once more, with what validation has found; samples are not part of a checkpoint
                self._run.save_checkpoint(step, feed_state, *self.of_checkpoint())
