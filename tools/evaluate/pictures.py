"""What can be said of a clip's frames without a network. None of it is "the more the better": a
frozen picture has no flicker, and noise is sharp. Each is compared with what real clips have.
"""

from typing import Any

import numpy as np

from tools.evaluate.clips import Frames

MEASURES = ("motion", "flicker", "sharpness")


def measure(frames: Frames) -> dict[str, float]:
    """motion: mean absolute difference of neighbouring frames, in 8-bit levels.
    flicker: mean absolute change of the frames' mean brightness, in levels.
    sharpness: standard deviation of the Laplacian of brightness, in levels.
    """
    bright_FHW = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    steps = np.abs(np.diff(bright_FHW, axis=0))
    means_F = bright_FHW.mean((1, 2))
    inner = bright_FHW[:, 1:-1, 1:-1]
    laplacian = (
        bright_FHW[:, :-2, 1:-1]
        + bright_FHW[:, 2:, 1:-1]
        + bright_FHW[:, 1:-1, :-2]
        + bright_FHW[:, 1:-1, 2:]
        - 4 * inner
    )
    return {
        "motion": float(steps.mean()) if len(steps) else 0.0,
        "flicker": float(np.abs(np.diff(means_F)).mean()) if len(steps) else 0.0,
        "sharpness": float(laplacian.std()),
    }


def psnr_db(real: Frames, other: Frames) -> float:
    """Of two clips of one shape, over all frames."""
    difference: np.ndarray[Any, Any] = real.astype(np.float32) - other.astype(np.float32)
    return float(10 * np.log10(255**2 / max(float(np.square(difference).mean()), 1e-10)))
