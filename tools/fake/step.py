"""Made-up weights and a made-up micro-batch, to measure a training step without a download."""

from collections.abc import Sequence

import torch

from loader.batch import Batch
from loader.models import TI2V_5B, ModelKind
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket
from train.model.load import build_transformer, tensor_sources
from train.model.wan import Wan, WanConfig


def random_transformer(config: WanConfig, device: torch.device, dtype: torch.dtype) -> Wan:
    """Random weights, small enough for activations to stay near unit variance."""
    with torch.device("meta"):
        empty = Wan(config)
    shapes = {}
    for name, sources in tensor_sources(empty).items():
        rows, *rest = empty.get_parameter(name).shape
        for source in sources:
            shapes[source] = (rows // len(sources), *rest)
    generator = torch.Generator(device).manual_seed(0)

    def read(name: str) -> torch.Tensor:
        normal = torch.randn(shapes[name], device=device, generator=generator)
        return normal / shapes[name][-1] ** 0.5

    return build_transformer(config, shapes.keys(), read, device, dtype, "random weights")


def random_batch(
    bucket: Bucket,
    device: torch.device,
    *,
    is_i2v: Sequence[bool],
    text_dim: int = 4096,
    num_text_tokens: int = 200,
    seed: int = 0,
    kind: ModelKind = TI2V_5B,
) -> Batch:
    """One random sample for each of `is_i2v`, with captions of `num_text_tokens` tokens, for a
    model of `kind`.
    """
    num_samples = len(is_i2v)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(num_samples, *shape, generator=generator, device=device).half()

    latent_BCTHW = normal(*kind.layout.latent_shape(bucket))
    text_BSD = latent_BCTHW.new_zeros(num_samples, MAX_TEXT_TOKENS, text_dim)
    text_BSD[:, :num_text_tokens] = 0.2 * normal(num_text_tokens, text_dim)
    return Batch(
        latent_BCTHW,
        text_BSD,
        None,
        is_i2v=list(is_i2v),
        caption_dropped=[False] * num_samples,
        seeds=[1000 + seed + i for i in range(num_samples)],
        keys=[""] * num_samples,
        bucket=bucket,
        dataset=0,
        epoch=0,
        index=0,
        wait_s=0.0,
        given_BCTHW=normal(*kind.layout.latent_shape(bucket)) if kind.condition else None,
    )
