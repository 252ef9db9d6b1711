"""Which foreign clips and pictures tools.index takes: those that a build would, and that DALI shows
as a display does.
"""

import io

import numpy as np
from PIL import Image

from loader.sample import is_bt709
from shardgen.media.containers import open_video
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Orientation
from shardgen.media.images import load_image
from shardgen.media.probe import probe_video


class RefusedError(ValueError):
    """A sample that can't be used. `reason` is what is counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def examine_clip(data: bytes, num_frames: int, side_px: int = 32) -> tuple[int, int, float]:
    """Width and height in pixels, and frames per second. Raises RefusedError.

    The rules are those of `shardgen build`, and decoding is as whole. Beyond them a clip is refused
    whose frames need more than DALI does to them: it gives what is stored, in the matrix that
    players assume of the size.
    """
    try:
        with open_video(data) as video:
            rate = video.stream.average_rate
            num_streams = len(video.container.streams.video)
            found = probe_video(video)
        with open_video(data) as video:
            packets = video.container.demux(video.stream)
            num_packets = sum(packet.size > 0 for packet in packets)
    except MediaError as error:
        raise RefusedError(f"its mp4: {error.reason}") from None
    if num_streams > 1:
        raise RefusedError("its mp4 has several video streams")
    if num_packets != found.num_frames:
        raise RefusedError("its mp4 holds frames that are not shown, as an edit list hides them")
    is_square = found.sar_num == found.sar_den
    if not is_square or found.orientation != Orientation() or found.interlaced:
        raise RefusedError("its mp4 is rotated, interlaced or has pixels that aren't square")
    width, height = found.width_px, found.height_px
    matrix = "bt709" if is_bt709(width - width % side_px, height - height % side_px) else "bt601"
    if found.color_matrix not in ("unspecified", matrix):
        raise RefusedError(
            "the colour matrix of its mp4 is not the one of its size (BT.709 if large, else BT.601)"
        )
    if found.num_frames < num_frames or not rate:
        raise RefusedError(f"fewer than {num_frames} frames")
    return width, height, float(rate)


def examine_image(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, as shown. Raises RefusedError, for one whose colours DALI would
    not show as a display does too.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        raise RefusedError("its jpg is no JPEG")
    try:
        still = load_image(data)
    except MediaError as error:
        raise RefusedError(f"its jpg: {error.reason}") from None
    with Image.open(io.BytesIO(data)) as image:
        plain = np.asarray(image.convert("RGB"))
    if still.mode not in ("L", "RGB") or not np.array_equal(still.rgb, plain):
        raise RefusedError("its jpg is CMYK, or has a colour profile other than sRGB")
    height, width = still.upright.shape[:2]
    return width, height
