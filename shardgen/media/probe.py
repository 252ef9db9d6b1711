"""What a file really is, found by decoding all of it.

That is a second decode next to the one that feeds the encoder, and it is deliberate: shards are
planned from what the probe saw, so damage has to be found before the plan, not in the middle of a
shard.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from loader.shape import Bucket
from shardgen.media.colour import check_colour
from shardgen.media.containers import Video, open_video, shown_frames
from shardgen.media.decode import orientation_of
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Fit, Fitting, Orientation, fit
from shardgen.media.images import is_image, load_image

_MATRIX_NAMES = {1: "bt709", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
# clocks in milliseconds jitter by one
_JITTER_S = 0.002


class Probe(msgspec.Struct, frozen=True):
    """What a file really is. `width_px` x `height_px` as stored, before pixel aspect ratio and
    orientation; for display a picture is mirrored left to right if `mirrored`, and then turned by
    `rotation_deg` anticlockwise.

    Times are those of a player's display: the first frame is there from `start_s`, and the last
    one until `duration_s`. `fps` and `num_frames` are of the frames that are shown. An image has
    fps 0.0, one frame and no duration.
    """

    media_type: Literal["video", "image"]
    width_px: int
    height_px: int
    sar_num: int
    sar_den: int
    rotation_deg: int
    fps: float
    num_frames: int
    duration_s: float
    codec: str
    pix_fmt: str
    bit_depth: int
    color_range: str
    variable_frame_rate: bool
    color_matrix: str = "unspecified"
    interlaced: bool = False
    has_audio: bool = False
    mirrored: bool = False
    start_s: float = 0.0

    @property
    def orientation(self) -> Orientation:
        """How the stored picture is to be laid for display."""
        return Orientation(self.rotation_deg // 90 % 4, self.mirrored)

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height on the screen, in square pixels: stored size, pixel aspect ratio and
        orientation applied.
        """
        width_px = max(round(self.width_px * self.sar_num / self.sar_den), 1)
        if self.orientation.swaps_sides:
            return self.height_px, width_px
        return width_px, self.height_px

    def fit(self, bucket: Bucket, fitting: Fitting) -> Fit:
        """Where this picture goes on a bucket's canvas."""
        sar = Fraction(self.sar_num, self.sar_den)
        return fit(self.width_px, self.height_px, sar, self.orientation, bucket, fitting)


def probe(source: Path | bytes) -> Probe:
    """Decode the whole file, or a file's bytes, and say what it is.

    Raises MediaError: media_empty, media_undecodable, media_truncated, media_no_video, media_hdr,
    media_colour, media_timestamps, media_rotation, media_aspect, media_animated, media_too_large.
    """
    if is_image(source):
        return _probe_image(source)
    with open_video(source) as video:
        return probe_video(video)


def probe_video(video: Video) -> Probe:
    """`probe` for an open video, whose frames it uses up."""
    first: Any = None
    first_sar = Fraction(1)
    interlaced = False
    starts_s: list[float] = []
    end_s = 0.0
    context = video.stream.codec_context
    for shown in shown_frames(video):
        check_colour(shown.frame, context)
        if first is None:
            first, first_sar = shown.frame, shown.sar
        interlaced = interlaced or shown.frame.interlaced_frame
        starts_s.append(shown.begin_s)
        end_s = shown.end_s
    if first is None:
        raise MediaError("media_undecodable", "no frame could be decoded")
    orientation = orientation_of(first)
    intervals_s = np.diff(starts_s)
    mean_rate = float(1 / intervals_s.mean()) if len(intervals_s) else 0.0
    return Probe(
        media_type="video",
        width_px=first.width,
        height_px=first.height,
        sar_num=first_sar.numerator,
        sar_den=first_sar.denominator,
        rotation_deg=_degrees(orientation),
        fps=round(mean_rate, 4) or float(video.stream.average_rate or 0),
        num_frames=len(starts_s),
        duration_s=round(end_s, 6),
        codec=context.name,
        pix_fmt=first.format.name,
        bit_depth=first.format.components[0].bits,
        color_range={1: "tv", 2: "pc"}.get(int(first.color_range), "unspecified"),
        variable_frame_rate=bool(len(intervals_s)) and bool(np.ptp(intervals_s) > _JITTER_S),
        color_matrix=_MATRIX_NAMES.get(int(first.colorspace), "unspecified"),
        interlaced=interlaced,
        has_audio=bool(video.container.streams.audio),
        mirrored=orientation.mirrored,
        start_s=round(starts_s[0], 6),
    )


def _degrees(orientation: Orientation) -> int:
    """-90, 0, 90 or 180, anticlockwise."""
    return {0: 0, 1: 90, 2: 180, 3: -90}[orientation.quarter_turns]


def _probe_image(source: Path | bytes) -> Probe:
    still = load_image(source)
    height_px, width_px = still.rgb.shape[:2]
    return Probe(
        media_type="image",
        width_px=width_px,
        height_px=height_px,
        sar_num=1,
        sar_den=1,
        rotation_deg=_degrees(still.orientation),
        fps=0.0,
        num_frames=1,
        duration_s=0.0,
        codec=still.format,
        pix_fmt=still.mode,
        bit_depth=still.bit_depth,
        color_range="pc",
        variable_frame_rate=False,
        mirrored=still.orientation.mirrored,
    )
