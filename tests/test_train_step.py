"""A micro-batch's loss and gradient: eager and graphed steps have the same two methods, and the
loss can be had without a gradient.
"""

import msgspec
import pytest
import torch
from torch import Tensor

from loader.feed_config import FeedConfig
from loader.shape import Bucket
from tools.fake.step import random_batch, random_transformer
from train import setup
from train.config import TrainConfig
from train.flow import FlowConfig, NoiseLaws, loss_weight, sample_sigma
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.model.wan import TI2V_5B
from train.parallel.mesh import World
from train.run import Run
from train.step import EagerStep, Inputs, MicroStep, prepare

CPU, BUCKET, OTHER = torch.device("cpu"), Bucket(96, 64, 9), Bucket(64, 64, 5)
TINY = msgspec.structs.replace(
    TI2V_5B,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=48,
    freq_dim=16,
    text_dim=16,
    num_layers=2,
)


def build(memory: str = "block", global_batch: int = 1, dropout: float = 0.0) -> Run:
    config = TrainConfig(
        output="",
        model=ModelConfig(path="", dtype="float32"),
        data=FeedConfig(datasets=[""]),
        lora=LoRAConfig(rank=4, dropout=dropout),
        num_steps=1,
        global_batch=global_batch,
        activation_memory=memory,
    )
    model = random_transformer(TINY, CPU, torch.float32)
    run = setup.build(config, World(0, 1, CPU), [BUCKET], model=model)
    for _, b in run.adapters.tensors().values():
        b.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    run.adapters.refresh()
    return run


def inputs(run: Run, bucket: Bucket = BUCKET, is_i2v: bool = False, seed: int = 0) -> Inputs:
    batch = random_batch(bucket, CPU, is_i2v=[is_i2v], text_dim=TINY.text_dim, seed=seed)
    return prepare(batch, run.laws)


def gradient(run: Run, *samples: Inputs) -> Tensor:
    run.flat.buffer.zero_()
    for sample in samples:
        run.micro_step.forward(sample)
        run.micro_step.backward()
    return run.flat.gradient.clone()


def test_accumulated_gradients_are_the_mean_over_the_global_batch() -> None:
    one, two = build(), build(global_batch=2)
    a, b = inputs(one, seed=0), inputs(one, seed=1, is_i2v=True)
    torch.testing.assert_close(gradient(two, a, b), (gradient(one, a) + gradient(one, b)) / 2)


def test_the_loss_without_a_gradient_is_that_of_the_forward_pass_for_any_shape() -> None:
    run = build()
    sample = inputs(run, is_i2v=True)
    with torch.no_grad():
        loss = run.micro_step.loss(sample)
        # the run has no plan of what such a shape saves
        assert run.micro_step.loss(inputs(run, OTHER)).isfinite()
    assert not loss.requires_grad
    assert torch.equal(loss, run.micro_step.forward(sample).mean())


def test_a_weight_multiplies_the_loss_and_the_gradient_of_its_sample() -> None:
    run = build()
    sample = inputs(run)
    plain = gradient(run, sample)
    assert sample.weight_B.tolist() == [1.0]
    heavy = sample._replace(weight_B=torch.tensor([3.0]))
    torch.testing.assert_close(gradient(run, heavy), 3 * plain)
    assert torch.equal(run.micro_step.forward(heavy), 3 * run.micro_step.forward(sample))


def test_level_and_weight_follow_the_shape_of_the_batch() -> None:
    batch = random_batch(BUCKET, CPU, is_i2v=[False], text_dim=TINY.text_dim, seed=0)
    laws = NoiseLaws(FlowConfig(shift=5.0, shifts={str(BUCKET): 2.0}, weighting="bell"))
    law = laws.of(BUCKET)
    (sigma,) = (sample_sigma(seed, law) for seed in batch.seeds)
    found = prepare(batch, laws)
    assert found.t_BR[0, 1] == pytest.approx(1000 * sigma, rel=1e-6)
    assert found.weight_B.tolist() == pytest.approx([loss_weight(sigma, law)], rel=1e-6)
    assert prepare(batch, NoiseLaws()).t_BR[0, 1] != found.t_BR[0, 1]


def test_backward_twice_is_an_error_and_not_silence() -> None:
    run = build()
    run.micro_step.forward(inputs(run))
    run.micro_step.backward()
    with pytest.raises(AssertionError, match="a forward"):
        run.micro_step.backward()


def test_a_step_scales_the_loss_only_where_it_goes_backward() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    step = EagerStep(
        lambda inputs: torch.stack([weight, 3 * weight]), lambda losses_B: 5 * losses_B.mean()
    )
    assert step.forward(None).tolist() == [2.0, 6.0]  # type: ignore[arg-type]
    step.backward()
    assert weight.grad == 5 * (1 + 3) / 2


def test_graphs_are_for_gpus_alone() -> None:
    run = build()
    assert isinstance(run.micro_step, MicroStep)
    for _ in range(3):
        run.micro_step.forward(inputs(run))
        assert isinstance(run.micro_step._current, EagerStep)
        run.micro_step.backward()
