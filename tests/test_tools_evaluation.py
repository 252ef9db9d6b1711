"""What validation and samples add to a run, by tools.plan: counted in passes, whole windows and
clips on a card.
"""

from pathlib import Path

import msgspec
import pytest

from loader.config import load_toml
from loader.feed_config import FeedConfig
from loader.shape import Bucket
from tools import plan
from tools.budget import CardBudget, Span, budget
from tools.counts import forward_of, step_of
from tools.evaluation import Evaluation, evaluation, final_evaluation
from train.activations.plan import ShapePlan
from train.config import TrainConfig
from train.lora.config import SELF_AND_CROSS_QKV
from train.model.config import ModelConfig
from train.model.wan import I2V_A14B, T2V_A14B, TI2V_5B, WAN21_1_3B, WanConfig
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

LARGE = Bucket(1280, 704, 49)
MEDIUM, SMALL = Bucket(832, 480, 49), Bucket(832, 480, 9)
QKV = list(SELF_AND_CROSS_QKV)
TRAIN_CONFIGS = Path(__file__).resolve().parents[1] / "configs/train"
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


@pytest.mark.parametrize(
    ("name", "wan", "bucket", "card", "num_gpus"),
    [
        ("ti2v5b_v100", TI2V_5B, LARGE, "V100", 2),
        ("ti2v5b_v100_rank16", TI2V_5B, LARGE, "V100", 2),
        ("ti2v5b_v100_rank64", TI2V_5B, LARGE, "V100", 2),
        ("ti2v5b_v100_832x480x9", TI2V_5B, SMALL, "V100", 2),
        ("ti2v5b_hopper", TI2V_5B, LARGE, "H", 1),
        ("t2v_a14b_high", T2V_A14B, MEDIUM, "V100", 1),
        ("t2v_a14b_low", T2V_A14B, MEDIUM, "V100", 1),
        ("i2v_a14b_high", I2V_A14B, MEDIUM, "V100", 1),
        ("i2v_a14b_low", I2V_A14B, MEDIUM, "V100", 1),
        ("wan21_t2v_1_3b", WAN21_1_3B, MEDIUM, "V100", 2),
    ],
)
def test_validation_and_samples_of_a_shipped_run_stay_within_three_per_cent(
    name: str, wan: WanConfig, bucket: Bucket, card: str, num_gpus: int
) -> None:
    config = load_toml(TRAIN_CONFIGS / f"{name}.toml", TrainConfig)
    planned = budget(config, wan, {bucket: 1.0}, num_gpus=num_gpus).cards
    on_these = [one for one in planned if one.card.name.startswith(card)]
    costs = [evaluation(config, wan, {bucket: 1.0}, num_gpus, one) for one in on_these]
    shares = [cost.validation_share + cost.samples_share for cost in costs if cost]
    assert shares and max(shares) <= 0.03


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
    one, _ = on_card(CONFIG, "H200")
    clip_s = final_evaluation(CONFIG).clip_s(CONFIG, TI2V_5B, {LARGE: 1.0}, one)
    assert clip_s is not None
    final = text.split("tools.evaluate final")[1].split("\n\n")[0]
    assert "160 clips" in final and "modelled" in final
    line = next(line for line in final.splitlines() if line.startswith("| H200"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == [f"{clip_s.slow:.2f}", f"{160 * clip_s.slow / 3600:.2f}"]


def test_an_evaluation_on_two_v100s_takes_what_a_hand_computes() -> None:
    """160 clips of 832x480x49 of the base and of a LoRA, 25 steps with guidance."""
    bucket = Bucket(832, 480, 49)
    final = final_evaluation(CONFIG)
    assert final == (160, 25, 5.0)
    # 13 latent frames of 15 x 26 tokens
    tokens, text, dim, ffn, blocks = 5070, 512, 3072, 14336, 30
    # q, k, v and out of self-attention, q and out of cross-attention, the feed-forward; its k and v
    frozen = tokens * (6 * dim * dim + 2 * dim * ffn) + text * 2 * dim * dim
    # rank 16 each: [q, k, v] together, q, [k, v] of the text
    narrow = tokens * (48 * 4 * dim + 16 * 2 * dim) + text * 32 * 3 * dim
    gemm_flops = blocks * 2 * (frozen + narrow)
    attention_flops = blocks * 4 * (tokens * tokens + tokens * text) * dim
    # six passes over the float32 stream, twelve over float16 rows, two over the feed-forward's
    moved_bytes = blocks * tokens * (6 * 4 * dim + 12 * 2 * dim + 2 * 2 * ffn)
    copy_s = moved_bytes / (0.9e12 * 3.9 / 4.8) + blocks * 21 * 4e-6
    fast_s = gemm_flops / 90e12 + attention_flops / 25e12 + copy_s
    slow_s = gemm_flops / (112e12 * 725 / 989) + attention_flops / (112e12 * 131 / 989) + copy_s

    # what is saved for the backward pass plays no part
    config = msgspec.structs.replace(CONFIG, activation_memory="block")
    one, _ = on_card(config, "V100", bucket)
    clip_s = final.clip_s(config, TI2V_5B, {bucket: 1.0}, one)
    assert clip_s is not None and one.kernels.names == "efficient"
    assert clip_s == pytest.approx((50 * fast_s, 50 * slow_s))
    assert clip_s == pytest.approx((48.0, 64.7), abs=0.05)
    # 80 clips on each card, of two variants
    hours = [each / 3600 for each in final.seconds(clip_s, num_gpus=2, num_variants=2)]
    assert hours == pytest.approx([160 * 48.02 / 3600, 160 * 64.71 / 3600], rel=1e-3)
    odd = final.seconds(Span(1.0, 1.0), num_gpus=3, num_variants=1)
    assert odd.fast == 54
