"""What validation and samples add to a run, by tools.plan: counted in passes, whole windows and
clips on a card.
"""

import msgspec
import pytest

from loader.feed_config import FeedConfig
from loader.shape import Bucket
from tools import plan
from tools.budget import CardBudget, budget
from tools.counts import forward_of, step_of
from tools.evaluation import Evaluation, evaluation
from train.activations.plan import ShapePlan
from train.config import TrainConfig
from train.lora.config import SELF_AND_CROSS_QKV
from train.model.config import ModelConfig
from train.model.wan import TI2V_5B
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

LARGE = Bucket(1280, 704, 49)
QKV = list(SELF_AND_CROSS_QKV)
CONFIG = TrainConfig(
    output="",
    model=ModelConfig(path="", dtype="float16"),
    data=FeedConfig(datasets=[]),
    num_steps=10_000,
    global_batch=8,
    activation_memory="auto",
    activation_offload=True,
)


def on_card(
    config: TrainConfig, name: str, bucket: Bucket = LARGE
) -> tuple[CardBudget, Evaluation]:
    shares = {bucket: 1.0}
    one = next(
        one
        for one in budget(config, TI2V_5B, shares, num_gpus=2).cards
        if one.card.name.startswith(name)
    )
    cost = evaluation(config, TI2V_5B, shares, 2, one)
    assert cost is not None
    return one, cost


def test_a_forward_pass_is_less_than_a_third_of_a_step() -> None:
    whole = step_of(TI2V_5B, 11_440, QKV, 16, 2, ShapePlan(None, 0.0))
    forward = forward_of(TI2V_5B, 11_440, QKV, 16, 2)
    assert forward.attention_flops["attn1"] * 3.5 == whole.attention_flops["attn1"]
    assert 0.4 < forward.gemm_flops / whole.gemm_flops < 0.55
    assert forward.moved_bytes < whole.moved_bytes / 2


def test_the_default_validation_takes_two_to_three_per_cent_at_batch_8() -> None:
    for card in ("V100", "H100", "H200"):
        _, cost = on_card(CONFIG, card)
        assert 0.021 <= cost.validation_share <= 0.027, card


def test_longer_intervals_and_fewer_windows_take_less_in_proportion() -> None:
    one, cost = on_card(CONFIG, "V100")
    seldom = msgspec.structs.replace(
        CONFIG,
        validation=ValidationConfig(every=1000, num_train_windows=0),
        samples=SamplesConfig(every=0),
    )
    _, less = on_card(seldom, "V100")
    # 64 windows at four levels instead of these and 16 at two
    assert less.validation_s.slow == pytest.approx(cost.validation_s.slow * 256 / 288)
    assert less.samples_share == 0.0
    assert one.step_s is not None
    assert less.with_both_s.slow == pytest.approx(one.step_s.slow + less.validation_s.slow / 1000)


def test_clips_are_shared_by_the_cards_and_cost_what_their_own_shape_costs() -> None:
    _, four = on_card(CONFIG, "H200")
    for samples, factor in (
        (SamplesConfig(num_clips=2), 0.5),
        (SamplesConfig(num_clips=3), 1.0),
        (SamplesConfig(guidance=1.0), 0.5),
        (SamplesConfig(num_steps=50), 2.0),
    ):
        _, cost = on_card(msgspec.structs.replace(CONFIG, samples=samples), "H200")
        assert cost.samples_s.slow == pytest.approx(factor * four.samples_s.slow)
    small = msgspec.structs.replace(CONFIG, samples=SamplesConfig(shape="832x480x9"))
    assert on_card(small, "H200")[1].samples_s.slow < four.samples_s.slow / 8


def test_the_plan_prints_the_share_and_the_days_with_it() -> None:
    text = plan.report(CONFIG, TI2V_5B, {LARGE: 1.0}, 2)
    _, cost = on_card(CONFIG, "H200")
    assert "validation (every: 500 steps) and samples (every: 500 steps; without the VAE's" in text
    days = f"{CONFIG.num_steps * cost.with_both_s.slow / 86400:.2f}"
    line = next(line for line in text.splitlines() if line.startswith("| H200") and "%" in line)
    assert f"{cost.validation_share:.1%}" in line and line.rstrip(" |").endswith(days)
