"""How many bytes there are for what the backward pass needs: what the user asks for, or what the
card has left.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from loader.shape import Bucket
from train.activations.plan import ShapePlan
from train.activations.sizes import Shape

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
            '"auto" asks the GPU how much is free; on a CPU set activation_memory to "block" or '
            '"all", and model.placement to "resident" or "streamed"'
        )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return _USABLE * min(free, limit - torch.cuda.memory_reserved(device))


def peak_bytes(plans: Mapping[Shape, ShapePlan], max_graph_tokens: int) -> float:
    """What the plans of a run take at once: shapes that run as CUDA graphs share one pool, which
    they keep while the others run.
    """
    graphs, others = [0.0], [0.0]
    for shape, plan in plans.items():
        is_graph = shape.batch * shape.num_tokens <= max_graph_tokens
        (graphs if is_graph else others).append(plan.num_bytes)
    return max(graphs) + max(others)


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
