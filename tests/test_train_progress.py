"""What a run logs: means over the steps since the line before, a file that reads as one run, plain
lines where nobody looks at a terminal.
"""

import io
import logging
import resource
import signal
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import optim
from train.lora.linear import AdapterParameter
from train.progress import Progress, Report, duration, status_line, tensorboard_tag
from train.records import METRICS_FILE, StepRecord, read_records
from train.tally import Tally


def report(step: int) -> Report:
    flat = optim.flatten([AdapterParameter(torch.zeros(2))])
    flat.losses.copy_(torch.tensor([0.5, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0]))
    tally = Tally(torch.device("cpu"), scaling=False)
    tally.step(flat, torch.tensor(2.0), torch.tensor(1.0), step)
    return Report(
        step=step,
        num_steps=2,
        num_tokens=300,
        laps=[("", 10.0), ("data_wait_s", 11.0), ("forward_s", 13.0), ("data_wait_s", 14.0)],
        scalars=tally.read_later(),
        epoch=0,
        lr=1e-4,
        memory_gib=1.5,
    )


def test_a_record_holds_means_over_its_steps_and_shares_that_add_up() -> None:
    record, faults = report(4).read()
    assert (record.step, record.loss, record.grad_norm, record.loss_scale) == (4, 0.5, 2.0, 1.0)
    assert (record.loss_t2v, record.loss_i2v, record.loss_image) == (0.5, None, None)
    assert (record.s_per_step, record.data_wait_s, record.forward_s) == (2.0, 1.0, 1.0)
    assert record.data_wait_share == 0.5 and record.tokens_per_s == 75.0
    # nothing was measured under these names
    assert record.other_s is None and record.gpu_power_w is None
    assert (record.num_overflows, record.num_skipped) == (0, 0) == (faults[0], faults[1])


def test_a_resumed_run_writes_on_after_its_checkpoint(tmp_path: Path) -> None:
    for first_step, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        with Progress(tmp_path, first_step, 8, is_evaluated=True) as opened:
            for step in steps:
                opened.write(report(step).read()[0])
    records = read_records(tmp_path / METRICS_FILE, StepRecord)
    assert [record.step for record in records] == [2, 4, 6, 8]
    assert records[-1].loss == pytest.approx(0.5)


def test_a_full_disk_is_told_by_the_folder_that_filled_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large") as caught,
            Progress(tmp_path, 0, 1000, is_evaluated=True) as opened,
        ):
            for step in range(1000):
                opened.write(report(step).read()[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(tmp_path / "tensorboard")
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_has_groups_and_tasks_apart(tmp_path: Path) -> None:
    with Progress(tmp_path, 0, 8, is_evaluated=True) as opened:
        opened.write(report(2).read()[0])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/all", "loss/t2v", "optimizer/lr", "time/s_per_step", "gpu/memory_gib"} <= tags
    assert "loss/i2v" not in tags  # not measured
    assert {tag.partition("/")[0] for tag in tags} <= {"loss", "optimizer", "time", "gpu", "data"}
    assert tensorboard_tag("gpu_power_w") == "gpu/gpu_power_w"


def test_a_redirected_log_is_plain_lines_ten_seconds_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("train.progress.time.monotonic", lambda: clock[0])
    with Progress(tmp_path, 0, 8, is_evaluated=True) as opened:
        for step, clock[0] in ((1, 100.0), (2, 105.0), (3, 110.0), (4, 111.0), (8, 112.0)):
            opened.write(report(step).read()[0])
            if step == 2:
                logging.getLogger("loader").warning("a sample is damaged")
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step 1/8", "step 3/8", "step 8/8"]


def test_on_a_terminal_a_warning_has_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    root = logging.getLogger()
    handler = logging.StreamHandler(terminal)
    handler.setFormatter(logging.Formatter("train: %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler])
    with Progress(tmp_path, 0, 8, is_evaluated=True) as opened:
        opened.write(report(2).read()[0])
        logging.getLogger("loader").warning("a sample is damaged")
    # the bar is wiped before the line is written, and drawn again after it
    assert "\rtrain: a sample is damaged\n" in terminal.getvalue()


def test_the_line_for_people_says_what_was_measured_and_nothing_else() -> None:
    record = StepRecord(step=40, loss=0.25, s_per_step=7.5, data_wait_share=0.01, num_skipped=2)
    assert status_line(record, 1000, validation=0.913) == (
        "step 40/1000, loss 0.2500, validation 0.9130 of the base, 7.5 s/step, data wait 1.0%, "
        "2h 00m left, 2 steps skipped"
    )
    assert status_line(StepRecord(step=1), 10) == "step 1/10, loss not finite"


def test_a_validation_before_a_step_is_no_part_of_the_time_left() -> None:
    usual = StepRecord(step=501, loss=0.25, s_per_step=30.0)
    after = msgspec.structs.replace(usual, s_per_step=630.0, other_s=600.0)
    assert status_line(after, 1000) == status_line(usual, 1000)
    assert "30 s/step" in status_line(after, 1000) and "4h 09m left" in status_line(after, 1000)


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.6, "1m 00s"), (245, "4m 05s"), (11520, "3h 12m"), (183600, "2d 3h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
