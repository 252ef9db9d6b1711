"""The `[lora]` table of a run's configuration."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

SELF_AND_CROSS_QKV = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
)


class LoRAConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The adapters, as PEFT defines them."""

    # layers by their names in diffusers' transformer block
    targets: list[str] = msgspec.field(default_factory=lambda: list(SELF_AND_CROSS_QKV))
    rank: Annotated[int, Meta(ge=1)] = 16
    # the update is alpha / rank * B A
    alpha: Annotated[float, Meta(gt=0.0)] = 16.0
    # on the input of A
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    # a LoRA file (diffusers keys) to start from; empty: fresh adapters
    init: str = ""
    # how the frozen weights of adapted layers are held: "dense" in model.dtype, "nf4" in a
    # quarter of that (QLoRA)
    base: Literal["dense", "nf4"] = "dense"
