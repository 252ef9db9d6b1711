"""The base model of a run: which one it is, and what it decides of the configuration.

    kind = base_kind(config)             refuses what that model can't be asked for
    config = resolve(config, kind)       unset keys take the model's own values
    laws = laws_of(config, kind)         the noise levels that are trained

Left out: whether the datasets are of that model (train/setup.py), and its weights (train/model/).
"""

from pathlib import Path

from msgspec.structs import replace

from loader.models import (
    KINDS,
    TRANSFORMER_OF,
    ModelError,
    ModelKind,
    check_expert,
    check_i2v_share,
    kind_of,
    read_kind,
)
from loader.shape import LatentLayout
from train.config import TrainConfig
from train.flow import NoiseLaws
from train.model.wan import Wan, WanConfig


def base_kind(config: TrainConfig, model: Wan | None = None) -> ModelKind:
    """Which model `model.path` holds, or `model` is. Raises ModelError for a configuration that
    asks for what that one does not do.
    """
    expert = config.model.expert
    if model is None:
        kind: ModelKind | None = read_kind(Path(config.model.path))
    else:
        channels = model.config.in_channels, model.config.out_channels
        kind = kind_of(*channels, has_experts=expert is not None)
    if kind is None:
        raise ModelError(
            f"a model of other channels than those that newsreel trains was given, or of two "
            f'experts without model.expert = "high" or "low": {[each.name for each in KINDS]}'
        )
    check_expert(kind, expert)
    check_i2v_share(kind, config.data.i2v_share)
    if kind.condition and config.data.condition == "raw":
        raise ModelError(
            f'data.condition = "raw": for {kind.name} it would encode each clip once more in every '
            f'epoch; set "latent", which reads what the build has stored'
        )
    return kind


def transformer_folder(config: TrainConfig) -> str:
    """Inside of `model.path`, of the transformer that is trained."""
    return TRANSFORMER_OF[config.model.expert]


def layout_of(wan: WanConfig) -> LatentLayout:
    """Of the latents that a transformer takes."""
    return next(kind.layout for kind in KINDS if kind.out_channels == wan.out_channels)


def resolve(config: TrainConfig, kind: ModelKind) -> TrainConfig:
    """The configuration with the model's own values where keys are unset."""
    flow, samples = config.flow, config.samples
    if flow.shift is None:
        flow = replace(flow, shift=kind.shift)
    if samples.guidance is None:
        low = config.model.expert == "low"
        samples = replace(samples, guidance=kind.guidance.low if low else kind.guidance.high)
    return replace(config, flow=flow, samples=samples)


def laws_of(config: TrainConfig, kind: ModelKind) -> NoiseLaws:
    """From which noise levels the run learns."""
    flow = resolve(config, kind).flow
    if kind.boundary is None:
        return NoiseLaws(flow)
    return NoiseLaws(flow, config.model.expert, kind.boundary)
