"""The two files of a LoRA: in the keys of diffusers, and in those of ComfyUI.

They treat alpha differently, and getting it wrong halves or doubles the effect without an error:
diffusers takes it from the metadata entry `lora_adapter_metadata` only (and assumes alpha = rank
without it), ComfyUI from one `.alpha` tensor per layer (and diffusers' converter would count
both).
"""

import re
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loader.files import write_atomic
from train.lora.adapters import LoRA, LoRAError
from train.lora.config import format_blocks

DIFFUSERS_FILE, COMFYUI_FILE = "lora.safetensors", "lora_comfyui.safetensors"
METADATA_KEY = "lora_adapter_metadata"
_BLOCK = re.compile(r"transformer\.blocks\.(\d+)\.")
_COMFYUI_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def save_both(lora: LoRA, folder: Path) -> None:
    """Write DIFFUSERS_FILE and COMFYUI_FILE into `folder`."""
    save_diffusers(lora, folder / DIFFUSERS_FILE)
    save_comfyui(lora, folder / COMFYUI_FILE)


def save_diffusers(lora: LoRA, path: Path) -> None:
    """Write the file that `pipe.load_lora_weights` takes: float32, alpha in the metadata."""
    tensors = {}
    for name, (a, b) in lora.tensors().items():
        tensors[f"transformer.{name}.lora_A.weight"] = a
        tensors[f"transformer.{name}.lora_B.weight"] = b
    metadata: dict[str, object] = {
        "transformer.r": lora.rank,
        "transformer.lora_alpha": lora.alpha,
        "transformer.target_modules": sorted(lora.targets),
    }
    # without these PEFT puts adapters, which do nothing, on the other blocks too
    if len(lora.modules) < lora.num_blocks:
        metadata["transformer.layers_to_transform"] = sorted(lora.modules)
        metadata["transformer.layers_pattern"] = "blocks"
    _save(tensors, path, {METADATA_KEY: msgspec.json.encode(metadata, order="sorted").decode()})


def save_comfyui(lora: LoRA, path: Path) -> None:
    """Write the file that ComfyUI's LoRA loader takes: float32, one alpha per layer, no adapter
    metadata.
    """
    tensors = {}
    for name, (a, b) in lora.tensors().items():
        _, index, target = name.split(".", 2)
        prefix = f"diffusion_model.blocks.{index}.{_COMFYUI_NAMES[target]}"
        tensors[f"{prefix}.lora_A.weight"] = a
        tensors[f"{prefix}.lora_B.weight"] = b
        tensors[f"{prefix}.alpha"] = torch.tensor(float(lora.alpha))
    _save(tensors, path, {})


def load_diffusers(lora: LoRA, path: Path) -> None:
    """Fill the adapters from a file of `save_diffusers`. Rank, alpha, blocks and targets must be
    the same. Raises LoRAError.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = msgspec.json.decode((file.metadata() or {}).get(METADATA_KEY, "{}"))
            found = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise LoRAError(
            f"{path}: can't be read as a LoRA file ({error}); give another one, or none"
        ) from error
    ours = {"transformer.r": lora.rank, "transformer.lora_alpha": lora.alpha}
    theirs = {key: metadata.get(key) for key in ours}
    if theirs != ours:
        raise LoRAError(
            f"{path}: the file has {theirs}, the configuration asks for {ours}; make them equal"
        )
    wanted = {
        f"transformer.{name}.lora_{kind}.weight": tensor
        for name, factors in lora.tensors().items()
        for kind, tensor in zip("AB", factors, strict=True)
    }
    blocks = {int(match[1]) for key in found if (match := _BLOCK.match(key))}
    if blocks != set(lora.modules):
        theirs_text, ours_text = format_blocks(blocks), format_blocks(lora.modules)
        raise LoRAError(
            f"{path}: the file has adapters in blocks {theirs_text}, lora.blocks asks for "
            f'{ours_text}; set lora.blocks = "{theirs_text}", or give another file'
        )
    if wanted.keys() != found.keys():
        raise LoRAError(
            f"{path}: adapters differ from lora.targets: "
            f"{len(wanted.keys() - found.keys())} missing, "
            f"{len(found.keys() - wanted.keys())} not asked for, "
            f"{sorted(wanted.keys() ^ found.keys())[:2]}"
        )
    for key, target in wanted.items():
        if found[key].shape != target.shape:
            raise LoRAError(
                f"{path}: {key} has shape {list(found[key].shape)}, not {list(target.shape)}: "
                f"give a LoRA of this model"
            )
        target.copy_(found[key])
    lora.refresh()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    assert len(metadata) <= 1, (
        "safetensors writes several entries in any order, and equal runs must give equal bytes"
    )
    on_cpu = {key: tensor.cpu().contiguous() for key, tensor in sorted(tensors.items())}
    write_atomic(path, save(on_cpu, metadata))
