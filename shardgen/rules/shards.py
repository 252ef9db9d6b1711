"""Which stretches of which clips become samples, on which side of the split, in which shard. Pure
functions.

Time is counted in frames of the labels' 29.97 fps counter, whatever the rate of the media, and
leaves this module in milliseconds from the clip's first frame. A window lies inside one shot: its
first sample is not before the shot's first frame, its last one not after the shot's last frame.
Frames that two shots claim belong to neither.

Left out: aligning shots to real cuts in the picture. The labels' timecodes are what the captions
were written for.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from math import ceil, log
from typing import NamedTuple

import msgspec
import xxhash

from loader.manifest import shard_name
from loader.shape import Bucket
from shardgen.labels.parse import Label, Timed
from shardgen.labels.timecode import TimecodeError, timecode_frame

MAX_SHOTS = 500
_FRAME_MS = 1001 / 30


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One sample to be: a stretch of one shot. `start_ms` counts from the clip's first frame; fps
    is the target's.
    """

    key: str
    label: str
    clip_id: str
    media_type: str
    category: str
    programme: str
    split: str
    shot: int
    start_ms: int
    fps: float
    prompt: str
    bucket: str
    media_xxh3: str
    flags: tuple[str, ...] = ()


class ShardPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of one shard, decided before anything is encoded. Keys ascend."""

    name: str
    split: str
    bucket: str
    windows: list[Window]


class PlanError(ValueError):
    """A clip that gives no window: a stable reason code and what is wrong, with the label's value
    and the media's.
    """

    def __init__(self, reason: str, detail: str, declared: str = "", probed: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.declared, self.probed = reason, detail, declared, probed


class Shot(NamedTuple):
    """Frames first..last (inclusive, 29.97 fps) and the sentences that speak of them alone."""

    first: int
    last: int
    scenes: list[str]
    objects: list[str]


def programme_group(station: str, date: str, clip_id: str, group_by: Sequence[str]) -> str:
    """The programme that a clip probably comes from: clips of one group never stand on both sides
    of the split.
    """
    neighbourhood = str(int(clip_id) // 100) if clip_id.isascii() and clip_id.isdigit() else clip_id
    parts = {"station": station, "date": date, "neighbourhood": neighbourhood}
    return "/".join(parts[name] for name in group_by)


def split_of(group: str, seed: int, val_share: float) -> str:
    """ "val" for about `val_share` of all groups, by hash: what is added later moves nothing."""
    return (
        "val"
        if xxhash.xxh3_64_intdigest(f"{seed}/{group}".encode()) < val_share * 2**64
        else "train"
    )


def shots_of(label: Label) -> list[Shot]:
    """The label's shots in time order; empty if it has no timecodes at all.

    A shot is a range of the object level (of the scene descriptions where that has none). A scene
    description belongs to a shot if they share at least half of the shorter one; sentences
    without timecodes belong to a shot only if it is the only one. Raises PlanError
    (timecode_invalid, timecode_reversed).
    """
    ranges = [_range(each) for each in label.objects]
    scene_ranges = [_range(each) for each in label.scenes]
    distinct = sorted({each for each in ranges if each} or {each for each in scene_ranges if each})
    if len(distinct) > MAX_SHOTS:
        raise PlanError(
            "timecode_invalid", f"{len(distinct)} shots; a clip has at most {MAX_SHOTS}"
        )
    shots = [Shot(first, last, [], []) for first, last in distinct]
    for each, span in zip(label.objects, ranges, strict=True):
        for shot in shots:
            if span == (shot.first, shot.last) or (span is None and len(shots) == 1):
                shot.objects.append(each.text)
    for each, span in zip(label.scenes, scene_ranges, strict=True):
        for shot in shots:
            if _belongs(span, shot) or (span is None and len(shots) == 1):
                shot.scenes.append(each.text)
    return shots


def _range(timed: Timed) -> tuple[int, int] | None:
    if not timed.tc_in and not timed.tc_out:
        return None
    try:
        first, last = timecode_frame(timed.tc_in), timecode_frame(timed.tc_out)
    except TimecodeError as error:
        raise PlanError("timecode_invalid", str(error)) from error
    if last < first:
        raise PlanError(
            "timecode_reversed", f"tc_in {timed.tc_in} comes after tc_out {timed.tc_out}"
        )
    return first, last


def _belongs(span: tuple[int, int] | None, shot: Shot) -> bool:
    if span is None:
        return False
    shared = min(span[1], shot.last) - max(span[0], shot.first) + 1
    return 2 * shared >= min(span[1] - span[0], shot.last - shot.first) + 1


def last_frame(duration_s: float) -> int:
    """The number of the last frame of the 29.97 fps counter that begins before the end of the
    media.
    """
    return max(ceil(duration_s * 1000 / _FRAME_MS - 1e-3) - 1, 0)


def clamp_shots(shots: Sequence[Shot], duration_s: float) -> list[Shot]:
    """Shots against the probed length: one frame past the end is clamped. Raises PlanError
    (timecode_past_end).
    """
    last = last_frame(duration_s)
    for shot in shots:
        if shot.last > last + 1 or shot.first > last:
            raise PlanError(
                "timecode_past_end",
                f"a shot ends at frame {shot.last}, the last frame is {last}",
                f"{(shot.last + 1) * _FRAME_MS / 1000:.2f} s",
                f"{duration_s:.2f} s",
            )
    return [shot._replace(last=min(shot.last, last)) for shot in shots]


def exclusive_ranges(shots: Sequence[Shot]) -> list[tuple[int, int] | None]:
    """Per shot the longest run of frames that no other shot claims, the first of equal ones; None
    if there is none.
    """
    longest: list[tuple[int, int] | None] = []
    for number, shot in enumerate(shots):
        free = [(shot.first, shot.last)]
        for other in (each for i, each in enumerate(shots) if i != number):
            free = [
                part
                for first, last in free
                for part in (
                    (first, min(last, other.first - 1)),
                    (max(first, other.last + 1), last),
                )
                if part[0] <= part[1]
            ]
        longest.append(max(free, key=lambda part: part[1] - part[0], default=None))
    return longest


def window_starts_ms(
    first: int, last: int, num_frames: int, fps: float, per_shot: int
) -> list[int]:
    """Starts of up to `per_shot` windows inside frames first..last, evenly spread, never
    overlapping; [] if none fits.

    A window of n samples reaches from its start to its last sample, (n - 1) / fps later.
    """
    begin_ms, end_ms, reach_ms = (
        ceil(first * _FRAME_MS),
        last * _FRAME_MS,
        (num_frames - 1) * 1000 / fps,
    )
    slack_ms = end_ms - begin_ms - reach_ms
    if slack_ms < 0:
        return []
    length_ms = num_frames * 1000 / fps
    count = min(per_shot, 1 + int(slack_ms // length_ms))
    gap_ms = (slack_ms - (count - 1) * length_ms) / (count + 1)
    return [begin_ms + int(gap_ms * (i + 1) + length_ms * i) for i in range(count)]


def nearest_aspect(width_px: float, height_px: float, buckets: Iterable[Bucket]) -> list[Bucket]:
    """The buckets whose aspect ratio is nearest to a picture's, most frames first, then most
    pixels.
    """
    aspect = log(width_px / height_px)
    ranked = sorted(
        buckets,
        key=lambda b: (
            round(abs(log(b.width_px / b.height_px) - aspect), 6),
            -b.num_frames,
            -b.width_px * b.height_px,
        ),
    )
    return [
        b for b in ranked if b.width_px * ranked[0].height_px == b.height_px * ranked[0].width_px
    ]


class Stretch(NamedTuple):
    """Windows of one shape in one shot; `number` is the shot's place in time."""

    number: int
    starts_ms: list[int]
    shot: Shot
    bucket: Bucket


def video_stretches(
    label: Label,
    duration_s: float,
    buckets: Sequence[Bucket],
    fps: float,
    per_shot: int,
    whole_clip: bool,
) -> tuple[list[Stretch], list[str]]:
    """Where a video's windows lie, in time order: in each shot of the longest shape that fits.
    With flags.

    A clip without timecodes counts as one shot (flag timecodes_missing); so does, if
    `whole_clip`, one whose timecodes are wrong (timecodes_wrong). Else those raise PlanError.
    """
    flags = []
    try:
        shots = clamp_shots(shots_of(label), duration_s)
    except PlanError:
        if not whole_clip:
            raise
        shots, flags = [], ["timecodes_wrong"]
    if not shots:
        flags = flags or ["timecodes_missing"]
        shots = [
            Shot(
                0,
                last_frame(duration_s),
                [each.text for each in label.scenes],
                [each.text for each in label.objects],
            )
        ]
    stretches = []
    for number, (shot, free) in enumerate(zip(shots, exclusive_ranges(shots), strict=True)):
        for bucket in buckets:
            if free and (starts_ms := window_starts_ms(*free, bucket.num_frames, fps, per_shot)):
                stretches.append(Stretch(number, starts_ms, shot, bucket))
                break
    return stretches, flags


def window_order(window: Window) -> tuple[str, str, str, str]:
    """Where a window comes when shards are cut: by split, bucket, its medium's hash, key."""
    return window.split, window.bucket, window.media_xxh3, window.key


def assign_shards(
    ordered: Iterable[Window], samples_per_shard: int, next_numbers: dict[tuple[str, str], int]
) -> Iterator[ShardPlan]:
    """Cut windows, which must come in `window_order`, into shards: numbers from `next_numbers`
    (default 0) on.

    Clips are taken in the order of their media's hashes, so a shard holds a random draw of them
    and all windows of a clip lie together (it is decoded once). Holds one shard at a time.
    """
    for (split, bucket), group in groupby(
        ordered, key=lambda window: (window.split, window.bucket)
    ):
        number = next_numbers.get((split, bucket), 0)
        while chosen := list(islice(group, samples_per_shard)):
            yield ShardPlan(
                name=shard_name(split, Bucket.parse(bucket), number),
                split=split,
                bucket=bucket,
                windows=sorted(chosen, key=lambda window: window.key),
            )
            number += 1
