"""A planted NaN or overflow is located, and the hooks that found it do not stay."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_runs import train_here

from loader.shape import Bucket
from tools.fake.step import random_batch
from train import setup
from train.config import TrainConfig
from train.diagnose import find_non_finite
from train.lora.adapters import LoRAProjections
from train.optim import OptimConfig
from train.parallel.mesh import World
from train.run import Run
from train.step import Inputs, prepare

CPU = torch.device("cpu")
BUCKET = Bucket(64, 64, 1)


@pytest.fixture
def run(run_config: TrainConfig) -> Run:
    return setup.build(run_config, World(data_rank=0, data_size=1, device=CPU), [BUCKET])


def inputs(run: Run) -> Inputs:
    width = run.model.config.text_dim
    return prepare(random_batch(BUCKET, CPU, is_i2v=[False], text_dim=width), run.laws)


def find(run: Run, inputs_: Inputs) -> str | None:
    return find_non_finite(inputs_, run.model, run.adapters, run.flat, run.micro_step)


def test_where_everything_is_finite_nothing_is_found_and_no_hook_stays(run: Run) -> None:
    assert find(run, inputs(run)) is None
    assert not any(module._forward_hooks for module in run.model.modules())


def test_a_nan_in_the_batch_and_in_a_weight_are_named(run: Run) -> None:
    broken = inputs(run)
    broken.text_BSD[0, 0, 0] = torch.nan
    assert "the batch's text_BSD holds NaN" in str(find(run, broken))
    with torch.no_grad():
        run.model.get_parameter("blocks.1.attn1.norm_k")[0] = torch.inf
    assert "blocks.1.attn1.norm_k (float32) is not finite" in str(find(run, inputs(run)))


def test_the_first_module_whose_output_overflows_is_named_with_its_dtype(run: Run) -> None:
    with torch.no_grad():
        run.model.get_parameter("blocks.1.ffn.up.weight").fill_(1e38)
    found = find(run, inputs(run))
    assert found == "the output of blocks.1.ffn.up (float32) is the first not finite"
    assert not any(module._forward_hooks for module in run.model.modules())


def test_a_gradient_that_overflows_alone_is_named_in_the_order_of_the_backward_pass(
    run: Run,
) -> None:
    # the loss is finite; its scaled gradient is not
    run.loss_scale()  # makes the scale
    run.scaler.update(2.0**127)
    with torch.no_grad():
        for module in run.model.modules():
            if isinstance(module, LoRAProjections):
                module.b_NR.fill_(100.0)
    run.adapters.refresh()
    found = str(find(run, inputs(run)))
    assert found.startswith("the loss is finite; in the backward pass the gradient of blocks.1.")


def test_the_samples_of_the_batch_are_named(run: Run, tmp_path: Path) -> None:
    config = run.config
    with setup.open_feed(config, run.world) as feed:
        again = setup.build(config, run.world, feed.buckets)
        with torch.no_grad():
            again.model.get_parameter("blocks.0.attn2.q.weight")[0, 0] = torch.nan
        keys = [key for number in range(2) for key in feed.batch_again(1, number).keys]
        found = again.trace(feed, 1)
        assert "blocks.0.attn2.q.weight" in found and found.endswith(f"samples {keys[0]}")
        # beside the sequence: the first batch still comes first
        assert next(feed)[0].index == 0


def test_a_planted_overflow_ends_a_float16_run_with_module_dtype_and_samples(
    run_config: TrainConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    # finite in float16, and so is the input; the products are not
    tensors["blocks.1.ffn.net.0.proj.weight"].fill_(6e4)
    save_file(tensors, path)
    half = msgspec.structs.replace(run_config.model, path=str(model), dtype="float16")
    with pytest.raises(ValueError) as caught:
        train_here(run_config, tmp_path / "run", model=half, optim=OptimConfig(lr=1e-3))
    said = str(caught.value)
    assert said.startswith("step 3: 3 steps were skipped, the last 3 in a row")
    assert "the output of blocks.1.ffn.up (float16) is the first not finite; samples " in said
    keys = said.partition("; samples ")[2].split(".")[0]
    assert all(len(key) == 32 for key in keys.split(", "))
    assert "not the learning rate" in said
