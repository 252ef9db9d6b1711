"""A14B in diffusers' pipelines: which LoRA belongs into which of the two transformers, whether it
is in effect there, and whether that transformer was asked at all.

A picture can't tell: with both LoRAs loaded it differs from the base model's even if one of them
does nothing. So each transformer is asked twice for the same random latent, with its LoRA and
without.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loader.models import TRANSFORMER_OF, ModelKind
from train.lora.formats import expert_of

# the pipeline's attribute -> the expert, of a model of two
EXPERT_OF: dict[str, str] = {
    folder: expert for expert, folder in TRANSFORMER_OF.items() if expert is not None
}


def files_by_transformer(
    kind: ModelKind, lora: Path | None, high: Path | None, low: Path | None
) -> dict[str, Path]:
    """The pipeline's attribute -> the LoRA for it: `lora` of a model of one transformer, `high` and
    `low`, or one of them, of A14B. Raises ValueError for options that don't fit the model, and for
    a file that says to be of the other expert.
    """
    if kind.boundary is None:
        if lora is None or high is not None or low is not None:
            raise ValueError(f"{kind.name} is one transformer: give its LoRA as --lora")
        return {"transformer": lora}
    if lora is not None or (high is None and low is None):
        raise ValueError(
            f"{kind.name} is two transformers with a LoRA each: give --lora-high and --lora-low, "
            f"or one of them"
        )
    files = {}
    for expert, path in (("high", high), ("low", low)):
        if path is None:
            continue
        found = expert_of(path)
        if found not in (None, expert):
            raise ValueError(
                f"--lora-{expert} {path}: is a LoRA of the {found}-noise expert by its metadata; "
                f"give it as --lora-{found}"
            )
        files["transformer" if expert == "high" else "transformer_2"] = path
    return files


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
