"""What is made of a window's pixels besides the latent: the JPEG of its first frame, an MP4, and
what is wrong with it.

Which H.264 encoder makes the MP4s is settled once, before a build plans anything, and becomes
part of the recipe and of every file: a machine without that encoder refuses to go on with the
build instead of taking another one in silence.
"""

import io

import numpy as np
from PIL import Image

from loader.mp4 import Mp4Encoder, Mp4Error, encode_mp4
from shardgen.media.decode import Frames

# levels of 255; percentiles, because letterbox bars are black in any window
BLACK_BELOW, DARK_BELOW, FROZEN_BELOW = 24, 48, 0.1
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def encode_jpeg(picture: Frames, quality: int = 95) -> bytes:
    """A uint8 RGB [H, W, 3] picture as a JPEG without chroma subsampling: it feeds an encoder,
    not eyes.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def choose_mp4_encoder(wanted: str) -> Mp4Encoder:
    """The encoder of a whole build. "auto": h264_nvenc if it encodes a few frames here, else
    libx264.

    Raises Mp4Error if the one that was asked for by name does not work.
    """
    if wanted == "libx264":
        return "libx264"
    try:
        encode_mp4(np.zeros((2, 256, 256, 3), np.uint8), 24.0, "h264_nvenc")
    except Mp4Error:
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
