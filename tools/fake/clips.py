"""Small clips whose every frame, timestamp and header field is known."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_clip(
    path: Path,
    frames: list[np.ndarray],
    times: list[Fraction],
    *,
    sar: Fraction = Fraction(1),
    matrix: int = 2,
    full_range: bool = False,
    rotation: int = 0,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """Write planar 8-bit YUV frames [3, H, W] (chroma at full size, subsampled here) with exact
    timestamps.
    """
    base = Fraction(1, 30000)
    with av.open(
        str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    ) as container:
        stream = container.add_stream(
            codec, rate=Fraction(30000, 1001), options={"crf": "1", **(options or {})}
        )
        _, stream.height, stream.width = frames[0].shape
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = stream.time_base = base
        stream.codec_context.sample_aspect_ratio = sar
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full_range else 1
        if rotation:
            stream.set_display_rotation(rotation)
        for picture, time in zip(frames, times, strict=True):
            y, u, v = picture
            planar = np.concatenate(
                [y.reshape(-1), u[::2, ::2].reshape(-1), v[::2, ::2].reshape(-1)]
            )
            frame = av.VideoFrame.from_ndarray(
                planar.reshape(y.shape[0] * 3 // 2, y.shape[1]), format="yuv420p"
            )
            frame.pts, frame.time_base = int(time / base), base
            frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def grey(level: int, width: int = 160, height: int = 96) -> np.ndarray:
    return np.stack([np.full((height, width), v, np.uint8) for v in (level, 128, 128)])


def ntsc(count: int) -> list[Fraction]:
    return [Fraction(1001, 30000) * i for i in range(count)]


def counting_clip(path: Path, times: list[Fraction]) -> Path:
    """A clip whose frame i is grey of level 16 + 4 i."""
    return write_clip(path, [grey(16 + 4 * i) for i in range(len(times))], times)


def levels(frames: np.ndarray) -> list[int]:
    """Which source frame each decoded frame of a counting clip is."""
    return [round(float(f[40:50, 70:90].mean()) * 219 / 255 / 4) for f in frames]
