"""Weights from a diffusers folder: one file or many, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from train.model.load import INDEX, SINGLE, WeightsError, load_transformer


def test_sharded_weights_load_like_a_single_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    single = load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32)
    WanTransformer3DModel.from_pretrained(tiny_checkpoint / "transformer").save_pretrained(
        tmp_path / "transformer", max_shard_size="100KB"
    )
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    sharded = load_transformer(tmp_path, torch.device("cpu"), torch.float32)
    for name, parameter in single.named_parameters():
        torch.testing.assert_close(sharded.get_parameter(name), parameter, atol=0, rtol=0)


def changed(folder: Path, to: Path, **values: Any) -> Path:
    """A copy of the transformer whose config.json has other values."""
    shutil.copytree(folder / "transformer", to / "transformer")
    config = to / "transformer" / "config.json"
    config.write_bytes(msgspec.json.encode(msgspec.json.decode(config.read_bytes()) | values))
    return to


def test_a_missing_tensor_and_a_foreign_folder_are_named(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["blocks.0.attn1.to_k.bias"]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"1 missing \['blocks.0.attn1.to_k.bias'\]"):
        load_transformer(tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(WeightsError, match=r"\(20, 48.*which no model has"):
        load_transformer(
            changed(tiny_checkpoint, tmp_path / "other", in_channels=20),
            torch.device("cpu"),
            torch.float32,
        )
    half = changed(tiny_checkpoint, tmp_path / "half")
    weights = half / "transformer" / SINGLE
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=f"{SINGLE}.*download the model again"):
        load_transformer(half, torch.device("cpu"), torch.float32)
    (half / "transformer" / INDEX).write_text('{"weights": {}}')
    with pytest.raises(WeightsError, match=f"{INDEX}.*weight_map.*download the model again"):
        load_transformer(half, torch.device("cpu"), torch.float32)
    with pytest.raises(WeightsError, match="must be a diffusers folder"):
        load_transformer(tmp_path / "nowhere", torch.device("cpu"), torch.float32)


def test_an_index_of_another_download_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    shutil.copytree(tiny_checkpoint / "transformer", folder)
    names = load_file(folder / SINGLE).keys()
    save_file({"other": torch.zeros(2)}, folder / "other.safetensors")
    places = dict.fromkeys(names, SINGLE) | {"blocks.0.attn1.to_k.bias": "other.safetensors"}
    (folder / INDEX).write_bytes(msgspec.json.encode({"weight_map": places}))
    with pytest.raises(WeightsError, match=r"other\.safetensors: has no tensor blocks\.0\.attn1"):
        load_transformer(tmp_path, torch.device("cpu"), torch.float32)


def test_a_model_without_heads_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = changed(tiny_checkpoint, tmp_path, num_attention_heads=0)
    with pytest.raises(WeightsError, match="num_attention_heads and attention_head_dim must be at"):
        load_transformer(other, torch.device("cpu"), torch.float32)
