"""Which keys of [encode] are part of the recipe, and which are refused where they mean nothing."""

import pytest

from loader.config import ConfigError
from shardgen.encode.config import CUDA_ENCODER, EncodeConfig, ExecutorConfig, encode_recipe
from shardgen.encode.device import check_device


def test_on_a_cpu_the_recipe_is_what_it_was_before_there_was_a_memory_budget() -> None:
    recipe = encode_recipe(EncodeConfig(model="m", vae_memory_gib=8.0))
    assert recipe == {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "text_batch": 8,
        "vae_batch": 1,
        "zstd_level": 3,
        "jpg_quality": 95,
        "jpg_for_images": False,
        "mp4": False,
        "mp4_encoder": "auto",
    }


def test_on_a_gpu_the_recipe_names_the_encoder_and_the_budget_that_decides_batches() -> None:
    recipe = encode_recipe(EncodeConfig(model="m", device="cuda", vae_memory_gib=8.0))
    assert recipe["encoder"] == CUDA_ENCODER and recipe["vae_memory_gib"] == 8.0
    assert "vae_batch" not in recipe


def test_a_batch_that_a_gpu_would_not_obey_is_refused() -> None:
    encode = EncodeConfig(model="m", device="cuda", vae_batch=4)
    with pytest.raises(ConfigError, match=r"encode\.vae_memory_gib"):
        check_device(encode, ExecutorConfig())
