"""A clip as a small animated GIF, which TensorBoard plays: it has no place for MP4."""

import io
from pathlib import Path

import av
from PIL import Image

MAX_WIDTH_PX = 320
EVERY_NTH = 2


def clip_gif(path: Path) -> bytes:
    """Every second frame of an MP4, at its speed, at most 320 pixels wide."""
    with av.open(path) as container:
        rate = float(container.streams.video[0].average_rate or 24)
        frames = [frame.to_image() for frame in container.decode(video=0)][::EVERY_NTH]
    width_px = min(frames[0].width, MAX_WIDTH_PX)
    size = (width_px, max(1, round(frames[0].height * width_px / frames[0].width)))
    small = [frame.resize(size, Image.Resampling.BILINEAR) for frame in frames]
    file = io.BytesIO()
    small[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=small[1:],
        duration=1000 * EVERY_NTH / rate,
        loop=0,
    )
    return file.getvalue()
