"""Small clips whose every frame, timestamp and header field is known."""

from collections.abc import Callable
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
    rate: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write planar 8-bit YUV frames [3, H, W] (chroma at full size, subsampled here) with exact
    timestamps; `rate` is for codecs that know no other ones than its multiples.
    """
    base = 1 / rate if rate else Fraction(1, 30000)
    with av.open(
        str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    ) as container:
        best = {"crf": "1"} if codec.startswith("libx") else {}
        stream = container.add_stream(
            codec, rate=rate or Fraction(30000, 1001), options={**best, **(options or {})}
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


def remux(
    source: Path,
    target: Path,
    *,
    shift_s: Fraction = Fraction(0),
    keep: Callable[[int], bool] = lambda number: True,
    options: dict[str, str] | None = None,
) -> Path:
    """Copy a clip's video packets, those whose number `keep` wants, with all times shifted."""
    with (
        av.open(str(source)) as old,
        av.open(
            str(target), "w", options={"avoid_negative_ts": "disabled", **(options or {})}
        ) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.dts is None or not keep(number):
                continue
            ticks = round(shift_s / packet.time_base)
            assert packet.pts is not None
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            packet.stream = stream
            new.mux(packet)
    return target


def keyframes(path: Path) -> list[int]:
    """The numbers of the packets that decoding can start at."""
    with av.open(str(path)) as container:
        packets = container.demux(video=0)
        return [number for number, packet in enumerate(packets) if packet.is_keyframe]
