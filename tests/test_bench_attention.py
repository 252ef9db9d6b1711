"""bench.attention without a GPU: what it checks, and its table."""

import pytest
import torch

from bench import attention as bench
from train.model.attention import AttentionShape, run_kernel

CPU, SHAPE = torch.device("cpu"), AttentionShape(1, 3, 90, 90, 64)


def test_errors_are_those_of_every_part_and_logits_reach_200(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "REFERENCE_ROWS", 40)
    real, factors = bench.largest_logit, []

    def largest(*tensors: object) -> float:
        factors.append(200 / real(*tensors))  # type: ignore[arg-type]
        return 200 / factors[-1]

    monkeypatch.setattr(bench, "largest_logit", largest)
    for deviation in (1.0, None):
        found = bench.accuracy(["gemm", "flash"], SHAPE, CPU, torch.float16, deviation)
        for parts in found.values():
            assert parts.pop("finite") is True
            assert set(parts) == set(bench.PARTS)
            assert all(0 < value < (2e-3 if deviation else 0.1) for value in parts.values())
    assert len(factors) == 1 and factors[0] > 10


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_kernel", lambda name, q, k, v: run_kernel(name, q, k, 1.01 * v))
    found = bench.accuracy(["flash"], SHAPE, CPU, torch.float32, 1.0)["flash"]
    assert all(found[part] == pytest.approx(0.01, rel=0.1) for part in bench.PARTS)


def test_the_table_names_times_shares_and_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.Pass, "time", lambda self: (1.0, 2.5))
    monkeypatch.setattr(bench.Pass, "peak_mib", lambda self: 7.0)
    times = bench.timings(["efficient", "gemm"], SHAPE, CPU, torch.float16, 10, 1.0)
    assert times["gemm"]["ms"] == 3.5 and times["gemm"]["n"] == 10
    checks = {part: 1e-3 for part in bench.PARTS}
    bench.print_rows(
        [
            {"num_tokens": 90, "kernel": name, **times[name], "1": checks, "4": checks}
            | {"200": checks | {"finite": name == "gemm"}}
            for name in times
        ]
    )
    *_, first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("| 1.0e-03 | 1.0e-03 | NOT FINITE |")
    assert last == (
        "| 90 | gemm | 10 | 1.00 + 2.50 = 3.50 (3.50 to 3.50) | 1.000 | 7 | 1.0e-03 | 1.0e-03 | "
        "1.0e-03 |"
    )
