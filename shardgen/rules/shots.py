"""The shots of a video, from the timecodes of its label. Pure functions.

Time is counted in frames of the labels' 29.97 fps counter, whatever the rate of the media. Frames
that two shots claim belong to neither.

Left out: aligning shots to real cuts in the picture. The labels' timecodes are what the captions
were written for.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from shardgen.labels.parse import Label, Timed
from shardgen.labels.timecode import TimecodeError, timecode_frame

MAX_SHOTS = 500
FRAME_MS = 1001 / 30  # of the labels' counter


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


def whole_clip_shot(label: Label, last: int) -> Shot:
    """One shot from frame 0 to `last` with all sentences of the label."""
    scenes = [scene.text for scene in label.scenes]
    return Shot(0, last, scenes, [each.text for each in label.objects])


def shots_of(label: Label) -> list[Shot]:
    """The label's shots in time order; empty if it has no timecodes at all.

    A shot is a range of the object level (of the scene descriptions where that has none). A scene
    description belongs to a shot if they share at least half of the shorter one; sentences
    without timecodes belong to a shot only if it is the only one. Raises PlanError
    (timecode_invalid, timecode_reversed).
    """
    ranges = [_range(each) for each in label.objects]
    scene_ranges = [_range(each) for each in label.scenes]
    # The object level says where the shots are; only where it has no timecodes the scenes do.
    distinct = sorted({each for each in ranges if each} or {each for each in scene_ranges if each})
    if len(distinct) > MAX_SHOTS:
        raise PlanError(
            "timecode_invalid", f"{len(distinct)} shots; a clip has at most {MAX_SHOTS}"
        )
    shots = [Shot(first, last, [], []) for first, last in distinct]
    # An object sentence belongs to the shot of exactly its range.
    for each, span in zip(label.objects, ranges, strict=True):
        for shot in shots:
            if span == (shot.first, shot.last) or (span is None and len(shots) == 1):
                shot.objects.append(each.text)
    # A scene description may span several shots, and belongs to all that it mostly covers.
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
    return max(ceil(duration_s * 1000 / FRAME_MS - 1e-3) - 1, 0)


def first_frame(start_s: float) -> int:
    """The number of the first frame of the 29.97 fps counter at which there is a picture."""
    return ceil(start_s * 1000 / FRAME_MS - 1e-3)


def clamp_shots(shots: Sequence[Shot], duration_s: float, first: int = 0) -> list[Shot]:
    """Shots against the probed picture, which is there from frame `first` until `duration_s`:
    what comes before it and one frame past the end are clamped. Raises PlanError
    (timecode_past_end, timecode_before_start).
    """
    last = last_frame(duration_s)
    for shot in shots:
        if shot.last < first:
            raise PlanError(
                "timecode_before_start",
                f"a shot ends at frame {shot.last}, the picture begins at frame {first}",
                f"{(shot.last + 1) * FRAME_MS / 1000:.2f} s",
                f"{first * FRAME_MS / 1000:.2f} s",
            )
        if shot.last > last + 1 or shot.first > last:
            raise PlanError(
                "timecode_past_end",
                f"a shot ends at frame {shot.last}, the last frame is {last}",
                f"{(shot.last + 1) * FRAME_MS / 1000:.2f} s",
                f"{duration_s:.2f} s",
            )
    return [
        shot._replace(first=max(shot.first, first), last=min(shot.last, last)) for shot in shots
    ]


def exclusive_ranges(shots: Sequence[Shot]) -> list[tuple[int, int] | None]:
    """Per shot the longest run of frames that no other shot claims, the first of equal ones; None
    if there is none.
    """
    longest: list[tuple[int, int] | None] = []
    for number, shot in enumerate(shots):
        free = [(shot.first, shot.last)]
        for other in (each for i, each in enumerate(shots) if i != number):
            # What `other` leaves of each run: a part before it and a part behind it, if any.
            before = [(first, min(last, other.first - 1)) for first, last in free]
            behind = [(max(first, other.last + 1), last) for first, last in free]
            parts = [part for pair in zip(before, behind, strict=True) for part in pair]
            free = [(first, last) for first, last in parts if first <= last]
        longest.append(max(free, key=lambda run: run[1] - run[0], default=None))
    return longest
