"""The options of the objective and the optimizer, in whole runs: each resumes to the same bytes,
and an average is what is validated, sampled and exported.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import records, train_here

from train import checkpoint
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.flow import FlowConfig
from train.lora import files
from train.optim import OptimConfig
from train.records import VALIDATION_FILE, ValidationRecord, read_records
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

# together, because what one decides another does not: levels and weights, rates, what is exported
OPTIONS: dict[str, dict[str, Any]] = {
    "in float32": {
        "flow": FlowConfig(shifts={"64x64x1": 2.0}, timesteps="logit_normal", weighting="bell"),
        "optim": OptimConfig(
            lr=1e-4, warmup_steps=1, schedule="linear", lora_plus_ratio=16.0, ema=0.5
        ),
    },
    "in 8 bits": {
        "flow": FlowConfig(weighting="bell"),
        "optim": OptimConfig(name="adamw8bit", lr=1e-4, lora_plus_ratio=16.0, ema=0.9),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_with_every_option_it_resumes_to_the_same_bytes(
    run_config: TrainConfig, tmp_path: Path, name: str
) -> None:
    changes = OPTIONS[name] | {"num_steps": 4}
    train_here(run_config, tmp_path, **changes)
    result = tmp_path / files.DIFFUSERS_FILE
    whole = result.read_bytes(), records(tmp_path)[-1].loss
    # as a run that was killed after its second step
    result.unlink()
    for step in (3, 4):
        shutil.rmtree(tmp_path / checkpoint.FOLDER / f"step-{step:08d}")
    train_here(run_config, tmp_path, **changes)
    assert (result.read_bytes(), records(tmp_path)[-1].loss) == whole


def newest_state(output: Path) -> dict[str, Any]:
    newest = checkpoint.latest(output)
    assert newest is not None
    return checkpoint.read_state(newest)


def values(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).sort().values


def lora_hash_of(path: Path) -> str:
    """train.sampling.lora_hash, of a file."""
    digest = xxhash.xxh3_128()
    tensors = load_file(path)
    for name in sorted({key.split(".lora_")[0] for key in tensors}):
        digest.update(name.removeprefix("transformer.").encode())
        for kind in "AB":
            factor = tensors[f"{name}.lora_{kind}.weight"]
            digest.update(np.ascontiguousarray(factor.numpy()).tobytes())
    return digest.hexdigest()


def test_an_average_is_what_is_validated_sampled_and_exported(
    run_config: TrainConfig, validated_run: TrainConfig, tmp_path: Path
) -> None:
    output, again = tmp_path / "run", tmp_path / "again"
    changes: dict[str, Any] = {
        "optim": OptimConfig(lr=1e-2, ema=0.5),
        "validation": ValidationConfig(every=3, num_windows=2, num_train_windows=0),
        "samples": SamplesConfig(every=3, num_clips=1, num_steps=1),
        "checkpoint": CheckpointConfig(every=1, keep_newest=3),
        "num_steps": 3,
    }
    train_here(validated_run, output, **changes)
    state, file = newest_state(output), output / files.DIFFUSERS_FILE
    # the average of what was trained
    expected = torch.zeros(())
    for step, decay in ((1, 0.0), (2, 2 / 11), (3, 3 / 12)):
        folder = output / checkpoint.FOLDER / f"step-{step:08d}"
        expected = decay * expected + (1 - decay) * checkpoint.read_state(folder)["parameters"]
    torch.testing.assert_close(state["average"], expected)
    assert (state["average"] - state["parameters"]).abs().max() > 1e-3
    # exported, in all places
    exported = load_file(file)
    assert torch.equal(values(exported), state["average"].sort().values)
    step_file = f"checkpoints/step-00000003/{files.step_file(3, run='run')}"
    for path in (output / "best" / files.DIFFUSERS_FILE, output / step_file):
        assert load_file(path).keys() == exported.keys()
        assert all(torch.equal(value, exported[key]) for key, value in load_file(path).items())
    # sampled
    event = json.loads((output / "samples/step-00000003/samples.json").read_bytes())
    assert event["lora_xxh3"] == lora_hash_of(file)
    # validated: the same loss as of a run without an average that starts from that file
    lora = msgspec.structs.replace(validated_run.lora, init=str(file))
    train_here(
        validated_run,
        again,
        lora=lora,
        validation=changes["validation"],
        num_steps=1,
    )
    ours, theirs = (
        read_records(folder / VALIDATION_FILE, ValidationRecord) for folder in (output, again)
    )
    assert ours[-1].step == 3 and theirs[0].step == 0 and ours[-1].loss == theirs[0].loss
    assert ours[-1].loss != ours[0].loss
