"""What is made of a window's pixels besides the latent: the JPEG of its first frame, an MP4, and
what is wrong with it.

Which H.264 encoder makes the MP4s is settled once, before a build plans anything, and becomes
part of the recipe and of every file: a machine without that encoder refuses to go on with the
build instead of taking another one in silence.
"""

import io
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from PIL import Image

from shardgen.media.colour import BT709, FULL, NARROW, SCALER
from shardgen.media.decode import Frames

Mp4Encoder = Literal["libx264", "h264_nvenc"]
# levels of 255; percentiles, because letterbox bars are black in any window
BLACK_BELOW, DARK_BELOW, FROZEN_BELOW = 24, 48, 0.1
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
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


class PictureError(ValueError):
    """A picture member can't be made as the recipe asks; the message says why and how to fix it."""


def encode_jpeg(picture: Frames, quality: int = 95) -> bytes:
    """A uint8 RGB [H, W, 3] picture as a JPEG without chroma subsampling: it feeds an encoder,
    not eyes.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_mp4(frames: Frames, fps: float, encoder: Mp4Encoder = "libx264") -> bytes:
    """uint8 RGB [F, H, W, 3] as H.264 High, 8-bit yuv420p BT.709, constant rate, closed GOP of at
    most 12 frames.

    One thread and no version strings in the container, whose comment names the encoder: with
    libx264 the bytes are a function of the frames and of PyAV's version. Raises PictureError if
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
        raise PictureError(
            f"{encoder} does not work here ({error.strerror or error}); set encode.mp4_encoder to "
            f"one that does, in a new output folder"
        ) from error
    return buffer.getvalue()


def choose_mp4_encoder(wanted: str) -> Mp4Encoder:
    """The encoder of a whole build. "auto": h264_nvenc if it encodes a few frames here, else
    libx264.

    Raises PictureError if the one that was asked for by name does not work.
    """
    if wanted == "libx264":
        return "libx264"
    try:
        encode_mp4(np.zeros((2, 256, 256, 3), np.uint8), 24.0, "h264_nvenc")
    except PictureError:
        if wanted == "auto":
            return "libx264"
        raise
    return "h264_nvenc"


def window_faults(frames: Frames) -> list[str]:
    """What a viewer would hold against a window uint8 [F, H, W, 3]: "black" or "dark"; "frozen"
    if it is no image.
    """
    luma = (frames[:, ::4, ::4].astype(np.float32) @ _LUMA).reshape(len(frames), -1)
    faults = []
    if np.percentile(luma, 99, axis=1).max() < BLACK_BELOW:
        faults.append("black")
    elif np.percentile(luma, 90, axis=1).max() < DARK_BELOW:
        faults.append("dark")
    if len(frames) > 1 and np.abs(np.diff(luma, axis=0)).mean(1).max() < FROZEN_BELOW:
        faults.append("frozen")
    return faults
