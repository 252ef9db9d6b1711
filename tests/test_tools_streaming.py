"""tools.plan of A14B: layouts, weights that a card has no room for, and if copying them hides."""

import msgspec
import pytest

from loader.feed_config import FeedConfig
from loader.shape import WAN21, Bucket
from tools import budget, plan
from tools.cards import CARDS
from tools.evaluation import sampled_steps
from tools.streaming import Moved, hidden_from_tokens, with_copies
from train.config import TrainConfig
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.model.wan import T2V_A14B, TI2V_5B

CLIP, IMAGE = Bucket(832, 480, 49), Bucket(832, 480, 1)


def on_card(bucket: Bucket, name: str, placement: str, **changes: object) -> budget.CardBudget:
    model = msgspec.convert(
        {"path": "", "dtype": "float16", "expert": "high", "placement": placement}, ModelConfig
    )
    config = TrainConfig(
        output="",
        model=model,
        data=FeedConfig(datasets=[""], i2v_share=0.0),
        num_steps=1,
        global_batch=4,
        activation_memory="auto",
        activation_offload=True,
        **changes,  # type: ignore[arg-type]
    )
    found = budget.budget(config, T2V_A14B, {bucket: 1.0}, num_gpus=1)
    if placement == "auto":
        text = plan.report(config, T2V_A14B, {bucket: 1.0}, 1)
        assert ("weights that are not resident" in text) == any(
            one.moved.num_blocks for one in found.cards
        )
        # plainly, where it is a matter of minutes
        slow = "on V100-PCIE-32GB a step of 4 samples takes 2." in text
        assert slow == (bucket == CLIP) and "on H200 a step" not in text
    return next(one for one in found.cards if one.card.name.startswith(name))


def test_a_card_of_32_gib_trains_a14b_with_its_weights_in_the_hosts_memory() -> None:
    resident, streamed = (on_card(CLIP, "V100", each) for each in ("resident", "auto"))
    assert not resident.fits and streamed.fits
    assert streamed.moved.num_blocks == 40
    # one half-precision block of 351 million weights, forty times
    assert streamed.moved.host_bytes / budget.GIB == pytest.approx(26.3, abs=0.3)
    # at 20,280 tokens copying hides, and what it frees saves attention outputs
    compute_s = streamed.compute_s[CLIP].fast
    assert streamed.moved.copied_bytes / streamed.card.link_bytes < compute_s / 5
    assert streamed.step_s is not None and resident.step_s is not None
    assert streamed.step_s.fast == pytest.approx(4 * compute_s)
    assert streamed.step_s.fast < resident.step_s.fast
    assert streamed.plans[CLIP].saved != resident.plans[CLIP].saved


@pytest.mark.parametrize("memory_gib", [12, 16])
def test_ti2v_5b_trains_on_a_small_card_with_its_weights_in_the_hosts_memory(
    memory_gib: int,
) -> None:
    small = CARDS[0]._replace(memory_gib=memory_gib)

    def on_small(placement: str) -> budget.CardBudget:
        raw = {"output": "o", "num_steps": 1, "global_batch": 1, "data": {"datasets": [""]}}
        raw |= {"activation_memory": "auto", "activation_offload": True}
        config = msgspec.convert(raw | {"model": {"path": "", "placement": placement}}, TrainConfig)
        bucket = Bucket(1280, 704, 49)
        return budget.budget(config, TI2V_5B, {bucket: 1.0}, num_gpus=1, cards=[small]).cards[0]

    auto = on_small("auto")
    assert auto.fits and auto.moved.num_blocks == 30
    assert auto.moved.host_bytes / budget.GIB == pytest.approx(9.2, abs=0.1)
    assert on_small("resident").fits == (memory_gib == 16)


def test_images_are_too_short_to_hide_the_copies_and_several_at_a_time_are_not() -> None:
    one, four = (
        on_card(IMAGE, "V100", "streamed", micro_batch=size, cuda_graph_tokens=0) for size in (1, 4)
    )
    copy_s = one.moved.copied_bytes / one.card.link_bytes
    assert one.step_s is not None and four.step_s is not None
    assert one.step_s.fast == pytest.approx(4 * copy_s) and one.compute_s[IMAGE].fast < copy_s
    assert four.step_s.fast < one.step_s.fast / 2


def test_copies_hide_from_the_tokens_on_that_the_plan_names() -> None:
    v100 = on_card(CLIP, "V100", "streamed")
    copy_s = v100.moved.copied_bytes / v100.card.link_bytes
    # more than an image has, less than 17 frames
    assert 1_560 < v100.hidden_from < 7_800
    assert hidden_from_tokens(lambda n: n / 1e3, 4.55) == 4600
    assert copy_s > 0 and on_card(CLIP, "H200", "resident").hidden_from == 0


def test_copies_hide_in_each_pass_or_not_at_all() -> None:
    both = Moved(forward_bytes=1.5, backward_bytes=1.5)
    assert with_copies(both, 1.0, forward_s=2.0, compute_s=6.0) == 6.0
    # there is time enough for all of it, but not in the forward pass
    assert with_copies(both, 1.0, forward_s=1.0, compute_s=6.0) == 6.5
    assert with_copies(both, 1.0, forward_s=1.0, compute_s=2.0) == 3.0


def test_a_backward_pass_of_a_few_blocks_copies_few() -> None:
    some, every = (
        on_card(CLIP, "V100", "streamed", lora=LoRAConfig(blocks=blocks)).moved
        for blocks in ("30-39", "")
    )
    # of ten trained blocks two are in the slots at the turn; then the forward pass begins anew
    assert some.backward_bytes == pytest.approx(every.backward_bytes * 8 / 38)
    assert some.forward_bytes == pytest.approx(every.forward_bytes * 40 / 38)


def test_shares_on_two_cards_take_half_of_the_weights_of_each() -> None:
    streamed = on_card(CLIP, "V100", "streamed").moved
    config = TrainConfig(
        output="",
        model=ModelConfig(path="", expert="high", placement="sharded"),
        data=FeedConfig(datasets=[""], i2v_share=0.0),
        num_steps=1,
        global_batch=2,
    )
    sharded = budget.budget(config, T2V_A14B, {CLIP: 1.0}, num_gpus=2).cards[0].moved
    weights_bytes = streamed.host_bytes
    assert streamed.freed_bytes - sharded.freed_bytes == pytest.approx(weights_bytes / 2, rel=1e-3)
    assert sharded.host_bytes == 0 and sharded.copied_bytes == streamed.copied_bytes / 2
    with pytest.raises(ValueError, match="one GPU has nobody to share"):
        budget.budget(config, T2V_A14B, {CLIP: 1.0}, num_gpus=1)


def test_a_card_with_room_keeps_its_weights() -> None:
    assert on_card(CLIP, "H200", "auto").moved.num_blocks == 0
    assert on_card(CLIP, "H200", "auto") == on_card(CLIP, "H200", "resident")


def test_tokens_are_of_the_models_own_layout() -> None:
    assert WAN21.num_tokens(CLIP) == 20_280 and WAN21.num_tokens(IMAGE) == 1_560
    saved = on_card(CLIP, "H200", "resident").plans[CLIP]
    # 39 of 40 blocks' inputs, float32 and half precision, wait on the host
    assert saved.host_bytes / budget.GIB == pytest.approx(39 * 20_280 * 5120 * 6 / 2**30, rel=0.01)


def test_one_expert_samples_its_own_steps() -> None:
    def steps(expert: str) -> float:
        raw = {"output": "o", "num_steps": 1, "global_batch": 1, "data": {"datasets": [""]}}
        model = {"path": "", "expert": expert}
        config = msgspec.convert(raw | {"model": model, "samples": {"num_steps": 40}}, TrainConfig)
        return sampled_steps(config, T2V_A14B)

    # at shift 12 sigma is above 0.875 for 63.2% of u
    assert steps("high") == pytest.approx(25.3, abs=0.05)
    assert steps("high") + steps("low") == pytest.approx(40)
