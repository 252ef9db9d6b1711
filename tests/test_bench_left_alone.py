"""The measurement of a run that is left alone, on a tiny model: each event has a cost, and a killed
trainer is started again by torchrun.
"""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from bench import left_alone
from bench.left_alone_inputs import TINY, write_inputs
from loader.shape import WAN22
from train.main import train
from train.parallel.mesh import World

ARGUMENTS = (
    "--tiny --shape 96x64x9 --steps 16 --every 8 --samples-every 8 --checkpoint-every 4 --kill-at 6"
)
ARGUMENTS += " --windows 4 --clips 2 --sampler-steps 2 --max-windows 6"


def check(results: Path) -> None:
    found = json.loads((results / "left_alone.json").read_text())
    assert all(math.isfinite(value) and value >= 0 for value in found["measured"].values())
    assert (results / "left_alone.png").exists() and (results / "contact_sheet.png").exists()
    lines = (results / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 17))


def test_every_event_of_a_run_on_real_footage_has_a_cost(tmp_path: Path) -> None:
    write_inputs(tmp_path, TINY, WAN22.parse("96x64x9"), "cpu", max_windows=6)
    config = left_alone.config_of(tmp_path, left_alone.parse([str(tmp_path), *ARGUMENTS.split()]))
    with ExitStack() as stack:
        train(config, World(data_rank=0, data_size=1, device=torch.device("cpu")), stack)
    seen = left_alone.Watched(0, 1.0, killed_at=6, num_repeated=2, resume_s=1.0, whole_s=2.0)
    left_alone.write_results(config, seen, {}, tmp_path / "results")
    check(tmp_path / "results")


@pytest.mark.soak
def test_a_killed_run_is_started_again_by_torchrun(tmp_path: Path) -> None:
    left_alone.main([str(tmp_path), *ARGUMENTS.split()])
    check(tmp_path)
    found = json.loads((tmp_path / "left_alone.json").read_text())["run"]
    assert found["exit_code"] == 0 and found["resume_s"] > 0
    # where other work delays the watcher some steps pass, each with a checkpoint every fourth
    assert 6 <= found["killed_at"] < 16 and 0 <= found["num_repeated"] <= 4
