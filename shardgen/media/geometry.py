"""How a stored picture is turned, and where it goes on a bucket's canvas."""

from fractions import Fraction
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from loader.shape import Bucket

Fitting = Literal["letterbox", "crop"]


class Orientation(NamedTuple):
    """One of the eight ways to lay a rectangle: mirrored left to right first, if at all, then
    turned anticlockwise.
    """

    quarter_turns: int = 0  # 0 to 3, anticlockwise
    mirrored: bool = False

    @property
    def swaps_sides(self) -> bool:
        """Whether width and height change places."""
        return self.quarter_turns % 2 == 1

    def apply(self, picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A stored picture [H, W, ...] as it is shown: a view."""
        return np.rot90(picture[:, ::-1] if self.mirrored else picture, self.quarter_turns)


# What is to be done for the values 1 to 8 of EXIF's Orientation (EXIF 2.32, 4.6.4).
EXIF_ORIENTATIONS = {
    1: Orientation(0, False),
    2: Orientation(0, True),
    3: Orientation(2, False),
    4: Orientation(2, True),
    5: Orientation(1, True),
    6: Orientation(3, False),
    7: Orientation(3, True),
    8: Orientation(1, False),
}


def orientation_of_matrix(matrix: np.ndarray[Any, Any]) -> Orientation | None:
    """The orientation that a display matrix int32 [9] stands for; None if it is none of the
    eight, but a turn by another angle, or a skew.

    The matrix is ISO/IEC 14496-12's a b u, c d v, x y w: a stored point (x right, y down) is
    shown at (a x + c y, b x + d y), up to scale. A scale is no part of the orientation:
    libavformat has made a pixel aspect ratio of it.
    """
    a, b, c, d = (float(matrix[i]) for i in (0, 1, 3, 4))
    width, height = max(abs(a), abs(b)), max(abs(c), abs(d))
    if not width or not height:
        return None
    x_axis = a / width, b / width
    y_axis = c / height, d / height
    for turns in range(4):
        for mirrored in (False, True):
            # where the unit vectors of a picture go: np.rot90 sends right to up, and down to right
            right, down = ((-1, 0), (0, 1)) if mirrored else ((1, 0), (0, 1))
            for _ in range(turns):
                right, down = (right[1], -right[0]), (down[1], -down[0])
            if np.allclose(x_axis, right, atol=0.01) and np.allclose(y_axis, down, atol=0.01):
                return Orientation(turns, mirrored)
    return None


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
    orientation: Orientation,
    bucket: Bucket,
    fitting: Fitting,
) -> Fit:
    """The one resize from stored pixels to the bucket: letterbox keeps everything, crop fills
    everything.
    """
    shown_w, shown_h = Fraction(width_px) * sar, Fraction(height_px)
    stored_w, stored_h = width_px, height_px
    if orientation.swaps_sides:
        shown_w, shown_h = shown_h, shown_w
        stored_w, stored_h = stored_h, stored_w
    choose = min if fitting == "letterbox" else max
    scale = choose(bucket.width_px / shown_w, bucket.height_px / shown_h)
    width, height = max(round(shown_w * scale), 1), max(round(shown_h * scale), 1)
    return Fit(
        width_px=width,
        height_px=height,
        x_px=(bucket.width_px - width) // 2,
        y_px=(bucket.height_px - height) // 2,
        factor=max(width / stored_w, height / stored_h),
    )
