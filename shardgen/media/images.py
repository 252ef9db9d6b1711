"""Still pictures, as a display shows them: 8-bit sRGB on black.

Pillow decodes (it refuses cut-off files where ffmpeg doesn't), but what it makes of a file is not
yet what a display shows. Here the alpha channel and colour keys are put on black, 16-bit grey is
scaled to 8 bits, and an ICC profile or a PNG's gamma is applied. What can't be shown so is
refused by name: animations, HDR, other primaries, profiles that don't fit their picture.

A JPEG has no checksum, and libjpeg conceals damage. So libavcodec's decoder, told to fail, looks
at every JPEG first. It can't look at all of them: what it does not support (arithmetic coding,
some CMYK) passes, and of progressive ones it misses much. In any JPEG bytes may be overwritten by
others that are as valid. PNG has checksums; WebP has none, and only its decoder to find damage.
"""

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.Image import DecompressionBombError

from shardgen.media.errors import MediaError
from shardgen.media.geometry import EXIF_ORIENTATIONS, Orientation

# As Pillow refuses by itself. It warns from half of that on, through the process's warning
# filters; both are turned off in favour of our own message.
MAX_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = None

_FORMATS = ("PNG", "JPEG", "WEBP")
_EXIF_ORIENTATION = 0x0112
# Pictures in the boxes of an MP4. As a video one would lose its opacity, and most of its tiles.
_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"mif1", b"msf1")
# Pillow tells of odd metadata through the process's warning filters, amid a build's bar. None of
# it changes a pixel. The filters are not safe among threads.
_WARNINGS = threading.Lock()
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
_RGB_MODES = ("P", "PA", "RGB", "RGBA")
# A profile that moves no colour by more levels than this is sRGB: its makers round differently.
_SRGB_LEVELS = 2
# PNG's gAMA of sRGB and what libpng takes for no difference; cHRM of sRGB and its rounding.
_SRGB_GAMMA, _GAMMA_TOLERANCE = 1 / 2.2, 0.05
_SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_CHROMATICITY_TOLERANCE = 0.003
# Colour primaries and transfers of ITU-T H.273 that are sRGB's, or near enough for a display.
_CICP_PRIMARIES, _CICP_TRANSFERS, _CICP_HDR = (1,), (1, 6, 13, 14, 15), (16, 18)

Pixels = np.ndarray[Any, Any]


class Still(NamedTuple):
    """A picture: uint8 RGB [H, W, 3] as stored, how it is to be laid, and what the file was."""

    rgb: Pixels
    orientation: Orientation
    format: str  # png, jpeg, mpo, webp
    mode: str  # Pillow's
    bit_depth: int

    @property
    def upright(self) -> Pixels:
        """The picture as it is shown: uint8 RGB [H, W, 3]."""
        return np.ascontiguousarray(self.orientation.apply(self.rgb))


def is_image(source: Path | bytes) -> bool:
    """Whether a file, or a file's bytes, begins as a PNG, JPEG or WebP does. Raises MediaError,
    for HEIF and AVIF too, which would open as videos.
    """
    try:
        if isinstance(source, bytes):
            head = source[:12]
        else:
            with source.open("rb") as file:
                head = file.read(12)
    except OSError as error:
        raise MediaError("media_undecodable", f"can't be opened: {error.strerror}") from error
    if head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS:
        raise MediaError(
            "media_undecodable", "HEIF and AVIF pictures are not handled; convert it to PNG"
        )
    is_webp = head[:4] == b"RIFF" and head[8:] == b"WEBP"
    return is_webp or head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def load_image(source: Path | bytes) -> Still:
    """Decode a picture. Raises MediaError: media_undecodable, media_truncated, media_too_large,
    media_animated, media_colour, media_hdr.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise MediaError(
                "media_too_large",
                f"{image.width}x{image.height} pixels; at most {MAX_PIXELS} are decoded",
            )
        # the further pictures of an MPO are previews, or another eye's
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise MediaError(
                "media_animated", f"{getattr(image, 'n_frames', 0)} frames; an image holds one"
            )
        image.load()
        if image.format in ("JPEG", "MPO"):
            check_jpeg(data)
        orientation = _orientation(image)
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        if isinstance(error, MediaError):
            raise
        reason = "media_truncated" if "truncated" in str(error) else "media_undecodable"
        # Pillow's own words for it name an address in memory
        is_unknown = isinstance(error, UnidentifiedImageError)
        detail = "no PNG, JPEG or WebP that can be read" if is_unknown else str(error)
        raise MediaError(reason, detail) from error
    is_png = image.format == "PNG"
    # a PNG's bit depth is the 25th byte; Pillow makes 8 bits of less than 8
    bit_depth = data[24] if is_png else 8
    if is_png:
        _check_cicp(data)
    return Still(
        rgb=shown_pixels(image, bit_depth),
        orientation=orientation,
        format=(image.format or "").lower(),
        mode=image.mode,
        bit_depth=bit_depth,
    )


def check_jpeg(data: bytes) -> None:
    """Raises MediaError (media_undecodable) for a JPEG in which libavcodec finds damage."""
    decoder: Any = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    decoder.options = {"err_detect": "explode"}
    try:
        decoder.decode(av.Packet(data))
        decoder.decode(None)
    except av.InvalidDataError as error:
        raise MediaError("media_undecodable", "the JPEG's data is damaged") from error
    except av.FFmpegError:
        # a kind that libavcodec has not: Pillow decides alone
        pass


def shown_pixels(image: Image.Image, bit_depth: int = 8) -> Pixels:
    """A decoded picture as a display shows it on black: uint8 RGB [H, W, 3]. `bit_depth` is the
    file's. Raises MediaError.
    """
    if image.mode not in (*_GREY_MODES, *_RGB_MODES, "CMYK"):
        raise MediaError("media_undecodable", f"pixels of the kind {image.mode} are not handled")
    alpha = _alpha(image, bit_depth)
    rgb = _colours(image)
    if alpha is None or alpha.min() == 255:
        return rgb
    product = rgb.astype(np.uint16) * alpha[..., None]
    return ((product + 127) // 255).astype(np.uint8)


def _alpha(image: Image.Image, bit_depth: int) -> Pixels | None:
    """The opacity uint8 [H, W], out of a channel or of a colour that stands for nothing."""
    if "A" in image.getbands():
        return np.asarray(image.getchannel("A"))
    key = image.info.get("transparency")
    if key is None:
        return None
    if image.mode == "P":
        return np.asarray(image.convert("RGBA").getchannel("A"))
    if image.mode == "RGB" and bit_depth > 8:
        raise MediaError("media_undecodable", "a transparent colour of 16 bits is not handled")
    if image.mode == "1":
        key = 255 if key else 0  # Pillow before 13 gives the file's 1
    elif image.mode == "L" and bit_depth < 8:
        key = key * 255 // (2**bit_depth - 1)
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    is_key = (pixels == key).all(-1) if pixels.ndim == 3 else pixels == key
    return np.where(is_key, 0, 255).astype(np.uint8)


def _colours(image: Image.Image) -> Pixels:
    """uint8 RGB [H, W, 3] in sRGB, without regard to opacity."""
    stated = image.info  # an image that is made anew has none of it
    if image.mode in ("I", "I;16", "I;16B"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if profile := stated.get("icc_profile"):
        return _from_profile(image, profile)
    is_stated = "srgb" in stated
    primaries = stated.get("chromaticity")
    if primaries and not is_stated:
        _check_chromaticity(primaries)
    rgb = np.asarray(_opaque(image, "RGB"))
    gamma = stated.get("gamma")
    if not gamma or is_stated or abs(gamma / _SRGB_GAMMA - 1) < _GAMMA_TOLERANCE:
        return rgb
    levels = 255 * (np.arange(256) / 255) ** (_SRGB_GAMMA / gamma)
    return np.round(levels).astype(np.uint8)[rgb]


def _eight_bits(grey: Pixels) -> Pixels:
    """16-bit grey to 8 bits. Raises MediaError for grey of 32 bits."""
    wide = grey.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise MediaError("media_undecodable", "grey of more than 16 bits is not handled")
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """The colours without opacity. A palette's have to become RGB(A) before they are anything."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA").convert("RGB")
    return image.convert(mode)


def _from_profile(image: Image.Image, profile: bytes) -> Pixels:
    """Colours of an ICC profile to sRGB; left as they are where the profile is sRGB's."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
    except (OSError, ValueError, ImageCms.PyCMSError) as error:  # ValueError: a name not in ASCII
        raise MediaError("media_colour", f"its ICC profile can't be read: {error}") from error
    fits = {
        "GRAY": image.mode in _GREY_MODES,
        "RGB": image.mode in (*_GREY_MODES, *_RGB_MODES),
        "CMYK": image.mode == "CMYK",
    }
    if not fits.get(space, False):
        raise MediaError(
            "media_colour", f"its ICC profile is for {space}, its pixels are {image.mode}"
        )
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[space]
    try:
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        colours = _opaque(image, mode)
        if mode != "CMYK" and _moves_nothing(transform, mode):
            return np.asarray(colours.convert("RGB"))
        return np.asarray(ImageCms.applyTransform(colours, transform))
    except (ValueError, ImageCms.PyCMSError) as error:
        raise MediaError("media_colour", f"its ICC profile can't be applied: {error}") from error


def _moves_nothing(transform: Any, mode: str) -> bool:
    """Whether a transform leaves a lattice of colours where they are."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    if mode == "L":
        lattice = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, -1, 3)
    colours = Image.fromarray(np.ascontiguousarray(lattice)).convert(mode)
    moved = np.asarray(ImageCms.applyTransform(colours, transform)).astype(int)
    return bool(np.abs(moved - lattice).max() <= _SRGB_LEVELS)


def _orientation(image: Image.Image) -> Orientation:
    """EXIF's, as Pillow finds it, in XMP too. Unknown values count as upright, and so does EXIF
    that can't be read.
    """
    with _quiet():
        try:
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
        except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
            value = 1
    return EXIF_ORIENTATIONS.get(value, Orientation())


@contextmanager
def _quiet() -> Iterator[None]:
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_chromaticity(primaries: tuple[float, ...]) -> None:
    """PNG's cHRM: white, red, green and blue as x, y. Raises MediaError unless it is sRGB's."""
    if not np.allclose(primaries, _SRGB_CHROMATICITY, atol=_CHROMATICITY_TOLERANCE):
        raise MediaError(
            "media_colour", f"PNG primaries {primaries} are not those of sRGB; convert it"
        )


def _check_cicp(data: bytes) -> None:
    """PNG's cICP, which Pillow skips and which overrules the other ways to state a colour space.
    Raises MediaError unless it is SDR with the primaries of sRGB.
    """
    position = 8
    while position + 12 <= len(data):
        length, kind = (
            int.from_bytes(data[position : position + 4], "big"),
            data[position + 4 :][:4],
        )
        if kind == b"IDAT":
            return
        if kind == b"cICP":
            primaries, transfer = data[position + 8 : position + 10]
            if transfer in _CICP_HDR:
                raise MediaError("media_hdr", f"PNG transfer number {transfer} of ITU-T H.273")
            if primaries not in _CICP_PRIMARIES or transfer not in _CICP_TRANSFERS:
                raise MediaError(
                    "media_colour",
                    f"PNG primaries {primaries} and transfer {transfer} of ITU-T H.273; convert it "
                    f"to sRGB",
                )
        position += 12 + length
