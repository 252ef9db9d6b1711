"""`lora.init`: adapters that start from a LoRA file instead of from nothing.

The update stays what it was, alpha / rank * B A, whatever alpha and rank the file has. A lower
rank is widened exactly: A's rows beyond the file's stay as they were drawn, B's columns there are
zero, so that the new directions add nothing yet and are free to learn. A higher rank would have to
lose something, and is refused.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from train.lora.adapters import Factors, LoRA, LoRAError
from train.lora.config import format_blocks
from train.lora.formats import Adapter, expert_of, read_lora


@torch.no_grad()
def start_from(lora: LoRA, path: Path, expert: str | None = None) -> str:
    """Fill fresh adapters from any LoRA file of this model (train/lora/formats.py), or of this
    expert of it. Returns what was read, in words.

    Raises LoRAError for a file of another model or expert, of other blocks or layers, or of a
    higher rank; nothing is changed then.
    """
    found_expert = expert_of(path)
    if expert and found_expert and found_expert != expert:
        raise LoRAError(
            f"{path}: is a LoRA of the {found_expert}-noise expert, and model.expert = "
            f'"{expert}"; give the other file'
        )
    found, ours = read_lora(path), lora.tensors()
    _check_layers(path, found, lora)
    for name, adapter in found.items():
        _check_shape(path, name, adapter, ours[name])
    own_scale = lora.alpha / lora.rank
    for name, (a_RK, b_NR) in ours.items():
        adapter = found[name]
        rank = len(adapter.a_RK)
        scale = 1.0 if adapter.scale is None else adapter.scale
        a_RK[:rank] = adapter.a_RK
        b_NR[:, :rank] = adapter.b_NR * (scale / own_scale)
        b_NR[:, rank:] = 0.0
    lora.refresh()
    ranks = sorted({len(adapter.a_RK) for adapter in found.values()})
    text = f"{path}: {len(found)} adapters of rank {', '.join(map(str, ranks))}"
    if any(adapter.scale is None for adapter in found.values()):
        text += "; it says no alpha, which is taken as alpha = rank"
    return text


def _check_layers(path: Path, found: Mapping[str, Adapter], lora: LoRA) -> None:
    blocks = {_block_of(name) for name in found}
    if max(blocks) >= lora.num_blocks:
        raise LoRAError(
            f"{path}: the file has adapters in block {max(blocks)}, this model has blocks 0 to "
            f"{lora.num_blocks - 1}: give a LoRA of this model"
        )
    if blocks != set(lora.modules):
        theirs, ours = format_blocks(blocks), format_blocks(lora.modules)
        raise LoRAError(
            f"{path}: the file has adapters in blocks {theirs}, lora.blocks asks for {ours}; set "
            f'lora.blocks = "{theirs}", or give another file'
        )
    wanted = lora.tensors().keys()
    if wanted != found.keys():
        targets = sorted({name.split(".", 2)[2] for name in found})
        raise LoRAError(
            f"{path}: adapters differ from lora.targets: {len(wanted - found.keys())} missing, "
            f"{len(found.keys() - wanted)} not asked for, {sorted(wanted ^ found.keys())[:2]}; the "
            f"file adapts {targets}"
        )


def _check_shape(path: Path, name: str, adapter: Adapter, ours: Factors) -> None:
    rank, width = adapter.a_RK.shape
    num_out, own_rank = len(adapter.b_NR), len(ours.a)
    if (width, num_out) != (ours.a.shape[1], ours.b.shape[0]):
        raise LoRAError(
            f"{path}: {name} is a layer of {width} to {num_out}, here of {ours.a.shape[1]} to "
            f"{ours.b.shape[0]}: give a LoRA of this model"
        )
    if rank > own_rank:
        raise LoRAError(
            f"{path}: {name} has rank {rank}, lora.rank = {own_rank}, and a LoRA can't be made "
            f"narrower without loss; set lora.rank = {rank} or more"
        )


def _block_of(name: str) -> int:
    return int(name.split(".", 2)[1])
