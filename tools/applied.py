"""Is a LoRA in effect in diffusers' pipelines? Proofs, because one that did not load gives pictures
too: the base model's.

Of A14B, with a LoRA in each of its two transformers, pictures alone prove little: they differ from
the base model's even if one of the two does nothing. So each transformer is asked twice for the
same random latent, with its LoRA and without, and it is counted how often it ran.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from loader.models import TRANSFORMER_OF
from train.contact_sheet import Frames

# the pipeline's attribute -> the expert, of a model of two
EXPERT_OF: dict[str, str] = {
    folder: expert for expert, folder in TRANSFORMER_OF.items() if expert is not None
}


class NotAppliedError(ValueError):
    """The LoRA is not in effect; the message says what is missing."""


def check_lora(path: Path) -> int:
    """Read a LoRA file through before minutes are spent on clips; returns its number of tensors.

    Raises NotAppliedError for a file that is missing or damaged, holds no LoRA, holds NaN or
    infinity, or whose lora_B are all zero: none of these has a picture to show.
    """
    num_tensors, num_up, has_effect = 0, 0, False
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise NotAppliedError(
                        f"{path}: {name} holds NaN or infinity: training had failed when this was "
                        f"written; take the file of an earlier step"
                    )
                num_tensors += not name.endswith(".alpha")
                if re.search(r"\.lora_(B|up)(\.|$)", name):
                    num_up += 1
                    has_effect |= bool(tensor.any())
    except (OSError, SafetensorError) as error:
        raise NotAppliedError(f"{path}: can't be read as safetensors: {error}") from error
    if num_up == 0:
        raise NotAppliedError(f"{path}: there is no LoRA tensor in it")
    if not has_effect:
        raise NotAppliedError(
            f"{path}: all of its lora_B are zero: a LoRA before its first step has no effect"
        )
    return num_tensors


def apply_lora(
    pipeline: Any, path: Path, num_tensors: int, transformer: str = "transformer"
) -> list[float]:
    """Load a LoRA file of `num_tensors` tensors (diffusers or ComfyUI keys) into this transformer
    of the pipeline; returns the scales alpha/r in effect.

    Raises NotAppliedError unless exactly the file's tensors are in the transformer.
    """
    is_second = {"load_into_transformer_2": True} if transformer == "transformer_2" else {}
    pipeline.load_lora_weights(str(path), **is_second)
    module = getattr(pipeline, transformer)
    loaded = [
        name for name, _ in module.named_parameters() if ".lora_A." in name or ".lora_B." in name
    ]
    if len(loaded) != num_tensors:
        raise NotAppliedError(
            f"{path}: the file has {num_tensors} LoRA tensors, {len(loaded)} are in the "
            f"{transformer}; its keys do not fit this model"
        )
    scales = {scale for part in module.modules() for scale in getattr(part, "scaling", {}).values()}
    return sorted(scales)


@torch.no_grad()
def output_change(pipeline: Any, name: str) -> float:
    """How much the adapters of this transformer change its answer to a random latent: the norm of
    the difference over that of the answer without them.
    """
    transformer = getattr(pipeline, name)
    config, dtype = transformer.config, transformer.dtype
    generator = torch.Generator().manual_seed(0)
    latent_BCThw = torch.randn(1, config.in_channels, 2, 8, 8, generator=generator).to(dtype)
    text_BSD = torch.randn(1, 512, config.text_dim, generator=generator).to(dtype)
    device = pipeline._execution_device
    inputs = (latent_BCThw.to(device), torch.tensor([500.0], device=device), text_BSD.to(device))
    tuned = transformer(*inputs, return_dict=False)[0].float()
    transformer.disable_adapters()
    try:
        base = transformer(*inputs, return_dict=False)[0].float()
    finally:
        transformer.enable_adapters()
        pipeline.maybe_free_model_hooks()
    return float((tuned - base).norm() / base.norm())


@contextmanager
def counting_passes(pipeline: Any) -> Iterator[dict[str, int]]:
    """How often each transformer of the pipeline runs, by its attribute."""
    names = [name for name in ("transformer", "transformer_2") if getattr(pipeline, name, None)]
    passes = dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def count(*_: Any, name: str = name) -> None:
            passes[name] += 1

        handles.append(getattr(pipeline, name).register_forward_pre_hook(count))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def check_experts(
    pipeline: Any, loras: Mapping[str, Path], passes: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Of each transformer of A14B with a LoRA: how much that changes its answer, and how often it
    ran. Raises NotAppliedError where one of them is 0.
    """
    found = {}
    for name, path in loras.items():
        change = output_change(pipeline, name)
        if change == 0.0:
            raise NotAppliedError(
                f"{path}: its tensors are loaded, but the {EXPERT_OF[name]}-noise transformer "
                f"answers as without them"
            )
        if passes[name] == 0:
            raise NotAppliedError(
                f"{path}: the {EXPERT_OF[name]}-noise transformer did not run once, because no "
                f"step was on its side of the boundary; raise --steps"
            )
        found[EXPERT_OF[name]] = {"output_change": change, "num_passes": passes[name]}
    return found


def mean_difference(base: Frames, lora: Frames) -> float:
    """Mean absolute difference in 8-bit levels. Raises NotAppliedError where it is 0."""
    difference = float(np.abs(base.astype(np.int16) - lora.astype(np.int16)).mean())
    if difference == 0.0:
        raise NotAppliedError(
            "the LoRA's tensors are loaded, but its pictures equal the base model's: its effect is "
            "below one 8-bit level"
        )
    return difference
