"""Where a picture goes on the canvas."""

from fractions import Fraction

import pytest

from loader.shape import Bucket
from shardgen.media.geometry import Orientation, fit


def test_geometry() -> None:
    bucket = Bucket(832, 480, 9)
    wide = fit(720, 480, Fraction(32, 27), Orientation(), bucket, "letterbox")
    assert (wide.width_px, wide.height_px, wide.x_px, wide.y_px) == (832, 468, 0, 6)
    assert wide.factor == pytest.approx(832 / 720)
    filled = fit(720, 480, Fraction(32, 27), Orientation(), bucket, "crop")
    assert (filled.width_px, filled.height_px, filled.x_px, filled.y_px) == (853, 480, -11, 0)
    turned = fit(1920, 1080, Fraction(1), Orientation(1), bucket, "letterbox")
    assert (turned.width_px, turned.height_px) == (270, 480)
    assert turned.factor == pytest.approx(270 / 1080)
