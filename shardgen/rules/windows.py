"""Which stretches of a clip become samples. Pure functions.

A window lies inside one shot: its first sample is not before the shot's first frame, its last one
not after the shot's last frame. Shots are counted in frames of the labels' 29.97 fps counter;
windows leave this module in milliseconds from the container's start, which is 0:00 on a player's
display.
"""

from collections.abc import Iterable, Sequence
from math import ceil, log
from typing import NamedTuple

import msgspec

from loader.sample import sample_key
from loader.shape import Bucket
from shardgen.labels.parse import Label
from shardgen.media.probe import Probe
from shardgen.rules.config import RulesConfig
from shardgen.rules.prompt import prompt_clean, prompt_of
from shardgen.rules.shots import (
    FRAME_MS,
    PlanError,
    Shot,
    clamp_shots,
    exclusive_ranges,
    first_frame,
    last_frame,
    shots_of,
    whole_clip_shot,
)
from shardgen.rules.split import split_of


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One sample to be: a stretch of one shot. `start_ms` counts from the container's start; fps is
    the target's.
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


class Origin(NamedTuple):
    """What a clip's windows say about where they come from. `label` is the label file's path
    below the root.
    """

    label: str
    media_type: str
    category: str
    programme: str
    media_xxh3: str


class Stretch(NamedTuple):
    """Windows of one shape in one shot; `number` is the shot's place in time."""

    number: int
    starts_ms: list[int]
    shot: Shot
    bucket: Bucket


def clip_windows(
    origin: Origin, label: Label, probe: Probe, rules: RulesConfig, *, whole_clip: bool = False
) -> list[Window]:
    """All windows of a clip, in time order, with its flags (timecodes_missing, timecodes_wrong).

    `whole_clip` takes a clip with wrong timecodes as one shot, as filters.wrong_timecodes can ask
    for. Raises PlanError.
    """
    recipe, media_type = rules.windows, origin.media_type
    buckets = nearest_aspect(*probe.shown_size, recipe.buckets_for(media_type))
    # The label's rule says so too, but with score_only it stops nobody, nor does it stop whoever
    # inspects the clip.
    if not buckets:
        raise PlanError("media_type_unwanted", f"windows.buckets has no shape for a {media_type}")

    flags: list[str] = []
    if media_type == "image":
        stretches = [Stretch(0, [0], whole_clip_shot(label, last=0), buckets[0])]
    else:
        filters = rules.filters
        stretches, flags = video_stretches(
            label,
            probe.duration_s,
            buckets,
            recipe.fps,
            recipe.per_shot,
            whole_clip or filters.wrong_timecodes == "whole_clip" or filters.score_only,
            first=first_frame(probe.start_s),
        )

    split = split_of(origin.programme, rules.split.seed, rules.split.val_share)
    windows = []
    for number, starts_ms, shot, bucket in stretches:
        prompt = prompt_clean(
            prompt_of(label, media_type, shot.scenes, shot.objects, parts=rules.prompt)
        )
        if not prompt:
            continue
        for start_ms in starts_ms:
            key = sample_key(origin.media_xxh3, label.clip_id, number, start_ms, bucket, recipe.fps)
            windows.append(
                Window(
                    key=key,
                    label=origin.label,
                    clip_id=label.clip_id,
                    media_type=media_type,
                    category=origin.category,
                    programme=origin.programme,
                    split=split,
                    shot=number,
                    start_ms=start_ms,
                    fps=recipe.fps,
                    prompt=prompt,
                    bucket=str(bucket),
                    media_xxh3=origin.media_xxh3,
                    flags=tuple(flags),
                )
            )
    if not windows:
        raise PlanError(
            "shot_short",
            f"no captioned shot is as long as a window of {buckets[-1]} at {recipe.fps} fps",
        )
    return windows


def video_stretches(
    label: Label,
    duration_s: float,
    buckets: Sequence[Bucket],
    fps: float,
    per_shot: int,
    whole_clip: bool,
    first: int = 0,
) -> tuple[list[Stretch], list[str]]:
    """Where a video's windows lie, in time order: in each shot of the longest shape that fits.
    With flags. The picture is there from frame `first` of the labels' counter until `duration_s`.

    A clip without timecodes counts as one shot (flag timecodes_missing); so does, if
    `whole_clip`, one whose timecodes are wrong (timecodes_wrong). Else those raise PlanError.
    """
    flags = []
    try:
        shots = clamp_shots(shots_of(label), duration_s, first)
    except PlanError:
        if not whole_clip:
            raise
        shots, flags = [], ["timecodes_wrong"]
    if not shots:
        flags = flags or ["timecodes_missing"]
        shots = [whole_clip_shot(label, last=last_frame(duration_s))._replace(first=first)]

    stretches = []
    for number, (shot, free) in enumerate(zip(shots, exclusive_ranges(shots), strict=True)):
        if free is None:
            continue
        begin, end = free
        # `buckets` has the longest first: a shot takes the first one that fits.
        for bucket in buckets:
            starts_ms = window_starts_ms(begin, end, bucket.num_frames, fps, per_shot)
            if starts_ms:
                stretches.append(Stretch(number, starts_ms, shot, bucket))
                break
    return stretches, flags


def window_starts_ms(
    first: int, last: int, num_frames: int, fps: float, per_shot: int
) -> list[int]:
    """Starts of up to `per_shot` windows inside frames first..last, evenly spread, never
    overlapping; [] if none fits.

    A window of n samples reaches from its start to its last sample, (n - 1) / fps later.
    """
    begin_ms = ceil(first * FRAME_MS)
    end_ms = last * FRAME_MS
    reach_ms = (num_frames - 1) * 1000 / fps
    slack_ms = end_ms - begin_ms - reach_ms
    if slack_ms < 0:
        return []
    # Windows follow each other at their full length, and what is left of the shot is shared out
    # as equal gaps: before the first, between each two, after the last.
    length_ms = num_frames * 1000 / fps
    count = min(per_shot, 1 + int(slack_ms // length_ms))
    gap_ms = (slack_ms - (count - 1) * length_ms) / (count + 1)
    return [begin_ms + int(gap_ms * (i + 1) + length_ms * i) for i in range(count)]


def nearest_aspect(width_px: float, height_px: float, buckets: Iterable[Bucket]) -> list[Bucket]:
    """The buckets whose aspect ratio is nearest to a picture's, most frames first, then most
    pixels.
    """
    aspect = log(width_px / height_px)

    def rank(bucket: Bucket) -> tuple[float, int, int]:
        distance = round(abs(log(bucket.width_px / bucket.height_px) - aspect), 6)
        return distance, -bucket.num_frames, -bucket.width_px * bucket.height_px

    ranked = sorted(buckets, key=rank)
    return [
        bucket
        for bucket in ranked
        if bucket.width_px * ranked[0].height_px == bucket.height_px * ranked[0].width_px
    ]
