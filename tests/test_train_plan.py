"""The activation plan: pure arithmetic over bytes."""

import pytest

from train.activations import plan
from train.activations import sizes as of_block
from train.lora import adapters as lora
from train.model.attention import Choice
from train.model.wan import TI2V_5B

EFFICIENT = Choice("efficient", "", ())


@pytest.mark.parametrize("budget_gib", [0.5, 2.0, 8.0, 17.0])
def test_the_plan_fills_the_budget_and_never_exceeds_it(budget_gib: float) -> None:
    sizes = of_block.output_bytes(TI2V_5B, 11_440, 512, 2)
    saved = plan.choose_saved(sizes, 30, budget_gib * 2**30)
    used = sum(sizes[name] for block in saved for name in block)
    assert used <= budget_gib * 2**30
    assert used > 0.9 * budget_gib * 2**30
    assert all("attn1" in block for block in saved) or not any(
        block - {"attn1"} for block in saved[-1:]
    )


def test_cross_attention_is_saved_before_the_gemms_where_attention_is_slow() -> None:
    sizes = of_block.output_bytes(TI2V_5B, 11_440, 512, 2)
    for cross_first in (False, True):
        # self-attention takes 2.0 of them
        saved = plan.choose_saved(sizes, 30, 3.0 * 2**30, cross_first)
        assert all("attn1" in block for block in saved)
        assert (
            any("attn2" in block for block in saved)
            == cross_first
            == (not any("attn1.out" in b for b in saved))
        )


def test_pinned_memory_is_counted_without_rounding() -> None:
    """9.05 and 4.53 GiB at 121 frames, where powers of two would be 24."""
    shape = of_block.Shape(1, 27_280, 512)
    found = plan.plan_shape(TI2V_5B, shape, lora.TARGETS[:3], 2, 0.0, offload=True)
    assert found.host_bytes / 2**30 == pytest.approx(13.6, abs=0.05)
    assert plan.plan_shape(TI2V_5B, shape, lora.TARGETS[:3], 2, 0.0).host_bytes == 0


def test_offloaded_inputs_leave_room_to_save_more() -> None:
    shape, num_bytes = of_block.Shape(1, 11_440, 512), 20.0 * 2**30
    plans = [
        plan.plan_shape(TI2V_5B, shape, lora.TARGETS[:3], 2, None, num_bytes, EFFICIENT, offload)
        for offload in (False, True)
    ]
    assert all(0.95 * num_bytes < chosen.num_bytes <= num_bytes for chosen in plans)
    without, with_offload = (sum(len(block) for block in chosen.saved or []) for chosen in plans)
    assert with_offload > without + 10
    large = plan.plan_shape(
        TI2V_5B, shape, lora.TARGETS[:3], 2, None, 100.0 * 2**30, EFFICIENT, True
    )
    assert large.saved is None and large.host_bytes == 0  # where all fits, nothing has to move


@pytest.mark.parametrize("room_gib", [13.0, 20.0, 30.0, 100.0])
def test_auto_fills_the_room_and_saves_everything_where_it_fits(room_gib: float) -> None:
    large, small = of_block.Shape(1, 11_440, 512), of_block.Shape(1, 1_170, 512)
    room_bytes = room_gib * 2**30
    for shapes in ([large], [small], [large, small]):
        plans = plan.plan_run(
            TI2V_5B, shapes, lora.TARGETS[:3], 2, None, room_bytes, max_graph_tokens=4096
        )
        # a graph's memory stays while the other shape runs
        total = sum(chosen.num_bytes for chosen in plans.values())
        assert total <= room_bytes
        if any(chosen.saved is not None for chosen in plans.values()):
            assert total > 0.9 * room_bytes or (shapes == [small])
    assert (plans[large].saved is None) == (room_gib == 100.0)
    graph_alone = plan.plan_run(
        TI2V_5B, [small], lora.TARGETS[:3], 2, None, room_bytes, max_graph_tokens=4096
    )
    assert graph_alone[small].saved is None  # nobody else needs the room
