"""Footage in, pixels out: probe a file, decode windows of it to constant rate at a bucket's size.

Frames are chosen by timestamp, never by number: output frame i of a window is the source frame on
the screen at `start + i / fps`, so 29.97, 25 and variable rates all come out at the right speed.
Each chosen frame is scaled once, from the source straight to its final size, with the pixel
aspect ratio, the rotation, the YUV matrix and the range that the file states (unstated: BT.601 up
to 576 lines and BT.709 above, narrow range, as players assume). Interlaced frames pass bwdif
first, one frame out for each frame in.

`probe` decodes the whole file. That is a second decode next to the one that feeds the encoder,
and it is deliberate: shards are planned from what the probe saw, so rot has to be found before
the plan, not in the middle of a shard. Decoders hide damage by default; here they are told to
fail, and packets are counted against the header.

Left out: seeking (a clip is at most some 45 s, all its windows come out of one pass, and a seek
can be wrong where a pass can't) and tone mapping (HDR is refused by name).
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import msgspec
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image, ImageOps
from PIL.Image import DecompressionBombError

from loader.shape import Bucket

Frames = np.ndarray[Any, Any]  # uint8 RGB, full range: [H, W, 3] or [F, H, W, 3]
Fitting = Literal["letterbox", "crop"]
# formats that hold their own pictures: a playlist would take them from files that nobody hashed
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mxf,mxf_opatom,mpegts,mpeg,mpegvideo,m4v,h264,hevc,mjpeg,asf,flv,ogg,gxf,dv,"
    "nut,ivf"
)
# start_ms is rounded to whole milliseconds; a frame may begin up to 0.5 ms after it
START_TOLERANCE_S = 0.001
_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_HDR = {16: "PQ (SMPTE 2084)", 18: "HLG (ARIB STD-B67)"}
SCALER = (
    Interpolation.LANCZOS
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # AVColorSpace -> swscale's matrix
BT709, BT601, NARROW, FULL = Colorspace.ITU709, Colorspace.ITU601, ColorRange.MPEG, ColorRange.JPEG


class MediaError(ValueError):
    """A file that can't be used. `reason` is a stable code, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling between processes
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Probe(msgspec.Struct, frozen=True):
    """What a file really is. `width_px` x `height_px` as stored, before SAR and rotation;
    `rotation_deg` is anticlockwise, as the display matrix states it; `fps`, `num_frames` and
    `duration_s` from the decoded timestamps. An image has fps 0.0, one frame and no duration.
    """

    media_type: Literal["video", "image"]
    width_px: int
    height_px: int
    sar_num: int
    sar_den: int
    rotation_deg: int
    fps: float
    num_frames: int
    duration_s: float
    codec: str
    pix_fmt: str
    bit_depth: int
    color_range: str
    variable_frame_rate: bool
    color_matrix: str = "unspecified"
    interlaced: bool = False
    has_audio: bool = False


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


def probe(path: Path) -> Probe:
    """Decode the whole file and say what it is. Raises MediaError (media_empty,
    media_undecodable, media_truncated, media_no_video, media_hdr, media_timestamps,
    media_rotation).
    """
    if _is_image(path):
        return _probe_image(path)
    first: Any = None
    starts_s: list[float] = []
    end_s = 0.0
    with _open(path) as container:
        stream = container.streams.video[0]
        sar = stream.sample_aspect_ratio or Fraction(1)
        for frame, begin_s, frame_end_s in _timed(_decoded(container), stream.average_rate):
            first = first or frame
            starts_s.append(begin_s)
            end_s = frame_end_s
        if first is None:
            raise MediaError("media_undecodable", "no frame could be decoded")
        if stream.codec_context.color_trc in _HDR:
            raise MediaError(
                "media_hdr",
                f"transfer {_HDR[stream.codec_context.color_trc]}; convert it to BT.709",
            )
        intervals_s = np.diff(starts_s)
        return Probe(
            media_type="video",
            width_px=first.width,
            height_px=first.height,
            sar_num=sar.numerator,
            sar_den=sar.denominator,
            rotation_deg=_rotation(first),
            fps=round(float(1 / intervals_s.mean()), 4)
            if len(intervals_s)
            else float(stream.average_rate or 0),
            num_frames=len(starts_s),
            duration_s=round(end_s, 6),
            codec=stream.codec_context.name,
            pix_fmt=first.format.name,
            bit_depth=first.format.components[0].bits,
            color_range={1: "tv", 2: "pc"}.get(int(first.color_range), "unspecified"),
            # ms clocks jitter by 1
            variable_frame_rate=bool(len(intervals_s)) and bool(np.ptp(intervals_s) > 0.002),
            color_matrix={1: "bt709", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}.get(
                int(first.colorspace), "unspecified"
            ),
            interlaced=first.interlaced_frame,
            has_audio=bool(container.streams.audio),
        )


def decode_window(
    path: Path, start_ms: int, fps: float, bucket: Bucket, fitting: Fitting = "letterbox"
) -> Frames:
    """One window of a file: uint8 RGB [F, H, W, 3]. Raises MediaError."""
    return next(decode_windows(path, [start_ms], fps, bucket, fitting))[1]


def decode_windows(
    path: Path, starts_ms: Sequence[int], fps: float, bucket: Bucket, fitting: Fitting = "letterbox"
) -> Iterator[tuple[int, Frames]]:
    """All windows of one file from one pass: yields (index into starts_ms, uint8 RGB [F, H, W,
    3]) as each is complete.

    Times count from the first frame. Raises MediaError (media_truncated when the footage ends
    before a window does).
    """
    shape = bucket.num_frames, bucket.height_px, bucket.width_px, 3
    if _is_image(path):
        for index in range(len(starts_ms)):
            yield index, np.broadcast_to(_fit_image(_load_image(path), bucket, fitting), shape)
        return
    slots = sorted(
        (start_ms / 1000 + i / fps, index, i)
        for index, start_ms in enumerate(starts_ms)
        for i in range(bucket.num_frames)
    )
    windows: dict[int, Frames] = {}
    done, end_s = 0, 0.0
    with _open(path) as container:
        stream = container.streams.video[0]
        sar = stream.sample_aspect_ratio or Fraction(1)
        for frame, _, end_s in _timed(_deinterlaced(_decoded(container)), stream.average_rate):
            picture = None
            while slots[done][0] + START_TOLERANCE_S < end_s:
                _, index, i = slots[done]
                if picture is None:
                    picture = _fit_frame(frame, sar, _rotation(frame), bucket, fitting)
                windows.setdefault(index, np.empty(shape, np.uint8))[i] = picture
                if i == bucket.num_frames - 1:
                    yield index, windows.pop(index)
                done += 1
                if done == len(slots):
                    return
    raise MediaError(
        "media_truncated", f"the footage ends at {end_s:.3f} s, a window needs {slots[-1][0]:.3f} s"
    )


def _open(path: Path) -> Any:
    """An open container with at least one video stream, its decoder set to fail on damage, on one
    thread.
    """
    try:
        if path.stat().st_size == 0:
            raise MediaError("media_empty", "the file has 0 bytes")
        container = av.open(
            str(path),
            "r",
            container_options={"format_whitelist": _FORMATS},
            metadata_errors="replace",
        )  # titles are in CP949 as often as in UTF-8
    except av.ArgumentError as error:
        raise MediaError(
            "media_undecodable", f"can't be opened, or its format is none of {_FORMATS}"
        ) from error
    except (av.FFmpegError, OSError) as error:
        raise MediaError("media_undecodable", f"can't be opened: {error}") from error
    if not container.streams.video:
        container.close()
        raise MediaError("media_no_video", "the file has no video stream")
    context: Any = container.streams.video[0].codec_context
    if context is None:
        container.close()
        raise MediaError("media_undecodable", "there is no decoder for its codec")
    context.thread_count = 1
    context.options = {"err_detect": "explode"}
    return container


def _timed(
    frames: Iterator[Any], average_rate: Fraction | None
) -> Iterator[tuple[Any, float, float]]:
    """(frame, begin_s, end_s) for each frame, counted from the first one. Raises MediaError."""
    origin: Fraction | None = None
    held: tuple[Any, float] | None = None
    begin_s = -1.0
    for frame in frames:
        if frame.pts is None:
            raise MediaError("media_timestamps", "a frame has no timestamp")
        time = frame.pts * frame.time_base
        origin = time if origin is None else origin
        previous_s, begin_s = begin_s, float(time - origin)
        if begin_s <= previous_s:
            raise MediaError(
                "media_timestamps", f"timestamps go back from {previous_s} to {begin_s} s"
            )
        if held is not None:
            yield *held, begin_s
        held = frame, begin_s
    if held is not None:
        frame, begin_s = held
        length_s = frame.duration * frame.time_base if frame.duration else 1 / (average_rate or 24)
        yield frame, begin_s, begin_s + float(length_s)


def _decoded(container: Any) -> Iterator[Any]:
    """All frames in display order. Raises MediaError at the first damage, and at the end if some
    were missing.
    """
    stream = container.streams.video[0]
    num_packets, demuxed_s = 0, 0.0
    try:
        for packet in container.demux():
            if packet.pts is not None:
                demuxed_s = max(
                    demuxed_s, float((packet.pts + (packet.duration or 0)) * packet.time_base)
                )
            if packet.is_corrupt:
                raise MediaError("media_truncated", f"packet {num_packets} is cut off")
            if packet.stream is not stream:
                continue
            num_packets += packet.size > 0
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise MediaError(
                        "media_undecodable", f"a frame near packet {num_packets} is damaged"
                    )
                yield frame
    except av.FFmpegError as error:
        raise MediaError(
            "media_undecodable", f"packet {num_packets} does not decode: {error.strerror}"
        ) from error
    except IndexError:  # PyAV's, at the end of a file that got a stream in its middle: those it began with are through
        pass
    if stream.frames > num_packets:
        raise MediaError(
            "media_truncated",
            f"the header promises {stream.frames} frames, the file holds {num_packets}",
        )
    promised_s = (container.duration or 0) / av.time_base + max(
        container.start_time or 0, 0
    ) / av.time_base
    if promised_s - demuxed_s > 0.5:
        raise MediaError(
            "media_truncated",
            f"the header promises {promised_s:.2f} s, the file holds {demuxed_s:.2f} s",
        )


def _deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """Frames as they are up to the first interlaced one, from there on through bwdif, which
    passes progressive ones.
    """
    graph: Any = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base,
            )
            bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
            graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _pulled(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[Any]:
    try:
        while True:
            yield graph.vpull()
    except (av.BlockingIOError, av.EOFError):  # it wants another frame, or has none left
        return


def _rotation(frame: Any) -> int:
    if frame.rotation % 90:
        raise MediaError(
            "media_rotation",
            f"turned by {frame.rotation} degrees; only multiples of 90 are handled",
        )
    return int(frame.rotation)


def _fit_frame(
    frame: Any, sar: Fraction, rotation_deg: int, bucket: Bucket, fitting: Fitting
) -> Frames:
    """Scale one frame, turn it, and place it on the bucket's canvas: uint8 RGB [H, W, 3]."""
    place = fit(frame.width, frame.height, sar, rotation_deg, bucket, fitting)
    turned = rotation_deg % 180 != 0
    width, height = (
        (place.height_px, place.width_px) if turned else (place.width_px, place.height_px)
    )
    colour: dict[str, Any] = {}
    if not frame.format.is_rgb:
        guess = BT709 if frame.height > 576 or frame.width >= 1280 else BT601
        full = frame.color_range == FULL or frame.format.name.startswith("yuvj")
        colour = {
            "src_colorspace": _MATRICES.get(int(frame.colorspace), guess),
            "src_color_range": FULL if full else NARROW,
            "dst_color_range": FULL,
        }
    scaled = frame.reformat(
        width=width, height=height, format="rgb24", interpolation=SCALER, threads=1, **colour
    )
    return _place(np.rot90(scaled.to_ndarray(), rotation_deg // 90), place, bucket)


def _place(picture: Frames, place: Fit, bucket: Bucket) -> Frames:
    canvas = np.zeros((bucket.height_px, bucket.width_px, 3), np.uint8)
    x, y, left, top = (
        max(place.x_px, 0),
        max(place.y_px, 0),
        max(-place.x_px, 0),
        max(-place.y_px, 0),
    )
    part = picture[top : top + bucket.height_px, left : left + bucket.width_px]
    canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
    return canvas


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(_IMAGE_MAGIC)
    except OSError as error:
        raise MediaError("media_undecodable", f"can't be opened: {error.strerror}") from error


def _load_image(path: Path) -> Image.Image:
    """A decoded picture, still as stored (no EXIF turn). Pillow: it refuses cut-off files, ffmpeg
    doesn't.
    """
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            image.load()
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        reason = "media_truncated" if "truncated" in str(error) else "media_undecodable"
        raise MediaError(reason, str(error)) from error
    return image


def _fit_image(image: Image.Image, bucket: Bucket, fitting: Fitting) -> Frames:
    frame = av.VideoFrame.from_image(ImageOps.exif_transpose(image).convert("RGB"))
    return _fit_frame(frame, Fraction(1), 0, bucket, fitting)


def _probe_image(path: Path) -> Probe:
    image = _load_image(path)
    turn = {3: 180, 6: -90, 8: 90}.get(image.getexif().get(0x0112, 1), 0)
    return Probe(
        media_type="image",
        width_px=image.width,
        height_px=image.height,
        sar_num=1,
        sar_den=1,
        rotation_deg=turn,
        fps=0.0,
        num_frames=1,
        duration_s=0.0,
        codec=(image.format or "").lower(),
        pix_fmt=image.mode,
        bit_depth=16 if image.mode.startswith("I") else 8,
        color_range="pc",
        variable_frame_rate=False,
    )
