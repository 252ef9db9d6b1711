"""Footage in, pixels out: windows of a file at constant rate and a bucket's size.

Frames are chosen by timestamp, never by number: output frame i of a window is the source frame
that a player shows when its display says `start + i / fps`, so 29.97, 25 and variable rates all
come out at the right speed. Each chosen frame is scaled once, from the source straight to its
final size, with the pixel aspect ratio, the orientation, the YUV matrix and the range that the
file states for it. Interlaced frames pass bwdif first, one frame out for each frame in. What is
transparent is shown on black.

Left out: seeking (a clip is at most some 45 s, all its windows come out of one pass, and a seek
can be wrong where a pass can't) and tone mapping (HDR is refused by name).
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type

from loader.mp4 import SCALER
from loader.shape import Bucket
from shardgen.media.colour import check_colour, source_colour, with_stated_range
from shardgen.media.containers import Shown, open_video, shown_frames
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Fit, Fitting, Orientation, fit, orientation_of_matrix
from shardgen.media.images import MAX_PIXELS, is_image, load_image

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

    Times count from the container's start, as a player's display does. Raises MediaError:
    media_starts_late when a window begins before the picture does, media_truncated when the
    footage ends before a window does, and what `probe` raises.
    """
    shape = bucket.num_frames, bucket.height_px, bucket.width_px, 3
    if is_image(path):
        still = _fit_image(path, bucket, fitting)
        for index in range(len(starts_ms)):
            yield index, np.broadcast_to(still, shape)
        return
    slots = sorted(
        (start_ms / 1000 + i / fps, index, i)
        for index, start_ms in enumerate(starts_ms)
        for i in range(bucket.num_frames)
    )
    windows: dict[int, Frames] = {}
    done, end_s = 0, 0.0
    with open_video(path) as video:
        for shown in shown_frames(video, deinterlace=True):
            end_s = shown.end_s
            if done == 0 and slots[0][0] + START_TOLERANCE_S < shown.begin_s:
                raise MediaError(
                    "media_starts_late",
                    f"the picture begins at {shown.begin_s:.3f} s, a window at {slots[0][0]:.3f} s",
                )
            picture = None
            while slots[done][0] + START_TOLERANCE_S < end_s:
                _, index, i = slots[done]
                if picture is None:
                    check_colour(shown.frame, video.stream.codec_context)
                    picture = fit_frame(shown, bucket, fitting)
                windows.setdefault(index, np.empty(shape, np.uint8))[i] = picture
                if i == bucket.num_frames - 1:
                    yield index, windows.pop(index)
                done += 1
                if done == len(slots):
                    return
    raise MediaError(
        "media_truncated", f"the footage ends at {end_s:.3f} s, a window needs {slots[-1][0]:.3f} s"
    )


def orientation_of(frame: Any) -> Orientation:
    """How a frame is to be laid for display. Raises MediaError (media_rotation)."""
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return Orientation()
    numbers = np.frombuffer(bytes(matrix), np.int32)
    orientation = orientation_of_matrix(numbers)
    if orientation is None:
        raise MediaError(
            "media_rotation",
            f"turned by {frame.rotation} degrees, or skewed; only quarter turns and mirrorings "
            f"are handled",
        )
    return orientation


def fit_frame(shown: Shown, bucket: Bucket, fitting: Fitting) -> Frames:
    """Scale one frame, lay it, and place it on the bucket's canvas: uint8 RGB [H, W, 3]. Raises
    MediaError: media_too_large where a sliver would have to become a picture of that many pixels
    before it is cropped, media_undecodable for a size that swscale does not take.
    """
    stored = shown.frame
    orientation = orientation_of(stored)
    place = fit(stored.width, stored.height, shown.sar, orientation, bucket, fitting)
    width_px, height_px = place.width_px, place.height_px
    if orientation.swaps_sides:
        width_px, height_px = height_px, width_px
    told = f"{stored.format.name} of {stored.width}x{stored.height} to {width_px}x{height_px}"
    if width_px * height_px > MAX_PIXELS:
        raise MediaError("media_too_large", f"{told}: at most {MAX_PIXELS} pixels are scaled")
    try:
        frame = on_black(with_stated_range(stored))
        scaled = frame.reformat(
            width=width_px,
            height=height_px,
            format="rgb24",
            interpolation=SCALER,
            threads=1,
            **source_colour(frame),
        )
    except (ValueError, av.FFmpegError) as error:
        raise MediaError("media_undecodable", f"{told} can't be scaled: {error}") from error
    return _place(orientation.apply(scaled.to_ndarray()), place, bucket)


def on_black(frame: Any) -> Any:
    """A frame with an alpha channel as RGB on black, any other as it is."""
    if not any(component.is_alpha for component in frame.format.components):
        return frame
    rgba = frame.reformat(
        format="rgba", interpolation=SCALER, threads=1, **source_colour(frame)
    ).to_ndarray()
    product = rgba[..., :3].astype(np.uint16) * rgba[..., 3:]
    return av.VideoFrame.from_ndarray(((product + 127) // 255).astype(np.uint8), format="rgb24")


def _place(picture: Frames, place: Fit, bucket: Bucket) -> Frames:
    canvas = np.zeros((bucket.height_px, bucket.width_px, 3), np.uint8)
    x, y = max(place.x_px, 0), max(place.y_px, 0)
    left, top = max(-place.x_px, 0), max(-place.y_px, 0)
    part = picture[top : top + bucket.height_px, left : left + bucket.width_px]
    canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
    return canvas


def _fit_image(path: Path, bucket: Bucket, fitting: Fitting) -> Frames:
    # turned before it is scaled: so it always was, and the scaler is not symmetric to the bit
    frame = av.VideoFrame.from_ndarray(load_image(path).upright, format="rgb24")
    return fit_frame(Shown(frame, 0.0, 0.0, Fraction(1)), bucket, fitting)
