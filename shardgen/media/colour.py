"""What the colours of a frame mean: YUV matrix, range, transfer."""

from typing import Any

from av.video.reformatter import ColorRange, Colorspace, Interpolation

from loader.sample import is_bt709

HDR = {16: "PQ (SMPTE 2084)", 18: "HLG (ARIB STD-B67)"}
SCALER = (
    Interpolation.LANCZOS
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # AVColorSpace -> swscale's matrix
BT709, BT601, NARROW, FULL = Colorspace.ITU709, Colorspace.ITU601, ColorRange.MPEG, ColorRange.JPEG


def source_colour(frame: Any) -> dict[str, Any]:
    """The arguments of `VideoFrame.reformat` that say how a frame's YUV becomes full-range RGB;
    none for a frame that is RGB already.

    Unstated means what players assume: BT.601 up to 576 lines and BT.709 above, narrow range.
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
