"""`lora.init`: adapters that start from a LoRA file instead of from nothing.

The update stays what it was, alpha / rank * B A, whatever alpha and rank the file has. A lower
rank is widened exactly: A's rows beyond the file's stay as they were drawn, B's columns there are
zero, so that the new directions add nothing yet and are free to learn. A higher rank would have to
lose something, and is refused.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from train.lora.adapters import LoRA, LoRAError
from train.lora.config import LoRAConfig, format_blocks, parse_blocks
from train.lora.formats import Adapter, expert_of, read_lora
from train.model.wan import Projections, Wan, WanConfig


class Wanted(NamedTuple):
    """The adapters that a run has, as far as a file can differ from them."""

    # "blocks.N.TARGET" -> (inputs, outputs) of the layer
    sizes: dict[str, tuple[int, int]]
    rank: int
    # of the model
    num_blocks: int


def wanted_of(wan: WanConfig, lora: LoRAConfig) -> Wanted:
    """Those of a configuration, before there is a model. Raises ValueError for `lora.blocks`."""
    blocks = parse_blocks(lora.blocks, wan.num_layers)
    with torch.device("meta"):
        model = Wan(wan)
    sizes = {
        f"blocks.{index}.{name}": (module.weight.shape[1], num_out)
        for index in blocks
        for module in model.blocks[index].modules()
        if isinstance(module, Projections)
        for name, num_out in zip(module.names, module.sizes, strict=True)
        if name in lora.targets
    }
    return Wanted(sizes, lora.rank, wan.num_layers)


def read_start(path: Path, wanted: Wanted, expert: str | None = None) -> dict[str, Adapter]:
    """What `start_from` takes of a LoRA file. Raises LoRAError for a file of another model or
    expert, of other blocks or layers, or of a higher rank.
    """
    found_expert = expert_of(path)
    if expert and found_expert and found_expert != expert:
        raise LoRAError(
            f"{path}: is a LoRA of the {found_expert}-noise expert, and model.expert = "
            f'"{expert}"; give the other file'
        )
    found = read_lora(path)
    _check_layers(path, found, wanted)
    for name, adapter in found.items():
        _check_shape(path, name, adapter, wanted)
    return found


@torch.no_grad()
def start_from(lora: LoRA, path: Path, expert: str | None = None) -> str:
    """Fill fresh adapters from any LoRA file of this model (train/lora/formats.py), or of this
    expert of it. Returns what was read, in words. Raises LoRAError as `read_start` does; nothing is
    changed then.
    """
    ours = lora.tensors()
    sizes = {name: (factors.a.shape[1], len(factors.b)) for name, factors in ours.items()}
    found = read_start(path, Wanted(sizes, lora.rank, lora.num_blocks), expert)
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


def _check_layers(path: Path, found: dict[str, Adapter], wanted: Wanted) -> None:
    blocks, own_blocks = ({_block_of(name) for name in names} for names in (found, wanted.sizes))
    if max(blocks) >= wanted.num_blocks:
        raise LoRAError(
            f"{path}: the file has adapters in block {max(blocks)}, this model has blocks 0 to "
            f"{wanted.num_blocks - 1}: give a LoRA of this model"
        )
    if blocks != own_blocks:
        theirs, ours = format_blocks(blocks), format_blocks(own_blocks)
        raise LoRAError(
            f"{path}: the file has adapters in blocks {theirs}, lora.blocks asks for {ours}; set "
            f'lora.blocks = "{theirs}", or give another file'
        )
    ours_only = wanted.sizes.keys() - found.keys()
    theirs_only = found.keys() - wanted.sizes.keys()
    if ours_only or theirs_only:
        targets = sorted({name.split(".", 2)[2] for name in found})
        raise LoRAError(
            f"{path}: adapters differ from lora.targets: {len(ours_only)} missing, "
            f"{len(theirs_only)} not asked for, {sorted(ours_only | theirs_only)[:2]}; the file "
            f"adapts {targets}"
        )


def _check_shape(path: Path, name: str, adapter: Adapter, wanted: Wanted) -> None:
    rank, width = adapter.a_RK.shape
    num_out, (own_width, own_num_out) = len(adapter.b_NR), wanted.sizes[name]
    if (width, num_out) != (own_width, own_num_out):
        raise LoRAError(
            f"{path}: {name} is a layer of {width} to {num_out}, here of {own_width} to "
            f"{own_num_out}: give a LoRA of this model"
        )
    if rank > wanted.rank:
        raise LoRAError(
            f"{path}: {name} has rank {rank}, lora.rank = {wanted.rank}, and a LoRA can't be made "
            f"narrower without loss; set lora.rank = {rank} or more"
        )


def _block_of(name: str) -> int:
    return int(name.split(".", 2)[1])
