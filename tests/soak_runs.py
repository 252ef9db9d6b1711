"""A two-rank run that is struck again and again, each time in a phase of its own: a micro-step,
validation, sampling, or the writing of a checkpoint. `Chain` is one output folder; what it goes
through it must end with the files of a run that was never struck.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from msgspec.structs import replace
from trainer_runs import Rank, finish, start

from loader.feed_config import FeedConfig
from loader.manifest import MANIFEST_FILE, encode_manifest, make_manifest
from tools.fake.batch import write_synthetic_dataset
from train import checkpoint
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.early_stop import EarlyStopConfig
from train.lora import files
from train.records import (
    METRICS_FILE,
    SAMPLES_FILE,
    SAMPLES_FOLDER,
    VALIDATION_FILE,
    StepRecord,
    ValidationRecord,
    read_records,
)
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

Phase = Literal["micro-step", "validation", "sampling", "checkpoint"]
PHASES: tuple[Phase, ...] = ("micro-step", "validation", "sampling", "checkpoint")
# beyond the last one a hit comes too late to be in its phase
LONGEST_S: dict[Phase, float] = {
    "micro-step": 0.05,
    "validation": 0.15,
    "sampling": 0.15,
    "checkpoint": 0.01,
}
NUM_STEPS, EVERY = 12, 2


class Hit(NamedTuple):
    """number: the signal; delay_s: after the phase began; lone: torchrun's way, one process dies
    and the other gets SIGTERM.
    """

    number: signal.Signals
    phase: Phase
    delay_s: float
    lone: bool


def hits(num_terms: int, num_kills: int, seed: int) -> list[Hit]:
    """So many of each signal, the phases in equal parts, in an order that the seed decides."""
    rng = random.Random(seed)
    wanted = [(signal.SIGTERM, number) for number in range(num_terms)]
    wanted += [(signal.SIGKILL, number) for number in range(num_kills)]
    rng.shuffle(wanted)
    found = []
    for number, place in wanted:
        phase = PHASES[place % len(PHASES)]
        lone = number == signal.SIGKILL and place % 3 == 2
        found.append(Hit(number, phase, rng.uniform(0.0, LONGEST_S[phase]), lone))
    return found


def struck_config(small: TrainConfig, dataset: Path) -> TrainConfig:
    """Validation and samples every second step, a checkpoint after every one."""
    train = write_synthetic_dataset(dataset, {"96x64x9": 8, "64x64x1": 4})
    val = write_synthetic_dataset(dataset, {"96x64x9": 6}, split="val", seed=1)
    both = make_manifest(train.recipe, {**train.splits, **val.splits})
    (dataset / MANIFEST_FILE).write_bytes(encode_manifest(both))
    return replace(
        small,
        data=FeedConfig(datasets=[str(dataset)], num_threads=1),
        num_steps=NUM_STEPS,
        checkpoint=CheckpointConfig(every=1),
        validation=ValidationConfig(every=EVERY, num_windows=4, num_train_windows=2),
        early_stop=EarlyStopConfig(patience=0),
        samples=SamplesConfig(every=EVERY, num_clips=2, num_steps=2, shape="64x64x5"),
    )


class Chain:
    """One output folder. `strike` starts the run and hits it once; `finish` lets it end."""

    def __init__(self, config: TrainConfig, output: Path):
        self._config, self.output = config, output

    def strike(self, hit: Hit) -> bool:
        """False where the run ended before the phase came again."""
        before = self._marks(hit.phase)
        ranks = start(self._config, self.output, 2)
        while self._marks(hit.phase) <= before:
            if any(rank.poll() is not None for rank in ranks):
                finish(ranks)
                return False
            time.sleep(0.001)
        time.sleep(hit.delay_s)
        first, second = ranks[::-1] if hit.lone else ranks
        first.send_signal(hit.number)
        if hit.lone:
            time.sleep(0.1)
            second.send_signal(signal.SIGTERM)
        else:
            second.send_signal(hit.number)
        self._check_end(hit, ranks)
        return True

    def _check_end(self, hit: Hit, ranks: list[Rank]) -> None:
        said = [rank.communicate()[1] for rank in ranks]
        codes = [rank.returncode for rank in ranks]
        assert all("Traceback" not in text for text in said), said
        if not hit.lone and hit.number == signal.SIGTERM:
            # 0: the last micro-batch was done already
            assert set(codes) <= {0, 143}, (hit, codes, said)

    def phase_found(self) -> Phase:
        """Where the last hit has met the run, by what it left."""
        if _names(self.output / checkpoint.FOLDER, ".tmp-[0-9]*"):
            return "checkpoint"
        if _names(self.output / SAMPLES_FOLDER, ".step-*"):
            return "sampling"
        newest = checkpoint.latest_intact(self.output).folder
        if newest is not None and not checkpoint.read_state(newest)["is_evaluated"]:
            return "validation"
        return "micro-step"

    def _marks(self, phase: Phase) -> set[str]:
        """What is seen of a phase from outside, more each time that it begins."""
        output = self.output
        if phase == "micro-step":
            return _names(output / checkpoint.FOLDER, "step-*")
        if phase == "checkpoint":
            return _names(output / checkpoint.FOLDER, ".tmp-*")
        if phase == "sampling":
            return _names(output / SAMPLES_FOLDER, ".step-*")
        # a checkpoint is written before each validation
        steps = _names(output / checkpoint.FOLDER, "step-*")
        return {name for name in steps if int(name.rpartition("-")[2]) % EVERY == 0}

    def finish(self) -> None:
        finish(start(self._config, self.output, 2))


def _names(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)} if folder.exists() else set()


def differences(ours: Path, theirs: Path) -> list[str]:
    """How a struck run's files differ from those of a whole one; empty if only in times."""
    checks: dict[str, Callable[[Path], object]] = {
        files.DIFFUSERS_FILE: lambda run: (run / files.DIFFUSERS_FILE).read_bytes(),
        files.COMFYUI_FILE: lambda run: (run / files.COMFYUI_FILE).read_bytes(),
        "best": lambda run: (run / "best" / files.DIFFUSERS_FILE).read_bytes(),
        "metrics": _steps,
        "validation": _validations,
        "samples": _samples,
        "checkpoints": lambda run: sorted(_names(run / checkpoint.FOLDER, "*")),
    }
    return [name for name, read in checks.items() if read(ours) != read(theirs)]


def _steps(run: Path) -> list[tuple[int, float | None, float | None]]:
    records = read_records(run / METRICS_FILE, StepRecord)
    return [(each.step, each.loss, each.grad_norm) for each in records]


def _validations(run: Path) -> list[ValidationRecord]:
    records = read_records(run / VALIDATION_FILE, ValidationRecord)
    return [replace(each, elapsed_s=None) for each in records]


def _samples(run: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted((run / SAMPLES_FOLDER).glob("*step-*")):
        event = json.loads((path / SAMPLES_FILE).read_bytes())
        found[path.name] = (event["lora_xxh3"], event["clips"])
    return found
