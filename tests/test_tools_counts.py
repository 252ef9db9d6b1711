"""tools.counts: operations and parameters against what the model really has and does."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loader.shape import WAN22, Bucket
from tools import counts
from train.activations.plan import plan_run
from train.activations.runner import block_runner
from train.activations.sizes import Shape
from train.lora import adapters as lora
from train.model.attention import choose_attention
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
    step = counts.step_of(model.config, shape.num_tokens, targets, 8, 4, plans[shape])
    # torch's plain attention does 2 x its forward work backward, the fused kernels that the plan
    # is about 2.5 x; the output projection's gradient is not in the plan
    blocks_count, dim, attention_once = (
        model.config.num_layers,
        model.config.dim,
        sum(counts.attention_flops(model.config, WAN22.num_tokens(BUCKET)).values()),
    )
    expected = step.gemm_flops + sum(step.attention_flops.values())
    expected -= 0.5 * blocks_count * attention_once
    expected += 2 * WAN22.num_tokens(BUCKET) * dim * 4 * model.config.out_channels
    assert counter.get_total_flops() - outside.get_total_flops() == expected
    assert adapters.parameters()[0].grad is not None


def test_parameters_are_those_of_the_model(tiny_checkpoint: Path) -> None:
    model = load_transformer(tiny_checkpoint, CPU, torch.bfloat16)
    half, full = counts.num_parameters(model.config)
    assert half == sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert full == sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    adapters = lora.attach(model, QKV, 8, 8.0, 0.0, seed=0)
    assert counts.num_adapter_parameters(model.config, QKV, 8) == sum(
        p.numel() for p in adapters.parameters()
    )
    with torch.device("meta"):
        assert sum(counts.num_parameters(TI2V_5B)) == sum(
            p.numel() for p in Wan(TI2V_5B).parameters()
        )
