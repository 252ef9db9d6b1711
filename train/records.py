"""The files that say how a run went: metrics.jsonl has a line of JSON for every step that was
logged, validation.jsonl one for every validation, samples.json what a folder of samples shows,
status.json how the run is doing.

Whatever writes or reads them does it through this module, which needs no torch. Only measured
values are written: None (null in the file) means that a value was not measured, or is not a finite
number, which JSON can't hold.
"""

from pathlib import Path
from typing import IO, Literal, TypeVar

import msgspec

from loader.files import atomic_file, write_atomic

METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"
SAMPLES_FOLDER, SAMPLES_FILE, SHEET_FILE = "samples", "samples.json", "contact_sheet.png"
STATUS_FILE = "status.json"
State = Literal["running", "done", "early_stop", "stopped", "failed"]
RecordT = TypeVar("RecordT", bound=msgspec.Struct)


class RecordError(ValueError):
    """A line that is no record; the message names the file and the line."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the optimizer steps since the record before, unless a field says otherwise.

    The parts of a step: waiting for data, forward pass, backward pass, all-reduce, optimizer, and
    other work since the step before, if there was one (logging, checkpoints, validation, samples).
    """

    # number of finished steps
    step: int
    # passes over all datasets so far, 0 in the first
    epoch: int | None = None
    # over the global batch, weighted as in flow.weighting, without steps whose loss is not finite
    loss: float | None = None
    # over the samples of that task
    loss_t2v: float | None = None
    loss_i2v: float | None = None
    loss_image: float | None = None
    lr: float | None = None
    # of the last step, before clipping
    grad_norm: float | None = None
    # after the last step; 1 unless model.dtype is float16
    loss_scale: float | None = None
    # since the start of the run: steps left out because a float16 gradient overflowed, which
    # halves the scale and is normal; and because a loss or gradient was not finite otherwise
    num_overflows: int | None = None
    num_skipped: int | None = None
    s_per_step: float | None = None
    data_wait_s: float | None = None
    forward_s: float | None = None
    backward_s: float | None = None
    sync_s: float | None = None
    optimizer_s: float | None = None
    other_s: float | None = None
    # video tokens of all processes
    tokens_per_s: float | None = None
    # data_wait_s / s_per_step
    data_wait_share: float | None = None
    # peak since the start, of the GPU's allocator or, on a CPU, of the process
    memory_gib: float | None = None
    # by NVML when the record was made, of the main process's card
    gpu_utilisation: float | None = None
    gpu_power_w: float | None = None
    gpu_temperature_c: float | None = None
    gpu_clock_mhz: float | None = None
    gpu_memory_gib: float | None = None


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """status.json: how a run is doing. torchrun's exit code is 1 for all ends but a good one.

    A run that was killed says "running" for ever: then nobody holds its folder's lock
    (loader.files.has_writer).
    """

    state: State
    # one line; empty for "running" and "done"
    reason: str = ""
    # number of finished steps
    step: int = 0
    num_steps: int = 0
    # the best one by validation, if there was any
    best_step: int | None = None
    # of the process that writes the run's files; it takes SIGUSR1 and SIGTERM
    pid: int = 0
    host: str = ""
    # Unix time of this line
    time: float = 0.0


def write_status(output: Path, status: RunStatus) -> None:
    """Replace status.json as a whole. Raises OSError."""
    with atomic_file(output / STATUS_FILE, durable=status.state != "running") as file:
        file.write(msgspec.json.format(msgspec.json.encode(status)))


def read_status(output: Path) -> RunStatus | None:
    """status.json, or None where there is none. Raises RecordError, OSError."""
    path = output / STATUS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunStatus)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise RecordError(f"{path}: {error}; delete it, the next start writes a new one") from error


class ValidationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One validation (train/validate.py says how each value is defined). Losses are relative to
    the base model's: 1 is no change, less is better.
    """

    # number of finished steps
    step: int
    # the headline: mean over tasks and noise levels of loss / base loss
    relative_loss: float
    # mean squared error of the velocity, over windows and noise levels
    loss: float
    by_task: dict[str, float]
    # in the order of the noise levels
    by_level: list[float]
    by_category: dict[str, float]
    # of the one-step estimate at the lower noise levels, dB
    psnr_db: list[float]
    # of windows that are trained on, at the middle noise levels, beside the val windows' at those
    # levels: the gap opens where a run learns its clips by heart. None: none were asked for
    train_relative_loss: float | None = None
    gap: float | None = None
    # to the reference, paired by window; None where a task has a single window
    difference: float
    standard_error: float | None = None
    is_improvement: bool
    reference_step: int
    best_step: int
    # validations in a row without an improvement
    num_without_gain: int
    num_windows: int
    # lowest and highest sigma of the expert that is trained, which is measured there alone; None:
    # a whole model, 0 to 1
    interval: tuple[float, float] | None = None
    elapsed_s: float | None = None


class SampledClip(msgspec.Struct, frozen=True, kw_only=True):
    """One clip of samples.json. mean_difference_levels: of 255, to the base model's clip of the
    same prompt and noise; 0 means that the adapters have no effect.
    """

    # relative to the folder of samples.json
    file: str
    key: str
    prompt: str
    task: str
    shape: str
    seed: int
    # of its noise levels; None in older files, where all clips had the event's
    shift: float | None = None
    mean_difference_levels: float


class SampleEvent(msgspec.Struct, frozen=True, kw_only=True):
    """samples.json: what was sampled after `step` steps, and how."""

    step: int
    # of the sampler
    num_steps: int
    guidance: float
    # of shapes without one of their own
    shift: float
    # tiles give another picture: never compare tiled with untiled
    tiled: bool
    # what the clips show where one expert made them without the other; empty: the whole model
    shows: str = ""
    # xxh3_128 of all factors
    lora_xxh3: str
    # Frobenius norm of scale * B A by kind of layer
    update_norms: dict[str, float]
    clips: list[SampledClip]
    # of the whole event, at step 0 with the base's clips
    elapsed_s: float | None = None


def append_record(file: IO[bytes], record: msgspec.Struct) -> None:
    """Write `record` as one line, and hand it to the operating system. Raises OSError."""
    try:
        file.write(msgspec.json.encode(record) + b"\n")
        file.flush()
    except OSError as error:
        # a write to an open file fails without saying which: the disk is full, for example
        error.filename = file.name
        raise


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """All records of a file of `kind`. A last line without its end is still being written, or was
    when the run was killed: it is left out. Raises RecordError, OSError.
    """
    return [_decode(path, number, line, kind) for number, line in _whole_lines(path)]


def drop_records_after(path: Path, step: int) -> None:
    """Drop the lines past `step`, and one that has no end: what a killed run logged after the
    checkpoint that is gone on from. Raises RecordError, OSError.
    """
    kept = [
        line
        for number, line in _whole_lines(path)
        if _decode(path, number, line, _Numbered).step <= step
    ]
    write_atomic(path, b"".join(kept))


class _Numbered(msgspec.Struct):
    """What every kind of record has."""

    step: int


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    lines = path.read_bytes().splitlines(keepends=True)
    return [(number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def _decode(path: Path, number: int, line: bytes, kind: type[RecordT]) -> RecordT:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError as error:
        raise RecordError(
            f"{path}: line {number} is no record of a step ({error}): {line[:80]!r}; delete the "
            f"line to go on without it"
        ) from error
