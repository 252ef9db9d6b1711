"""UMT5 in float16: a prompt that leaves its range is found, whatever transformers clamps, and
encoded in float32; without saturation float16 is near float32.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from shard_jobs import spec_for
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from loader.manifest import decode_index
from loader.sample import JSON, TEXT, decode_meta, decode_tensor, split_member_name
from shardgen.encode.encoders import load_encoders
from shardgen.encode.text import TextEncoder, TextError
from tools import prompts
from tools.index import write_index

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


def one_prompt_overflows(model: Path) -> None:
    """Make the words of PROMPTS[1] so large that what the first attention adds leaves float16."""
    encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    ours, others = (set(tokenizer(prompt).input_ids) for prompt in (PROMPTS[1], PROMPTS[0]))
    words = encoder.get_input_embeddings().weight.data
    for token in sorted(ours - others):
        words[token] *= 6.5e4 / words[token].abs().max()
    encoder.save_pretrained(model / "text_encoder")


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


def test_of_a_batch_only_the_prompt_that_saturates_is_encoded_anew(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=2e3)
    one_prompt_overflows(model)
    texts = load_encoders(spec_for(model, tmp_path, dtype="float16")).encode_text(PROMPTS, 2)
    exact = TextEncoder(model, "cpu", torch.float32).encode(PROMPTS, 2).texts
    assert [texts[prompt].in_float32 for prompt in PROMPTS] == [False, True]
    assert 0 < relative_l2(texts[PROMPTS[0]].rows, exact[PROMPTS[0]].rows) < 1e-2
    assert relative_l2(texts[PROMPTS[1]].rows, exact[PROMPTS[1]].rows) < 1e-3


def test_an_index_of_foreign_tars_has_saturated_prompts_in_float32_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=1e5)
    picture = io.BytesIO()
    PIL.Image.new("RGB", (96, 64), "teal").save(picture, "jpeg")
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for name, data in (
            ("0.json", json.dumps({"caption": PROMPTS[0]}).encode()),
            ("0.jpg", picture.getvalue()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    half = TextEncoder(model, "cpu", torch.float16)
    write_index([tmp_path / "foreign.tar"], tmp_path / "indexed", half)
    assert "float16 overflows on 1 prompts" in capsys.readouterr().err

    (shard,) = (tmp_path / "indexed/train").glob("*0.tar")
    (members,) = decode_index(shard.with_suffix(".idx").read_bytes(), "")
    stored = {
        split_member_name(m.name)[1]: shard.read_bytes()[m.offset : m.offset + m.size]
        for m in members
    }
    rows = decode_tensor(stored[TEXT], decode_meta(stored[JSON]).text)
    exact = TextEncoder(model, "cpu", torch.float32).encode(PROMPTS[:1], 1).texts
    assert np.array_equal(rows, exact[PROMPTS[0]].rows)


def test_prompts_for_samples_are_encoded_in_float32_where_they_saturate_and_say_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=2e3)
    one_prompt_overflows(model)
    rows = prompts.encode(PROMPTS, model, "cpu", torch.float16)
    assert "float16 overflows on 1 texts" in capsys.readouterr().err
    exact = TextEncoder(model, "cpu", torch.float32).encode(PROMPTS, 1).texts
    assert np.array_equal(rows[PROMPTS[1]], exact[PROMPTS[1]].rows)
    assert not np.array_equal(rows[PROMPTS[0]], exact[PROMPTS[0]].rows)
    assert relative_l2(rows[PROMPTS[0]], exact[PROMPTS[0]].rows) < 1e-2


def test_a_text_that_float16_can_not_hold_is_told_with_advice_that_helps(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Shards hold float16: no other encode.dtype makes such a text storable."""
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=1)
    encoder = TextEncoder(model, "cpu", torch.bfloat16)
    encoder.model.encoder.final_layer_norm.weight.data *= 1e6
    with pytest.raises(TextError, match=r"whatever encode\.dtype is: leave the prompt's label out"):
        encoder.encode(PROMPTS, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_formats_with_float32s_range_are_not_watched(
    tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = deep_checkpoint(tiny_checkpoint, tmp_path / "model", scale=1e5)
    assert not TextEncoder(model, "cpu", dtype).encode(PROMPTS, 2).saturated
