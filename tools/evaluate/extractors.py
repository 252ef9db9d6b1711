"""The network whose features a Frechet distance is taken of: a TorchScript file, hashed before it
is loaded, because TorchScript runs code.

The contract is that of I3D's TorchScript port: `f(x, rescale, resize, return_features)` of float32
pixels [B, 3, F, H, W] returns [B, D]. We scale to [-1, 1] before we resize (after it, features
move by 1e-2) and stretch to a square, so rescale and resize are False.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tools.evaluate.clips import Frames
from tools.evaluate.config import I3D_SHA256, I3D_SOURCE, FVDConfig
from tools.evaluate.frechet import Features, floor, frechet_distance

# below this I3D's pooling has nothing left to pool
MIN_FRAMES = 10


class Extractor:
    """`features(frames)` of one clip at a time: float32 [D]."""

    def __init__(self, config: FVDConfig, device: torch.device):
        """Raises ValueError for a file that is missing or has another hash."""
        path = Path(config.weights)
        if not path.is_file():
            source = I3D_SOURCE if config.sha256 == I3D_SHA256 else "its publisher"
            raise ValueError(
                f"fvd.weights = {path}: there is no such file; get {source}, SHA-256 "
                f"{config.sha256}; nothing is downloaded here"
            )
        found = file_sha256(path)
        if found != config.sha256:
            raise ValueError(
                f"fvd.weights = {path}: SHA-256 is {found}, not {config.sha256}: TorchScript runs "
                f"code, so another file is not loaded"
            )
        self.name = f"{path.name} sha256 {found[:8]}"
        self._config, self._device = config, device
        with warnings.catch_warnings():
            # from torch 2.13 on; these networks exist in no other form
            warnings.simplefilter("ignore", DeprecationWarning)
            self._network: Any = torch.jit.load(str(path), map_location=device).eval()

    def why_not(self, num_frames: int) -> str:
        """Why clips of so many frames can't be measured; empty if they can."""
        wanted = self._config.num_frames
        if num_frames < max(wanted, MIN_FRAMES if self._config.name == "fvd" else 1):
            return f"{num_frames} frames a clip, the extractor takes {wanted}"
        return ""

    @torch.no_grad()
    def features(self, frames: Frames) -> Features:
        first = torch.from_numpy(frames[: self._config.num_frames].copy()).to(self._device)
        pixels_FCHW = first.permute(0, 3, 1, 2).float() / 127.5 - 1
        size = (self._config.size_px, self._config.size_px)
        pixels_FCHW = F.interpolate(pixels_FCHW, size, mode="bilinear", align_corners=False)
        features_1D = self._network(pixels_FCHW.transpose(0, 1)[None], False, False, True)
        return np.asarray(features_1D[0].float().cpu().numpy())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(frames: Frames, how: str, seed: int = 0) -> Frames:
    """A clip as the self-test spoils it: "blurred" or "noise"."""
    if how == "noise":
        random = np.random.default_rng(seed)
        return np.asarray(random.integers(0, 256, frames.shape, dtype=np.uint8))
    height, width = frames.shape[1:3]
    pixels_FCHW = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float()
    small_FCHW = F.interpolate(pixels_FCHW, (max(2, height // 8), max(2, width // 8)), mode="area")
    blurred_FCHW = F.interpolate(small_FCHW, (height, width), mode="bilinear")
    return np.asarray(blurred_FCHW.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def self_test(real_ND: Features, blurred_ND: Features, noise_ND: Features) -> str:
    """Why the extractor can't be trusted; empty if it reacts: the distance of real clips to other
    real ones is less than to blurred ones, and that less than to noise.
    """
    half = len(real_ND) // 2
    if half < 4:
        return f"{len(real_ND)} real clips: too few for the extractor's self-test, which takes 8"
    other = floor(real_ND)
    assert other is not None
    blurred, noise = (
        frechet_distance(real_ND[:half], spoilt_ND[half:]) for spoilt_ND in (blurred_ND, noise_ND)
    )
    if other < blurred < noise:
        return ""
    return (
        f"the extractor does not react: real against real {other:.4g}, against blurred "
        f"{blurred:.4g}, against noise {noise:.4g}; they should rise"
    )
