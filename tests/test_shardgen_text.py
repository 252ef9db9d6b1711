"""text.py: the rows diffusers' pipeline would make, one per real token."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from shardgen.encode.text import TextEncoder, TextError

KOREAN = "노란 장화를 신은 상인이 얼음 위에 생선을 놓는다."
PROMPTS = [KOREAN, "a fish market at dawn", "", KOREAN]


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> Iterator[TextEncoder]:
    yield TextEncoder(tiny_checkpoint, "cpu", torch.float32)


def test_rows_equal_the_pipelines_and_padding_is_left_out(
    encoder: TextEncoder, tiny_checkpoint: Path
) -> None:
    encoded = encoder.encode(PROMPTS, batch_size=2).texts
    assert list(encoded) and set(encoded) == set(PROMPTS)
    pipeline = WanPipeline.from_pretrained(tiny_checkpoint, transformer=None, vae=None)
    for prompt, (rows, truncated, _) in encoded.items():
        with torch.inference_mode():
            expected_SD = (
                pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]
                .float()
                .numpy()
            )
        assert rows.dtype == np.float16 and not truncated
        assert np.abs(expected_SD[: len(rows)] - rows).max() < 2e-3 * np.abs(expected_SD).max()
        assert not expected_SD[len(rows) :].any()


def test_a_long_prompt_is_cut_at_512_tokens_and_says_so(encoder: TextEncoder) -> None:
    long = "시장 " * 900
    rows, truncated, _ = encoder.encode([long], 1).texts[long]
    assert len(rows) == 512 and truncated


def test_batches_are_a_function_of_the_prompts_alone(encoder: TextEncoder) -> None:
    one = encoder.encode(PROMPTS, batch_size=2).texts
    other = encoder.encode(PROMPTS[::-1], batch_size=2).texts
    assert all(np.array_equal(one[prompt].rows, other[prompt].rows) for prompt in PROMPTS)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="diffusers layout"):
        TextEncoder(tmp_path, "cpu", torch.float32)
