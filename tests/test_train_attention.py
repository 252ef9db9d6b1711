"""Which attention kernel runs: the rule, with made-up timings."""

import json
from collections.abc import Callable

import pytest
import torch

from train.model.attention import (
    AttentionName,
    AttentionShape,
    Choice,
    candidates,
    choose_attention,
    describe,
    fixed_kernel,
    from_table,
    run_kernel,
)

CPU = torch.device("cpu")
LONG, TEXT = AttentionShape(1, 24, 11_440, 11_440, 128), AttentionShape(1, 24, 11_440, 512, 128)
SHORT = AttentionShape(2, 24, 1170, 1170, 128)
MS = {
    ("efficient", LONG): 41.7,
    ("gemm", LONG): 27.0,
    ("efficient", TEXT): 2.0,
    ("gemm", TEXT): 2.5,
    ("efficient", SHORT): 0.6,
    ("gemm", SHORT): 0.8,
}
Time = Callable[[str, AttentionShape, torch.device, torch.dtype], float]


def made_up(name: str, shape: AttentionShape, *_: object) -> float:
    return MS[name, shape]


def choose(time: Time = made_up, deterministic: bool = False) -> Choice:
    return choose_attention(
        "auto",
        CPU,
        torch.float16,
        deterministic=deterministic,
        shapes=[LONG, TEXT, SHORT],
        kernels=["efficient", "gemm"],
        time=time,
    )


def test_the_fastest_is_taken_for_each_pair_of_lengths() -> None:
    choice = choose()
    assert choice.kernel_for(11_440, 11_440) == "gemm"
    assert choice.kernel_for(11_440, 512) == "efficient"
    assert choice.kernel_for(1170, 1170) == "efficient"
    assert [row.times_ms for row in choice.rows if row.kernel == "gemm"] == [
        {"efficient": 41.7, "gemm": 27.0}
    ]
    assert (
        "attention of 11,440 queries and 11,440 keys: gemm of efficient 41.70 ms, gemm 27.00 ms"
        in describe(choice)
    )


def test_lengths_that_were_not_timed_take_the_kernel_of_the_nearest() -> None:
    choice = choose()
    assert choice.kernel_for(9000, 9000) == "gemm"
    assert choice.kernel_for(2000, 2000) == "efficient"
    assert choice.kernel_for(2000, 512) == "efficient"


def test_a_kernel_that_fails_or_runs_out_of_memory_is_not_taken() -> None:
    def fails(name: str, shape: AttentionShape, *_: object) -> float:
        if name == "gemm":
            raise torch.OutOfMemoryError("no room")
        return MS[name, shape]

    row = next(row for row in choose(fails).rows if row.num_keys == 11_440)
    assert row.kernel == "efficient" and row.times_ms == {"efficient": 41.7, "gemm": None}

    def fails_always(*_: object) -> float:
        raise RuntimeError("No available kernel")

    with pytest.raises(ValueError, match=r"none of efficient, gemm can run .*smaller"):
        choose(fails_always)


def test_deterministic_times_nothing() -> None:
    def never(*_: object) -> float:
        raise AssertionError

    choice = choose(never, deterministic=True)
    assert choice.kernel_for(11_440, 11_440) == "gemm"
    assert choice.kernel_for(1170, 1170) == choice.kernel_for(11_440, 512) == "efficient"
    assert not any(row.times_ms for row in choice.rows)
    assert fixed_kernel(["flash", "efficient", "gemm"], LONG) == "flash"


def test_a_table_survives_json() -> None:
    choice = choose()
    assert from_table(json.loads(json.dumps(choice.table()))) == choice


def test_the_largest_batch_of_equal_lengths_is_timed() -> None:
    timed = []

    def seen(name: str, shape: AttentionShape, *_: object) -> float:
        timed.append(shape.batch)
        return 1.0

    shapes = [SHORT._replace(batch=batch) for batch in (2, 4, 1)]
    choose_attention(
        "auto", CPU, torch.float16, shapes=shapes, kernels=["efficient", "gemm"], time=seen
    )
    assert timed == [4, 4]


def test_a_cpu_has_one_kernel_whatever_the_lengths() -> None:
    assert candidates(CPU, torch.float32) == ["flash"]
    choice = choose_attention("auto", CPU, torch.float32, shapes=[SHORT])
    assert choice == Choice("flash", "cpu", ())


@pytest.mark.parametrize("name", ["flash4", "cudnn"])
def test_deterministic_refuses_kernels_that_do_not_repeat_their_bits(name: AttentionName) -> None:
    with pytest.raises(ValueError, match=f'"{name}" gives other bits each time'):
        choose_attention(name, CPU, torch.float16, deterministic=True)


def test_gemm_refuses_bfloat16_which_has_too_few_bits_for_logits() -> None:
    with pytest.raises(ValueError, match="bfloat16 has too few bits"):
        choose_attention("gemm", CPU, torch.bfloat16)


def test_every_kernel_of_a_cpu_computes_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 20, 16).unbind(0)
    expected = run_kernel("math", q, k, v)
    for name in ("gemm", "flash"):
        torch.testing.assert_close(run_kernel(name, q, k, v), expected)
