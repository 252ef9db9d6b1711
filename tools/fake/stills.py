"""PNG files and ICC profiles made by hand: what Pillow reads but can't write."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

# Red, green and blue of sRGB and of a wide gamut as XYZ under D50, as ICC profiles hold them.
SRGB_XYZ = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
WIDE_XYZ = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
_WHITE_XYZ = (0.9642, 1.0, 0.8249)


def write_png(
    pixels: np.ndarray, colour_type: int, bit_depth: int, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG of `pixels` [H, W] or [H, W, C], with further chunks before its data. `colour_type`
    is PNG's: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha.
    """
    height, width = pixels.shape[:2]
    if bit_depth == 16:
        rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    elif bit_depth < 8:
        bits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., -bit_depth:]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    else:
        rows = pixels.astype(np.uint8).reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rgb_profile(xyz: Sequence[tuple[float, float, float]], gamma: float) -> bytes:
    """An ICC profile (version 2) of three primaries and one gamma."""
    tags = {b"wtpt": _xyz(_WHITE_XYZ)}
    for name, colour in zip((b"r", b"g", b"b"), xyz, strict=True):
        tags[name + b"XYZ"] = _xyz(colour)
        tags[name + b"TRC"] = _gamma(gamma)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey with one gamma."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(_WHITE_XYZ), b"kTRC": _gamma(gamma)})


def cmyk_profile(lab: np.ndarray) -> bytes:
    """An ICC profile that maps the 16 corners of CMYK to `lab` uint8 [2, 2, 2, 2, 3]."""
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix
    table += identity * 4 + lab.astype(np.uint8).tobytes() + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(_WHITE_XYZ), b"A2B0": table})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text(b"desc"), b"cprt": _text(b"text"), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4xI", start + len(body), 0x02400000) + kind + space + connection
    header += bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(round(65536 * part) for part in _WHITE_XYZ))
    return header.ljust(128, b"\0") + table + body


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(256 * gamma))


def _text(kind: bytes) -> bytes:
    if kind == b"text":
        return b"text\0\0\0\0none\0"
    return b"desc\0\0\0\0" + struct.pack(">I", 5) + b"fake\0" + bytes(8 + 3 + 67)
