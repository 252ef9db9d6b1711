"""Whether a card and a number format encode rightly: a small tensor against float32, and which
layer overflows.
"""

import torch
from torch import Tensor, nn

from loader.vae.blocks import Past
from loader.vae.encoder import VAEEncoder

# Relative L2 of a latent. Measured on real windows with random weights of the real size, one H200:
# 1.43e-3 in float16, 1.15e-2 in bfloat16, 3e-6 in float32.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2, torch.float32: 1e-4}


def relative_l2(latent: Tensor, exact: Tensor) -> float:
    """The norm of the difference by that of `exact`, in float32 on the CPU."""
    latent, exact = latent.float().cpu(), exact.float().cpu()
    return float((latent - exact).norm() / exact.norm())


@torch.inference_mode()
def deviation_from_float32(encoder: VAEEncoder, reference: VAEEncoder) -> float:
    """Relative L2 between the latents of one small clip, by `encoder` on its device and by
    `reference`, the same weights in float32 on the CPU.

    Old cuDNN versions are reported to give wrong half-precision results for 3-D convolutions on
    V100s without any error: look before a dataset is written. Compare with TOLERANCE.
    """
    size = 2 * encoder.space_factor
    generator = torch.Generator().manual_seed(0)
    # 9 frames in chunks of 4: the first frame, and a chunk after another
    video_BCTHW = torch.rand((1, 3, 9, size, size), generator=generator) * 2 - 1
    exact = reference.encode(video_BCTHW, chunk_frames=4)
    return relative_l2(encoder.encode(video_BCTHW, chunk_frames=4), exact)


@torch.inference_mode()
def overflowing_layer(encoder: VAEEncoder, video_BCTHW: Tensor) -> str | None:
    """The name of the first layer whose output isn't finite for this video, or None.

    Runs the layers one by one (loader/vae/blocks.py), four frames at a time. In half precision
    that layer needs float32: norms bound what enters most convolutions, so it is the residual
    stream or a downsampling that grows too large.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def look(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if not found and not bool(output.isfinite().all()):
                found.append(name)

        handles.append(module.register_forward_hook(look))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in encoder.encoder.named_modules(prefix="encoder"):
        # what a block holds is heard of before the block, whose sum may be what overflows
        if module is not encoder.encoder:
            watch(name, module)
    try:
        past: Past = {}
        for start in (0, *range(1, video_BCTHW.shape[2], 4)):
            pixels_BCTHW = video_BCTHW[:, :, start : start + 4 if start else 1]
            encoder.encode_by_layers(pixels_BCTHW, past)
            if found:
                break
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
