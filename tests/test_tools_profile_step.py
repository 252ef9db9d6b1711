"""tools.profile_step counts and adds up; the profiling itself needs a GPU."""

from tools.cards import CARDS
from tools.profile_step import NUM_STEPS, operation_flops, report, rows_of
from train.model.wan import TI2V_5B

L, H, E = 100, 24, 128


class Event:
    """What rows_of reads of the profiler's averages."""

    def __init__(self, key: str, ms: float, shapes: list[list[int]]):
        self.key, self.input_shapes = key, shapes
        self.count = TI2V_5B.num_layers * NUM_STEPS  # once a block and step
        self.self_device_time_total = ms * 1e3 * self.count


def test_operations_of_gemms_and_of_attention_in_either_layout() -> None:
    assert operation_flops("aten::mm", [[L, 8], [8, 16]]) == operation_flops(
        "aten::addmm", [[16], [L, 8], [8, 16]]
    )
    assert operation_flops("aten::mm", [[L, 8], [8, 16]]) == 2 * L * 8 * 16
    cudnn, flash4 = [[1, H, L, E], [1, H, 512, E]], [[1, L, H, E], [1, 512, H, E]]
    for ours, theirs, inputs in (
        ("newsreel::flash4_forward", "aten::_cudnn_attention_forward", cudnn),
        ("newsreel::flash4_backward", "aten::_cudnn_attention_backward", [[], *cudnn]),
    ):
        assert operation_flops(ours, flash4) == operation_flops(theirs, inputs) > 0
    assert operation_flops("aten::add", [[L], [L]]) == 0


def test_rows_add_up_and_a_kernel_inside_an_operation_is_not_counted_twice() -> None:
    events = [
        Event("aten::mm", 2.0, [[L, 8], [8, 16]]),
        Event("nvjet_gemm", 2.0, []),
        Event("_gelu", 1.0, []),
        Event("aten::add", 0.5, [[L], [L]]),
    ]
    rows = rows_of(events, TI2V_5B, L, 2, CARDS[-1])
    assert [row.ms for row in rows] == [2.0, 1.0, 0.5] and [row.calls for row in rows] == [1.0] * 3
    assert rows[0].floor_ms == 2 * L * 8 * 16 / CARDS[-1].fast.gemm_flops * 1e3
    assert rows[1].floor_ms == 2.5 * 2 * L * TI2V_5B.ffn_dim / CARDS[-1].fast.copy_bytes * 1e3
    assert rows[2].floor_ms is None
    assert "3.500  all of a block's operations; 0.500 ms in the 1 that are not shown" in report(
        rows, num_shown=2
    )
