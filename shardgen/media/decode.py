"""Footage in, pixels out: windows of a file at constant rate and a bucket's size.

Frames are chosen by timestamp, never by number: output frame i of a window is the source frame on
the screen at `start + i / fps`, so 29.97, 25 and variable rates all come out at the right speed.
Each chosen frame is scaled once, from the source straight to its final size, with the pixel
aspect ratio, the rotation, the YUV matrix and the range that the file states. Interlaced frames
pass bwdif first, one frame out for each frame in.

Left out: seeking (a clip is at most some 45 s, all its windows come out of one pass, and a seek
can be wrong where a pass can't) and tone mapping (HDR is refused by name).
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from loader.shape import Bucket
from shardgen.media.colour import SCALER, source_colour
from shardgen.media.containers import (
    decoded_frames,
    deinterlaced,
    open_container,
    rotation_deg,
    timed_frames,
)
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Fit, Fitting, fit
from shardgen.media.images import is_image, load_image

Frames = np.ndarray[Any, Any]  # uint8 RGB, full range: [H, W, 3] or [F, H, W, 3]
# start_ms is rounded to whole milliseconds; a frame may begin up to 0.5 ms after it
START_TOLERANCE_S = 0.001


def decode_window(
    path: Path, start_ms: int, fps: float, bucket: Bucket, fitting: Fitting = "letterbox"
) -> Frames:
    """One window of a file: uint8 RGB [F, H, W, 3]. Raises MediaError."""
    return next(decode_windows(path, [start_ms], fps, bucket, fitting))[1]


def decode_windows(
    path: Path, starts_ms: Sequence[int], fps: float, bucket: Bucket, fitting: Fitting = "letterbox"
) -> Iterator[tuple[int, Frames]]:
    """All windows of one file from one pass: yields (index into starts_ms, uint8 RGB [F, H, W,
    3]) as each is complete.

    Times count from the first frame. Raises MediaError (media_truncated when the footage ends
    before a window does).
    """
    shape = bucket.num_frames, bucket.height_px, bucket.width_px, 3
    if is_image(path):
        for index in range(len(starts_ms)):
            yield index, np.broadcast_to(_fit_image(load_image(path), bucket, fitting), shape)
        return
    slots = sorted(
        (start_ms / 1000 + i / fps, index, i)
        for index, start_ms in enumerate(starts_ms)
        for i in range(bucket.num_frames)
    )
    windows: dict[int, Frames] = {}
    done, end_s = 0, 0.0
    with open_container(path) as container:
        stream = container.streams.video[0]
        sar = stream.sample_aspect_ratio or Fraction(1)
        for frame, _, end_s in timed_frames(
            deinterlaced(decoded_frames(container)), stream.average_rate
        ):
            picture = None
            while slots[done][0] + START_TOLERANCE_S < end_s:
                _, index, i = slots[done]
                if picture is None:
                    picture = _fit_frame(frame, sar, rotation_deg(frame), bucket, fitting)
                windows.setdefault(index, np.empty(shape, np.uint8))[i] = picture
                if i == bucket.num_frames - 1:
                    yield index, windows.pop(index)
                done += 1
                if done == len(slots):
                    return
    raise MediaError(
        "media_truncated", f"the footage ends at {end_s:.3f} s, a window needs {slots[-1][0]:.3f} s"
    )


def _fit_frame(
    frame: Any, sar: Fraction, turn_deg: int, bucket: Bucket, fitting: Fitting
) -> Frames:
    """Scale one frame, turn it, and place it on the bucket's canvas: uint8 RGB [H, W, 3]."""
    place = fit(frame.width, frame.height, sar, turn_deg, bucket, fitting)
    turned = turn_deg % 180 != 0
    width, height = (
        (place.height_px, place.width_px) if turned else (place.width_px, place.height_px)
    )
    scaled = frame.reformat(
        width=width,
        height=height,
        format="rgb24",
        interpolation=SCALER,
        threads=1,
        **source_colour(frame),
    )
    return _place(np.rot90(scaled.to_ndarray(), turn_deg // 90), place, bucket)


def _place(picture: Frames, place: Fit, bucket: Bucket) -> Frames:
    canvas = np.zeros((bucket.height_px, bucket.width_px, 3), np.uint8)
    x, y, left, top = (
        max(place.x_px, 0),
        max(place.y_px, 0),
        max(-place.x_px, 0),
        max(-place.y_px, 0),
    )
    part = picture[top : top + bucket.height_px, left : left + bucket.width_px]
    canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
    return canvas


def _fit_image(image: Image.Image, bucket: Bucket, fitting: Fitting) -> Frames:
    frame = av.VideoFrame.from_image(ImageOps.exif_transpose(image).convert("RGB"))
    return _fit_frame(frame, Fraction(1), 0, bucket, fitting)
