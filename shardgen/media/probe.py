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
from shardgen.media.colour import HDR
from shardgen.media.containers import decoded_frames, open_container, rotation_deg, timed_frames
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Fit, Fitting, fit
from shardgen.media.images import is_image, load_image


class Probe(msgspec.Struct, frozen=True):
    """What a file really is. `width_px` x `height_px` as stored, before SAR and rotation;
    `rotation_deg` is anticlockwise, as the display matrix states it; `fps`, `num_frames` and
    `duration_s` from the decoded timestamps. An image has fps 0.0, one frame and no duration.
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

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height on the screen, in square pixels: stored size, pixel aspect ratio and
        rotation applied.
        """
        width_px = max(round(self.width_px * self.sar_num / self.sar_den), 1)
        turned = self.rotation_deg % 180 != 0
        return (self.height_px, width_px) if turned else (width_px, self.height_px)

    def fit(self, bucket: Bucket, fitting: Fitting) -> Fit:
        """Where this picture goes on a bucket's canvas."""
        sar = Fraction(self.sar_num, self.sar_den)
        return fit(self.width_px, self.height_px, sar, self.rotation_deg, bucket, fitting)


def probe(path: Path) -> Probe:
    """Decode the whole file and say what it is. Raises MediaError (media_empty,
    media_undecodable, media_truncated, media_no_video, media_hdr, media_timestamps,
    media_rotation).
    """
    if is_image(path):
        return _probe_image(path)
    first: Any = None
    starts_s: list[float] = []
    end_s = 0.0
    with open_container(path) as container:
        stream = container.streams.video[0]
        sar = stream.sample_aspect_ratio or Fraction(1)
        for frame, begin_s, frame_end_s in timed_frames(
            decoded_frames(container), stream.average_rate
        ):
            first = first or frame
            starts_s.append(begin_s)
            end_s = frame_end_s
        if first is None:
            raise MediaError("media_undecodable", "no frame could be decoded")
        if stream.codec_context.color_trc in HDR:
            raise MediaError(
                "media_hdr",
                f"transfer {HDR[stream.codec_context.color_trc]}; convert it to BT.709",
            )
        intervals_s = np.diff(starts_s)
        return Probe(
            media_type="video",
            width_px=first.width,
            height_px=first.height,
            sar_num=sar.numerator,
            sar_den=sar.denominator,
            rotation_deg=rotation_deg(first),
            fps=round(float(1 / intervals_s.mean()), 4)
            if len(intervals_s)
            else float(stream.average_rate or 0),
            num_frames=len(starts_s),
            duration_s=round(end_s, 6),
            codec=stream.codec_context.name,
            pix_fmt=first.format.name,
            bit_depth=first.format.components[0].bits,
            color_range={1: "tv", 2: "pc"}.get(int(first.color_range), "unspecified"),
            # ms clocks jitter by 1
            variable_frame_rate=bool(len(intervals_s)) and bool(np.ptp(intervals_s) > 0.002),
            color_matrix={1: "bt709", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}.get(
                int(first.colorspace), "unspecified"
            ),
            interlaced=first.interlaced_frame,
            has_audio=bool(container.streams.audio),
        )


def _probe_image(path: Path) -> Probe:
    image = load_image(path)
    turn = {3: 180, 6: -90, 8: 90}.get(image.getexif().get(0x0112, 1), 0)
    return Probe(
        media_type="image",
        width_px=image.width,
        height_px=image.height,
        sar_num=1,
        sar_den=1,
        rotation_deg=turn,
        fps=0.0,
        num_frames=1,
        duration_s=0.0,
        codec=(image.format or "").lower(),
        pix_fmt=image.mode,
        bit_depth=16 if image.mode.startswith("I") else 8,
        color_range="pc",
        variable_frame_rate=False,
    )
