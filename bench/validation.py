"""Validation on one GPU and on all of them: `python -m bench.validation FOLDER`.

Its value must depend on weights and data alone (train/validate.py). FOLDER gets bench.left_alone's
model and dataset. A first run makes a LoRA; then one process, and one process a GPU, start from it
with a learning rate that changes nothing, and validate. Every number of validation.jsonl is
compared; the exit code is 1 if one differs by more than 1e-6 of itself. The attention kernel is
named: timed by each run, one or the other won by chance, which moved the loss by 1.4e-6.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.left_alone_inputs import REAL, TINY, write_inputs
from loader.config import dump_toml
from loader.feed_config import FeedConfig
from loader.shape import Bucket
from train.config import TrainConfig
from train.early_stop import EarlyStopConfig
from train.lora.config import LoRAConfig
from train.lora.files import DIFFUSERS_FILE
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.records import VALIDATION_FILE
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

TOLERANCE = 1e-6
NO_NUMBERS_OF_THE_MODEL = {"elapsed_s"}


def config_of(folder: Path, name: str, dtype: str, num_gpus: int) -> TrainConfig:
    """The first run trains at 1e-2; the others start from what it made."""
    is_first = name == "first"
    init = "" if is_first else str(folder / "first" / DIFFUSERS_FILE)
    return TrainConfig(
        output=str(folder / name),
        model=ModelConfig(
            path=str(folder / "model"),
            dtype=dtype,  # type: ignore[arg-type]
            attention="auto" if dtype == "float32" else "flash",
        ),
        data=FeedConfig(datasets=[str(folder / "dataset")]),
        lora=LoRAConfig(rank=16, alpha=16.0, init=init),
        optim=OptimConfig(lr=1e-2 if is_first else 1e-12),
        validation=ValidationConfig(every=0 if is_first else 1, num_windows=16),
        early_stop=EarlyStopConfig(patience=0),
        samples=SamplesConfig(every=0),
        num_steps=4 if is_first else 1,
        global_batch=num_gpus,
        activation_memory="all",
    )


def train(config: TrainConfig, num_processes: int) -> None:
    """Raises CalledProcessError if the run fails; what it said stands before it."""
    path = config.output_dir.with_suffix(".toml")
    path.write_text(dump_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(num_processes), "train/main.py", str(path)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a record, by its place."""
    if isinstance(value, dict):
        for key in value.keys() - NO_NUMBERS_OF_THE_MODEL:
            yield from numbers(value[key], f"{name}.{key}")
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from numbers(each, f"{name}[{place}]")
    elif isinstance(value, int | float):
        yield name, float(value)


def read(folder: Path) -> list[dict[str, float]]:
    lines = (folder / VALIDATION_FILE).read_bytes().splitlines()
    return [dict(numbers(msgspec.json.decode(line))) for line in lines]


def furthest(one: list[dict[str, float]], other: list[dict[str, float]]) -> tuple[float, str]:
    """The largest relative difference, and where. Raises ValueError if they are not of the same
    steps and windows.
    """
    if [record.keys() for record in one] != [record.keys() for record in other] or not one:
        raise ValueError("the runs wrote other records: they can't be compared")
    return max(
        (abs(ours[name] - theirs[name]) / (abs(ours[name]) or 1.0), f"step {step}{name}")
        for step, (ours, theirs) in enumerate(zip(one, other, strict=True))
        for name in ours
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="832x480x9", metavar="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU, two processes")
    arguments = parser.parse_args(argv)
    folder, num_gpus = arguments.folder, 2 if arguments.tiny else torch.cuda.device_count()
    if num_gpus < 2:
        parser.error("one GPU has nothing to compare with: use a machine with two, or --tiny")
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: runs of another call would be compared; name another")
    sizes, dtype, device = (
        (TINY, "float32", "cpu") if arguments.tiny else (REAL, "bfloat16", "cuda")
    )
    wan = msgspec.structs.replace(sizes.transformer, num_layers=arguments.layers)
    folder.mkdir(parents=True, exist_ok=True)
    bucket = Bucket.parse(arguments.shape)
    write_inputs(folder, sizes._replace(transformer=wan), bucket, device, max_windows=20)
    if not arguments.tiny:
        torch.cuda.empty_cache()
    found = {}
    for name, num_processes in (("first", 1), ("one", 1), ("all", num_gpus)):
        train(config_of(folder, name, dtype, num_gpus), num_processes)
        if name != "first":
            found[name] = read(folder / name)
            relative_loss = found[name][0][".relative_loss"]
            print(f"{num_processes} process(es): relative loss {relative_loss:.9f}", flush=True)
    off, place = furthest(found["one"], found["all"])
    count = sum(len(record) for record in found["one"])
    card = "CPU" if arguments.tiny else torch.cuda.get_device_name()
    print(
        f"{card}, {num_gpus} processes against one: {count} numbers of {len(found['one'])} "
        f"validations, furthest {off:.3g} at {place} (at most {TOLERANCE:g}); relative loss "
        f"{found['one'][0]['.relative_loss']:.9f} and {found['all'][0]['.relative_loss']:.9f}"
    )
    return 0 if off <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
