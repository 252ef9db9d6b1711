"""tools.plot draws measured values only, and names the line it can't read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.plot import plot, read_metrics, running_mean


def test_running_mean_counts_only_what_is_there() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(running_mean(values, 2), [1, 2, 3, 5, 6])
    np.testing.assert_allclose(running_mean(values, 99), [1, 2, 2, 3, 4])


def test_null_and_absent_values_are_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0, "memory_gib": null}\n{"step": 2, "loss": 1.0, "lr": 1e-4}\n'
    )
    metrics = read_metrics(path)
    np.testing.assert_array_equal(metrics["loss"], [2.0, 1.0])
    np.testing.assert_array_equal(metrics["lr"], [np.nan, 1e-4])
    plot(metrics, "run", tmp_path / "metrics.png")  # no tokens_per_s: the panel says "not measured"
    with Image.open(tmp_path / "metrics.png") as image:
        assert image.size == (1080, 960)


def test_a_run_whose_losses_were_never_finite_is_drawn_without_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null, "lr": 1e-4}\n{"step": 2, "lr": 1e-4}\n')
    plot(read_metrics(path), "run", tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").stat().st_size


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no step"), ('{"step": 1}\n{"st\n', "line 2"), ("[1]\n", "line 1")],
)
def test_unreadable_metrics_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(path)
