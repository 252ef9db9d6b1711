"""How many bytes there are for what the backward pass needs: what the user asks for, or what the
card has left.
"""

import re
from collections.abc import Sequence

import torch

from loader.shape import Bucket

# of what is free, for what does not fit exactly
_USABLE = 0.95


def parse_activation_memory(text: str) -> float | None:
    """Bytes that all blocks together may save: "all" inf, "block" 0, "6GiB" or "6.5GiB", "auto"
    None.

    Raises ValueError.
    """
    if text in ("all", "block", "auto"):
        return {"all": float("inf"), "block": 0.0, "auto": None}[text]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)GiB", text)
    if match is None:
        raise ValueError(
            f'activation_memory = "{text}": use "auto", "all", "block" or a budget such as "6.5GiB"'
        )
    return float(match.group(1)) * 2**30


def room_bytes(device: torch.device) -> float:
    """What this process can still take on a GPU, less a twentieth. Raises ValueError on a CPU."""
    if device.type != "cuda":
        raise ValueError(
            'activation_memory = "auto" asks the GPU how much is free; on a CPU use "block" or '
            '"all"'
        )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return _USABLE * min(free, limit - torch.cuda.memory_reserved(device))


def raw_bytes(buckets: Sequence[Bucket], clips: bool) -> float:
    """An allowance, not measured, for condition = "raw": DALI, and eight activations of the VAE
    at its widest (160 channels at half the size) of one frame, or of the 16 frames of a clip that
    are encoded at a time.
    """
    dali_bytes = 2.0**30
    num_activations, num_channels, half_bytes = 8, 160, 2
    num_frames = 16 if clips else 1
    num_pixels = max(bucket.width_px * bucket.height_px for bucket in buckets)
    return dali_bytes + num_activations * num_frames * num_channels * half_bytes * num_pixels / 4
