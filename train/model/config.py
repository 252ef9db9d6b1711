"""The `[model]` table of a run's configuration."""

from typing import Literal

import msgspec

from train.model.attention import AttentionName


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which base model is trained, and in what precision."""

    # a diffusers folder, such as a download of Wan-AI/Wan2.2-TI2V-5B-Diffusers
    path: str
    # of the frozen weights and the inputs of GEMMs; V100 has no bfloat16
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    attention: AttentionName = "auto"
