"""KEY.mp4 and every other clip that we write: one H.264 encoder for all of them, so that clips of
different origin differ in their pictures alone.
"""

import io
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

Frames = np.ndarray[Any, Any]  # uint8 RGB, full range: [F, H, W, 3]
Mp4Encoder = Literal["libx264", "h264_nvenc"]
SCALER = (
    Interpolation.LANCZOS
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
BT709, NARROW, FULL = Colorspace.ITU709, ColorRange.MPEG, ColorRange.JPEG
_OPTIONS = {
    # mbtree=0: with it the bytes depend on what memory held before (PyAV 18.1's x264: 16
    # different files of 25)
    "libx264": {
        "crf": "18",
        "preset": "medium",
        "threads": "1",
        "x264-params": (
            "open-gop=0:mbtree=0:colorprim=bt709:transfer=bt709:colormatrix=bt709:range=tv"
        ),
    },
    "h264_nvenc": {
        "rc": "constqp",
        "qp": "18",
        "preset": "p5",
        "forced-idr": "1",
        "strict_gop": "1",
        "bf": "0",
    },
}


class Mp4Error(ValueError):
    """A clip can't be encoded as asked; the message says why and what to do."""


def encode_mp4(frames: Frames, fps: float, encoder: Mp4Encoder = "libx264") -> bytes:
    """uint8 RGB [F, H, W, 3] as H.264 High, 8-bit yuv420p BT.709, constant rate, closed GOP of at
    most 12 frames.

    One thread and no version strings in the container, whose comment names the encoder: with
    libx264 the bytes are a function of the frames and of PyAV's version. Raises Mp4Error if
    the encoder does not work here.
    """
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            container.metadata["comment"] = encoder
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream(
                encoder, rate=rate, options={"profile": "high", "g": "12", **_OPTIONS[encoder]}
            )
            stream.width, stream.height, stream.pix_fmt = (
                frames.shape[2],
                frames.shape[1],
                "yuv420p",
            )
            stream.codec_context.colorspace, stream.codec_context.color_range = BT709, NARROW
            stream.codec_context.color_primaries = stream.codec_context.color_trc = BT709
            for i, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                    format="yuv420p",
                    interpolation=SCALER,
                    dst_colorspace=BT709,
                    src_color_range=FULL,
                    dst_color_range=NARROW,
                    threads=1,
                )
                frame.pts, frame.time_base = i, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise Mp4Error(
            f"{encoder} does not work here ({error.strerror or error}); set encode.mp4_encoder to "
            f"one that does, in a new output folder"
        ) from error
    return buffer.getvalue()
