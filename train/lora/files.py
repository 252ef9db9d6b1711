"""The two files of a LoRA: in the keys of diffusers, and in those of ComfyUI; and their names.

They treat alpha differently, and getting it wrong halves or doubles the effect without an error:
diffusers takes it from the metadata entry `lora_adapter_metadata` only (and assumes alpha = rank
without it), ComfyUI from one `.alpha` tensor per layer (and diffusers' converter would count
both).
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loader.files import write_atomic
from train.lora.adapters import LoRA
from train.lora.formats import EXPERT_KEY, METADATA_KEY, WAN_NAMES

DIFFUSERS_FILE, COMFYUI_FILE = "lora.safetensors", "lora_comfyui.safetensors"
# of our own entry: how this LoRA was trained, as JSON
TRAINING_KEY = "newsreel_training"


def step_file(step: int, *, run: str = "", expert: str | None = None, comfyui: bool = False) -> str:
    """The name of the LoRA file after `step`: the only place that knows the rule

        [RUN-][high_noise-|low_noise-]step-NNNNNNNN[-comfyui].safetensors

    expert: "high" or "low", of the models that have two.
    """
    parts = [run, f"{expert}_noise" if expert else "", f"step-{step:08d}"]
    stem = "-".join(part for part in parts if part)
    return f"{stem}{'-comfyui' if comfyui else ''}.safetensors"


def steps_of(path: Path) -> int | None:
    """After how many steps a file of `save_both` or `save_step` was written; None where it does not
    say so, or can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            training = msgspec.json.decode((file.metadata() or {})[TRAINING_KEY])
        return int(training["step"])
    except (OSError, SafetensorError, KeyError, msgspec.DecodeError):
        return None


def result_files(expert: str | None = None) -> tuple[str, str]:
    """The names of a run's result: DIFFUSERS_FILE and COMFYUI_FILE, or lora_high_noise.safetensors
    and lora_high_noise_comfyui.safetensors, the same for low.
    """
    if expert is None:
        return DIFFUSERS_FILE, COMFYUI_FILE
    return f"lora_{expert}_noise.safetensors", f"lora_{expert}_noise_comfyui.safetensors"


def save_both(
    lora: LoRA,
    folder: Path,
    expert: str | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write the files of `result_files` into `folder`: the result of a run, float32. How it was
    trained, `training`, stands in their metadata if given.
    """
    diffusers, comfyui = result_files(expert)
    notes = _notes(expert, training)
    save_diffusers(lora, folder / diffusers, notes=notes)
    save_comfyui(lora, folder / comfyui, notes=notes)


def _notes(expert: str | None, training: dict[str, Any] | None) -> dict[str, str]:
    notes = {} if expert is None else {EXPERT_KEY: expert}
    if training is not None:
        notes[TRAINING_KEY] = msgspec.json.encode(training, order="sorted").decode()
    return notes


def save_step(
    lora: LoRA,
    folder: Path,
    step: int,
    *,
    run: str,
    dtype: torch.dtype,
    training: dict[str, Any],
    expert: str | None = None,
) -> None:
    """Write both files after `step` under the names of `step_file`, tensors in `dtype`; how they
    were trained, `training`, stands in the metadata of both.
    """
    notes = _notes(expert, training)
    path = folder / step_file(step, run=run, expert=expert)
    save_diffusers(lora, path, dtype, notes)
    path = folder / step_file(step, run=run, expert=expert, comfyui=True)
    save_comfyui(lora, path, dtype, notes)


def save_diffusers(
    lora: LoRA,
    path: Path,
    dtype: torch.dtype = torch.float32,
    notes: dict[str, str] | None = None,
) -> None:
    """Write the file that `pipe.load_lora_weights` takes: alpha in the metadata. `notes` are
    more entries there.
    """
    tensors = {}
    for name, (a, b) in lora.tensors().items():
        tensors[f"transformer.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"transformer.{name}.lora_B.weight"] = b.to(dtype)
    adapter: dict[str, object] = {
        "transformer.r": lora.rank,
        "transformer.lora_alpha": lora.alpha,
        "transformer.target_modules": sorted(lora.targets),
    }
    # without these PEFT puts adapters, which do nothing, on the other blocks too
    if len(lora.modules) < lora.num_blocks:
        adapter["transformer.layers_to_transform"] = sorted(lora.modules)
        adapter["transformer.layers_pattern"] = "blocks"
    entry = msgspec.json.encode(adapter, order="sorted").decode()
    _save(tensors, path, {METADATA_KEY: entry} | (notes or {}))


def save_comfyui(
    lora: LoRA,
    path: Path,
    dtype: torch.dtype = torch.float32,
    notes: dict[str, str] | None = None,
) -> None:
    """Write the file that ComfyUI's LoRA loader takes: one float32 alpha per layer, no adapter
    metadata. `notes` are entries of the metadata.
    """
    tensors = {}
    for name, (a, b) in lora.tensors().items():
        _, index, target = name.split(".", 2)
        prefix = f"diffusion_model.blocks.{index}.{WAN_NAMES[target]}"
        tensors[f"{prefix}.lora_A.weight"] = a.to(dtype)
        tensors[f"{prefix}.lora_B.weight"] = b.to(dtype)
        tensors[f"{prefix}.alpha"] = torch.tensor(float(lora.alpha))
    _save(tensors, path, notes or {})


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    on_cpu = {key: tensor.cpu().contiguous() for key, tensor in sorted(tensors.items())}
    write_atomic(path, _with_sorted_metadata(save(on_cpu, metadata)))


def _with_sorted_metadata(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order: safetensors writes several entries in
    any order, and equal runs must give equal bytes.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = msgspec.json.decode(data[8:start])
    if len(header.get("__metadata__", {})) <= 1:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
