"""Where the stored pixels of a picture go on a bucket's canvas."""

from fractions import Fraction
from typing import Literal

import msgspec

from loader.shape import Bucket

Fitting = Literal["letterbox", "crop"]


class Fit(msgspec.Struct, frozen=True):
    """Where the scaled picture lies on the bucket's canvas: its size, and its offset (negative:
    cropped). `factor` is the larger of the two scale factors against stored pixels; above 1 the
    picture was enlarged.
    """

    width_px: int
    height_px: int
    x_px: int
    y_px: int
    factor: float


def fit(
    width_px: int,
    height_px: int,
    sar: Fraction,
    rotation_deg: int,
    bucket: Bucket,
    fitting: Fitting,
) -> Fit:
    """The one resize from stored pixels to the bucket: letterbox keeps everything, crop fills
    everything.
    """
    turned = rotation_deg % 180 != 0
    shown_w, shown_h = Fraction(width_px) * sar, Fraction(height_px)
    stored_w, stored_h = (height_px, width_px) if turned else (width_px, height_px)
    if turned:
        shown_w, shown_h = shown_h, shown_w
    choose = min if fitting == "letterbox" else max
    scale = choose(bucket.width_px / shown_w, bucket.height_px / shown_h)
    width, height = max(round(shown_w * scale), 1), max(round(shown_h * scale), 1)
    return Fit(
        width,
        height,
        (bucket.width_px - width) // 2,
        (bucket.height_px - height) // 2,
        max(width / stored_w, height / stored_h),
    )
