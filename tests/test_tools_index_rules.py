"""Of foreign clips and pictures those are refused that a build would refuse, and those that DALI
would show otherwise than a display.
"""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tools.fake.clips import grey, remux, write_clip
from tools.fake.stills import WIDE_XYZ, rgb_profile
from tools.index_rules import RefusedError, examine_clip, examine_image

FRAMES = 5


def refusal(data: bytes, num_frames: int = FRAMES) -> str:
    with pytest.raises(RefusedError) as caught:
        examine_clip(data, num_frames)
    return caught.value.reason


def test_an_edit_list_promises_no_frames_that_it_hides(tmp_path: Path) -> None:
    frames = [grey(16 + 4 * i) for i in range(12)]
    times = [Fraction(i, 25) for i in range(12)]
    intra = {"g": "1", "bf": "0"}
    whole = write_clip(tmp_path / "a.mp4", frames, times, options=intra)
    assert examine_clip(whole.read_bytes(), 12)[:2] == (160, 96)
    trimmed = remux(whole, tmp_path / "b.mp4", shift_s=-Fraction(4, 25)).read_bytes()
    assert examine_clip(trimmed, 8)[:2] == (160, 96)
    assert refusal(trimmed, 9) == "fewer than 9 frames"
    # frames that must be decoded, but are not shown: DALI on a GPU would show them
    chained = write_clip(tmp_path / "c.mp4", frames, times, options={"bf": "0"})
    hidden = remux(chained, tmp_path / "d.mp4", shift_s=-Fraction(4, 25)).read_bytes()
    assert "frames that are not shown" in refusal(hidden)


def test_the_rules_are_those_of_a_build(tmp_path: Path) -> None:
    times = [Fraction(i, 25) for i in range(8)]
    plain = write_clip(tmp_path / "a.mp4", [grey(99)] * 8, times)
    flags = {"movflags": "frag_keyframe+empty_moov"}
    fragmented = remux(plain, tmp_path / "f.mp4", options=flags).read_bytes()
    assert examine_clip(fragmented, 8)[:2] == (160, 96)
    assert refusal(plain.read_bytes()[:-900]) == "its mp4: media_truncated"
    for stated, reason in {
        "transfer=arib-std-b67": "its mp4: media_hdr",
        "colorprim=bt2020:colormatrix=bt2020nc": "its mp4: media_colour",
    }.items():
        matrix = 9 if "bt2020" in stated else 2
        path = write_clip(
            tmp_path / "h.mp4",
            [grey(99)] * 8,
            times,
            matrix=matrix,
            options={"x264-params": stated},
        )
        assert refusal(path.read_bytes()) == reason
    data = bytearray(plain.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 4] = (-65536).to_bytes(4, "big", signed=True)  # mirrored
    assert "is rotated" in refusal(bytes(data))


def test_a_picture_that_dali_would_show_otherwise_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise)

    def saved(image: PIL.Image.Image, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95, **options)
        return file.getvalue()

    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert examine_image(saved(image.crop((0, 0, 96, 64)), exif=exif)) == (64, 96)
    damaged = bytearray(saved(image))
    damaged[4000:4512] = bytes(np.random.default_rng(1).integers(0, 256, 512, dtype=np.uint8))
    for data, reason in (
        (saved(image, icc_profile=rgb_profile(WIDE_XYZ, 2.2)), "colour profile"),
        (saved(image.convert("CMYK")), "CMYK"),
        (bytes(damaged), "its jpg: media_undecodable"),
        (saved(image)[:3000], "its jpg: media_truncated"),
        (b"\x89PNG", "is no JPEG"),
    ):
        with pytest.raises(RefusedError, match=reason):
            examine_image(data)
