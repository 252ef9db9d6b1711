"""What the colours of a frame mean: YUV matrix, range, transfer and primaries.

What is not stated is what players assume: BT.601 up to 576 lines and BT.709 above, narrow range.
What would need more than a matrix to look right is refused by name: HDR needs tone mapping, wide
gamuts and linear light a conversion that nobody asked for.
"""

from typing import Any

from av.video.reformatter import Colorspace

from loader.mp4 import BT709, FULL, NARROW, SCALER
from loader.sample import is_bt709
from shardgen.media.errors import MediaError

BT601 = Colorspace.ITU601
# Numbers of ITU-T H.273, as libavutil has them.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # to swscale's
_UNSTATED_MATRICES = (2, 3)
_BT2020_MATRICES = (9, 10)
_HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
_TRANSFERS = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428"}
_UNSTATED_PRIMARIES = 2
# swscale takes grey for full range, whatever is stated of it; with chroma it obeys
_WITH_CHROMA = {
    "gray": "yuv444p",
    "gray9le": "yuv444p9le",
    "gray10le": "yuv444p10le",
    "gray12le": "yuv444p12le",
    "gray14le": "yuv444p14le",
    "gray16le": "yuv444p16le",
    "ya8": "yuva444p",
    "ya16le": "yuva444p16le",
}
_PRIMARIES = {9: "BT.2020", 10: "SMPTE ST 428", 11: "DCI-P3", 12: "Display P3"}


def check_colour(frame: Any, context: Any) -> None:
    """Raises MediaError (media_hdr, media_colour) for colours that a YUV matrix alone does not
    make right on an SDR display. `context` is the codec context that decoded the frame.
    """
    transfer, primaries = int(context.color_trc), int(context.color_primaries)
    matrix = int(frame.colorspace)
    if transfer in _HDR:
        raise MediaError("media_hdr", f"transfer {_HDR[transfer]}; convert it to BT.709")
    wrong = ""
    if transfer in _TRANSFERS:
        wrong = f"transfer {_TRANSFERS[transfer]}"
    elif primaries in _PRIMARIES:
        wrong = f"primaries {_PRIMARIES[primaries]}"
    elif primaries == _UNSTATED_PRIMARIES and matrix in _BT2020_MATRICES:
        wrong = "matrix BT.2020, and so its primaries"
    elif not _is_without_matrix(frame.format) and matrix not in (*_MATRICES, *_UNSTATED_MATRICES):
        wrong = f"matrix number {matrix} of ITU-T H.273"
    if wrong:
        raise MediaError("media_colour", f"{wrong}; convert it to BT.709")


def _is_without_matrix(pixel_format: Any) -> bool:
    return bool(pixel_format.is_rgb) or pixel_format.name in _WITH_CHROMA


def with_stated_range(frame: Any) -> Any:
    """A frame whose range `source_colour` can state: grey of narrow range gets neutral chroma, with
    its samples as they are; any other frame stays.
    """
    if frame.color_range != NARROW or frame.format.name not in _WITH_CHROMA:
        return frame
    chromatic = frame.reformat(
        format=_WITH_CHROMA[frame.format.name],
        interpolation=SCALER,
        threads=1,
        src_color_range=FULL,
        dst_color_range=FULL,
    )
    chromatic.color_range = NARROW
    return chromatic


def source_colour(frame: Any) -> dict[str, Any]:
    """The arguments of `VideoFrame.reformat` that say how a frame's YUV becomes full-range RGB;
    none for a frame that is RGB already.
    """
    if frame.format.is_rgb:
        return {}
    guess = BT709 if is_bt709(frame.width, frame.height) else BT601
    full = frame.color_range == FULL or frame.format.name.startswith("yuvj")
    return {
        "src_colorspace": _MATRICES.get(int(frame.colorspace), guess),
        "src_color_range": FULL if full else NARROW,
        "dst_color_range": FULL,
    }
