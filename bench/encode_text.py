"""UMT5 for bench.encode: how long a batch of prompts takes in each number format, with random
weights of the real size (UMT5-XXL's encoder).
"""

import time
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from shardgen.encode.text import SaturationWatch

XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SMALL = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
VOCABULARY = 256_384


def random_umt5(sizes: dict[str, int], dtype: torch.dtype, device: str) -> UMT5EncoderModel:
    """As `TextEncoder` loads it: in float16 the second feed-forward matrix stays in float32."""
    vocabulary = VOCABULARY if sizes is XXL else 1000
    config = UMT5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = UMT5EncoderModel(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    if dtype == torch.float16:
        for block in model.encoder.block:
            block.layer[-1].DenseReluDense.wo.float()
    return model


@torch.inference_mode()
def measure_text(
    device: str, dtype: torch.dtype, rounds: int, batch: int, num_tokens: int, is_small: bool
) -> dict[str, Any]:
    """Seconds of each encode of a batch of prompts, float16 watched as it is in a build."""
    if device == "cuda":
        # else the largest of the formats measured before
        torch.cuda.reset_peak_memory_stats()
    model = random_umt5(SMALL if is_small else XXL, dtype, device)
    watch = SaturationWatch(model) if dtype == torch.float16 else None
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(3, 1000, (batch, num_tokens), generator=generator).to(device)
    seconds = []
    num_saturated = 0
    for number in range(rounds + 1):
        begin_s = time.perf_counter()
        model(ids_BS, torch.ones_like(ids_BS)).last_hidden_state.to(torch.float16).cpu()
        num_saturated = sum(watch.take()) if watch else 0
        if number:
            seconds.append(time.perf_counter() - begin_s)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {
        "prompts": batch,
        "tokens": num_tokens,
        "seconds": sorted(seconds),
        "saturated": num_saturated,
        "peak_gib": peak_gib,
    }
