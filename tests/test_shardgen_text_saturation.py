"""UMT5 in float16: a prompt that leaves its range is found, whatever transformers clamps, and
encoded in float32; without saturation float16 is near float32.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_jobs import spec_for
from transformers import UMT5Config, UMT5EncoderModel

from shardgen.encode.encoders import load_encoders
from shardgen.encode.text import TextEncoder

PROMPTS = ["a fish market at dawn", "노란 장화를 신은 상인이 얼음 위에 생선을 놓는다."]


def deep_checkpoint(tiny_checkpoint: Path, folder: Path, scale: float) -> Path:
    """The tiny checkpoint with a UMT5 of the real one's depth, whose first attention puts out
    `scale` times as much.
    """
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("text_encoder"))
    config = UMT5Config.from_pretrained(tiny_checkpoint / "text_encoder", num_layers=24)
    torch.manual_seed(3)
    model = UMT5EncoderModel(config)
    model.encoder.block[0].layer[0].SelfAttention.o.weight.data *= scale
    model.save_pretrained(folder / "text_encoder")
    return folder


def relative_l2(rows: np.ndarray, exact: np.ndarray) -> float:
    rows, exact = rows.astype(np.float32), exact.astype(np.float32)
    return float(np.linalg.norm(rows - exact) / np.linalg.norm(exact))


def test_without_saturation_half_precision_is_within_a_hundredth_of_float32(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=1)
    half = TextEncoder(model, "cpu", torch.float16).encode(PROMPTS, 2)
    exact = TextEncoder(model, "cpu", torch.float32).encode(PROMPTS, 2)
    assert not half.saturated and not exact.saturated
    for prompt in PROMPTS:
        assert relative_l2(half.texts[prompt].rows, exact.texts[prompt].rows) < 1e-2


def test_a_saturated_prompt_is_encoded_in_float32_though_its_result_is_finite(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=1e5)
    half = TextEncoder(model, "cpu", torch.float16)
    assert sorted(half.encode(PROMPTS, 2).saturated) == sorted(PROMPTS)
    # what would have been stored: finite, and wrong
    tokens = half.tokenizer(PROMPTS[:1], return_tensors="pt")
    with torch.inference_mode():
        silent = half.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
    exact = TextEncoder(model, "cpu", torch.float32).encode(PROMPTS, 2).texts
    assert silent.isfinite().all()
    assert relative_l2(silent.numpy(), exact[PROMPTS[0]].rows) > 1e-2

    spec = spec_for(model, tmp_path, dtype="float16")
    texts = load_encoders(spec).encode_text(PROMPTS, 2)
    for prompt in PROMPTS:
        assert texts[prompt].in_float32
        assert np.array_equal(texts[prompt].rows, exact[prompt].rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_formats_with_float32s_range_are_not_watched(
    tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=1e5)
    assert not TextEncoder(model, "cpu", dtype).encode(PROMPTS, 2).saturated
