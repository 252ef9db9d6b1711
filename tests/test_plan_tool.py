"""tools.plan counts: its operations and bytes against what the model really has and does."""

from pathlib import Path

import msgspec
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loader.feed_config import FeedConfig
from loader.order import describe_counts
from loader.shape import WAN22, Bucket
from tools import plan
from tools.fake.batch import write_synthetic_dataset
from train.activations.plan import Shape, ShapePlan, plan_run
from train.activations.runner import block_runner
from train.config import TrainConfig
from train.lora import adapters as lora
from train.model.attention import choose_attention
from train.model.config import ModelConfig
from train.model.load import load_transformer
from train.model.wan import TI2V_5B, Wan

CPU, BUCKET = torch.device("cpu"), Bucket(96, 64, 9)
QKV = [*lora.TARGETS[:3], *lora.TARGETS[4:7]]


@pytest.mark.parametrize("targets", [QKV, list(lora.TARGETS)], ids=["qkv", "all"])
@pytest.mark.parametrize("budget_bytes", [float("inf"), 0.0], ids=["all", "block"])
def test_operations_are_those_that_torch_counts(
    tiny_checkpoint: Path, targets: list[str], budget_bytes: float
) -> None:
    model = load_transformer(tiny_checkpoint, CPU, torch.float32)
    adapters = lora.attach(model, targets, 8, 8.0, 0.0, seed=0)
    inputs = (
        torch.randn(1, *WAN22.latent_shape(BUCKET)),
        torch.tensor([[0.0, 500.0]]),
        torch.tensor([0]),
        torch.randn(1, 512, model.config.text_dim),
    )
    attention = choose_attention("math", CPU, torch.float32).attention
    # embeddings and the output projection: not in the plan
    with FlopCounterMode(display=False) as outside:
        blocks, model.blocks = model.blocks, torch.nn.ModuleList()
        model(*inputs, attention)
        model.blocks = blocks
    shape = Shape(1, WAN22.num_tokens(BUCKET), 512)
    plans = plan_run(model.config, [shape], targets, 4, budget_bytes, 0.0, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs, attention, block_runner(model, plans)).square().mean().backward()
    step = plan.step_of(model.config, BUCKET, targets, 8, 4, plans[shape])
    # torch's plain attention does 2 x its forward work backward, the fused kernels that the plan
    # is about 2.5 x; the output projection's gradient is not in the plan
    blocks_count, dim, attention_once = (
        model.config.num_layers,
        model.config.dim,
        sum(plan.attention_flops(model.config, WAN22.num_tokens(BUCKET)).values()),
    )
    expected = step.gemm_flops + step.attention_flops - 0.5 * blocks_count * attention_once
    expected += 2 * WAN22.num_tokens(BUCKET) * dim * 4 * model.config.out_channels
    assert counter.get_total_flops() - outside.get_total_flops() == expected
    assert adapters.parameters()[0].grad is not None


def test_parameters_are_those_of_the_model(tiny_checkpoint: Path) -> None:
    model = load_transformer(tiny_checkpoint, CPU, torch.bfloat16)
    half, full = plan.num_parameters(model.config)
    assert half == sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert full == sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    adapters = lora.attach(model, QKV, 8, 8.0, 0.0, seed=0)
    assert plan.num_adapter_parameters(model.config, QKV, 8) == sum(
        p.numel() for p in adapters.parameters()
    )
    with torch.device("meta"):
        assert sum(plan.num_parameters(TI2V_5B)) == sum(
            p.numel() for p in Wan(TI2V_5B).parameters()
        )


def fitting(text: str) -> dict[str, tuple[str, ...]]:
    """Per card what the report says: GiB, fits, s/step, days."""
    return {
        words[0]: tuple(words[1:5])
        for line in text.splitlines()
        for words in [line.split()]
        if words and words[0] in {card.name for card in plan.CARDS}
    }


def test_a_card_of_32_gib_needs_recomputation_at_720p() -> None:
    shares = {Bucket.parse("1280x704x49"): 1.0}
    config = TrainConfig(
        output="",
        model=ModelConfig(path="", dtype="float16"),
        data=FeedConfig(datasets=[]),
        num_steps=1000,
        global_batch=8,
    )
    found = {
        memory: fitting(
            plan.report(
                msgspec.structs.replace(config, activation_memory=memory), TI2V_5B, shares, 2
            )
        )
        for memory in ("block", "auto", "all")
    }
    v100, h200 = plan.CARDS[0].name, plan.CARDS[-1].name
    assert [found[memory][v100][1] for memory in found] == ["yes", "yes", "no"]
    assert [found[memory][h200][1] for memory in found] == ["yes", "yes", "yes"]
    assert found["auto"][h200] == found["all"][h200]
    assert float(found["auto"][v100][2]) < float(found["block"][v100][2])
    assert 'activation_memory = "auto"' in plan.report(
        msgspec.structs.replace(config, activation_memory="all"), TI2V_5B, shares, 2
    )


@pytest.mark.parametrize(
    ("model", "deterministic", "expected"),
    [
        (
            ModelConfig(path="", dtype="float16"),
            False,
            {"V100": "efficient", "A100": "flash", "H200": "flash4"},
        ),
        (
            ModelConfig(path="", dtype="float16"),
            True,
            {"V100": "efficient", "A100": "flash", "H200": "flash"},
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
    lines = plan.report(config, TI2V_5B, {Bucket.parse("1280x704x49"): 1.0}, 2).splitlines()
    for card, words in expected.items():
        (line,) = (line for line in lines if line.strip().startswith(card))
        has_time = not words.startswith(("refused", "no rate"))
        assert f"   {words}" in line and (line.split()[3] != "-") == has_time
        assert not has_time or f"{words} attention;" in line


def test_slower_attention_takes_longer_by_what_it_is_slower() -> None:
    step = plan.step_of(TI2V_5B, Bucket.parse("1280x704x49"), QKV, 16, 2, ShapePlan(None, 0.0))
    times = {
        name: plan.seconds(step, plan.CARDS[-1], name) for name in plan.CARDS[-1].attention_flops
    }
    assert sorted(times, key=lambda name: times[name]) == ["flash4", "cudnn", "flash", "efficient"]
    assert times["efficient"] - times["flash4"] == pytest.approx(
        step.attention_flops / 1e12 * (1 / 131 - 1 / 568)
    )


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
        match=f"global_batch = 8 is not a multiple of micro_batch x GPUs = 1 x {num_gpus}",
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
    assert plan.buckets_of(plan.order_of(config)) == pytest.approx({tall: 0.2, wide: 0.8})
    weighted = msgspec.structs.replace(
        config, data=FeedConfig(datasets=datasets, weights=[1.0, 1.0])
    )
    assert plan.buckets_of(plan.order_of(weighted)) == pytest.approx({tall: 0.125, wide: 0.875})
    for weights in ([1.0], [1.0, 2.0, 3.0], [0.0, 1.0]):
        data = FeedConfig(datasets=datasets, weights=weights)
        with pytest.raises(ValueError, match="dataset weights"):
            plan.order_of(msgspec.structs.replace(config, data=data))


def test_a_shape_that_is_never_trained_has_no_share_and_is_named(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, {"64x32x1": 9, "32x64x1": 3}, text_dim=8)
    config = TrainConfig(
        output="",
        model=ModelConfig(path=""),
        data=FeedConfig(datasets=[str(tmp_path)]),
        num_steps=1,
        global_batch=4,
    )
    order = plan.order_of(config)
    assert plan.buckets_of(order) == {Bucket(64, 32, 1): 1.0}
    assert describe_counts(order.counts[0], 4) == (
        "2 batches of 4 an epoch; samples left out each epoch, others each time: 1 of 64x32x1; "
        "never trained, because a bucket holds fewer samples than a global batch of 4: "
        "3 of 32x64x1"
    )
