"""The parts `wait` and `raw` of bench.loader_gpu: what the trainer waits for, and what raw first
frames cost it.
"""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from bench.gpu_inputs import LARGE, SMALL
from bench.gpu_rows import Row, at_most
from loader.batch import Batch
from loader.config import load_toml
from loader.feed import Feed
from loader.feed_config import FeedConfig
from train.config import TrainConfig

RUN = """
output = "{folder}/run-{name}"
num_steps = {steps}
global_batch = 1
[checkpoint]
every = {steps}
[model]
path = "{folder}/model"
dtype = "bfloat16"
[data]
datasets = ["{folder}/{dataset}"]
condition = "{condition}"
"""


def write_run(folder: Path, name: str, dataset: str, condition: str, steps: int) -> Path:
    # a run would go on from its checkpoint
    shutil.rmtree(folder / f"run-{name}", ignore_errors=True)
    path = folder / f"{name}.toml"
    path.write_text(
        RUN.format(folder=folder, name=name, dataset=dataset, condition=condition, steps=steps)
    )
    return path


def read_metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"run-{name}" / "metrics.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


def check_wait(folder: Path) -> Iterator[Row]:
    config = write_run(folder, "wait", "small", "latent", 150)
    subprocess.run([sys.executable, "train/main.py", str(config)], check=True)
    steps = [step for step in read_metrics(folder, "wait") if step["step"] > 20]
    step_s, wait_s = (
        statistics.fmean(step[key] for step in steps) for key in ("s_per_step", "data_wait_s")
    )
    yield Row(f"{SMALL}: mean step of {len(steps)}", 1e3 * step_s, "ms")
    yield at_most(f"{SMALL}: data wait in the step", 100 * wait_s / step_s, "%", 0.5)


class Turns:
    """Stands in for train.setup's Feed: the batches of several feeds in turn, and a record of
    whose each was.
    """

    def __init__(self, feeds: dict[str, Feed]):
        self._feeds, self._next = feeds, 0
        self.record: list[tuple[str, str, bool]] = []

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        turn, place = divmod(self._next, len(self._feeds))
        # each is first, second and last equally often
        name = list(self._feeds)[(turn + place) % len(self._feeds)]
        self._next += 1
        batch, state = next(self._feeds[name])
        self.record.append((name, batch.keys[0], batch.is_i2v[0]))
        return batch, state

    def __getattr__(self, name: str) -> Any:
        return getattr(next(iter(self._feeds.values())), name)

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *error: object) -> None:
        for feed in self._feeds.values():
            feed.close()


def check_raw(folder: Path, num_turns: int) -> Iterator[Row]:
    from train import main, setup
    from train.parallel import mesh

    runs = {"latent": ("jpg", "latent"), "raw, jpg": ("jpg", "raw"), "raw, mp4": ("mp4", "raw")}
    config = write_run(folder, "raw", "jpg", "raw", (num_turns + 2) * len(runs))
    turns: list[Turns] = []

    def make(data: FeedConfig, *arguments: Any) -> Turns:
        feeds = {}
        for name, (dataset, condition) in runs.items():
            changes = {"datasets": [str(folder / dataset)], "condition": condition}
            feeds[name] = Feed(msgspec.structs.replace(data, **changes), *arguments)
        turns.append(Turns(feeds))
        return turns[0]

    setattr(setup, "Feed", make)  # noqa: B010  the loop stays the trainer's own
    with ExitStack() as stack:
        main.train(
            load_toml(config, TrainConfig, []), stack.enter_context(mesh.process_group()), stack
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    waits: dict[str, list[float]] = {name: [] for name in runs}
    steps = list(zip(turns[0].record, read_metrics(folder, "raw"), strict=True))[2 * len(runs) :]
    for (name, *_), step in steps:
        seconds[name].append(step["s_per_step"])
        waits[name].append(step["data_wait_s"])
    samples = [
        {(key, is_i2v) for (_, key, is_i2v), _ in steps[i : i + 3]} for i in range(0, len(steps), 3)
    ]
    assert all(len(turn) == 1 for turn in samples), "the feeds don't hold the same samples"
    i2v = [is_i2v for ((_, is_i2v),) in samples]
    yield Row(f"{LARGE}: I2V samples of {num_turns}", sum(i2v), "")
    base = seconds["latent"]
    for name, times in seconds.items():
        yield Row(
            f"{LARGE}: {name}: median step (least {min(times):.3f}, most {max(times):.3f}, "
            f"n = {len(times)})",
            statistics.median(times),
            "s",
        )
        yield Row(
            f"{LARGE}: {name}: data wait in the step", 100 * sum(waits[name]) / sum(times), "%"
        )
    for name, times in list(seconds.items())[1:]:
        for what, middle in (("median", statistics.median), ("mean", statistics.fmean)):
            yield at_most(
                f"{LARGE}: {name}: {what} step over latent's",
                100 * (middle(times) / middle(base) - 1),
                "%",
                2,
            )
        pairs = [1e3 * (a - b) for a, b in zip(times, base, strict=True)]
        yield Row(
            f"{LARGE}: {name}: median of the paired differences", statistics.median(pairs), "ms"
        )
