"""tools.plan answers for no run that the trainer would refuse."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loader.config import load_toml
from loader.feed_config import FeedConfig
from loader.shape import Bucket
from loader.walk import Walk
from tools import plan
from tools.fake.batch import write_synthetic_dataset
from train import setup
from train.config import TrainConfig
from train.lora.adapters import attach
from train.lora.config import SELF_AND_CROSS_QKV
from train.lora.files import save_diffusers
from train.lora.formats import EXPERT_KEY
from train.model.load import load_transformer
from train.parallel.mesh import World

CPU = torch.device("cpu")


def planned(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> None:
    """Plan a run of one dataset in `folder`. Raises SystemExit where it is refused."""
    write_synthetic_dataset(folder, {"64x64x5": 4}, text_dim=64)
    file = folder / "run.toml"
    file.write_text(
        f'output = "o"\nnum_steps = 1\nglobal_batch = 2\n[model]\npath = "{checkpoint}"\n'
        f'[data]\ndatasets = ["{folder}"]\n[lora]\nrank = 8\n'
    )
    monkeypatch.setattr("sys.argv", ["plan", str(file), *arguments])
    plan.main()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ['model.attention="math"', 'activation_memory="1GiB"'],
            r'activation_memory = "1GiB": attention = "math" is many',
        ),
        (["samples.every=5", 'samples.shape="100x100x5"'], "the next smaller shape is 96x96x5"),
        (['flow.shifts={"96x96x5" = 2.0}'], "flow.shifts: 96x96x5 is no shape of the datasets"),
        (["lora.init={folder}/run.toml"], "run.toml"),
        (["model.expert=high"], "is one transformer"),
        (['lora.targets=["attn1.to_z"]'], r"lora.targets: \['attn1.to_z'\] given"),
        (['samples.keys=["0"]'], "samples.keys: the datasets have no val split"),
        (["samples.prompts={folder}/run.toml"], r"samples\.shape is empty: a file of prompts"),
        (
            ["samples.prompts={folder}/run.toml", 'samples.shape="64x64x5"'],
            r"run\.toml: not a file of tools\.prompts",
        ),
    ],
)
def test_what_the_trainer_refuses_is_refused(
    changes: list[str],
    said: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [
        part for change in changes for part in ("--set", change.replace("{folder}", str(tmp_path)))
    ]
    with pytest.raises(SystemExit, match=said):
        planned(tiny_checkpoint, tmp_path, monkeypatch, *arguments)


def test_a_dataset_of_another_model_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="its latents have 48 channels"):
        planned(tiny_model("wan2.1-t2v"), tmp_path, monkeypatch, "--set", "data.i2v_share=0.0")


def test_a_key_that_no_val_split_has_is_refused(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Walk(FeedConfig(datasets=[str(tiny_dataset)]), "val", "cpu") as walk:
        known = walk.places[0].key
    key = "0" * 32
    arguments = ["--set", f'data.datasets=["{tiny_dataset}"]', "--set"]
    with pytest.raises(SystemExit, match=f"samples.keys: {key} are no samples of the val split"):
        planned(
            tiny_checkpoint,
            tmp_path,
            monkeypatch,
            *arguments,
            f'samples.keys=["{known}", "{key}"]',
        )
    planned(tiny_checkpoint, tmp_path, monkeypatch, *arguments, f'samples.keys=["{known}"]')


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.expert=low"], r'is a LoRA of the high-noise expert, and model\.expert = "low"'),
        (["model.expert=high", "lora.rank=8"], "has rank 16, lora.rank = 8, and a LoRA can't"),
        (["model.expert=high", 'lora.blocks="1"'], "blocks 0-1, lora.blocks asks for 1"),
        (["model.expert=high", 'lora.targets=["ffn.net.2"]'], r"differ from lora\.targets"),
    ],
)
def test_what_a_run_can_not_start_from_is_told_by_the_plan_and_before_weights_are_read(
    changes: list[str],
    said: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("t2v-a14b"), model)
    wan = load_transformer(model, CPU, torch.float32)
    adapters = attach(wan, SELF_AND_CROSS_QKV, rank=16, alpha=16.0, dropout=0.0, seed=0)
    file = tmp_path / "high.safetensors"
    save_diffusers(adapters, file, notes={EXPERT_KEY: "high"})
    for weights in model.glob("transformer*/*.safetensors"):
        weights.unlink()

    every = [f"lora.init={file}", "data.i2v_share=0.0", "lora.rank=16", *changes]
    arguments = [part for change in every for part in ("--set", change)]
    with pytest.raises(SystemExit, match=said):
        planned(model, tmp_path, monkeypatch, *arguments, "--shape", "64x64x5")
    config = load_toml(tmp_path / "run.toml", TrainConfig, [*every, 'model.dtype="float32"'])
    with pytest.raises(ValueError, match=said):
        setup.build(config, World(0, 1, CPU), [Bucket(64, 64, 5)])


def test_steps_too_few_for_an_expert_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["model.expert=low", "data.i2v_share=0.0", "samples.num_steps=1"]
    arguments = [part for change in changes for part in ("--set", change)]
    with pytest.raises(SystemExit, match=r"samples.num_steps = 1: none of so few steps is below"):
        planned(tiny_model("t2v-a14b"), tmp_path, monkeypatch, *arguments, "--shape", "64x64x5")


def test_a_run_that_can_be_trained_is_planned(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # its weights may be on another machine, and what it starts from
    elsewhere = ["lora.init=/nowhere.safetensors", "samples.prompts=/nowhere.safetensors"]
    arguments = [part for change in elsewhere for part in ("--set", change)]
    planned(tiny_checkpoint, tmp_path, monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "2 batches of 2 an epoch" in printed and "memory of one GPU" in printed
