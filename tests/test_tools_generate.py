"""tools.generate never shows base pictures under the name of a LoRA: what is not loaded or has no
effect is an error.
"""

import json
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loader.shape import Bucket
from tools.applied import NotAppliedError, check_lora
from tools.generate import Options, compare, load_pipeline, main
from train.contact_sheet import contact_sheet

PROMPT = "커다란 토끼가 풀밭에 서 있다."
RANK, ALPHA = 4, 8.0


def _write_lora(
    path: Path, b_scale: float, blocks: Iterable[int] = (0, 1), keys: str = "diffusers"
) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors, layers = {}, {"to_q": "q", "to_v": "v"}
    for block in blocks:
        for layer, comfyui in layers.items():
            name = (
                f"transformer.blocks.{block}.attn1.{layer}"
                if keys == "diffusers"
                else f"diffusion_model.blocks.{block}.self_attn.{comfyui}"
            )
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, 32, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(32, RANK, generator=generator) * b_scale
            if keys == "comfyui":
                tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    adapter = {
        "transformer.r": RANK,
        "transformer.lora_alpha": ALPHA,
        "transformer.target_modules": [f"attn1.{layer}" for layer in layers],
    }
    metadata = {"format": "pt"} | (
        {"lora_adapter_metadata": json.dumps(adapter)} if keys == "diffusers" else {}
    )
    save_file(tensors, path, metadata)
    return path


def _run(checkpoint: Path, lora: Path, output: Path, image: Image.Image | None = None) -> None:
    options = Options(
        Bucket(64, 64, 5), num_steps=2, guidance=5.0, seed=0, negative_prompt="", image=image
    )
    loras = {"transformer": lora}
    compare(checkpoint, loras, output, [PROMPT], options, "cpu", torch.float32)


@pytest.mark.parametrize("image", [None, Image.new("RGB", (80, 50), "grey")], ids=["t2v", "i2v"])
def test_base_and_lora_are_written_with_what_was_measured(
    tiny_checkpoint: Path, tmp_path: Path, image: Image.Image | None
) -> None:
    _run(tiny_checkpoint, _write_lora(tmp_path / "lora.safetensors", 0.5), tmp_path / "out", image)
    report = json.loads((tmp_path / "out/samples.json").read_text(encoding="utf-8"))
    assert report["num_lora_tensors"] == 8 and report["scales"] == [ALPHA / RANK]
    assert (
        report["clips"][0]["prompt"] == PROMPT and report["clips"][0]["mean_difference_levels"] > 0
    )
    for name in ("01-base.mp4", "01-lora.mp4"):
        with av.open(str(tmp_path / "out" / name)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 5
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.height == 2 * (64 + 4)


def test_both_key_styles_have_the_same_effect(tiny_checkpoint: Path, tmp_path: Path) -> None:
    reports = []
    for keys in ("diffusers", "comfyui"):
        _run(
            tiny_checkpoint,
            _write_lora(tmp_path / f"{keys}.safetensors", 0.5, keys=keys),
            tmp_path / keys,
        )
        reports.append(json.loads((tmp_path / keys / "samples.json").read_text(encoding="utf-8")))
    assert reports[0]["clips"] == reports[1]["clips"] and reports[0]["num_lora_tensors"] == 8


def test_an_untrained_lora_is_an_error_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotAppliedError, match="lora_B are zero"):
        _run(tiny_checkpoint, _write_lora(tmp_path / "zero.safetensors", 0.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_with_nan_is_refused_by_tensor_before_anything_is_generated(
    tmp_path: Path, value: float
) -> None:
    lora = _write_lora(tmp_path / "broken.safetensors", value)
    with pytest.raises(NotAppliedError, match=r"to_q\.lora_B\.weight holds NaN or infinity"):
        _run(tmp_path / "no model is needed for this", lora, tmp_path / "out")


def test_a_missing_lora_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(NotAppliedError, match=r"absent\.safetensors: can't be read"):
        _run(tmp_path / "no model", tmp_path / "absent.safetensors", tmp_path / "out")


def test_a_base_model_that_makes_nan_is_named_and_not_its_lora(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    path = min((model / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["proj_out.bias"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="pictures of the base model hold NaN"):
        _run(model, _write_lora(tmp_path / "lora.safetensors", 0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shift_of_training_replaces_the_folders(tiny_checkpoint: Path) -> None:
    pipeline = load_pipeline(tiny_checkpoint, "cpu", torch.float32, False, shift=2.5)
    pipeline.scheduler.set_timesteps(4)
    plain = torch.linspace(1, 0, 5)[:4]
    expected = 1000 * 2.5 * plain / (1 + 1.5 * plain)
    assert torch.allclose(pipeline.scheduler.timesteps.float(), expected, atol=2.0)


def test_keys_of_another_model_are_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Blocks that the model does not have are dropped by diffusers without an exception."""
    with pytest.raises(NotAppliedError, match="12 LoRA tensors, 8 are"):
        _run(
            tiny_checkpoint,
            _write_lora(tmp_path / "deep.safetensors", 0.5, blocks=(0, 1, 2)),
            tmp_path / "out",
        )


def test_contact_sheet_has_base_above_lora() -> None:
    base, lora = np.full((5, 32, 32, 3), 10, np.uint8), np.full((5, 32, 32, 3), 200, np.uint8)
    sheet = np.asarray(contact_sheet([("base", base), ("LoRA", lora)]))
    assert (sheet[10, -10] == 10).all() and (sheet[-10, -10] == 200).all()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--shape", "1280x720x49", "the next smaller shape is 1280x704x49"),
        ("--model", "/nowhere", "/nowhere/transformer/config.json: "),
        ("--lora", "/nowhere.safetensors", "/nowhere.safetensors: can't be read"),
        ("--output", "/proc/nowhere", "/proc/nowhere"),
        ("--image", "/nowhere.png", "/nowhere.png"),
        ("--image", __file__, "test_tools_generate.py: media_undecodable: no PNG, JPEG or WebP"),
        ("--steps", "0", "--steps 0: give at least 1"),
        ("--steps", "-1", "--steps -1: give at least 1"),
        ("--shift", "0", "--shift 0.0: give a number above 0"),
        ("--shift", "nan", "--shift nan: give a number above 0"),
        ("--guidance", "nan", "--guidance nan: give a number from 0 on"),
        ("--guidance", "inf", "--guidance inf: give a number from 0 on"),
        ("--guidance-low", "3", "--guidance-low 3: Wan2.2-TI2V-5B is one transformer"),
        ("--prompt", "한 " * 600, r"prompt 1 has \d+ tokens, the model takes 512"),
        ("--negative-prompt", "한 " * 600, r"prompt 2 has \d+ tokens, the model takes 512"),
    ],
)
def test_a_wrong_argument_is_told_before_a_model_is_loaded(
    option: str,
    value: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    lora = _write_lora(tmp_path / "lora.safetensors", 0.5)
    given = {"--model": str(tiny_checkpoint), "--lora": str(lora), "--output": str(tmp_path / "o")}
    given |= {"--prompt": "p", "--shape": "160x96x9", option: value}
    monkeypatch.setattr("sys.argv", ["generate", *chain.from_iterable(given.items())])
    monkeypatch.setattr("tools.generate.load_pipeline", None)
    with pytest.raises(SystemExit, match=said):
        main()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_of_the_model_that_is_missing_is_named_before_anything_is_loaded(
    part: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    shutil.rmtree(model / part)
    with pytest.raises(ValueError, match=f"model/{part}: nothing is there"):
        _run(model, _write_lora(tmp_path / "lora.safetensors", 0.5), tmp_path / "out")


def test_a_file_without_lora_tensors_is_called_that(tiny_checkpoint: Path) -> None:
    weights = min((tiny_checkpoint / "transformer").glob("*.safetensors"))
    with pytest.raises(NotAppliedError, match="there is no LoRA tensor in it"):
        check_lora(weights)


def test_other_names_of_lora_b_count_too(tmp_path: Path) -> None:
    name = "lora_unet_blocks_0_self_attn_q"
    for value in (0.0, 1.0):
        tensors = {
            f"{name}.lora_down.weight": torch.ones(4, 32),
            f"{name}.lora_up.weight": torch.full((32, 4), value),
            f"{name}.alpha": torch.tensor(4.0),
        }
        save_file(tensors, tmp_path / "kohya.safetensors")
        if value:
            assert check_lora(tmp_path / "kohya.safetensors") == 2
            continue
        with pytest.raises(NotAppliedError, match="lora_B are zero"):
            check_lora(tmp_path / "kohya.safetensors")


def test_a_contact_sheet_of_large_clips_is_scaled_down_and_keeps_their_aspect() -> None:
    gray = np.full((1, 704, 1280, 3), 127, np.uint8)
    sheet = contact_sheet([("base", gray)])
    assert sheet.size == (64 + 480 + 4, 264 + 4)
    assert sheet.getpixel((64 + 240, 132)) == (127, 127, 127)
