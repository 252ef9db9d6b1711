"""bench.placement on the CPU at a tiny size: both subjects run, give the same bits, and a
difference ends it.
"""

import math
from typing import Any

import msgspec
import pytest
import torch

from bench.placement import CASES, Case, check_bits, compare, config_of, our_subject
from bench.placement_timing import Timing, rows_of
from tools.fake.step import random_batch
from train.model.wan import T2V_A14B
from train.parallel.mesh import World
from train.placement.streamed import HostWeights

CPU = torch.device("cpu")
ALONE = World(data_rank=0, data_size=1, device=CPU)
TINY = msgspec.structs.replace(
    T2V_A14B,
    num_layers=4,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=48,
    freq_dim=16,
    text_dim=16,
)


@pytest.mark.parametrize("name", CASES)
def test_streamed_and_resident_run_side_by_side(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]._replace(shape="32x32x5")
    deadline_s = math.inf
    noted: list[list[dict[str, Any]]] = []
    rows = compare(name, TINY, ALONE, torch.float32, "auto", 2, deadline_s, noted.append, case)
    assert [row["n"] for rows in noted for row in rows] == [1, 1, 2, 2]
    assert [(row["subject"], row["n"]) for row in rows] == [("resident", 2), ("streamed", 2)]
    assert rows[0]["loss"] == rows[1]["loss"]
    said = capsys.readouterr().out
    assert "same bits of the gradient: resident, streamed" in said
    assert "attn1 of 4" in said and "weights of 4 blocks wait in the host's memory" in said


def test_other_bits_end_it() -> None:
    case = Case(CASES["t2v"].kind, "32x32x5")
    bucket = case.kind.layout.parse(case.shape)
    runs = {}
    for placed in ("resident", "streamed"):
        config = config_of(case, TINY, placed, torch.float32, "auto")
        run = our_subject(config, bucket, TINY, ALONE).run
        assert run is not None
        runs[placed] = run
    batch = random_batch(bucket, CPU, is_i2v=[False], text_dim=16, kind=case.kind)
    weights = runs["streamed"].weights
    assert weights is not None and isinstance(weights._source, HostWeights)
    weights._source._flat[2].mul_(1.001)
    with pytest.raises(SystemExit, match="the gradient of streamed is off resident's"):
        check_bits(runs, batch, CPU)


def test_ratios_are_paired_by_round() -> None:
    timings = {
        name: [Timing(factor, 0.5, 3.0), Timing(2 * factor, 0.5, 4.0)]
        for name, factor in (("resident", 1.0), ("streamed", 1.01))
    }
    row = rows_of("t2v", timings, "resident")[1]
    assert row["ratio"] == pytest.approx(1.01) and row["peak_gib"] == 4.0 and row["n"] == 2
