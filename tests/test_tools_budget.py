"""tools.budget and tools.plan: what fits, how long it takes, and when there is no time to tell."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from loader.feed_config import FeedConfig
from loader.order import describe_counts
from loader.shape import WAN22, Bucket
from tools import budget, plan
from tools.cards import CARDS, gemm_attention_flops
from tools.counts import step_of
from tools.fake.batch import write_synthetic_dataset
from train.activations.plan import ShapePlan
from train.config import TrainConfig
from train.lora.config import SELF_AND_CROSS_QKV
from train.model.config import ModelConfig
from train.model.load import WeightsError, load_transformer
from train.model.wan import TI2V_5B

BUCKET, LARGE = Bucket(96, 64, 9), Bucket(1280, 704, 49)
QKV = list(SELF_AND_CROSS_QKV)


def on_card(config: TrainConfig, name: str) -> budget.CardBudget:
    """The budget of the card whose name starts so, with the kernels that "auto" takes."""
    return next(
        one
        for one in budget.budget(config, TI2V_5B, {LARGE: 1.0}, num_gpus=2).cards
        if one.card.name.startswith(name)
    )


def test_a_card_of_32_gib_needs_recomputation_at_720p() -> None:
    config = TrainConfig(
        output="",
        model=ModelConfig(path="", dtype="float16"),
        data=FeedConfig(datasets=[]),
        num_steps=1000,
        global_batch=8,
    )
    found = {
        (card, memory): on_card(msgspec.structs.replace(config, activation_memory=memory), card)
        for card in ("V100", "H200")
        for memory in ("block", "auto", "all")
    }
    assert [found["V100", memory].fits for memory in ("block", "auto", "all")] == [
        True,
        True,
        False,
    ]
    assert all(found["H200", memory].fits for memory in ("block", "auto", "all"))
    assert found["H200", "auto"] == found["H200", "all"]
    auto_s, block_s = found["V100", "auto"].step_s, found["V100", "block"].step_s
    assert auto_s is not None and block_s is not None and auto_s.slow < block_s.slow

    text = plan.report(
        msgspec.structs.replace(config, activation_memory="all"), TI2V_5B, {LARGE: 1.0}, 2
    )
    assert 'To fit a smaller card: activation_memory = "auto"' in text


@pytest.mark.parametrize(
    ("model", "deterministic", "expected"),
    [
        (
            ModelConfig(path="", dtype="float16"),
            False,
            {"V100": "gemm and efficient", "A100": "flash", "H200": "flash4"},
        ),
        (
            ModelConfig(path="", dtype="float16"),
            True,
            {"V100": "gemm and efficient", "A100": "flash", "H200": "flash"},
        ),
        (
            ModelConfig(path="", dtype="bfloat16"),
            False,
            {"V100": "refused: no bfloat16", "H200": "flash4"},
        ),
        (
            ModelConfig(path="", dtype="float16", attention="efficient"),
            False,
            {"V100": "efficient", "H200": "efficient"},
        ),
        (
            ModelConfig(path="", dtype="bfloat16", attention="gemm"),
            False,
            {"V100": "refused: no bfloat16", "H200": 'refused: attention = "gemm"'},
        ),
        (
            ModelConfig(path="", dtype="float16", attention="cudnn"),
            False,
            {"V100": "no rate", "H200": "cudnn"},
        ),
        (
            ModelConfig(path="", dtype="float16", attention="cudnn"),
            True,
            {"H200": "refused: attention"},
        ),
        (ModelConfig(path="", dtype="float32"), False, {"H200": "no rates for float32"}),
    ],
)
def test_a_time_is_for_the_kernel_that_runs_or_there_is_none(
    model: ModelConfig, deterministic: bool, expected: dict[str, str]
) -> None:
    config = TrainConfig(
        output="",
        model=model,
        data=FeedConfig(datasets=[""]),
        num_steps=1000,
        global_batch=8,
        deterministic=deterministic,
    )
    text = plan.report(config, TI2V_5B, {LARGE: 1.0}, 2)
    for card, words in expected.items():
        found = on_card(config, card)
        has_time = not words.startswith(("refused", "no rate"))
        assert (found.step_s is not None) == has_time
        assert found.kernels.names == words if has_time else found.why_no_time.startswith(words)
        line = next(line for line in text.splitlines() if line.startswith(f"| {card}"))
        assert f"| {words}" in line and (not has_time or f"| {words} attention;" in line)


def test_slower_attention_takes_longer_by_what_it_is_slower() -> None:
    step = step_of(TI2V_5B, WAN22.num_tokens(LARGE), QKV, 16, 2, ShapePlan(None, 0.0))
    rates = CARDS[-1].slow
    times = {
        name: budget.seconds(step, rates, {"attn1": name, "attn2": name})
        for name in rates.attention_flops
    }
    assert sorted(times, key=lambda name: times[name]) == [
        "flash4",
        "cudnn",
        "flash",
        "gemm",
        "efficient",
    ]
    assert times["efficient"] - times["flash4"] == pytest.approx(
        sum(step.attention_flops.values()) / 1e12 * (1 / 131 - 1 / 568)
    )


def test_the_roofline_of_attention_from_gemms_is_near_what_was_measured() -> None:
    """On an H200 at 11,440 tokens, with the shift of logits: 28.25 ms, of which the roofline
    explains 22.6; at 27,280 tokens it was 161.85.
    """
    num_flops = 14 * 11_440**2 * 3072
    measured = CARDS[-1].slow.attention_flops["gemm"]
    assert num_flops / measured == pytest.approx(28.25e-3)
    assert 14 * 27_280**2 * 3072 / measured == pytest.approx(161.85e-3, rel=0.02)
    assert num_flops / gemm_attention_flops(725e12, 3.9e12) == pytest.approx(22.6e-3, rel=1e-2)


def test_a_v100_has_both_kernels_side_by_side_each_as_a_range() -> None:
    config = TrainConfig(
        output="",
        model=ModelConfig(path="", dtype="float16"),
        data=FeedConfig(datasets=[]),
        num_steps=1000,
        global_batch=16,
        activation_memory="auto",
        activation_offload=True,
    )
    mixed, alone = (
        one
        for one in budget.budget(config, TI2V_5B, {LARGE: 1.0}, num_gpus=2).cards
        if one.card.name.startswith("V100")
    )
    assert (mixed.kernels.names, alone.kernels.names) == ("gemm and efficient", "efficient")
    assert mixed.kernels.kernel_for(11_440, 512) == "efficient"
    assert mixed.fits and alone.fits
    assert 0.9 < mixed.scratch_bytes / 2**30 <= 1.0 and alone.scratch_bytes == 0
    assert mixed.step_s is not None and alone.step_s is not None
    assert mixed.step_s.fast < mixed.step_s.slow < alone.step_s.fast < alone.step_s.slow
    text = plan.report(config, TI2V_5B, {LARGE: 1.0}, 2)
    assert f"{mixed.step_s.fast:.2f} to {mixed.step_s.slow:.2f}" in text


def test_adapters_in_the_last_blocks_take_less_time_and_memory() -> None:
    config = TrainConfig(
        output="",
        model=ModelConfig(path="", dtype="float16"),
        data=FeedConfig(datasets=[]),
        num_steps=1000,
        global_batch=8,
    )
    blocks = msgspec.structs.replace(config.lora, blocks="15-29")
    half = on_card(msgspec.structs.replace(config, lora=blocks), "H200")
    whole = on_card(config, "H200")
    assert half.step_s is not None and whole.step_s is not None
    # forward 30 times instead of 30, recomputed and backward 15 times instead of 30
    assert 0.55 < half.step_s.slow / whole.step_s.slow < 0.7
    assert half.num_bytes < whole.num_bytes


@pytest.mark.parametrize("num_gpus", [0, -2, 3])
def test_gpus_that_do_not_divide_the_batch_are_refused_as_in_training(num_gpus: int) -> None:
    config = TrainConfig(
        output="",
        model=ModelConfig(path=""),
        data=FeedConfig(datasets=[""]),
        num_steps=1,
        global_batch=8,
    )
    with pytest.raises(
        ValueError,
        match=(
            "global_batch = 8 is not a multiple of micro_batch x processes = 1 x 3"
            if num_gpus > 0
            else f"--gpus {num_gpus}: use at least 1"
        ),
    ):
        plan.report(config, TI2V_5B, {BUCKET: 1.0}, num_gpus)


def test_shapes_have_the_share_that_their_dataset_is_weighted_with(tmp_path: Path) -> None:
    for name, buckets in (("a", {"64x32x1": 6, "32x64x1": 2}), ("b", {"64x32x1": 2})):
        write_synthetic_dataset(tmp_path / name, buckets, text_dim=8)
    datasets = [str(tmp_path / name) for name in "ab"]
    config = TrainConfig(
        output="",
        model=ModelConfig(path=""),
        data=FeedConfig(datasets=datasets),
        num_steps=1,
        global_batch=2,
    )
    wide, tall = Bucket(64, 32, 1), Bucket(32, 64, 1)
    assert budget.buckets_of(budget.order_of(config)) == pytest.approx({tall: 0.2, wide: 0.8})
    weighted = msgspec.structs.replace(
        config, data=FeedConfig(datasets=datasets, weights=[1.0, 1.0])
    )
    assert budget.buckets_of(budget.order_of(weighted)) == pytest.approx({tall: 0.125, wide: 0.875})
    for weights in ([1.0], [1.0, 2.0, 3.0], [0.0, 1.0]):
        data = FeedConfig(datasets=datasets, weights=weights)
        with pytest.raises(ValueError, match="dataset weights"):
            budget.order_of(msgspec.structs.replace(config, data=data))


def test_a_shape_that_is_never_trained_has_no_share_and_is_named(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, {"64x32x1": 9, "32x64x1": 3}, text_dim=8)
    config = TrainConfig(
        output="",
        model=ModelConfig(path=""),
        data=FeedConfig(datasets=[str(tmp_path)]),
        num_steps=1,
        global_batch=4,
    )
    order = budget.order_of(config)
    assert budget.buckets_of(order) == {Bucket(64, 32, 1): 1.0}
    assert describe_counts(order.counts[0], 4) == (
        "2 batches of 4 an epoch; samples left out each epoch, others each time: 1 of 64x32x1; "
        "never trained, because a bucket holds fewer samples than a global batch of 4: "
        "3 of 32x64x1"
    )


@pytest.mark.parametrize(
    ("change", "heads", "said"),
    [
        ('lora.targets=["to_x"]', 2, r"lora\.targets: \['to_x'\] given; choose from attn1"),
        ("lora.rank=12", 2, r"lora\.rank = 12: use a multiple of 8"),
        ("num_steps=3", 4, r"have shapes .* which do not fill .* of config\.json"),
        ("num_steps=3", 1, r"have shapes .* which do not fill .* of config\.json"),
    ],
)
def test_the_plan_refuses_what_the_trainer_refuses(
    change: str,
    heads: int,
    said: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer")
    wan = tmp_path / "transformer" / "config.json"
    wan.write_text(json.dumps(json.loads(wan.read_text()) | {"num_attention_heads": heads}))
    file = tmp_path / "run.toml"
    file.write_text(
        f'output = "o"\nnum_steps = 1\nglobal_batch = 2\n[model]\npath = "{tmp_path}"\n'
        f'[data]\ndatasets = ["d"]\n[lora]\nrank = 8\n'
    )
    command = ["plan", str(file), "--shape", "64x64x5", "--set", change]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=said):
        plan.main()
    if heads != 2:
        with pytest.raises(WeightsError, match=said):
            load_transformer(tmp_path, torch.device("cpu"), torch.float32)
