"""The LoRA files: diffusers and ComfyUI get the effect that training had, with alpha other than
the rank.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from train.lora import adapters as lora
from train.lora import files
from train.lora.config import format_blocks, parse_blocks
from train.lora.start import start_from
from train.model.attention import choose_attention
from train.model.load import load_transformer
from train.model.wan import Wan

RANK, ALPHA = 8, 20.0


def trained(checkpoint: Path, targets: tuple[str, ...] = lora.TARGETS) -> tuple[Wan, lora.LoRA]:
    """A model with adapters that are not zero."""
    model = load_transformer(checkpoint, torch.device("cpu"), torch.float32)
    adapters = lora.attach(model, targets, RANK, ALPHA, dropout=0.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    for _, b in adapters.tensors().values():
        b.copy_(0.2 * torch.randn(b.shape, generator=generator))
    adapters.refresh()
    return model, adapters


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(1, 48, 2, 6, 8, generator=generator),
        torch.tensor([[700.0, 700.0]]),
        torch.randn(1, 512, 32, generator=generator),
    )


@torch.no_grad()
def ours(model: Wan) -> Tensor:
    latent, t_BR, text = inputs()
    out: Tensor = model(
        latent,
        t_BR,
        torch.tensor([0]),
        text,
        choose_attention("math", torch.device("cpu"), torch.float32).attention,
    )
    return out


@torch.no_grad()
def theirs(transformer: Any) -> Tensor:
    latent, t_BR, text = inputs()
    out: Tensor = transformer(latent, t_BR[:, :1].repeat(1, 24), text, return_dict=False)[0]
    return out


@pytest.mark.parametrize(
    "targets", [lora.TARGETS, ("attn1.to_q", "attn2.to_v")], ids=["all", "two"]
)
def test_diffusers_loads_the_file_and_moves_as_we_do(
    tiny_checkpoint: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    model, adapters = trained(tiny_checkpoint, targets)
    files.save_both(adapters, tmp_path)
    pipe = WanPipeline.from_pretrained(tiny_checkpoint)
    base = theirs(pipe.transformer)
    pipe.load_lora_weights(tmp_path, weight_name=files.DIFFUSERS_FILE)
    moved = theirs(pipe.transformer)
    torch.testing.assert_close(moved, ours(model), atol=1e-4, rtol=0)
    assert (moved - base).abs().max() > 100 * 1e-4  # the effect is far larger than the tolerance


def test_comfyui_file_holds_the_scaled_update_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _, adapters = trained(tiny_checkpoint)
    files.save_both(adapters, tmp_path)
    converted = _convert_non_diffusers_wan_lora_to_diffusers(
        load_file(tmp_path / files.COMFYUI_FILE)
    )
    for name, (a, b) in adapters.tensors().items():
        update = (
            converted[f"transformer.{name}.lora_B.weight"]
            @ converted[f"transformer.{name}.lora_A.weight"]
        )
        torch.testing.assert_close(update, ALPHA / RANK * (b @ a), atol=1e-5, rtol=1e-5)
    assert len(converted) == 2 * len(adapters.tensors())


def test_diffusers_loads_the_comfyui_file_to_the_same_effect(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model, adapters = trained(tiny_checkpoint)
    files.save_both(adapters, tmp_path)
    pipe = WanPipeline.from_pretrained(tiny_checkpoint)
    pipe.load_lora_weights(tmp_path, weight_name=files.COMFYUI_FILE)
    torch.testing.assert_close(theirs(pipe.transformer), ours(model), atol=1e-4, rtol=0)


def test_a_saved_lora_fills_fresh_adapters(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, adapters = trained(tiny_checkpoint)
    files.save_both(adapters, tmp_path)
    fresh_model = load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32)
    fresh = lora.attach(fresh_model, lora.TARGETS, RANK, ALPHA, dropout=0.0, seed=9)
    start_from(fresh, tmp_path / files.DIFFUSERS_FILE)
    torch.testing.assert_close(ours(fresh_model), ours(model), atol=0, rtol=0)


def test_the_names_of_step_files_follow_one_rule() -> None:
    assert files.step_file(500) == "step-00000500.safetensors"
    assert (
        files.step_file(12, run="news", expert="high", comfyui=True)
        == "news-high_noise-step-00000012-comfyui.safetensors"
    )


def test_a_step_can_be_stored_in_bfloat16_and_says_how_it_was_trained(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    _, adapters = trained(tiny_checkpoint)
    training = {"step": 7, "config": {"lora.rank": RANK}}
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        files.save_step(adapters, folder, 7, run="news", dtype=torch.bfloat16, training=training)
    names = ["news-step-00000007-comfyui.safetensors", "news-step-00000007.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        path = folder / name
        assert path.read_bytes() == (tmp_path / "one" / name).read_bytes()
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()[files.TRAINING_KEY]) == training
        tensors = load_file(path)
        alphas = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
        assert len(alphas) == (len(adapters.tensors()) if "comfyui" in name else 0)
        assert {value.item() for value in alphas.values()} <= {ALPHA}
        factors = [value for key, value in tensors.items() if key not in alphas]
        assert {value.dtype for value in factors} == {torch.bfloat16}
        # and it starts a run with that effect, but for the bits that bfloat16 has not
        model = load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32)
        fresh = lora.attach(model, lora.TARGETS, RANK, ALPHA, dropout=0.0, seed=9)
        start_from(fresh, path)
        for name_, (a, b) in adapters.tensors().items():
            assert torch.equal(fresh.tensors()[name_].a, a.bfloat16().float())
            assert torch.equal(fresh.tensors()[name_].b, b.bfloat16().float())


def test_an_unknown_target_is_refused_by_name(tiny_checkpoint: Path) -> None:
    model = load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32)
    with pytest.raises(lora.LoRAError, match=r"attn1\.to_z"):
        lora.attach(model, ["attn1.to_z"], RANK, ALPHA, dropout=0.0, seed=1)


def test_fresh_adapters_do_nothing_and_depend_on_the_seed_alone(tiny_checkpoint: Path) -> None:
    model = load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32)
    before = ours(model)
    first = lora.attach(model, lora.TARGETS, RANK, ALPHA, dropout=0.0, seed=4)
    torch.testing.assert_close(ours(model), before, atol=1e-6, rtol=0)
    again = lora.attach(
        load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32),
        lora.TARGETS,
        RANK,
        ALPHA,
        dropout=0.0,
        seed=4,
    )
    for name, (a, _) in first.tensors().items():
        assert torch.equal(a, again.tensors()[name][0])
        assert 0.9 / a.shape[1] ** 0.5 < a.abs().max() <= 1 / a.shape[1] ** 0.5


def test_adapters_in_some_blocks_get_no_others_in_diffusers(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32)
    adapters = lora.attach(model, lora.TARGETS, RANK, ALPHA, 0.0, seed=1, blocks=(1,))
    for _, b in adapters.tensors().values():
        b.copy_(0.2 * torch.randn(b.shape, generator=torch.Generator().manual_seed(2)))
    adapters.refresh()
    files.save_both(adapters, tmp_path)
    for name in (files.DIFFUSERS_FILE, files.COMFYUI_FILE):
        pipe = WanPipeline.from_pretrained(tiny_checkpoint)
        pipe.load_lora_weights(tmp_path, weight_name=name)
        blocks = {
            parameter.split(".")[1]
            for parameter, _ in pipe.transformer.named_parameters()
            if "lora_" in parameter
        }
        assert blocks == {"1"}
        torch.testing.assert_close(theirs(pipe.transformer), ours(model), atol=1e-4, rtol=0)


def test_blocks_are_named_by_ranges() -> None:
    assert parse_blocks("", 30) == tuple(range(30))
    assert parse_blocks("0,2, 10-12", 30) == (0, 2, 10, 11, 12)
    assert format_blocks((0, 2, 10, 11, 12)) == "0,2,10-12"
    for text in ("30", "5-30", "7-5", "a", "1,,2", "-1"):
        with pytest.raises(ValueError, match="names no blocks of 0 to 29"):
            parse_blocks(text, 30)
