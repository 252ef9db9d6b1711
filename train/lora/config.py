"""The `[lora]` table of a run's configuration."""

import re
from collections.abc import Iterable
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
    # the transformer blocks that get adapters, such as "15-29" or "0,2,10-12"; empty: all. Those
    # before the first one are not trained through: they run without a graph and save nothing
    blocks: str = ""
    rank: Annotated[int, Meta(ge=1)] = 16
    # the update is alpha / rank * B A
    alpha: Annotated[float, Meta(gt=0.0)] = 16.0
    # on the input of A
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    # any LoRA file of this model to start from (diffusers, PEFT, ComfyUI or kohya's keys), of this
    # rank or a lower one, with any alpha; empty: fresh adapters
    init: str = ""
    # how the frozen weights of adapted layers are held: "dense" in model.dtype, "nf4" in a
    # quarter of that (QLoRA)
    base: Literal["dense", "nf4"] = "dense"


def parse_blocks(text: str, num_blocks: int) -> tuple[int, ...]:
    """ "0,2,10-12" -> (0, 2, 10, 11, 12), ascending; empty: all. Raises ValueError."""
    found: set[int] = set()
    for part in text.split(",") if text else [f"0-{num_blocks - 1}"]:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < num_blocks:
            raise ValueError(
                f'lora.blocks = "{text}": "{part}" names no blocks of 0 to {num_blocks - 1}; write '
                f'for instance "{num_blocks // 2}-{num_blocks - 1}"'
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def format_blocks(blocks: Iterable[int]) -> str:
    """The shortest text of which `parse_blocks` makes these."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
