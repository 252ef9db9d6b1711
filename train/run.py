"""A run's parts, and what is done with all of them: resume, save, look for what went wrong.

Left out: how they are made (train/setup.py) and the order of a step (train/main.py).
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loader.feed import Feed
from loader.models import ModelKind
from loader.shape import Bucket
from train import checkpoint, optim
from train.activations import plan as activations
from train.average import Average
from train.config import TrainConfig, defaults, flat, resumable_changes
from train.diagnose import find_non_finite
from train.flow import NoiseLaws
from train.lora import adapters as lora
from train.lora import files as lora_files
from train.lora.start import start_from
from train.model.attention import Choice, describe
from train.model.wan import Wan
from train.parallel.mesh import World, first_found, from_main
from train.placement.weights import MovedWeights
from train.records import VALIDATION_FILE, ValidationRecord, read_records
from train.step import Inputs, MicroStep, prepare
from train.tally import Tally

log = logging.getLogger(__name__)
# keys of the configuration that say where things lie
PATHS = {
    "output",
    "model.path",
    "data.datasets",
    "data.exclude",
    "data.cache_dir",
    "lora.init",
    "samples.prompts",
}


class Resumed(NamedTuple):
    """Where a run goes on. `validation`: the validator's state, None where it had none;
    is_evaluated: False if a validation was due after that step, and not yet done.
    """

    num_done: int
    validation: dict[str, Any] | None
    is_evaluated: bool


def check_state(
    config: TrainConfig, newest: Path, state: dict[str, Any], base_weights: str
) -> None:
    """Can a run go on from the checkpoint `newest`, whose state this is? base_weights: of the model
    that it would train, empty: not known. Raises CheckpointError, and ValueError for a checkpoint
    that is beyond `num_steps`.
    """
    checkpoint.check_config(
        newest,
        state["config"],
        flat(config),
        changeable=resumable_changes(config, is_validated=state.get("validation") is not None),
        defaults=defaults(),
    )
    if state["step"] > config.num_steps:
        raise ValueError(
            f"num_steps = {config.num_steps}: {newest} is {state['step']} steps on already; ask "
            f"for as many or more, or choose another output"
        )
    # older versions did not know theirs
    before = state.get("base_weights", "")
    if before and base_weights and before != base_weights:
        raise checkpoint.CheckpointError(
            f"{newest}: was trained on other base weights than those in {config.model.path}; set "
            f"model.path back, or choose another output"
        )


@dataclass(frozen=True)
class Run:
    """The parts of one training run on one process."""

    # with the model's own values where keys were unset
    config: TrainConfig
    kind: ModelKind
    # from which noise levels it learns
    laws: NoiseLaws
    world: World
    model: Wan
    # which attention kernel runs where
    kernels: Choice
    adapters: lora.LoRA
    # all LoRA parameters, their gradient and the loss, each one vector
    flat: optim.FlatParameters
    optimizer: torch.optim.Optimizer
    # what is validated, sampled and exported, unless that is what is trained
    average: Average | None
    scaler: torch.amp.GradScaler
    # what each shape saves for the backward pass
    plans: dict[Bucket, activations.ShapePlan]
    micro_step: MicroStep
    # losses and faults, summed on the device
    tally: Tally
    # train.model.identity.weights_xxh3; empty for a model that was given
    base_weights: str
    # those that are not on the card from step to step; None: all are
    weights: MovedWeights | None = None

    def resume(self, feed: Feed) -> Resumed:
        """Take up the newest checkpoint in the output folder whose files are intact, or the file
        `lora.init`. Raises CheckpointError, LoRAError, and
        ValueError for a run that is longer than `num_steps`.
        """
        # others may be on hosts that don't have these files
        newest, state = from_main(self._read_newest, self.world)
        if newest is None:
            if self.config.lora.init:
                self.flat.vector.data.copy_(from_main(self._start, self.world))
                self.adapters.refresh()
                if self.average:
                    self.average.vector.copy_(self.flat.vector.detach())
            return Resumed(num_done=0, validation=None, is_evaluated=False)
        # older versions had none, and a run without validation has none
        validation = state.get("validation")
        check_state(self.config, newest, state, self.base_weights)
        num_done: int = state["step"]
        self.flat.vector.data.copy_(state["parameters"])
        self.adapters.refresh()
        if self.average:
            self.average.vector.copy_(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scales_loss:
            self.scaler.load_state_dict(state["scaler"])
        # older versions had none
        if "faults" in state:
            self.tally.load_state(state["faults"])
        feed.load_state_dict(state["feed"])
        # older versions evaluated before they saved
        return Resumed(num_done, validation, state.get("is_evaluated", True))

    def _read_newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest intact checkpoint and its state, if there is one."""
        newest, damaged = checkpoint.latest_intact(self.config.output_dir)
        for line in damaged:
            log.warning("%s; going on from the checkpoint before it", line)
        return newest, {} if newest is None else checkpoint.read_state(newest)

    def _start(self) -> Tensor:
        """The parameters that `lora.init` makes, on the CPU."""
        read = start_from(self.adapters, Path(self.config.lora.init), self.config.model.expert)
        log.info("starts from %s", read)
        return self.flat.vector.detach().cpu()

    def save_checkpoint(
        self,
        num_done: int,
        feed_state: dict[str, Any],
        validation: dict[str, Any] | None,
        best_steps: Sequence[int],
        is_evaluated: bool = True,
    ) -> None:
        """Write the checkpoint after `num_done` steps and delete what need not stay; on the main
        process, the others do nothing.

        feed_state: it came with the last batch of these steps. validation: the validator's state;
        best_steps: by validation, the best first. is_evaluated: False before a validation that is
        due now. Raises ValueError, on all processes, if a parameter is not
        finite: nothing is written then. Raises OSError.
        """
        self.check_parameters(num_done)
        if not self.world.is_main:
            return
        output = self.config.output_dir
        state = {
            "step": num_done,
            "config": flat(self.config),
            "base_weights": self.base_weights,
            "parameters": self.flat.vector.detach(),
            "average": self.average.vector if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "faults": self.tally.state(),
            "feed": feed_state,
            "validation": validation,
            "is_evaluated": is_evaluated,
            "attention": self.kernels.table(),
        }
        checkpoint.save(output, num_done, state, partial(self._save_lora, num_done))
        path = output / VALIDATION_FILE
        validated = read_records(path, ValidationRecord) if path.exists() else []
        retention = checkpoint.retain(
            checkpoint.steps(output),
            checkpoint.steps_with_state(output),
            self.config.checkpoint,
            best=best_steps,
            validated=[record.step for record in validated],
        )
        checkpoint.prune(output, retention)

    @contextmanager
    def exported(self) -> Iterator[None]:
        """As long as the block runs the adapters are those that are validated, sampled and
        exported: their average, if the run has one. Nothing may be trained meanwhile.
        """
        with ExitStack() as stack:
            if self.average:
                shown = self.average.shown(self.flat.vector, self.adapters.refresh)
                stack.enter_context(shown)
            yield

    def _save_lora(self, num_done: int, folder: Path) -> None:
        with self.exported():
            lora_files.save_step(
                self.adapters,
                folder,
                num_done,
                run=self.name,
                expert=self.config.model.expert,
                dtype=getattr(torch, self.config.checkpoint.lora_dtype),
                training=self.training(num_done),
            )

    def training(self, num_done: int) -> dict[str, Any]:
        """How the adapters were trained, for the metadata of their files."""
        return {
            "step": num_done,
            "base_weights": self.base_weights,
            "config": self.shared_config(),
        }

    @property
    def name(self) -> str:
        """Of the run, in the names of its LoRA files: the output folder's."""
        return re.sub(r"[^\w.]+", "_", self.config.output_dir.resolve().name)

    def shared_config(self) -> dict[str, object]:
        """The configuration for whoever gets the LoRA, as dotted keys. Paths would tell them
        nothing, and too much about where it is from.
        """
        return {
            key: value
            for key, value in flat(self.config).items()
            if key not in PATHS and not key.startswith("wandb.") and value is not None
        }

    @property
    def scales_loss(self) -> bool:
        return self.config.model.dtype == "float16"

    def is_due(self, num_done: int, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after
        `num_done` of them; never if `every` is 0.
        """
        return every > 0 and (num_done % every == 0 or num_done == self.config.num_steps)

    def check_parameters(self, num_done: int) -> None:
        """Raises ValueError if a parameter is not finite. Waits for the device."""
        if not bool(self.flat.vector.isfinite().all()):
            raise ValueError(
                f"step {num_done}: the parameters are not finite after the update, and nothing of "
                f"them is saved. {self.advice()}"
            )

    def advice(self) -> str:
        """How to go on from a run that is lost."""
        newest = checkpoint.latest(self.config.output_dir)
        if newest is None:
            return "Start again with a lower optim.lr"
        step, expert = checkpoint.step_of(newest), self.config.model.expert
        file = newest / lora_files.step_file(step, run=self.name, expert=expert)
        if not file.exists():
            # of the time when the output had another name
            file = min(
                newest.glob(lora_files.step_file(step, run="*", expert=expert)), default=file
            )
        return f"Start a new output with a lower optim.lr, from lora.init = {file}"

    def trace(self, feed: Feed, index: int) -> str:
        """What was not finite first on this process in global batch `index`, with its samples.
        Runs that batch again with the parameters of now; overwrites the gradient.
        """
        for number in range(feed.batch_again(index, 0).num_micro):
            batch = feed.batch_again(index, number)
            found = self.find_non_finite(prepare(batch, self.laws))
            # who trains a sample together goes on together
            found = first_found(found, self.world)
            if found:
                return f"{found}; samples {', '.join(batch.keys)}"
        return f"it does not show again on rank {self.world.rank} with the parameters of now"

    def find_non_finite(self, inputs: Inputs) -> str | None:
        """What is not finite first of what is computed from these; overwrites the gradient."""
        if self.weights is not None and self.weights.couples:
            return 'not looked for: with model.placement = "sharded" no process can pass alone'
        return find_non_finite(
            inputs, self.model, self.adapters, self.flat, self.micro_step, self.weights
        )

    def uneven(self) -> AbstractContextManager[None]:
        """Around forward passes without gradients of which ranks make different numbers, and
        nothing else that they do together.
        """
        return nullcontext() if self.weights is None else self.weights.uneven()

    def loss_scale(self) -> Tensor:
        """A float32 scalar on the device; 1 without loss scaling."""
        scale: Tensor = self.scaler.scale(torch.ones((), device=self.world.device))
        return scale

    def describe(self) -> list[str]:
        """What was chosen, as lines of the log, before the first step."""
        newest = checkpoint.latest(self.config.output_dir)
        summary = (
            f"{len(self.adapters.tensors())} adapters, {self.flat.vector.numel():,} parameters on "
            f"{self.world.size} x {self.world.device.type}; {self.config.model.dtype}, "
            f"{self.kernels.names} attention, activation_memory = "
            f"{self.config.activation_memory}; "
            f"{f'resumed from {newest}' if newest else 'from the start'}"
        )
        plans = [f"{bucket}: {activations.describe(plan)}" for bucket, plan in self.plans.items()]
        moved = [self.weights.describe()] if self.weights else []
        size = self.world.sequence_size
        split = (
            f"{size} processes train each sample together, of {self.world.data_size} at a time; "
            f"CUDA graphs are off, validation and samples are made by each process alone"
        )
        moved += [split] if size > 1 else []
        return [summary, *moved, *describe(self.kernels), *plans]
