"""tools.plan with samples that cards share: memory, bytes between them, what is refused."""

import msgspec
import pytest

from loader.feed_config import FeedConfig
from loader.shape import Bucket
from tools import plan
from tools.budget import CardBudget, budget
from train.config import TrainConfig
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.model.wan import TI2V_5B
from train.parallel.config import ParallelConfig

LONG = Bucket(1280, 704, 121)
CONFIG = TrainConfig(
    output="",
    model=ModelConfig(path="", dtype="float16"),
    data=FeedConfig(datasets=[""]),
    lora=LoRAConfig(rank=16),
    num_steps=1000,
    global_batch=8,
    parallel=ParallelConfig(sequence=2),
)


def on_h200(sequence: int, memory: str) -> CardBudget:
    config = msgspec.structs.replace(
        CONFIG, activation_memory=memory, parallel=ParallelConfig(sequence=sequence)
    )
    return budget(config, TI2V_5B, {LONG: 1.0}, num_gpus=2).cards[-1]


def test_two_cards_send_half_of_q_k_v_and_the_output_each_time() -> None:
    # 13,640 tokens of 3072 channels in half precision
    once = 4 * 13_640 * 3072 * 2 / 2
    assert on_h200(2, "all").exchanged_bytes[LONG] == 30 * 2 * once
    # a recomputed block does it a third time
    assert on_h200(2, "block").exchanged_bytes[LONG] == 30 * 3 * once
    assert on_h200(1, "block").exchanged_bytes[LONG] == 0


@pytest.mark.parametrize("memory", ["all", "block"])
def test_half_of_the_tokens_take_about_half_of_the_activations_and_of_the_time(memory: str) -> None:
    one, two = (on_h200(sequence, memory) for sequence in (1, 2))
    assert 0.5 < two.plans[LONG].num_bytes / one.plans[LONG].num_bytes < 0.6
    ratio = one.compute_s[LONG].slow / two.compute_s[LONG].slow
    # the text and the exchange are not halved
    assert 1.85 < ratio < 2.0
    assert one.step_s is not None and two.step_s is not None
    # of as many samples, which the cards have one after another
    assert two.step_s.slow == pytest.approx(2 * one.step_s.slow / ratio)


def test_what_the_trainer_refuses_is_refused_and_the_rate_is_said() -> None:
    with pytest.raises(ValueError, match=r"--gpus 3: parallel.sequence = 2 takes a multiple of 2"):
        plan.report(CONFIG, TI2V_5B, {LONG: 1.0}, 3)
    seven = msgspec.structs.replace(CONFIG, parallel=ParallelConfig(sequence=7))
    with pytest.raises(ValueError, match=r"= 7: does not divide the model's 24 heads"):
        plan.report(seven, TI2V_5B, {LONG: 1.0}, 7)
    text = plan.report(CONFIG, TI2V_5B, {LONG: 1.0}, 2)
    assert "2 cards train each sample together, at 1280x704x121" in text
    assert "each sends 15.1 GB a micro-batch, 1.51 s at 10 GB/s (modelled)" in text
