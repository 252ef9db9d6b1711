"""What a run logs: means over the steps since the line before, and a file that reads as one run."""

from pathlib import Path

import pytest
import torch

from train.progress import Progress, Report
from train.records import METRICS_FILE, StepRecord, read_records
from train.stopwatch import Scalars


def report(step: int) -> Report:
    return Report(
        step=step,
        num_steps=2,
        num_tokens=300,
        laps=[("", 10.0), ("data_wait_s", 11.0), ("forward_s", 13.0), ("data_wait_s", 14.0)],
        scalars=Scalars(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(1.0)),
        epoch=0,
        lr=1e-4,
        memory_gib=1.5,
    )


def test_a_record_holds_means_over_its_steps_and_shares_that_add_up() -> None:
    record = report(4).record()
    assert (record.step, record.loss, record.grad_norm, record.loss_scale) == (4, 0.5, 2.0, 1.0)
    assert (record.s_per_step, record.data_wait_s, record.forward_s) == (2.0, 1.0, 1.0)
    assert record.data_wait_share == 0.5 and record.tokens_per_s == 75.0
    assert record.other_s is None  # nothing was measured under that name


def test_a_resumed_run_writes_on_after_its_checkpoint(tmp_path: Path) -> None:
    for first_step, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        with Progress(tmp_path, first_step, 8) as progress:
            for step in steps:
                progress.write(report(step).record())
    records = read_records(tmp_path / METRICS_FILE, StepRecord)
    assert [record.step for record in records] == [2, 4, 6, 8]
    assert records[-1].loss == pytest.approx(0.5)
    assert list((tmp_path / "tensorboard").iterdir())
