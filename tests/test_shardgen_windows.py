"""Windows lie inside one shot, at the longest shape that fits, and never overlap."""

import random
from itertools import pairwise
from math import ceil

import pytest

from bench.label_tree import OBJECTS, SCENE, label_bytes, make_label
from loader.shape import Bucket
from shardgen.labels.parse import Label, parse_label
from shardgen.rules.shots import FRAME_MS, PlanError, Shot
from shardgen.rules.windows import nearest_aspect, video_stretches, window_starts_ms

LONG, SHORT = Bucket(1280, 704, 49), Bucket(1280, 704, 17)


def label(*shots: tuple[str, str]) -> Label:
    return parse_label(label_bytes(make_label("2400101", shots=shots)))


@pytest.mark.parametrize(
    ("tc_in", "tc_out", "reason"),
    [
        ("00:00:05;00", "00:00:02;00", "timecode_reversed"),
        ("00:01:00;00", "00:01:05;00", "timecode_invalid"),
        ("", "00:00:02;00", "timecode_invalid"),
        ("어제", "오늘", "timecode_invalid"),
    ],
)
def test_a_wrong_timecode_is_a_reason_or_the_whole_clip(
    tc_in: str, tc_out: str, reason: str
) -> None:
    with pytest.raises(PlanError) as caught:
        video_stretches(label((tc_in, tc_out)), 10.0, [LONG], 24.0, 1, whole_clip=False)
    assert caught.value.reason == reason
    (stretch,), flags = video_stretches(
        label((tc_in, tc_out)), 10.0, [LONG], 24.0, 1, whole_clip=True
    )
    assert flags == ["timecodes_wrong"]
    assert stretch.shot == Shot(0, 299, [SCENE] if tc_in else [], [OBJECTS[0]])


def test_missing_timecodes_mean_the_whole_clip_with_a_flag() -> None:
    (stretch,), flags = video_stretches(label(("", "")), 10.01, [LONG], 24.0, 1, whole_clip=False)
    assert flags == ["timecodes_missing"]
    assert (stretch.shot.first, stretch.shot.last, stretch.number) == (0, 299, 0)


def test_no_window_begins_before_the_picture() -> None:
    for shots, whole in ((("", ""), [15, 299]), (("00:00:00;00", "00:00:09;29"), [15, 299])):
        (stretch,), _ = video_stretches(
            label(shots), 10.01, [LONG], 24.0, 9, whole_clip=False, first=15
        )
        assert [stretch.shot.first, stretch.shot.last] == whole
        assert min(stretch.starts_ms) >= 500


def test_every_window_lies_inside_its_shot_and_overlaps_no_other() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        first = draw.randint(0, 4000)
        last, count = first + draw.randint(0, 900), draw.randint(1, 5)
        num_frames, fps = draw.choice([1, 5, 17, 49, 81]), draw.choice([24.0, 16.0, 23.976])
        starts = window_starts_ms(first, last, num_frames, fps, count)
        reach_ms = (num_frames - 1) * 1000 / fps
        assert len(starts) <= count
        assert bool(starts) == (ceil(first * FRAME_MS) + reach_ms <= last * FRAME_MS)
        for start in starts:
            assert first * FRAME_MS <= start and start + reach_ms <= last * FRAME_MS
        assert all(
            later - start >= int(num_frames * 1000 / fps) for start, later in pairwise(starts)
        )


def test_a_single_window_stands_in_the_middle_of_its_shot() -> None:
    assert window_starts_ms(0, 299, 49, 24.0, 1) == [int((299 * FRAME_MS - 2000) / 2)]


def test_a_shot_takes_the_longest_shape_that_fits_and_a_short_one_none() -> None:
    shots = label(
        ("00:00:00;00", "00:00:03;00"),
        ("00:00:03;01", "00:00:04;10"),
        ("00:00:04;11", "00:00:04;20"),
    )
    stretches, _ = video_stretches(shots, 5.0, [LONG, SHORT], 24.0, 1, whole_clip=False)
    assert [(each.number, each.bucket) for each in stretches] == [(0, LONG), (1, SHORT)]


def test_the_bucket_is_that_of_the_nearest_aspect_ratio() -> None:
    wide, tall, square = Bucket(1280, 704, 49), Bucket(704, 1280, 49), Bucket(960, 960, 49)
    buckets = [tall, SHORT, square, wide]
    assert nearest_aspect(853, 480, buckets) == [wide, SHORT]
    assert nearest_aspect(360, 640, buckets) == [tall]
    assert nearest_aspect(500, 480, buckets) == [square]
