"""Every still picture ends as a display shows it on black, or is refused by name."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from loader.shape import Bucket
from shardgen.media import images
from shardgen.media.decode import decode_window
from shardgen.media.errors import MediaError
from shardgen.media.geometry import EXIF_ORIENTATIONS
from shardgen.media.images import load_image, shown_pixels
from shardgen.media.probe import probe
from shardgen.rules.windows import nearest_aspect
from tools.fake.stills import (
    SRGB_XYZ,
    WIDE_XYZ,
    cmyk_profile,
    grey_profile,
    rgb_profile,
    write_png,
)

RAMP = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], read from a file's bytes."""
    return load_image(data).rgb.astype(int)


def reason(data: bytes) -> str:
    with pytest.raises(MediaError) as caught:
        load_image(data)
    return caught.value.reason


def colourful(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_an_opaque_picture_is_what_pillow_makes_of_it(mode: str) -> None:
    image = Image.fromarray(colourful()).convert(mode)
    assert np.array_equal(pixels(saved(image)), np.asarray(image.convert("RGB")))


def test_grey_of_16_bits_is_scaled_not_clipped() -> None:
    wide = (np.arange(1024) * 64).reshape(32, 32)
    data = write_png(wide, 0, 16)
    grey = pixels(data)
    assert np.abs(grey[..., 0] - wide / 257).max() <= 0.5
    assert np.ptp(grey, axis=-1).max() == 0 and load_image(data).bit_depth == 16


@pytest.mark.parametrize(("mode", "level"), [("I", 70_000), ("I", -1), ("F", 0.5), ("HSV", 9)])
def test_a_kind_of_pixels_that_can_not_be_shown_rightly_is_refused(mode: str, level: float) -> None:
    with pytest.raises(MediaError) as caught:
        shown_pixels(Image.new(mode, (4, 4), level))
    assert caught.value.reason == "media_undecodable"


def test_grey_of_16_bits_obeys_what_the_file_states_of_its_colours() -> None:
    wide = np.full((8, 8), 120 * 257)

    def profile(data: bytes) -> tuple[bytes, bytes]:
        return b"iCCP", b"name\0\0" + zlib.compress(data)

    # level 120 of linear light is level 181 of sRGB
    for chunk in (
        profile(grey_profile(1.0)),
        profile(rgb_profile(SRGB_XYZ, 1.0)),
        (b"gAMA", struct.pack(">I", 100_000)),
    ):
        assert np.abs(pixels(write_png(wide, 0, 16, chunk)) - 181).max() <= 2
    primaries = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    assert reason(write_png(wide, 0, 16, (b"cHRM", primaries))) == "media_colour"
    assert reason(write_png(wide, 0, 16, profile(b"none"))) == "media_colour"


@pytest.mark.parametrize("mode", ["LA", "RGBA", "RGBA in webp"])
def test_what_is_transparent_is_black_and_what_is_translucent_is_dark(mode: str) -> None:
    mode, _, kind = mode.partition(" in ")
    image = Image.fromarray(colourful()).convert(mode)
    image.putalpha(Image.fromarray(RAMP))
    options = {"lossless": True, "exact": True} if kind else {}
    colour = np.asarray(image.convert(mode.removesuffix("A")).convert("RGB")).astype(int)
    got = pixels(saved(image, kind or "PNG", **options))
    assert np.abs(got - colour * RAMP[..., None] / 255).max() <= 0.5 and got[0, 0].max() == 0


def test_a_colour_that_stands_for_transparency_is_black() -> None:
    red = np.array([200, 10, 20], np.uint8)
    rgb = np.where(RAMP[..., None] < 128, red, np.uint8(90))
    key = struct.pack(">3H", 200, 10, 20)
    assert np.array_equal(pixels(write_png(rgb, 2, 8, (b"tRNS", key)))[0, 0], [0, 0, 0])
    assert np.array_equal(pixels(write_png(rgb, 2, 8, (b"tRNS", key)))[-1, -1], [90, 90, 90])
    for depth in (1, 2, 4, 8, 16):
        top = 2**depth - 1
        grey = np.array([[0, top, top // 2 + 1, top]])
        data = write_png(grey, 0, depth, (b"tRNS", struct.pack(">H", top // 2 + 1)))
        shown = pixels(data)[0, :, 0].tolist()
        assert shown == ([0, 0, 0, 0] if depth == 1 else [0, 255, 0, 255]), depth
    palette = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    index = palette.getpixel((0, 0))
    assert pixels(saved(palette, transparency=index))[0, 0].max() == 0
    assert pixels(saved(palette, transparency=index))[-1, -1].min() > 80
    alphas = bytes(128 if i == index else 255 for i in range(4))
    half = pixels(saved(palette, transparency=alphas))[0, 0]
    assert np.abs(half - red * (128 / 255)).max() <= 2
    assert reason(write_png(rgb, 2, 16, (b"tRNS", key))) == "media_undecodable"


def test_a_profile_of_another_gamut_is_applied_and_srgb_changes_no_byte() -> None:
    image = Image.fromarray(colourful())
    for kind in ("PNG", "JPEG"):
        plain = pixels(saved(image, kind))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        assert np.array_equal(pixels(saved(image, kind, icc_profile=srgb)), plain)
        # makers of profiles round the primaries of sRGB in their own ways
        at = srgb.index(b"XYZ ", 460) + 8  # X of its red
        red = int.from_bytes(srgb[at : at + 4], "big") + 30
        other = srgb[:at] + red.to_bytes(4, "big") + srgb[at + 4 :]
        assert np.array_equal(pixels(saved(image, kind, icc_profile=other)), plain)
        wide = pixels(saved(image, kind, icc_profile=rgb_profile(WIDE_XYZ, 2.2)))
        assert np.abs(wide - plain).max() > 20
    # the full red of a wide gamut lies outside sRGB, a grey is the same grey in both
    grey = Image.new("RGB", (8, 8), (120, 120, 120))
    assert np.abs(pixels(saved(grey, icc_profile=rgb_profile(WIDE_XYZ, 2.2))) - 120).max() <= 4
    dark = pixels(saved(grey, icc_profile=rgb_profile(SRGB_XYZ, 1.0)))
    assert np.abs(dark - 181).max() <= 2  # (120 / 255) of light is level 181 of sRGB


def test_profiles_of_grey_and_of_ink_are_applied() -> None:
    grey = Image.new("L", (8, 8), 120)
    assert np.abs(pixels(saved(grey, icc_profile=grey_profile(1.0))) - 181).max() <= 2
    assert np.abs(pixels(saved(grey, icc_profile=rgb_profile(SRGB_XYZ, 1.0))) - 181).max() <= 2
    # coloured inks that are a mid grey whatever is printed, and a black one that is black
    lab = np.full((2, 2, 2, 2, 3), (128, 128, 128), np.uint8)
    lab[0, 0, 0, 0], lab[..., 1, :] = (255, 128, 128), (0, 128, 128)
    for ink, level in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), 119), ((0, 255, 255, 0), 119)):
        image = Image.new("CMYK", (16, 16), ink)
        got = pixels(saved(image, "JPEG", quality=100, icc_profile=cmyk_profile(lab)))
        assert np.abs(got - level).max() <= 4, (ink, got[0, 0])
    plain = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(pixels(saved(plain, "JPEG", quality=100)) - [0, 255, 255]).max() <= 2


def test_a_profile_that_fits_not_or_is_broken_is_refused() -> None:
    rgb, profile = Image.fromarray(colourful()), rgb_profile(WIDE_XYZ, 2.2)
    assert reason(saved(rgb, icc_profile=grey_profile(1.8))) == "media_colour"
    assert reason(saved(rgb, icc_profile=b"no profile at all")) == "media_colour"
    assert reason(saved(rgb, icc_profile=profile[:150])) == "media_colour"
    # the name of its colour space is the 17th byte and the three after it
    no_name = profile[:16] + b"\xffGB " + profile[20:]
    assert reason(saved(rgb, icc_profile=no_name)) == "media_colour"
    assert reason(saved(rgb.convert("CMYK"), "JPEG", icc_profile=profile)) == "media_colour"


def test_the_gamma_and_the_primaries_of_a_png_count_where_nothing_better_is_stated() -> None:
    def png(*chunks: tuple[bytes, bytes]) -> bytes:
        return write_png(np.full((8, 8, 3), 120), 2, 8, *chunks)

    def gamma(value: float) -> tuple[bytes, bytes]:
        return b"gAMA", struct.pack(">I", round(value * 100_000))

    srgb = (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
    wide = (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000))
    assert (pixels(png(gamma(0.45455), srgb)) == 120).all()
    assert np.abs(pixels(png(gamma(1.0))) - 181).max() <= 1
    assert (pixels(png((b"sRGB", b"\0"), gamma(1.0), wide)) == 120).all()
    assert reason(png(gamma(0.45455), wide)) == "media_colour"
    assert (pixels(png((b"cICP", bytes([1, 13, 0, 1])))) == 120).all()
    assert reason(png((b"cICP", bytes([9, 16, 0, 1])))) == "media_hdr"
    assert reason(png((b"cICP", bytes([12, 13, 0, 1])))) == "media_colour"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_no_picture(kind: str) -> None:
    first, *others = [Image.new("RGB", (16, 16), (level, 0, 0)) for level in (0, 100, 200)]
    assert reason(saved(first, kind, save_all=True, append_images=others)) == "media_animated"


def test_of_a_camera_s_several_pictures_the_first_is_taken() -> None:
    first, other = (Image.new("RGB", (16, 16), (level,) * 3) for level in (50, 200))
    data = saved(first, "MPO", save_all=True, append_images=[other])
    assert np.abs(pixels(data) - 50).max() <= 1


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("value", range(1, 9))
def test_every_exif_orientation_is_laid_as_pillow_lays_it(
    tmp_path: Path, value: int, kind: str
) -> None:
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:32, :32], picture[:32, 96:] = (250, 20, 20), (20, 250, 20)
    exif = Image.Exif()
    exif[0x0112] = value
    path = tmp_path / f"a.{kind}"
    Image.fromarray(picture).save(path, exif=exif, quality=95, lossless=True)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = probe(path)
    assert found.shown_size == upright.shape[1::-1]
    buckets = [Bucket(128, 64, 1), Bucket(64, 128, 1)]
    (bucket,) = nearest_aspect(*found.shown_size, buckets)
    assert np.array_equal(decode_window(path, 0, 24.0, bucket)[0], upright)
    assert found.fit(bucket, "letterbox").factor == 1


def test_a_picture_that_would_fill_the_memory_is_refused_in_our_words() -> None:
    data = bytearray(write_png(np.zeros((8, 8)), 0, 8))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    with pytest.raises(MediaError, match=r"20000x20000 pixels; at most 178956970") as caught:
        load_image(bytes(data))
    assert caught.value.reason == "media_too_large"
    assert images.MAX_PIXELS == 178_956_970


def valid_jpegs() -> list[bytes]:
    """200 sound files: every way that Pillow has to write a JPEG."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(200):
        width, height = (int(side) for side in rng.integers(1, 80, 2))
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height))
        if number % 3 == 0:  # noise, with every code in it
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = image.convert(["RGB", "L", "CMYK", "RGB", "YCbCr"][number % 5])
        options: dict[str, Any] = {
            "quality": int(rng.choice([1, 30, 75, 95, 100])),
            "progressive": number % 4 == 1,
            "optimize": number % 4 == 2,
        }
        if image.mode != "L":
            options["subsampling"] = ["4:4:4", "4:2:2", "4:2:0", "4:1:1"][number // 5 % 4]
        if number % 7 == 3:
            options["restart_marker_blocks"] = int(rng.integers(1, 6))
        if number % 7 == 5:
            options["restart_marker_rows"] = 1
        if number % 6 == 1:
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(1, 9))
            options |= {"exif": exif, "comment": b"a comment", "dpi": (72, 300)}
        made.append(saved(image, "JPEG", **options) + (b"camera" * 9 if number % 11 == 4 else b""))
    return made


def test_no_sound_jpeg_is_refused_and_its_pixels_are_pillow_s() -> None:
    for number, data in enumerate(valid_jpegs()):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(pixels(data), np.asarray(image.convert("RGB"))), number


@pytest.mark.parametrize(
    "options", [{}, {"optimize": True}, {"restart_marker_rows": 1}, {"subsampling": "4:4:4"}]
)
def test_a_jpeg_whose_bytes_were_overwritten_is_refused(options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise).resize((256, 256)), "JPEG", quality=90, **options)
    refused = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        start = int(rng.integers(len(data) // 4, len(data) // 2))
        data[start : start + 512] = bytes(rng.integers(0, 256, 512, dtype=np.uint8))
        try:
            load_image(bytes(data))
        except MediaError as error:
            assert error.reason == "media_undecodable"
            refused += 1
    assert refused >= 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0\xff",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x99\0\0\0\0",
    ],
    ids=["empty", "cut", "nowhere", "an orientation past the end"],
)
def test_exif_that_can_not_be_read_is_upright_and_says_nothing(kind: str, exif: bytes) -> None:
    still = load_image(saved(Image.fromarray(colourful()), kind, exif=exif))
    assert still.orientation == EXIF_ORIENTATIONS[1]


@pytest.mark.parametrize("brand", [b"avif", b"heic", b"mif1"])
def test_a_picture_in_an_mp4_s_boxes_is_no_film(brand: bytes) -> None:
    boxes = struct.pack(">I4s4sI4s", 24, b"ftyp", brand, 0, b"miaf") + bytes(64)
    with pytest.raises(MediaError, match="HEIF and AVIF pictures are not handled") as caught:
        probe(boxes)
    assert caught.value.reason == "media_undecodable"
