"""The `[model]` table of a run's configuration."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from loader.models import Expert
from train.model.attention import AttentionName


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which base model is trained, and in what precision."""

    # a diffusers folder, such as a download of Wan-AI/Wan2.2-TI2V-5B-Diffusers
    path: str
    # of a model of two transformers (A14B) the one that is trained: "high" noise levels, or "low"
    expert: Expert | None = None
    # of the frozen weights and the inputs of GEMMs; V100 has no bfloat16
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    attention: AttentionName = "auto"
    # where the frozen weights of the blocks are: "resident" on the card; "streamed" in the host's
    # memory, from where they come to the card block by block; "auto" on the card if they fit
    # beside what activation_memory takes, else as many of them as do; "sharded" in equal shares
    # on the cards of the run
    placement: Literal["resident", "streamed", "auto", "sharded"] = "resident"
    # of a model whose weights are not resident, so many blocks are all the same
    resident_blocks: Annotated[int, Meta(ge=0)] = 0
