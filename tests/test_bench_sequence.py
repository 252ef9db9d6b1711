"""bench.sequence on two small processes: the gradient is right, and the bytes that are exchanged
are those that tools.plan predicts, whatever is saved.
"""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from sequence_runs import BUCKET, TINY
from trainer_runs import Group, fork_server

from bench.our_step import Model
from bench.sequence import CHECK_LIMIT, parse_cases, report
from bench.sequence_timing import Case
from loader.models import TI2V_5B
from train.parallel import mesh

MEMORIES = ("all", "block", "0.00004GiB")
# the second process has no part in what one does
SIDES = (["one", "sequence", "data", "one"], ["sequence", "data"])


def rank(environment: dict[str, str], path: Path) -> None:
    """Of a forked process."""
    os.environ |= environment
    torch.set_num_threads(1)
    cases = [Case(BUCKET, memory) for memory in MEMORIES]
    with mesh.process_group(2) as world:
        found = []
        for case in cases:
            of_case = path.with_name(f"{case.activation_memory}.json")
            model = Model(TINY, TI2V_5B)
            found.append(
                report(model, [case], torch.float32, world, rounds=1, check_layers=2, path=of_case)
            )
        path.with_suffix("." + environment["RANK"]).write_bytes(msgspec.json.encode(found))


def test_the_bytes_exchanged_are_those_of_the_plan(tmp_path: Path) -> None:
    group, path = Group(2), tmp_path / "found.x"
    processes = [
        fork_server().Process(
            target=rank,
            args=(group.environment | {"RANK": str(i), "LOCAL_RANK": str(i)}, path),
            daemon=True,
        )
        for i in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    sent = []
    for i in range(2):
        found: list[Any] = msgspec.json.decode(path.with_suffix(f".{i}").read_bytes())
        for each in found:
            assert each["gradient_error"]["torch.float32"] < CHECK_LIMIT
            of_shape = each[str(BUCKET)]
            assert of_shape["sent_bytes"] == pytest.approx(of_shape["predicted_bytes"], rel=1e-12)
            sent.append(of_shape["sent_bytes"])
        # every side stands in the file before the next one is built
        assert [side["side"] for side in found[0][str(BUCKET)]["sides"]] == SIDES[i]
    for memory in MEMORIES:
        written = msgspec.json.decode(path.with_name(f"{memory}.json").read_bytes())
        assert len(written[str(BUCKET)]["sides"]) == len(SIDES[0])
    # "block" exchanges once more, a budget between the two
    assert sent[:3] == sent[3:] and sent[0] < sent[2] < sent[1] == pytest.approx(1.5 * sent[0])
    assert found[0][str(BUCKET)].keys() == {
        "activation_memory",
        "sides",
        "sent_bytes",
        "predicted_bytes",
        "exchange_bytes_a_second",
    }


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("128x64x9=auto", '"auto" differs between the sides'),
        ("128x64x9=much", 'activation_memory = "much": use'),
        ("128x64x9=all,96x32x1=all", "does not divide the tokens of every shape"),
        ("128x65x9", "65"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_is_timed(
    shapes: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cases(Model(TINY, TI2V_5B), shapes, 2)
