"""How the fused encoder cuts work: a function of shape and budget that stays inside the budget."""

import pytest

from loader.shape import Bucket
from loader.vae.memory import EncodePlan, plan_encoding

WAN22_HALF = 160 * 2 / 2**2  # bytes a pixel of one tensor of the first stage, in half precision
WAN21_HALF = 96 * 2.0


@pytest.mark.parametrize(
    ("bucket", "memory_gib", "expected"),
    [
        ("1280x704x49", 16.0, EncodePlan(1, 48)),
        ("1280x704x49", 8.0, EncodePlan(1, 20)),
        ("1280x704x1", 16.0, EncodePlan(16, 4)),
        ("832x480x9", 16.0, EncodePlan(9, 8)),
        ("1280x704x49", 3.0, None),
    ],
)
def test_the_budget_goes_to_the_chunk_and_then_to_the_batch(
    bucket: str, memory_gib: float, expected: EncodePlan | None
) -> None:
    assert plan_encoding(Bucket.parse(bucket), memory_gib, WAN22_HALF) == expected


@pytest.mark.parametrize("bytes_per_pixel", [WAN22_HALF, WAN21_HALF, 2 * WAN22_HALF])
@pytest.mark.parametrize("bucket", ["1280x704x49", "1280x720x81", "832x480x17", "160x96x9"])
def test_a_larger_budget_never_takes_fewer_frames(bucket: str, bytes_per_pixel: float) -> None:
    before = 0
    for memory_gib in range(2, 80):
        plan = plan_encoding(Bucket.parse(bucket), memory_gib, bytes_per_pixel)
        if plan is not None:
            assert plan.chunk_frames % 4 == 0
            assert plan.batch * plan.chunk_frames >= before
            before = plan.batch * plan.chunk_frames
    assert before
