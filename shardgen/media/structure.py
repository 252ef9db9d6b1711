"""Whether a file is as long as its own structure says.

A file that was cut between two packets decodes without an error. But most containers write the
length of what follows before it, so the cut is found to the byte. Formats that don't (program and
raw streams) can't tell: one that ends between two frames is whole. So is a transport stream
that ends between two of its packets, or a DV stream between two frames, which are of one length.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# Boxes of MP4 and MOV whose loss matters. What follows the last one may be anything.
_BOXES = (b"moov", b"mdat", b"moof", b"ftyp", b"free", b"skip", b"wide", b"styp", b"sidx", b"mfra")
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_MXF_PARTITION = bytes.fromhex("060e2b34020501010d01020101")
# The first block of a raw DV frame, of 525 lines and of 625; what its kind is multiplied by.
_DV_525, _DV_625 = bytes.fromhex("1f07003f"), bytes.fromhex("1f0700bf")
_DV_KIND_AT, _DV_CHANNELS = 451, {0x04: 2, 0x14: 4, 0x18: 2}
# Lengths of a transport stream's packets and where in them the sync byte stands: plain, with a
# time stamp before it (M2TS), with a check sum after it.
_TS_PACKETS, _TS_SYNC = ((188, 0), (192, 4), (204, 0)), 0x47


def missing_bytes(source: Path | bytes) -> int:
    """How many bytes a file's structure promises past its end: 0 for a whole file, and for one
    whose format makes no such promise. Raises OSError.
    """
    if isinstance(source, bytes):
        return _missing(io.BytesIO(source))
    with source.open("rb") as file:
        return _missing(file)


def has_gap(source: Path | bytes, number: int) -> bool:
    """Whether a transport stream lacks packets within the first picture of its stream `number`. Of
    those that it lacks later libavformat tells. Raises OSError.
    """
    if isinstance(source, bytes):
        return _has_gap(io.BytesIO(source), number)
    with source.open("rb") as file:
        return _has_gap(file, number)


def _missing(file: BinaryIO) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    walk: Callable[[BinaryIO, int], int] | None = None
    if head[4:8] in _BOXES:
        walk = _end_of_boxes
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        walk = _end_of_ebml
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        walk = _end_of_riff
    elif head == _ASF_HEADER:
        walk = _end_of_asf
    elif head.startswith(_MXF_PARTITION):
        walk = _end_of_mxf
    elif head[:3] == b"FLV":
        walk = _end_of_flv
    elif head[:4] == b"OggS":
        walk = _end_of_ogg
    elif head[:4] in (_DV_525, _DV_625):
        walk = _end_of_dv
    elif _TS_SYNC in (head[0:1] + head[4:5]):
        walk = _end_of_packets
    return max(walk(file, size) - size, 0) if walk else 0


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """ISO/IEC 14496-12, 4.2: a box is a 32-bit size and a type; size 1 puts a 64-bit one after
    them, size 0 reaches to the end of the file.
    """
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or (head[4:8] not in _BOXES and position + length > size):
            return size
        position += length
    return position


def _end_of_ebml(file: BinaryIO, size: int) -> int:
    """RFC 8794: an element is an id, a length and its data; a length of all ones is unknown, and
    then the data's own elements say where it ends.
    """
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(12)
        id_length = _vint_length(head)
        length_length = _vint_length(head[id_length:])
        if not id_length or not length_length or id_length + length_length > len(head):
            return size
        element = int.from_bytes(head[:id_length], "big")
        bits = 7 * length_length
        length = int.from_bytes(head[id_length : id_length + length_length], "big") % (1 << bits)
        position += id_length + length_length
        if length == (1 << bits) - 1:
            if element not in (_SEGMENT, _CLUSTER):
                return size
            continue
        position += length
    return position


def _vint_length(data: bytes) -> int:
    """Bytes of a variable-length integer: one more than the zero bits before its first one."""
    return 9 - data[0].bit_length() if data and data[0] else 0


def _end_of_riff(file: BinaryIO, size: int) -> int:
    """One RIFF chunk, or several (OpenDML). Recorders that were cut off leave the length 0 or all
    ones.
    """
    position = 0
    while position + 12 <= size:
        file.seek(position)
        head = file.read(8)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or not 0 < length < 1 << 31:
            return size
        position += 8 + length
    # the padding of an odd last chunk is often left out
    return max(position - 1, 0)


def _end_of_asf(file: BinaryIO, size: int) -> int:
    """The header object says where the data object begins, and that how long it is (0: live)."""
    file.seek(16)
    position = int.from_bytes(file.read(8), "little")
    file.seek(position)
    head = file.read(24)
    return position + int.from_bytes(head[16:24], "little") if head[:16] == _ASF_DATA else size


def _end_of_mxf(file: BinaryIO, size: int) -> int:
    """SMPTE ST 377-1: a key of 16 bytes, a length and a value, one after the other. The header
    says where the last partition begins, once the file is closed.
    """
    file.seek(0)
    head = file.read(64)
    value = 17 + (head[16] & 0x7F if head[16] & 0x80 else 0)
    # after two numbers of version, the grid and two other offsets
    footer = int.from_bytes(head[value + 24 : value + 32], "big")
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(25)
        if len(head) < 17:
            return position + 17
        if head[:4] != _MXF_PARTITION[:4]:
            return max(size, footer)
        length, length_bytes = head[16], 0
        if length & 0x80:
            length_bytes = length & 0x7F
            length = int.from_bytes(head[17 : 17 + length_bytes], "big")
        position += 17 + length_bytes + length
    return max(position, footer)


def _end_of_flv(file: BinaryIO, size: int) -> int:
    """A tag is 11 bytes, of which three say how long its data are, the data, and 4 bytes more."""
    file.seek(5)
    position = int.from_bytes(file.read(4), "big") + 4
    while position + 11 <= size:
        file.seek(position + 1)
        position += 11 + int.from_bytes(file.read(3), "big") + 4
    return position if position > size else position + 11 * (position < size)


def _end_of_ogg(file: BinaryIO, size: int) -> int:
    """RFC 3533: a page is 27 bytes, the last of which counts the segments, a byte for the length of
    each, and the segments.
    """
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(27 + 255)
        if head[:4] != b"OggS"[: len(head)]:
            return size
        if len(head) < 27 or len(head) < 27 + head[26]:
            return size + 1
        position += 27 + head[26] + sum(head[27 : 27 + head[26]])
    return position


def _end_of_dv(file: BinaryIO, size: int) -> int:
    """SMPTE ST 314 and 370: a frame is 10 or 12 sequences of 150 blocks of 80 bytes, for each of
    its channels. libavformat fills up a last frame with what the one before held.
    """
    file.seek(0)
    head = file.read(_DV_KIND_AT + 1)
    num_sequences = 12 if head[:4] == _DV_625 else 10
    num_channels = _DV_CHANNELS.get(head[-1] & 0x1F, 1)
    frame_bytes = num_channels * num_sequences * 150 * 80
    return -(-size // frame_bytes) * frame_bytes


def _end_of_packets(file: BinaryIO, size: int) -> int:
    length, sync = _packets_of(file)
    if not length:
        return size
    whole = size // length * length
    file.seek(whole + sync)
    # a rest that begins otherwise is padding
    return whole + length if file.read(1) == bytes([_TS_SYNC]) else size


def _packets_of(file: BinaryIO) -> tuple[int, int]:
    """The kind of a transport stream's packets, of _TS_PACKETS; zeros for another file."""
    for length, sync in _TS_PACKETS:
        file.seek(0)
        head = file.read(5 * length)[sync::length]
        if head and all(byte == _TS_SYNC for byte in head):
            return length, sync
    return 0, 0


def _has_gap(file: BinaryIO, number: int) -> bool:
    """ISO/IEC 13818-1, 2.4.3: the packets of a stream are counted modulo 16. One may come twice,
    and some say that the count begins anew.
    """
    length, sync = _packets_of(file)
    file.seek(0)
    last: int | None = None  # the count of the packet before, from the start of a picture on
    while length:
        packet = file.read(length)[sync : sync + 188]
        if len(packet) < 188 or packet[0] != _TS_SYNC:
            break
        has_field, has_payload = packet[3] & 0x20, packet[3] & 0x10
        if int.from_bytes(packet[1:3], "big") & 0x1FFF != number or not has_payload:
            continue
        count = packet[3] & 15
        field_bytes = 1 + packet[4] if has_field else 0
        begins_anew = field_bytes > 1 and bool(packet[5] & 0x80)
        payload = packet[4 + field_bytes :]
        if last is not None and not begins_anew and (count - last) % 16 > 1:
            return True
        is_start = packet[1] & 0x40 and payload[:3] == b"\0\0\1"
        if is_start and last is not None and count != last:
            break
        if is_start or last is not None:
            last = count
    return False
