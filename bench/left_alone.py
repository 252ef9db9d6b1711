"""What leaving a run alone costs: `python -m bench.left_alone FOLDER` trains by torchrun, kills the
trainer once, and prints what each event took.

FOLDER gets a model of TI2V-5B's real dimensions with random weights, a dataset of real footage
(bench/left_alone_inputs.py), the run, and left_alone.png and left_alone.json. With `--prepare` it
ends once model and dataset are there. The trainer is `torchrun --max-restarts 1 train/main.py`; its
process gets SIGKILL some steps after a checkpoint, and torchrun starts it again.

What an event cost: validation and samples say so in their own records; a checkpoint is what a step
that was logged after one took beside its own work, less these. The time to the first step and from
the kill to the next one are wall-clock time, seen from outside.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import msgspec
import numpy as np
import torch

from bench.left_alone_inputs import REAL, TINY, write_inputs
from loader.config import dump_toml
from loader.feed_config import FeedConfig
from loader.shape import WAN22
from tools.plot import running_mean
from tools.table import table
from train import checkpoint
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.early_stop import EarlyStopConfig
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.records import (
    METRICS_FILE,
    SAMPLES_FILE,
    SAMPLES_FOLDER,
    SHEET_FILE,
    VALIDATION_FILE,
    SampleEvent,
    StepRecord,
    ValidationRecord,
    read_records,
    read_status,
)
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

POLL_S = 0.05
STEP_S = "step, median of its own work, s"
VALIDATION_S = "validation, median of the others, s"
SAMPLES_S = "samples, median of the others, s"


class Watched(NamedTuple):
    """Wall-clock seconds of one run, from its start."""

    exit_code: int
    # to the first step that was logged, with imports, weights and the base's validation
    first_step_s: float
    # number of steps when it was killed, and how many of them were done again
    killed_at: int
    num_repeated: int
    # from the kill to the next step
    resume_s: float
    whole_s: float


def config_of(folder: Path, arguments: argparse.Namespace) -> TrainConfig:
    """Validation and samples as often as the arguments say, nothing else unusual."""
    return TrainConfig(
        output=str(folder / "run"),
        model=ModelConfig(
            path=str(folder / "model"), dtype="float32" if arguments.tiny else "bfloat16"
        ),
        data=FeedConfig(datasets=[str(folder / "dataset")]),
        lora=LoRAConfig(rank=16, alpha=16.0),
        optim=OptimConfig(lr=arguments.lr, warmup_steps=10),
        validation=ValidationConfig(
            every=arguments.every, num_windows=arguments.windows, num_train_windows=4
        ),
        early_stop=EarlyStopConfig(patience=0),
        samples=SamplesConfig(
            every=arguments.samples_every,
            num_clips=arguments.clips,
            num_steps=arguments.sampler_steps,
        ),
        checkpoint=CheckpointConfig(every=arguments.checkpoint_every),
        num_steps=arguments.steps,
        global_batch=1,
        activation_memory="all" if arguments.tiny else "auto",
    )


def watch(config_path: Path, output: Path, kill_at: int) -> Watched:
    """Run to the end, and kill the trainer once when `kill_at` steps are logged."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", "1", "train/main.py", str(config_path)]
    begin_s = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    first_s = killed_s = resumed_s = None
    killed_at = num_kept = file_then = 0
    while process.poll() is None:
        time.sleep(POLL_S)
        now_s, newest = time.monotonic() - begin_s, _last_step(output)
        if first_s is None and newest:
            first_s = now_s
        if killed_s is None and newest >= kill_at:
            status = read_status(output)
            assert status is not None and status.state == "running", status
            os.kill(status.pid, signal.SIGKILL)
            killed_s, killed_at = now_s, newest
            kept = checkpoint.latest(output)
            num_kept = checkpoint.step_of(kept) if kept else 0
            file_then = _file_id(output)
        # the trainer that goes on writes a new file, without what came after its checkpoint; if
        # nothing did, the old one grows
        elif killed_s is not None and resumed_s is None:
            goes_on = newest > killed_at or _file_id(output) != file_then
            resumed_s = now_s if goes_on and newest > num_kept else None
    return Watched(
        exit_code=process.returncode,
        first_step_s=first_s or float("nan"),
        killed_at=killed_at,
        num_repeated=killed_at - num_kept,
        resume_s=(resumed_s or float("nan")) - (killed_s or float("nan")),
        whole_s=time.monotonic() - begin_s,
    )


def _last_step(output: Path) -> int:
    path = output / METRICS_FILE
    if not path.exists():
        return 0
    records = read_records(path, StepRecord)
    return records[-1].step if records else 0


def _file_id(output: Path) -> int:
    return (output / METRICS_FILE).stat().st_ino


def costs(output: Path, config: TrainConfig, seen: Watched) -> dict[str, Any]:
    """What was measured, by name and unit."""
    records = {record.step: record for record in read_records(output / METRICS_FILE, StepRecord)}
    validated = read_records(output / VALIDATION_FILE, ValidationRecord)
    sampled = events(output)
    own_s = {
        step: (record.s_per_step or 0.0) - (record.other_s or 0.0)
        for step, record in records.items()
    }
    after_s = [
        record.other_s or 0.0
        for step, record in records.items()
        if (step - 1) % config.checkpoint.every == 0
        and (step - 1) % config.validation.every
        and (step - 1) % config.samples.every
        and step > 1
        and step - 1 != seen.killed_at - seen.num_repeated
    ]
    validation_s = [record.elapsed_s or 0.0 for record in validated]
    samples_s = [event.elapsed_s or 0.0 for event in sampled]
    waits = [record.data_wait_share or 0.0 for record in records.values()]
    return {
        STEP_S: statistics.median(own_s.values()),
        "data wait, share of a step, median": statistics.median(waits),
        "checkpoint, median, s": statistics.median(after_s) if after_s else None,
        "validation at step 0 (base measured too), s": validation_s[0],
        VALIDATION_S: statistics.median(validation_s[1:]),
        "samples at step 0 (base drawn too), s": samples_s[0],
        SAMPLES_S: statistics.median(samples_s[1:]),
        "start to first step (with step 0's events), s": seen.first_step_s,
        "kill to next step, s": seen.resume_s,
        "whole run, s": seen.whole_s,
        "peak memory, GiB": max(record.memory_gib or 0.0 for record in records.values()),
    }


def events(output: Path) -> list[SampleEvent]:
    paths = sorted((output / SAMPLES_FOLDER).glob(f"step-*/{SAMPLES_FILE}"))
    return [msgspec.json.decode(path.read_bytes(), type=SampleEvent) for path in paths]


def shares(config: TrainConfig, cost_s: dict[str, Any]) -> dict[str, float]:
    """Of the time of a run with these intervals, in per cent, without what is made once."""
    step_s, validation_s, samples_s = cost_s[STEP_S], cost_s[VALIDATION_S], cost_s[SAMPLES_S]
    each_s = step_s + validation_s / config.validation.every + samples_s / config.samples.every
    # at the default intervals and a global batch of 8
    default_s = 8 * step_s + (validation_s + samples_s) / 500
    return {
        "validation and samples, of this run": 100 * (1 - step_s / each_s),
        "the same events every 500 steps of 8": 100 * (1 - 8 * step_s / default_s),
    }


def plot(output: Path, seen: Watched, path: Path) -> None:
    """Training loss, relative validation loss, seconds of each step."""
    records = read_records(output / METRICS_FILE, StepRecord)
    validated = read_records(output / VALIDATION_FILE, ValidationRecord)
    step = np.array([record.step for record in records])
    loss = np.array([record.loss or np.nan for record in records], float)
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, sharex=True, figsize=(9, 9), layout="constrained"
    )
    top.plot(step, loss, color="0.8", label="each step")
    top.plot(step, running_mean(loss, 20), color="tab:blue", label="mean of 20")
    top.set_ylabel("training loss")
    top.legend()
    at = [record.step for record in validated]
    middle.plot(at, [record.relative_loss for record in validated], "o-", label="val windows")
    middle.plot(at, [record.train_relative_loss for record in validated], "s--", label="train")
    middle.axhline(1.0, color="0.6", linewidth=0.8)
    middle.set_ylabel("loss / the base's")
    middle.legend()
    bottom.semilogy(step, [record.s_per_step for record in records], ".", color="tab:green")
    bottom.set_ylabel("s/step, events of the step before included")
    bottom.set_xlabel("optimizer step")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        axes.axvline(seen.killed_at, color="tab:red", linestyle=":")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true", help="write model and dataset, then end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--shape", default="1280x704x49", metavar="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100, help="steps between validations")
    parser.add_argument("--samples-every", type=int, default=150)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    parser.add_argument("--kill-at", type=int, default=110)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--sampler-steps", type=int, default=8)
    parser.add_argument("--max-windows", type=int, default=40, help="of each clip of footage")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--results", type=Path, help="folder for PNG, JSON and sheet; else FOLDER")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    folder, bucket = arguments.folder, WAN22.parse(arguments.shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        sys.exit("left_alone: no GPU is visible to torch; --tiny runs on a CPU")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = TINY if arguments.tiny else REAL
    begin_s = time.monotonic()
    write_inputs(folder, sizes, bucket, device, arguments.max_windows)
    print(f"model and dataset after {time.monotonic() - begin_s:.0f} s", flush=True)
    if arguments.prepare:
        return
    if device == "cuda":
        # the encoder's memory is the trainer's from here on
        torch.cuda.empty_cache()

    config, results = config_of(folder, arguments), arguments.results or folder
    output = config.output_dir
    shutil.rmtree(output, ignore_errors=True)
    path = folder / "run.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    seen = watch(path, output, arguments.kill_at)
    if seen.exit_code:
        sys.exit(f"left_alone: torchrun ended with {seen.exit_code}; {read_status(output)}")

    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{card}, {bucket}, {config.num_steps} steps of 1, torch {torch.__version__}")
    write_results(config, seen, {"card": card, "shape": str(bucket)}, results)


def write_results(config: TrainConfig, seen: Watched, about: dict[str, str], folder: Path) -> None:
    """Print the tables, and write PNG, JSON and copies of the run's records."""
    output = config.output_dir
    cost = costs(output, config, seen)
    share = shares(config, cost)
    print(table(("what", "value"), [(name, _text(value)) for name, value in cost.items()], "<>"))
    print(table(("share", "%"), [(name, _text(value)) for name, value in share.items()], "<>"))
    print(f"killed at step {seen.killed_at}, {seen.num_repeated} steps done again")
    folder.mkdir(parents=True, exist_ok=True)
    plot(output, seen, folder / "left_alone.png")
    found = about | {"measured": cost, "shares": share, "run": seen._asdict()}
    (folder / "left_alone.json").write_text(json.dumps(found, indent=1))
    for name in (METRICS_FILE, VALIDATION_FILE):
        shutil.copyfile(output / name, folder / name)
    newest = max((output / SAMPLES_FOLDER).glob("step-*"))
    shutil.copyfile(newest / SHEET_FILE, folder / SHEET_FILE)


def _text(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
